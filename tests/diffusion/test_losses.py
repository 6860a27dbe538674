import pytest
import torch
from torch import Tensor
from torch.nn import functional

from litdiffusion.data.stores import Batch
from litdiffusion.diffusion import (
    L1,
    L2,
    X0,
    Denoising,
    Epsilon,
    Huber,
    Importance,
    MinSNR,
    Uniform,
    UniformLevels,
    V,
    q_sample,
    schedules,
)
from litdiffusion.nn import UNet
from peers import blog
from small_worlds import TARGETS, Affine, Spy, affine_denoiser, draws, images, normal, times

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.linear(60)
T = times(1 / 60, 0.25, 0.5, 1)
DIFFERENCES = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.2, 1.0, 2.5])[:, None, None, None]


def objective(loss=None, weighting=None) -> Denoising:
    return Denoising(loss or L2(), weighting or Uniform(), UniformLevels())


def loss_of(loss, seed: int = 0) -> Tensor:
    target = normal(7, 1, 1, 1, seed=seed)
    return loss(target + DIFFERENCES, target)


def test_losses_are_their_formulas_elementwise():
    size = DIFFERENCES.abs()
    torch.testing.assert_close(loss_of(L1()), size)
    torch.testing.assert_close(loss_of(L2()), size.square())
    torch.testing.assert_close(loss_of(Huber()), torch.where(size < 1, size.square() / 2, size - 0.5))
    torch.testing.assert_close(
        loss_of(Huber(0.3)), torch.where(size < 0.3, size.square() / 2, 0.3 * (size - 0.15))
    )


def test_huber_at_delta_1_is_smooth_l1():
    output, target = 2 * normal(4, 1, 3, 3), normal(4, 1, 3, 3, seed=1)
    expected = functional.smooth_l1_loss(output, target, reduction="none")
    torch.testing.assert_close(Huber()(output, target), expected)


@pytest.mark.parametrize("delta", [0.0, -1.0])
def test_huber_needs_a_positive_delta(delta):
    with pytest.raises(ValueError, match="delta"):
        Huber(delta)


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_min_snr_needs_a_positive_gamma(gamma):
    with pytest.raises(ValueError, match="gamma"):
        MinSNR(gamma)


@pytest.mark.parametrize(("loss", "name"), [(L1(), "l1"), (L2(), "l2"), (Huber(), "huber")])
def test_the_objective_is_the_blogs_p_losses(loss, name):
    torch.manual_seed(0)
    net = UNet(8, 1, (1, 2), heads=2, head_dim=4)
    denoiser = affine_denoiser(schedules.linear(300, rescale=False), Epsilon(), "none", net)
    x0, eps, steps = images(6), normal(6, 1, 4, 4, seed=1), torch.tensor([1, 2, 100, 200, 299, 300])
    theirs = blog.Diffusion(blog.linear_betas(300)).p_losses(net, x0, steps - 1, eps, name)
    ours = objective(loss).losses(denoiser, x0, steps.double() / 300, eps).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("weighting", [Uniform(), MinSNR()], ids=lambda w: type(w).__name__)
def test_each_images_loss_is_the_mean_over_its_own_pixels(target, weighting):
    denoiser = affine_denoiser(SCHEDULE, target)
    x0, eps = images(4, channels=3), normal(4, 3, 4, 4, seed=1)
    losses = objective(weighting=weighting).losses(denoiser, x0, T, eps)
    assert losses.shape == (4,)
    for i in range(4):
        one = slice(i, i + 1)
        alpha, sigma = SCHEDULE.at(T[one])
        x_t = q_sample(SCHEDULE, x0[one], T[one], eps[one])
        c_in, c_noise = target.coefficients(alpha, sigma).c_in, target.c_noise(SCHEDULE, T[one]).float()
        output = denoiser.core.net((c_in * x_t).float(), c_noise)
        error = output - target.target(x0[one], eps[one], alpha, sigma)
        weight = weighting(SCHEDULE, T[one], target).float()
        torch.testing.assert_close(losses[i], (weight * error.square()).mean())
        alone = objective(weighting=weighting).losses(denoiser, x0[one], T[one], eps[one])
        torch.testing.assert_close(losses[i], alone[0])


