import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import nn

from litdiffusion.data.datamodule import Batch
from litdiffusion.diffusion import (
    L2,
    Denoising,
    Draws,
    Importance,
    NoiseLevels,
    Objective,
    ObjectiveOutput,
    Uniform,
    UniformLevels,
    V,
    q_sample,
    schedules,
)
from litdiffusion.errors import UserError
from litdiffusion.evaluation import HeldOutLoss
from litdiffusion.nn import UNet
from litdiffusion.training.ema import EMA
from litdiffusion.training.lr import constant, warmup_cosine
from litdiffusion.training.module import LitDiffusion
from small_worlds import Affine, Spy, affine_denoiser, images, randomized

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's own use of torch
]


def objective(levels: NoiseLevels | None = None, **kwargs: Any) -> Denoising:
    return Denoising(L2(), Uniform(), levels or UniformLevels(stratified=True), **kwargs)


def module(
    net: nn.Module | None = None, ema: EMA | None = None, seed: int = 0, **kwargs: Any
) -> LitDiffusion:
    settings = {
        "objective": objective(),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "lr_scheduler": constant,
        "metrics": {"loss": HeldOutLoss(), "bits_per_dim": None},
    }
    denoiser = affine_denoiser(schedules.cosine(50), V(), net=net)
    return LitDiffusion(denoiser, **(settings | kwargs), ema=ema, seed=seed)


def trainer(devices: int = 1, **kwargs: Any) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    strategy = "ddp" if devices > 1 else "auto"
    quiet = settings | {"enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(devices=devices, strategy=strategy, **(quiet | kwargs))


class Loader:
    """Lightning takes a list for a list of loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def fit(lit: LitDiffusion, batches: int, **kwargs: Any) -> None:
    stream = [Batch(images(4, seed=step), None, 0, step) for step in range(batches)]
    trainer(max_epochs=1, **kwargs).fit(lit, Loader(stream))


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


# ---------------------------------------------------------------------------------------------- the draws


class Remember(Objective):
    """An objective that keeps its draws."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draws] = []

    def forward(self, denoiser, batch, draws):
        self.draws.append(draws)
        return ObjectiveOutput(denoiser.core.net.gain * torch.ones(len(batch.images)))


def drawn(seed: int, devices: int, first: int, size: int, step: int) -> Draws:
    lit = module(objective=Remember(), seed=seed)
    lit.trainer = trainer(devices=devices)
    lit.training_step(Batch(images(size), None, first, step), 0)
    return lit.objective.draws[0]


def test_two_processes_draw_what_one_draws():
    whole = drawn(0, 1, 0, 24, 7)
    halves = [drawn(0, 2, first, 12, 7) for first in (0, 12)]
    for draw in (lambda d: d.uniform("t"), lambda d: d.stratified("t"), lambda d: d.normal("eps", (1, 4, 4))):
        assert torch.equal(torch.cat([draw(half) for half in halves]), draw(whole))
    assert {d.shared_uniform("coin") for d in (whole, *halves)} == {whole.shared_uniform("coin")}


def test_draws_depend_on_seed_and_step_and_nothing_else():
    eps = drawn(0, 1, 0, 4, 3).normal("eps", (2,))
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(drawn(0, 1, 0, 4, 3).normal("eps", (2,)), eps)
    for other in (drawn(1, 1, 0, 4, 3), drawn(0, 1, 0, 4, 4)):
        assert not torch.equal(other.normal("eps", (2,)), eps)


def test_an_objective_of_another_kind_trains_with_the_same_module():
    """One with two times, and something of its own to log: a class, and not a line elsewhere."""

    class TwoTimes(Objective):
        def forward(self, denoiser, batch, draws):
            t = denoiser.schedule.trained_time(draws.uniform("t").double())
            s = t * draws.uniform("s")
            eps = draws.normal("eps", tuple(batch.images.shape[1:]))
            x_t, x_s = (
                q_sample(denoiser.schedule, batch.images, time, eps) for time in (t, s.clamp(min=0.02))
            )
            errors = denoiser(x_t, t).x0 - denoiser(x_s, s.clamp(min=0.02)).x0.detach()
            losses = errors.square().flatten(1).mean(1)
            return ObjectiveOutput(losses, logs={"train/distance": (t - s).mean()})

    lit = module(objective=TwoTimes())
    before = weights(lit.denoiser)
    fit(lit, 3)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(lit.denoiser), strict=True))


def test_parameters_of_an_objective_are_trained_too():
    class Uncertain(Objective):
        """A learned weight beside the network, as EDM2's."""

        def __init__(self):
            super().__init__()
            self.u = nn.Parameter(torch.zeros(()))

        def forward(self, denoiser, batch, draws):
            output = objective()(denoiser, batch, draws)
            return output._replace(losses=output.losses * (-self.u).exp() + self.u)

    lit = module(objective=Uncertain())
    fit(lit, 3)
    assert float(lit.objective.u.detach()) != 0


