"""No step of training or sampling makes the host wait for the GPU, or needs one that has float64.

The device ``meta`` stands in for it: it has no values that could be read. ``no_host_waits`` refuses what
``torch.cuda.set_sync_debug_mode("error")`` does, reads and blocking copies, and names the operation; and, as Apple's
GPUs do, float64. What may wait is at the end of this file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litdiffusion.data.datamodule import Batch, ImageDataModule
from litdiffusion.data.sources.digits import Digits
from litdiffusion.diffusion import (
    DDPM,
    L1,
    L2,
    P2,
    Clipped,
    Denoiser,
    Denoising,
    DPMSolverPP2M,
    Draws,
    Huber,
    Importance,
    Labelled,
    LogitNormal,
    Lognormal,
    MinSNR,
    NoiseLevels,
    Objective,
    Preconditioned,
    Sampler,
    SamplerOutput,
    Sigmoid,
    Uniform,
    UniformLevels,
    Variational,
    devices,
    schedules,
)
from litdiffusion.diffusion.editing import Edit, Inpaint, Interpolate, Slerp, Variation
from litdiffusion.diffusion.guidance import Guidance
from litdiffusion.diffusion.spacing import SPACINGS
from litdiffusion.evaluation import BitsPerDim, HeldOutLoss, Metric, Model, X0MeanAbsoluteError
from litdiffusion.nn import DiT, UNet
from litdiffusion.reporting.gif import Film
from litdiffusion.sampling import sample_images
from litdiffusion.training.callbacks import Monitor
from litdiffusion.training.ema import EMA
from litdiffusion.training.lr import constant
from litdiffusion.training.module import LitDiffusion
from small_worlds import SAMPLERS, TARGETS, every_pair, images

pytestmark = pytest.mark.usefixtures("one_thread")

aten = torch.ops.aten
READ = {
    aten._local_scalar_dense,  # item, float, bool, int
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.allclose,
    aten.bincount,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
"""What returns a number to the host, or has a size that depends on values."""
INDEX = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}
MADE_OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class WaitError(RuntimeError):
    """The host would wait for the device here."""


class Float64Error(RuntimeError):
    """The device has no float64."""


class Dispatched(TorchDispatchMode):
    """Refuses operations on the device that make the host wait, or numbers in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func is aten._to_copy.default:
            self.check_copy(func, args[0], kwargs.get("device"), kwargs.get("non_blocking"))
        elif func is aten.copy_.default:
            self.check_copy(func, args[1], args[0].device, kwargs.get("non_blocking") or True in args[2:])
        elif any(each.is_meta for each in tensors):
            if func.overloadpacket in READ:
                raise WaitError(f"{func} reads values off the device")
            if any(each.device.type == "cpu" and each.ndim > 0 for each in tensors):
                raise WaitError(f"{func} mixes devices")
            masks = [each for each in tensors if each.dtype in (torch.bool, torch.uint8)]
            if func.overloadpacket in INDEX and any(each is mask for each in args[1] for mask in masks):
                raise WaitError(f"{func} picks by a mask on the device")
        result = func(*args, **kwargs)
        if any(isinstance(x, Tensor) and x.is_meta and x.dtype == torch.float64 for x in tree_leaves(result)):
            raise Float64Error(f"{func} makes float64 on the device")
        return result

    def check_copy(self, func: Any, source: Tensor, target: torch.device | None, non_blocking: bool) -> None:
        ways = source.device.type, (target or source.device).type
        if ways == ("meta", "cpu") or (ways == ("cpu", "meta") and not non_blocking):
            raise WaitError(f"{func} copies from {ways[0]} to {ways[1]}")


