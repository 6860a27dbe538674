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
        "| part | came to | seconds | in short |",
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
    found = (
        f"{peak:,.1f} TFLOP/s" if peak else f"not measured ({cell(details['matmul_fault'] or 'no turn yet')})"
    )
    lines = [
        "Images per second in bf16-mixed, medians over the turns; a sampling step is one evaluation of the network."
        f" A bfloat16 matrix product in the same run reached {found}: the shares are of that.",
        "",
        "| contender | parameters | turns | training, images/s | TFLOP/s | share | peak memory, GiB | GPU idle"
        " | sampling step, images/s | TFLOP/s | share | peak memory, GiB |",
        "|---|" + "---:|" * 11,
    ]
    for each in details["measurements"]:
        if not each["turns"]:
            lines.append(f"| {title(each)} | {cell(each['fault'] or 'no turn yet')} |" + " |" * 10)
            continue
        idle = (each.get("profile") or {}).get("idle_share")
        cells = [
            title(each),
            f"{each['parameters'] / 1e6:.1f}M",
            str(len(each["turns"])),
            *rates(each, "train"),
            "" if idle is None else f"{idle:.0%}",
            *rates(each, "sample"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if each["fault"]:
            lines.append(f"| … then | {cell(each['fault'])} |" + " |" * 10)
    for each in details["measurements"]:
        if profile := each.get("profile"):
            busy = "an unknown time" if profile["busy_ms"] is None else f"{profile['busy_ms']:.1f} ms"
            what = "kernels" if each["device"] == "cuda" else "CPU operators"
            lines += [
                "",
                f"**{title(each)}**: {profile['kernels']} {what} in a training step of"
                f" {profile['step_ms']:.1f} ms, busy for {busy}. The longest:",
                "",
                f"| {what} | ms | share |",
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
    network = {"cifar10": "CIFAR-10 network", "blog": "blog's network"}.get(
        measurement["network"], measurement["network"]
    )
    return f"{TITLES[measurement['contender']]}, {how}, {network}, batch {measurement['batch_size']:,}"


def rates(measurement: dict[str, Any], what: str) -> list[str]:
    """Images per second, TFLOP/s, their share of the matrix product's, and the peak of memory."""
    share, memory = measurement[f"{what}_of_peak"], measurement[f"{what}_peak_gib"]
    return [
        f"{measurement[f'{what}_images_per_second']:,.0f}",
        f"{measurement[f'{what}_tflops']:,.1f}",
        "" if share is None else f"{share:.0%}",
        "" if memory is None else f"{memory:.1f}",
    ]


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