# ---------------------------------------------------------------------------------------------- labels


class Labelled(Affine):
    """An ``Affine`` whose output is moved by the label."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[torch.Tensor] = []

    def forward(self, x, c_noise, self_cond=None, labels=None):
        self.heard.append(labels)
        return super().forward(x, c_noise) + 0.1 * labels[:, None, None, None]


def told(lit: LitDiffusion, batch: Batch) -> torch.Tensor:
    lit.training_step(batch, 0)
    return lit.denoiser.core.net.heard[-1]


def test_a_share_of_the_labels_is_withheld_the_same_on_any_number_of_processes():
    whole, halves = (module(Labelled(), objective=objective(label_dropout=0.25)) for _ in range(2))
    whole.trainer, halves.trainer = trainer(), trainer(devices=2)
    labels = torch.arange(400) % 3
    batch = Batch(images(400), labels, 0, 7)
    all_told = told(whole, batch)
    withheld = all_told == 3
    assert 0.15 * 400 < int(withheld.sum()) < 0.35 * 400
    assert torch.equal(all_told[~withheld], labels[~withheld])
    assert torch.equal(told(halves, Batch(batch.images[200:], labels[200:], 200, 7)), all_told[200:])
    assert not torch.equal(told(whole, batch._replace(step=8)), all_told)


def test_training_and_validation_tell_the_network_its_labels():
    net = Labelled()
    lit = module(net, objective=objective(label_dropout=0.0))
    lit.trainer = trainer()
    batch = Batch(images(6), torch.tensor([0, 1, 2, 0, 1, 2]), 0, 0)
    lit.training_step(batch, 0)
    lit.eval()
    lit.objective.label_dropout = 1.0  # of training alone
    lit.validation_step(batch, 0)
    assert [labels.tolist() for labels in net.heard] == [[0, 1, 2, 0, 1, 2]] * len(net.heard)


@pytest.mark.parametrize("label_dropout", [-0.1, 1.1])
def test_label_dropout_is_a_share(label_dropout):
    with pytest.raises(ValueError, match="label_dropout"):
        objective(label_dropout=label_dropout)


# ---------------------------------------------------------------------------------------------- the steps


def test_importance_sampled_times_learn_from_the_losses_and_leave_the_mean_loss_alone():
    levels = Importance(50, history=1)
    lit = module(objective=objective(levels))
    lit.trainer = trainer()
    schedule, before = lit.denoiser.schedule, torch.linspace(0.1, 2, 50, dtype=torch.float64)
    levels.observe(schedule, torch.arange(1, 51) / 50, before)
    loss, output = lit.training_step(Batch(images(64), None, 0, 0), 0).values()
    p = 0.999 * before / before.sum() + 0.001 / 50
    step = (output.t * 50).round().long() - 1
    torch.testing.assert_close(loss.double(), (output.losses / (50 * p[step])).mean())
    last = {int(i): float(each) for i, each in zip(step, output.losses.detach(), strict=True)}
    for i in range(50):  # what was seen is remembered, what was not is what it was
        assert float(levels.losses[i, 0]) == pytest.approx(last.get(i, float(before[i])))
    assert "objective.noise_levels.losses" in lit.state_dict()


def test_importance_needs_no_more_parts_than_there_are_times():
    with pytest.raises(ValueError, match=r"noise_levels.bins=51.*50 steps"):
        module(objective=objective(Importance(51)))


def test_a_training_step_is_the_objective_on_the_draws():
    lit = module()
    lit.trainer = trainer()
    batch = Batch(images(6), None, 0, 2)
    loss, output = lit.training_step(batch, 0).values()
    draws = Draws.at(0, "train", 2, start=0, stop=6, batch_size=6)
    t = ((draws.stratified("t") * 50).floor() + 1) / 50
    losses = lit.objective.losses(lit.denoiser, batch.images, t, draws.normal("eps", (1, 4, 4)))
    assert torch.equal(output.t, t)
    torch.testing.assert_close(output.losses, losses)
    torch.testing.assert_close(loss, losses.mean())
    assert loss.requires_grad


def test_dropout_is_drawn_from_the_step_too():
    def lit() -> LitDiffusion:
        torch.manual_seed(0)
        return module(randomized(UNet(8, 1, (1,), heads=2, head_dim=4, dropout=0.5)))

    first, second = lit(), lit()
    first.trainer = second.trainer = trainer()
    batch = Batch(images(2), None, 0, 4)
    loss = first.training_step(batch, 0)["loss"]
    torch.manual_seed(1234)
    assert torch.equal(second.training_step(batch, 0)["loss"], loss)
    assert not torch.equal(first.training_step(batch._replace(step=5), 0)["loss"], loss)


def test_a_self_conditioned_network_is_fed_back_in_half_of_the_steps():
    net = Spy()
    steps = 120
    fit(module(net), steps)
    fed = [call for call in net.calls if call.self_cond is not None]
    alone = [call for call in net.calls if call.grad_enabled and call.self_cond is None]
    estimates = [call for call in net.calls if not call.grad_enabled]
    assert len(fed) + len(alone) == steps
    assert len(estimates) == len(fed)
    assert 0.4 * steps < len(fed) < 0.6 * steps
    assert all(call.grad_enabled for call in fed)
    assert float(net.feedback_gain.detach()) != 0.25  # and it learns from it


def test_feeding_back_is_decided_for_the_whole_batch_alike():
    """Or ranks would call their networks a different number of times."""

    def calls(first: int, step: int) -> int:
        net = Spy()
        lit = module(net)
        lit.trainer = trainer(devices=2)
        lit.training_step(Batch(images(4), None, first, step), 0)
        return len(net.calls)

    decisions = [calls(0, step) for step in range(12)]
    assert [calls(16, step) for step in range(12)] == decisions
    assert set(decisions) == {1, 2}


class Weights(Callback):
    """Keeps the weights and their average after every batch."""

    def __init__(self) -> None:
        self.raw: list[list[torch.Tensor]] = []
        self.averaged: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, _: Trainer, lit: LitDiffusion, *args: Any) -> None:
        self.raw.append(weights(lit.denoiser.core.net))
        self.averaged.append(weights(lit.ema_net))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_follows_every_optimizer_step(accumulate):
    lit, kept = module(ema=EMA(0.5)), Weights()
    average = weights(lit.ema_net)
    fit(lit, 12 * accumulate, callbacks=[kept], accumulate_grad_batches=accumulate)
    assert lit.trainer.global_step == 12
    after_steps = slice(accumulate - 1, None, accumulate)
    for n, (raw, averaged) in enumerate(
        zip(kept.raw[after_steps], kept.averaged[after_steps], strict=True), start=1
    ):
        d = min(0.5, (1 + n) / (10 + n))
        average = [d * a + (1 - d) * p for a, p in zip(average, raw, strict=True)]
        torch.testing.assert_close(averaged, average)
    assert n == 12


def test_only_the_network_is_trained():
    lit = module(ema=EMA(0.9))
    fit(lit, 1)
    optimizer = lit.trainer.optimizers[0]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in lit.denoiser.core.net.parameters()}
    assert all(p.grad is None for p in lit.ema_net.parameters())


def test_one_samples_from_the_average_where_there_is_one():
    lit = module(ema=EMA(0.9))
    fit(lit, 3)
    best = lit.ema_denoiser
    assert best.core.net is lit.ema_net
    assert best.schedule is lit.denoiser.schedule
    assert best.clip == lit.denoiser.clip
    assert not torch.equal(best.core.net.gain, lit.denoiser.core.net.gain)
    plain = module()
    assert plain.ema_denoiser is plain.denoiser
    assert plain.ema_net is None


def test_the_scheduler_steps_with_the_optimizer():
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, tr: Trainer, *args: Any) -> None:
            rates.append(tr.optimizers[0].param_groups[0]["lr"])

    fit(module(lr_scheduler=partial(constant, warmup_steps=3)), 5, callbacks=[Rates()])
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


# ---------------------------------------------------------------------------------------------- resumption


def saved(lit: LitDiffusion, step: int) -> dict[str, Any]:
    """What a checkpoint at a step holds of the optimizer."""
    configured = lit.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    return {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [scheduler.state_dict()]}


def adam(lr: float, schedule: Any) -> LitDiffusion:
    return module(optimizer=partial(torch.optim.Adam, lr=lr), lr_scheduler=schedule)


COSINE = partial(warmup_cosine, total_steps=100)


@pytest.mark.parametrize(
    "schedule",
    [
        COSINE,
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=100),
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=100),  # moves the momentum, too
    ],
    ids=["cosine", "torch's cosine", "one cycle"],
)
def test_without_a_change_a_resumed_optimizer_is_the_same_bit_for_bit(schedule, caplog):
    for step in range(1, 100, 7):
        before, checkpoint = saved(adam(0.003, schedule), step), saved(adam(0.003, schedule), step)
        adam(0.003, schedule).on_load_checkpoint(checkpoint)
        assert checkpoint == before
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("old", "new", "rate"), [(0.0, 0.0, 0.0), (0.0, 0.4, 0.2), (0.2, 0.4, 0.2), (0.2, 0.0, 0.0)]
)
def test_a_rate_of_zero_can_be_left_and_come_to(old, new, rate, caplog):
    checkpoint = saved(adam(old, COSINE), 50)  # where the cosine is at a half
    adam(new, COSINE).on_load_checkpoint(checkpoint)
    [group] = checkpoint["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["initial_lr"]) == (pytest.approx(rate), new)
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [new]
    assert caplog.text == ""


def test_a_finished_cosine_that_is_made_longer_says_that_the_rate_jumps(caplog):
    checkpoint = saved(adam(0.2, COSINE), 100)
    adam(0.2, partial(COSINE, total_steps=200)).on_load_checkpoint(checkpoint)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.1)
    assert "the learning rate goes from 0 to 0.1 at step 100" in caplog.text


def test_a_schedule_of_torch_goes_on_with_its_new_settings():
    """Its place stays, also where the checkpoint is of another schedule."""
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR
    for schedule in (partial(annealing, T_max=100), constant):
        checkpoint = saved(adam(0.2, schedule), 20)
        lit = adam(0.2, partial(annealing, T_max=400, eta_min=0.01))
        lit.on_load_checkpoint(checkpoint)
        state = checkpoint["lr_schedulers"][0]
        assert (state["T_max"], state["eta_min"], state["last_epoch"]) == (400, 0.01, 20)
        scheduler = lit.configure_optimizers()["lr_scheduler"]["scheduler"]
        scheduler.load_state_dict(state)
        assert scheduler.state_dict() == state
    checkpoint = saved(adam(0.2, partial(annealing, T_max=100)), 20)
    lit = adam(0.2, constant)
    lit.on_load_checkpoint(checkpoint)
    lit.configure_optimizers()["lr_scheduler"]["scheduler"].load_state_dict(checkpoint["lr_schedulers"][0])


@pytest.mark.parametrize(
    ("optimizer", "schedule", "line"),
    [
        ({"lr": -1.0}, constant, "optimizer: Invalid learning rate: -1.0"),
        ({"betas": (1, 2)}, constant, "optimizer: Invalid beta parameter at index 0: 1"),
        ({"fused": True, "foreach": True}, constant, "optimizer: `fused` and `foreach` cannot be `True`"),
        ({"lr": float("inf")}, constant, "optimizer.lr=inf: must be a finite number"),
        ({}, partial(constant, warmup_steps=-1), "lr_scheduler: warmup_steps=-1: must be at least 0"),
        ({}, partial(torch.optim.lr_scheduler.LinearLR, start_factor=2.0), "lr_scheduler: Starting multip"),
    ],
    ids=range(6),
)
def test_what_torch_refuses_is_one_line(optimizer, schedule, line):
    lit = module(optimizer=partial(torch.optim.Adam, **optimizer), lr_scheduler=schedule)
    with pytest.raises(UserError, match=re.escape(line)):
        lit.configure_optimizers()


# ---------------------------------------------------------------------------------------------- validation


def validation_losses(lit: LitDiffusion, *cuts: int) -> dict[str, float]:
    """Losses over 20 images, cut into batches at ``cuts``."""
    edges, held_out = [0, *cuts, 20], images(20, seed=3)
    shares = [
        Batch(held_out[start:stop], None, start, index) for index, (start, stop) in enumerate(pairwise(edges))
    ]
    running = trainer()
    running.validate(lit, Loader(shares), verbose=False)
    return {name: float(value) for name, value in running.callback_metrics.items()}


def test_validation_loss_does_not_depend_on_the_batches_nor_on_the_seed():
    torch.manual_seed(0)
    net = randomized(Affine())
    whole = validation_losses(module(net))
    assert whole.keys() == {"val/loss", *(f"val/loss_t{i:02d}" for i in range(10))}
    for cuts in ((10,), (7, 19), tuple(range(1, 20))):
        assert validation_losses(module(net, seed=4), *cuts) == pytest.approx(whole, rel=1e-6)


def test_validation_judges_the_average_and_the_raw_weights():
    lit = module(ema=EMA(0.9))
    fit(lit, 3)
    both = validation_losses(lit)
    assert both.keys() - {f"val/loss_t{i:02d}" for i in range(10)} == {"val/loss", "val/loss_raw"}
    assert both["val/loss"] == pytest.approx(validation_losses(module(lit.ema_net))["val/loss"])
    assert both["val/loss_raw"] == pytest.approx(validation_losses(module(lit.denoiser.core.net))["val/loss"])
    assert both["val/loss"] != both["val/loss_raw"]


def test_validation_feeds_a_self_conditioned_network_back_as_sampling_does():
    net = Spy()
    validation_losses(module(net), 10)
    assert [call.self_cond is None for call in net.calls] == [True, False] * 2