class Called(TorchFunctionMode):
    """Refuses tensors that are made of Python's numbers on the device: no operation shows these on ``meta``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in MADE_OF_NUMBERS and result.is_meta and result is not args[0]:
            raise WaitError(f"{func.__name__} copies numbers to the device")
        return result


@contextmanager
def no_host_waits() -> Iterator[None]:
    with Called(), Dispatched():
        yield


@pytest.fixture(autouse=True)
def autocast_takes_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return original("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", autocast)


@pytest.fixture(autouse=True)
def no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", {"meta"})


# ---------------------------------------------------------------------------------------------- the instrument


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


ROWS = torch.tensor([0, 2])
WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if (x > 0).any() else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "copy to the host": lambda x: torch.empty(4, 3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "mask assigned": lambda x: x.__setitem__(x > 0, x[0, 0]),
    "rows": lambda x: x[ROWS],
    "rows assigned": lambda x: x.__setitem__(ROWS, 1.0),
    "rows of the host": lambda x: torch.rand(4)[x[:, 0].long()],
    "to": lambda x: ROWS.to("meta"),
    "to its like": lambda x: ROWS.to(x),
    "copy": lambda x: x[0].copy_(torch.ones(3)),
    "assigned": lambda x: x.__setitem__(0, torch.ones(3)),
    "tensor": lambda x: torch.tensor([1.0], device="meta"),
    "as_tensor": lambda x: torch.as_tensor(1.0, device="meta"),
    "new_tensor": lambda x: x.new_tensor([1.0]),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "non_blocking": lambda x: ROWS.to("meta", non_blocking=True),
    "non_blocking copy": lambda x: x[0].copy_(torch.ones(3), non_blocking=True),
    "made there": lambda x: torch.arange(3, device="meta") + torch.full((3,), 2, device="meta"),
    "a number": lambda x: torch.where(x > 0, x, 2.0) * 3.0,
    "a scalar of the host": lambda x: x * torch.tensor(2.0),
    "rows of the device": lambda x: x[torch.arange(2, device="meta")],
    "as_tensor of itself": lambda x: torch.as_tensor(x),
    "on the host": lambda x: float(torch.rand(3)[ROWS].sum()),
}


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_a_wait_is_found(wait):
    x = on_device(4, 3)
    with pytest.raises(WaitError), no_host_waits():
        wait(x)


def test_float64_is_found():
    x = on_device(4, 3)
    for make in (torch.Tensor.double, lambda x: torch.zeros(3, dtype=torch.float64, device="meta")):
        with pytest.raises(Float64Error), no_host_waits():
            make(x)


@pytest.mark.parametrize("free", FREE.values(), ids=FREE)
def test_what_does_not_wait_is_let_be(free):
    x = on_device(4, 3)
    with no_host_waits():
        free(x)


# ---------------------------------------------------------------------------------------------- training

SCHEDULES = {
    "linear": schedules.linear(20),
    "cosine": schedules.cosine(20),
    "zero_snr": schedules.cosine(20, zero_terminal_snr=True),
    "flow": schedules.Flow(num_steps=20),
    "ve": schedules.VE(num_steps=20),
    "vp_cosine": schedules.VPCosine(num_steps=20),
    "vp_linear": schedules.VPLinear(num_steps=20),
}
NETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "self_condition": {"self_condition": True},
    "classes": {"num_classes": 3},
    "learned_variance": {"learned_variance": True},
    "all": {"self_condition": True, "num_classes": 3, "learned_variance": True, "dropout": 0.1},
}


class Small(nn.Module):
    """A network that can do everything, in a few operations."""

    self_condition, num_classes, learned_variance = True, 3, True

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.labels = nn.Embedding(4, 1)

    def forward(self, x: Tensor, c_noise: Tensor, self_cond: Tensor | None, labels: Tensor) -> Tensor:
        both = torch.cat((x, torch.zeros_like(x) if self_cond is None else self_cond), dim=1)
        return self.conv(both) + (self.labels(labels)[:, :, None, None] + c_noise[:, None, None, None])


def on_the_gpu(net: nn.Module, schedule: str = "linear", target: str = "v", clip: str = "static") -> Denoiser:
    """A denoiser of 8x8 images."""
    return Clipped(Preconditioned(net, SCHEDULES[schedule], TARGETS[target], 1, 8), clip).to("meta")


def unet(options: dict[str, Any]) -> UNet:
    return UNet(8, 1, (1,), heads=2, head_dim=4, **options)


def objective(levels: NoiseLevels | None = None, loss: Any = None, weighting: Any = None) -> Denoising:
    return Denoising(loss or L1(), weighting or Uniform(), levels or UniformLevels())


def train(denoiser: Denoiser, objective: Objective, steps: int) -> None:
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    lit = LitDiffusion(denoiser, objective, optimizer, constant, EMA(0.9), seed=1).to("meta").train()
    lit.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    adam = lit.configure_optimizers()["optimizer"]
    datamodule = ImageDataModule(Digits(8, 1, flip=True), batch_size=6, seed=0)
    monitor = Monitor()
    labels = on_device(6, dtype=torch.int64) if denoiser.num_classes else None
    for step in range(steps):
        batch = Batch(on_device(6, 1, 8, 8, dtype=torch.uint8), labels, 0, step)
        with no_host_waits():
            output = lit.training_step(datamodule.finish(batch, training=True), step)
            output["loss"].backward()
            nn.utils.clip_grad_norm_(lit.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            lit.ema.update(lit.ema_net, lit.denoiser.core.net, step + 1)
            monitor._add(output, 1, step + 1)


@pytest.mark.parametrize("options", NETS.values(), ids=NETS)
def test_no_training_step_waits(options, monkeypatch):
    evaluations = []
    original = Preconditioned.output
    monkeypatch.setattr(
        Preconditioned, "output", lambda *args, **kwargs: evaluations.append(1) or original(*args, **kwargs)
    )
    steps = 3
    train(on_the_gpu(unet(options)), objective(), steps)
    # With self-conditioning, some steps evaluate the network twice, and some do not.
    assert (steps < len(evaluations) < 2 * steps) == ("self_condition" in options)


def test_no_step_of_a_transformer_waits():
    net = DiT(1, 8, 1, 2, self_condition=True, num_classes=3, learned_variance=True, dropout=0.1)
    train(on_the_gpu(net), objective(), 2)


LEVELS = {
    "uniform": UniformLevels,
    "lognormal": Lognormal,
    "logit_normal": LogitNormal,
    "importance": lambda stratified: Importance(20, stratified=stratified),
}


@pytest.mark.parametrize(("schedule", "stratified"), [("zero_snr", False), ("ve", True)])
@pytest.mark.parametrize("make", LEVELS.values(), ids=LEVELS)
def test_no_noise_level_waits(make, schedule, stratified):
    """Importance learns from the losses on the device, and draws from what it has learned there."""
    train(on_the_gpu(Small(), schedule), objective(make(stratified=stratified)), 2)


def test_draws_are_made_on_the_device():
    draws = Draws((0, "test"), torch.arange(3, device="meta"), batch_size=6)
    with no_host_waits():
        made = [draws.uniform("u"), draws.stratified("s"), draws.normal("n", (1, 3, 3))]
        assert 0 <= draws.shared_uniform("coin") < 1  # the one that the host decides by never was there
    assert all(each.is_meta for each in made)


WEIGHTINGS = {
    "uniform": Uniform(),
    "min_snr": MinSNR(),
    "p2": P2(),
    "sigmoid": Sigmoid(),
    "variational": Variational(),
}


@pytest.mark.parametrize(
    ("target", "schedule", "weighting"), every_pair(TARGETS, SCHEDULES, list(WEIGHTINGS))
)
def test_no_objective_waits(target, schedule, weighting):
    if SCHEDULES[schedule].has_zero_terminal_snr and not TARGETS[target].defined_at_zero_snr:
        return
    levels = UniformLevels(stratified=True)
    train(on_the_gpu(Small(), schedule, target), objective(levels, Huber(), WEIGHTINGS[weighting]), 1)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_no_metric_waits(name):
    denoiser, batch = on_the_gpu(unet(NETS[name])), Batch(on_device(3, 1, 8, 8), None, 7, 0)
    metrics: list[Metric] = [HeldOutLoss(), BitsPerDim(9, 2), X0MeanAbsoluteError()]
    for metric in metrics:
        metric.to("meta")
        with no_host_waits():
            metric.update(Model(denoiser, objective(None, L2(), MinSNR()), denoiser), batch)


# ---------------------------------------------------------------------------------------------- sampling

ALL_SAMPLERS = {**SAMPLERS, "ddpm_learned": lambda num_steps: DDPM(num_steps, variance="learned")}
EDITS: dict[str, Edit] = {
    "inpaint": Inpaint(images(2, size=8), torch.rand(2, 8, 8) > 0.5, repeats=2),
    "inpaint_from_the_gpu": Inpaint(on_device(2, 1, 8, 8), on_device(8, 8), repeats=2),
    "variation": Variation(images(2, size=8)),
    "interpolate": Interpolate(images(1, size=8), images(1, size=8, seed=1), 3),
    "slerp": Slerp(images(1, size=8), images(1, size=8, seed=1), 3),
}


def draw(denoiser: Denoiser, sampler: Sampler, **how: Any) -> None:
    """The images come to the host after the last time of a batch, and nothing does before."""
    film, times = Film(range(100)), []

    def watch(start: int, output: SamplerOutput) -> None:
        film.watch(start, output)
        times.append(output.t)

    with pytest.raises(WaitError, match="copies from meta to cpu"), no_host_waits():
        sample_images(denoiser, sampler, 3, seed=0, watch=watch, **how)
    assert times == sampler.times(denoiser.schedule)[-len(times) :]
    assert len(times) > 1


@pytest.mark.parametrize("make", ALL_SAMPLERS.values(), ids=ALL_SAMPLERS)
@pytest.mark.parametrize("schedule", ["linear", "zero_snr", "ve"])
def test_no_sampler_waits(schedule, make):
    draw(on_the_gpu(Small(), schedule), make(5), guidance=Guidance(None))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", ["zero_snr", "ve"])
def test_no_spacing_waits(schedule, spacing):
    draw(on_the_gpu(Small(), schedule), DPMSolverPP2M(5, spacing), guidance=Guidance(None))


@pytest.mark.parametrize(
    ("scale", "interval", "clip"),
    [
        *((0.0, (0, 1), "static"), (1.0, (0, 1), "none"), (3.0, (0, 1), "dynamic")),
        *((3.0, (0.2, 0.6), "static"), (0.0, (0.2, 0.6), "dynamic")),
    ],
)
def test_guidance_and_clipping_do_not_wait(scale, interval, clip):
    denoiser = on_the_gpu(unet(NETS["all"]), clip=clip)
    draw(denoiser, DDPM(5), guidance=Guidance("all", scale, interval))


def test_autoguidance_does_not_wait():
    model, guide = (on_the_gpu(unet(NETS["all"])) for _ in range(2))
    draw(model, DDPM(5), guidance=Guidance("all", 2.0, guide=guide))


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize(
    "make", [ALL_SAMPLERS[name] for name in ("ddpm_learned", "dpmpp_2m", "heun_churn")], ids=lambda _: ""
)
def test_no_edit_waits(make, edit):
    draw(on_the_gpu(Small()), make(5), edit=edit, guidance=Guidance(scale=2.0, interval=(0.2, 0.8)))


# ---------------------------------------------------------------------------------------------- what waits


def test_times_and_labels_on_the_gpu_are_used_there():
    """As those of training and of the bound are; a request's labels are numbers, checked before anything is drawn."""
    x_t, t, labels = on_device(2, 1, 8, 8), on_device(2), on_device(2, dtype=torch.int64)
    denoiser = on_the_gpu(Small())
    with no_host_waits():
        Labelled(denoiser, labels)(x_t, t)
        for interval in ((0.0, 1.0), (0.2, 0.6)):
            Guidance([0, 1], 3.0, interval).around(denoiser, range(2))(x_t, t)


def test_a_requests_labels_on_the_gpu_are_read():
    denoiser, labels = on_the_gpu(Small()), on_device(3, dtype=torch.int64)
    with pytest.raises(WaitError, match=r"copies from meta to cpu|_local_scalar_dense"), no_host_waits():
        Guidance(labels).classes(denoiser)