def test_min_snr_is_the_papers_for_every_target():
    """Hang et al., 2303.09556, section 3.4: min(SNR, 5) / SNR for eps, min(SNR, 5) / (SNR + 1) for v."""
    snr = torch.tensor([1e4, 7.0, 5.0, 1.0, 0.5, 1e-4], dtype=torch.float64)
    schedule = schedules.Discrete(snr / (1 + snr))
    t = torch.arange(1, len(snr) + 1).double() / len(snr)
    least = snr.clamp(max=5)
    for target, expected in ((Epsilon(), least / snr), (X0(), least), (V(), least / (snr + 1))):
        torch.testing.assert_close(MinSNR()(schedule, t, target).flatten(), expected)
    torch.testing.assert_close(MinSNR(2.0).x0_weight(schedule, t), snr.clamp(max=2))
    # Clean times are held down and noisy ones left alone, in the space of eps: never the other way round.
    weights = MinSNR()(schedule, t, Epsilon()).flatten()
    torch.testing.assert_close(weights[2:], torch.ones(4, dtype=torch.float64))
    assert float(weights[0]) == pytest.approx(5e-4)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_min_snr_means_the_same_for_every_target(target):
    """One error of x_0 costs min(SNR, 5) times its square, whatever the network was asked for."""
    x0, eps = images(4), normal(4, 1, 4, 4, seed=1)
    alpha, sigma = SCHEDULE.at(T)
    wrong = x0 + 0.1

    class Wrong(Affine):
        def forward(self, x, c_noise, self_cond=None):
            x_t = x / target.coefficients(alpha, sigma).c_in
            return target.target(wrong, (x_t - alpha * wrong) / sigma, alpha, sigma)

    denoiser = affine_denoiser(SCHEDULE, target, net=Wrong())
    losses = objective(weighting=MinSNR()).losses(denoiser, x0, T, eps)
    snr = (alpha / sigma).square().flatten()
    torch.testing.assert_close(losses.double(), snr.clamp(max=5) * 0.01, rtol=1e-3, atol=0)


@pytest.mark.parametrize("target", [X0(), V()], ids=lambda t: type(t).__name__)
def test_losses_are_finite_at_zero_terminal_snr(target):
    schedule = schedules.linear(60, zero_terminal_snr=True)
    denoiser = affine_denoiser(schedule, target)
    losses = objective(weighting=MinSNR()).losses(denoiser, images(4), T, normal(4, 1, 4, 4))
    assert bool(torch.isfinite(losses).all())
    assert losses[3] > 0  # SNR 0 would count for nothing


def gradients(net: torch.nn.Module, losses: Tensor) -> list[Tensor]:
    return [
        torch.zeros(()) if g is None else g
        for g in torch.autograd.grad(losses.sum(), list(net.parameters()), allow_unused=True)
    ]


def test_feed_back_gives_the_network_its_own_clipped_estimate_without_gradient():
    net = Spy()
    denoiser = affine_denoiser(SCHEDULE, V(), net=net)
    x0, eps = images(4), 2 * normal(4, 1, 4, 4, seed=1)
    losses = objective().losses(denoiser, x0, T, eps, self_condition=True)
    first, second = net.calls
    assert (first.grad_enabled, second.grad_enabled) == (False, True)
    assert first.self_cond is None
    x_t = q_sample(SCHEDULE, x0, T, eps)
    assert torch.equal(first.x, x_t)
    assert torch.equal(second.x, x_t)
    estimate = denoiser(x_t, T).x0
    assert estimate.abs().max() == 1  # clipped somewhere
    assert torch.equal(second.self_cond, estimate)
    # The gradient is that of a loss whose fed-back image is a constant.
    target, c_noise = V().target(x0, eps, *SCHEDULE.at(T)), (60 * T - 1).float()
    constant = (net(x_t, c_noise, estimate.detach()) - target).square().mean((1, 2, 3))
    through = (net(x_t, c_noise, estimate) - target).square().mean((1, 2, 3))
    ours, wanted, unwanted = (gradients(net, each) for each in (losses, constant, through))
    torch.testing.assert_close(ours, wanted)
    assert not torch.allclose(ours[0], unwanted[0])
    assert float(ours[2]) != 0


