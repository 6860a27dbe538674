"""What the GPU kit has found, as a Markdown page."""

from typing import Any

TITLES = {
    "ours": "litdiffusion",
    "ddpm_pytorch": "denoising-diffusion-pytorch",
    "diffusers": "diffusers UNet2DModel",
}


def page(results: dict[str, Any]) -> str:
    machine, parts = results["machine"], results["parts"]
    card = f"{machine['card']}, {machine['memory_gib']} GiB" if machine["card"] else "no GPU"
    lines = [
        f"# {'A dry run of the GPU kit, on the CPU' if results['dry_run'] else 'GPU kit'}",
        "",
        f"{card}; torch {machine['torch']}, CUDA {machine['cuda']}, Python {machine['python']};"
        f" commit {results['commit'] or 'unknown'}; {results['date']}.",
        "",
        "| part | | seconds | |",
        "|---|---|---:|---|",
        *(
            f"| {name} | **{part['state']}** | {part['seconds']:.0f} | {cell(part['summary'])} |"
            for name, part in parts.items()
        ),
    ]
    for name, chapter in (("tests", tests), ("speed", speed), ("quality", quality)):
        if details := parts.get(name, {}).get("details"):
            lines += ["", f"## {name.capitalize()}", "", *chapter(details)]
    return "\n".join(lines) + "\n"


def tests(details: dict[str, Any]) -> list[str]:
    by_outcome: dict[str, list[str]] = {}
    for name, outcome in details["outcomes"].items():
        by_outcome.setdefault(outcome, []).append(name.removeprefix("tests/gpu/"))
    lines = [f"- {line}" for line in details["reasons"]]
    for outcome, names in sorted(by_outcome.items()):
        lines += ["", f"{outcome} ({len(names)}):", "", *(f"- `{name}`" for name in sorted(names))]
    return lines


def speed(details: dict[str, Any]) -> list[str]:
    peak = details["matmul_tflops"]
    found = f"{peak:,.1f} TFLOP/s" if peak else "not measured"
    lines = [
        f"bf16-mixed; medians over the turns. A bfloat16 matrix product in the same run: {found}.",
        "",
        "| | parameters | training, images/s | TFLOP/s (of the product) | memory, GiB | GPU idle"
        " | sampling step, images/s | TFLOP/s (of the product) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for each in details["measurements"]:
        if not each["turns"]:
            lines.append(f"| {title(each)} | {cell(each['fault'] or 'no turn yet')} | | | | | | |")
            continue
        profile = each.get("profile")
        cells = [
            title(each),
            f"{each['parameters'] / 1e6:.1f}M",
            f"{each['train_images_per_second']:,.0f}",
            rate(each, "train"),
            "" if each["train_peak_gib"] is None else f"{each['train_peak_gib']:.1f}",
            f"{profile['idle_share']:.0%}" if profile else "",
            f"{each['sample_images_per_second']:,.0f}",
            rate(each, "sample"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for each in details["measurements"]:
        if profile := each.get("profile"):
            lines += [
                "",
                f"**{title(each)}**: {profile['kernels']} kernels in a training step of"
                f" {profile['step_ms']:.1f} ms, busy for {profile['busy_ms']:.1f} ms. The longest:",
                "",
                "| kernel | ms | share |",
                "|---|---:|---:|",
                *(
                    f"| `{cell(kernel['name'])[:100]}` | {kernel['ms']:.2f} | {kernel['share']:.0%} |"
                    for kernel in profile["longest"]
                ),
            ]
    return lines


def quality(details: dict[str, Any]) -> list[str]:
    summary = details["summary"]
    losses = ", ".join(f"{loss:.4f}" for loss in details["val_losses"])
    return [
        f"`experiment=fashion_mnist`, {summary['steps']:,} steps, {summary['images_seen']:,} images,"
        f" {summary['wall_seconds']:.0f} s from start to summary, {summary['images_per_second']:,.0f} images/s"
        f" in training. Validation loss: {losses}; bits per dimension: {summary['val_bits_per_dim']:.3f}.",
        "",
        *(f"![{name}]({name})" for name in details["pictures"]),
    ]


def title(measurement: dict[str, Any]) -> str:
    """Name a measurement: who, which network, which batch."""
    how = "compiled" if measurement["compiled"] else "eager"
    network = {"cifar10": "35.7M", "blog": "blog's network"}.get(
        measurement["network"], measurement["network"]
    )
    return f"{TITLES[measurement['contender']]}, {how}, {network}, batch {measurement['batch_size']:,}"


def rate(measurement: dict[str, Any], what: str) -> str:
    share = measurement[f"{what}_of_peak"]
    return f"{measurement[f'{what}_tflops']:,.1f}" + (f" ({share:.0%})" if share is not None else "")


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
