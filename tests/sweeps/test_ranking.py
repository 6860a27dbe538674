"""Runs are ranked by a number that means the same in all of them, or not at all."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from litdiffusion.errors import UserError
from litdiffusion.sweeps.jobs import Job
from litdiffusion.sweeps.ranking import goals, ranking, require_comparable

AVAILABLE = ("val_loss", "val_bits_per_dim", "val_x0_mae", "train_loss", "wall_seconds")


def config(goal: Any = None, **changes: object) -> DictConfig:
    names = {"loss": "HeldOutLoss", "bits_per_dim": "BitsPerDim", "x0_mae": "X0MeanAbsoluteError"}
    metrics = {name: {"_target_": f"litdiffusion.evaluation.{kind}"} for name, kind in names.items()}
    return OmegaConf.create({"run_dir": "x", "optimized_metric": goal, "metrics": metrics, **changes})


def swept(key: str, *values: str, settings: list[dict[str, Any]] | None = None) -> list[Job]:
    """Jobs of a training sweep over ``key``, each with its ``settings``: by default what was typed."""
    return [
        Job(n, (), Path(), Path(), (), varied={key: value}, config=settings[n] if settings else {key: value})
        for n, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("key", "values", "by"),
    [
        ("optimizer.lr", ["1", "2"], "val_loss"),
        ("net", ["unet", "dit"], "val_loss"),
        ("data.flip", ["true", "false"], "val_loss"),
        ("loss", ["l1", "huber"], "val_bits_per_dim"),
        ("weighting.gamma", ["1", "5"], "val_bits_per_dim"),
        ("objective", ["default", "mine"], "val_bits_per_dim"),
        ("noise_levels", ["uniform", "importance"], "val_bits_per_dim"),
        ("schedule", ["linear", "cosine"], "val_bits_per_dim"),
        ("target", ["v", "x0"], "val_bits_per_dim"),
        ("net.learned_variance", ["true", "false"], "val_bits_per_dim"),
        ("data", ["digits", "hub"], None),
        ("datamodule.num_val", ["8", "16"], None),
    ],
)
def test_the_first_metric_that_compares_all_runs_ranks_them(
    key: str, values: list[str], by: str | None
) -> None:
    metric, line = ranking(config(), swept(key, *values), AVAILABLE)
    assert metric == by
    assert line.startswith("Not sorted" if by is None else f"Sorted by {by}, the best first")
    assert (f"val_loss does not compare runs that differ in {key}" in line) == (by != "val_loss")


def test_the_estimate_of_the_image_compares_losses_but_not_schedules() -> None:
    without_bound = ("val_loss", "val_x0_mae")
    assert ranking(config(), swept("loss", "l1", "l2"), without_bound)[0] == "val_x0_mae"
    assert ranking(config(), swept("schedule", "linear", "cosine"), without_bound)[0] is None


def test_what_a_preset_has_changed_counts_as_well() -> None:
    """``experiment=a,b`` may change anything; the configurations of the jobs say what."""
    losses = [
        {"loss": {"_target_": kind}, "objective": {"loss": {"_target_": kind}}} for kind in ("l1", "l2")
    ]
    metric, line = ranking(config(), swept("experiment", "a", "b", settings=losses), AVAILABLE)
    assert metric == "val_bits_per_dim"
    assert "val_loss does not compare runs that differ in loss" in line
    assert ranking(config(), swept("experiment", "a", "b", settings=[{}, {}]), AVAILABLE)[0] == "val_loss"
    counts = [{"metrics": {"bits_per_dim": {"num_images": number}}} for number in (8, 16)]
    jobs = swept("experiment", "a", "b", settings=counts)
    assert ranking(config("val_bits_per_dim"), jobs, AVAILABLE)[0] is None


def test_checkpoints_compare_by_what_does_not_depend_on_their_objective(tmp_path: Path) -> None:
    """As far as ``evaluate`` has found them trained on the same data."""
    jobs = []
    for n, data in enumerate(("digits", "digits", "fashion")):
        (tmp_path / f"{n}.json").write_text(f'{{"data": "{data}", "ckpt": "{n}"}}')
        jobs.append(Job(n, (), tmp_path, tmp_path / f"{n}.json", (), varied={"ckpt": str(n)}))
    assert ranking(config(), jobs[:2], AVAILABLE)[0] == "val_bits_per_dim"
    assert ranking(config(), jobs, AVAILABLE)[0] is None


@pytest.mark.parametrize("searched", [False, True])
def test_a_goal_that_does_not_compare_the_runs_is_refused(searched: bool) -> None:
    jobs = swept("loss", "l1", "l2")
    for goal in ("val_loss", "train_loss", ["wall_seconds", "val_loss"]):
        with pytest.raises(
            UserError, match="not comparable between runs that differ in loss; use val_bits_per_dim"
        ):
            require_comparable(config(goal), jobs, searched)
    for goal in ("val_bits_per_dim", "val_x0_mae", "wall_seconds"):
        require_comparable(config(goal), jobs, searched)


def test_a_search_is_refused_before_its_second_trial() -> None:
    with pytest.raises(UserError, match=r"optimized_metric=val_loss: .* differ in loss"):
        require_comparable(config("val_loss"), swept("loss", "l1"), searched=True)
    with pytest.raises(UserError, match=r"optimized_metric=null: a search .*; use val_loss"):
        require_comparable(config(), swept("optimizer.lr", "1"), searched=True)


@pytest.mark.parametrize("goal", ["val_los", "loss", "nonsense", 3, ["val_loss", "fid"]])
def test_a_goal_is_a_number_of_the_summary(goal: Any) -> None:
    with pytest.raises(UserError, match=r"optimized_metric=\w+: no number of summary.json"):
        goals(config(goal))


def test_of_other_commands_the_results_decide_what_is_a_number() -> None:
    assert goals(OmegaConf.create({"out": "x", "optimized_metric": "val/loss"})) == ["val/loss"]
    assert ranking(OmegaConf.create({"out": "x"}), [], ()) == (None, "")