def test_without_feed_back_a_self_conditioned_network_is_called_once_with_nothing():
    net = Spy()
    objective().losses(affine_denoiser(SCHEDULE, net=net), images(4), T, normal(4, 1, 4, 4))
    assert [call.self_cond for call in net.calls] == [None]


def test_feed_back_means_nothing_to_a_plain_network():
    net = Spy(self_condition=False)
    batch = (images(4), T, normal(4, 1, 4, 4))
    denoiser = affine_denoiser(SCHEDULE, net=net)
    fed, plain = (objective().losses(denoiser, *batch, self_condition=fed) for fed in (True, False))
    assert torch.equal(fed, plain)
    assert len(net.calls) == 2


def test_feed_back_leaves_no_weight_without_gradient_under_autocast():
    """Autocast caches casted weights; a cache filled without gradient must not serve the pass that has one."""
    torch.manual_seed(0)
    net = UNet(8, 1, (1, 2), self_condition=True, heads=2, head_dim=4)
    denoiser = affine_denoiser(SCHEDULE, V(), net=net)
    results = []
    for cache in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            losses = objective().losses(denoiser, images(4), T, normal(4, 1, 4, 4), self_condition=True)
        results.append(torch.autograd.grad(losses.sum(), list(net.parameters())))
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------- what the objective draws


def test_the_objective_draws_a_time_and_noise_for_each_image():
    """And weighs the losses as the distribution of the times asks."""
    levels = Importance(2, history=1, stratified=False)
    levels.observe(SCHEDULE, times(0.5, 1), torch.tensor([1.0, 3.0]))
    denoiser, x0, numbers = affine_denoiser(SCHEDULE, V()), images(6), draws(6)
    found = Denoising(L2(), MinSNR(), levels)(denoiser, Batch(x0, None, 0, 0), numbers)
    t, eps = levels(SCHEDULE, numbers), numbers.normal("eps", (1, 4, 4))
    assert torch.equal(found.t, t)
    assert torch.equal(found.losses, objective(weighting=MinSNR()).losses(denoiser, x0, t, eps))
    weights = levels.weights(SCHEDULE, t)
    assert len(weights.unique()) == 2
    torch.testing.assert_close(found.loss.double(), (weights * found.losses).mean())
    torch.testing.assert_close(found._replace(weights=None).loss, found.losses.mean())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_labels_are_withheld_in_training_and_none_in_evaluation(share):
    class Told(Affine):
        num_classes = 3

        def forward(self, x, c_noise, self_cond=None, labels=None):
            self.told = labels
            return super().forward(x, c_noise)

    net, labels, batch = Told(), torch.arange(2000) % 3, images(2000)
    training = Denoising(L2(), Uniform(), UniformLevels(), label_dropout=share)
    training(affine_denoiser(SCHEDULE, net=net), Batch(batch, labels, 0, 0), draws(2000))
    withheld = net.told == 3
    assert float(withheld.float().mean()) == pytest.approx(share, abs=0.05)
    assert torch.equal(net.told[~withheld], labels[~withheld])
    training.eval()(affine_denoiser(SCHEDULE, net=net), Batch(batch, labels, 0, 0), draws(2000))
    assert torch.equal(net.told, labels)


def test_an_estimate_is_fed_back_in_half_of_the_steps_and_always_in_evaluation():
    net, training, batch = Spy(), objective(), Batch(images(2), None, 0, 0)
    denoiser = affine_denoiser(SCHEDULE, net=net)
    for seed in range(100):
        training(denoiser, batch, draws(2, seed=seed))
    assert 35 <= len(net.calls) - 100 <= 65
    net.calls.clear()
    for seed in range(10):
        training.eval()(denoiser, batch, draws(2, seed=seed))
    assert len(net.calls) == 20
