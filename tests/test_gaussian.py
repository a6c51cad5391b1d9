"""Gaussian chains against closed forms: levels kept, densities, limits of eta, clipping."""

import math
from dataclasses import replace

import pytest
import torch

from steering import gaussian, noise
from steering.gaussian import Clamp, DynamicThreshold, NormalTransition, ToClean

T = 20
ALPHA_BAR = torch.cat([torch.linspace(0.01, 0.99, T).double(), torch.ones(1).double()])
SIGMA = torch.linspace(1, 0, T + 1).double()


def chains(eta):
    """A diffusion and a flow; the flow starts at sigma = 1 and both end without noise."""
    return [gaussian.vp((2,), ALPHA_BAR, eta=eta), gaussian.flow((2,), SIGMA, eta=eta)]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_step_from_the_true_level_reaches_the_next_level(eta):
    # With the exact clean item as guess, x_i = a c + s e turns into mean (on_x a + on_clean) c
    # and variance (on_x s + on_eps)² + std²: the level tables, to float64 rounding
    for chain in chains(eta):
        k, alpha, sigma = chain.kernel, chain.alpha, chain.sigma
        mean = k.on_x * alpha[:-1] + k.on_clean
        variance = (k.on_x * sigma[:-1] + k.on_eps) ** 2 + k.std**2
        torch.testing.assert_close(mean, alpha[1:], atol=1e-12, rtol=0)
        torch.testing.assert_close(variance, sigma[1:] ** 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("large", [False, True])
def test_ddpm_keeps_the_mean_and_its_small_variance_is_ddim_with_eta_1(large):
    alpha, sigma = ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()
    levels = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    ddpm, ddim = gaussian.ddpm_kernel(*levels, large=large), gaussian.ddim_kernel(*levels, eta=1.0)
    on_noise = ddim.on_eps / sigma[:-1]  # DDIM's mean in terms of x and clean
    torch.testing.assert_close(ddpm.on_x, on_noise, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        ddpm.on_clean, ddim.on_clean - alpha[:-1] * on_noise, atol=1e-12, rtol=0
    )
    if large:
        assert (ddpm.std > ddim.std).all()
    else:
        torch.testing.assert_close(ddpm.std, ddim.std, atol=1e-12, rtol=0)


def test_eta_0_on_a_flow_is_the_euler_step():
    chain = gaussian.flow((3,), SIGMA, eta=0.0)
    x, velocity = torch.randn(2, T, 3, generator=torch.Generator().manual_seed(0))
    i = torch.arange(T)
    sigma = SIGMA.float()[:, None]
    step = chain.transition(x, i, x - sigma[:-1] * velocity)
    euler = x + (sigma[1:] - sigma[:-1]) * velocity
    # a few float32 roundings of numbers up to about 5
    torch.testing.assert_close(step.mean, euler, atol=5e-6, rtol=0)
    assert not chain.stochastic.any()


def test_only_the_last_step_of_a_chain_that_ends_clean_draws_nothing():
    for chain in chains(1.0):
        assert chain.stochastic.tolist() == [True] * (T - 1) + [False]
        assert not gaussian.vp((2,), ALPHA_BAR, eta=0.0).stochastic.any()


def test_particles_at_different_steps_do_as_they_do_alone():
    x = torch.randn(T, 2, generator=torch.Generator().manual_seed(1))
    clean = 1.5 * x.flip(0)
    i, key = torch.arange(T).flip(0), noise.root_key(7, torch.arange(T))
    for chain in chains(0.7):
        chain = replace(chain, bound=DynamicThreshold(0.9, 2.0))
        together = chain.transition(x, i, clean).sample(key)
        for n in range(T):
            one = slice(n, n + 1)
            alone = chain.transition(x[one], i[one], clean[one]).sample(key[one])
            assert torch.equal(alone, together[one])


def test_consistency_keeps_nothing_of_the_old_noise():
    kernel = gaussian.consistency_kernel(ALPHA_BAR[1:].sqrt(), (1 - ALPHA_BAR[1:]).sqrt())
    assert not kernel.on_x.any()
    assert not kernel.on_eps.any()
    torch.testing.assert_close(kernel.on_clean**2 + kernel.std**2, torch.ones(T).double())


def test_density_is_that_of_torch_and_0_where_nothing_is_drawn():
    mean, x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    std = torch.tensor([0.3, 0.0, 2.0])
    density = NormalTransition(mean, std).log_prob(x)
    assert density.dtype == torch.float64
    assert density[1] == 0
    for n in (0, 2):
        law = torch.distributions.Normal(mean[n].double(), std[n].double())
        assert math.isclose(density[n].item(), law.log_prob(x[n].double()).sum().item())


def test_samples_have_the_law_of_the_transition():
    n = 40_000
    law = NormalTransition(torch.full((n, 1), 1.5), torch.full((n,), 0.5))
    z = (law.sample(noise.root_key(0, torch.arange(n))) - 1.5) / 0.5
    # four standard errors of the mean and of the second moment of a unit normal
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / n)


def test_every_prediction_gives_back_the_clean_item():
    clean, eps = torch.randn(2, T, 2, generator=torch.Generator().manual_seed(3))
    diffusion, straight = chains(0.0)
    i = torch.arange(T)
    for chain, kinds in [(diffusion, ("epsilon", "v_prediction", "sample")), (straight, ("flow",))]:
        alpha, sigma = chain.alpha[:-1, None].float(), chain.sigma[:-1, None].float()
        x = alpha * clean + sigma * eps
        outputs = {
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * clean,
            "sample": clean,
            "flow": eps - clean,
        }
        for kind in kinds:
            guess = ToClean(chain, kind)(outputs[kind], x, chain.time(i))
            # float32 rounding over the smallest alpha, .1
            torch.testing.assert_close(guess, clean, atol=1e-5, rtol=0)


def test_a_time_off_the_grid_has_no_guess():
    chain = gaussian.flow((1,), SIGMA, eta=0.0)
    guess = ToClean(chain, "flow")(torch.ones(3, 1), torch.ones(3, 1), torch.tensor([3.0, 3.5, 99]))
    assert guess.isnan().flatten().tolist() == [False, True, True]
    # and a time on it names its step, whichever way the times run
    times = torch.tensor([900.0, 400.5, 7.0])
    down = gaussian.flow((1,), torch.linspace(1, 0, 4), times=times)
    assert ToClean(down, "flow").step(torch.tensor([7.0, 900, 400.5, 400])).tolist() == [
        2,
        0,
        1,
        -1,
    ]


def test_clipping_takes_the_clipped_guess_and_the_raw_noise():
    chain = gaussian.vp((1,), torch.tensor([0.25, 0.64, 1.0]), eta=0.0, bound=Clamp(1.0))
    x, clean = torch.tensor([[0.5]]), torch.tensor([[3.0]])
    eps = (0.5 - 0.5 * 3) / math.sqrt(0.75)
    step = chain.transition(x, torch.tensor([0]), clean)
    assert step.mean.item() == pytest.approx(0.8 * 1.0 + 0.6 * eps, abs=1e-6)


def test_dynamic_threshold_by_hand():
    bound = DynamicThreshold(quantile=0.5, ceiling=4.0)
    clean = torch.tensor([[0.1, -0.2, 0.3], [-2.0, 1.0, 6.0], [9.0, 8.0, -7.0]])
    expected = torch.tensor([[0.1, -0.2, 0.3], [-1.0, 0.5, 1.0], [1.0, 1.0, -1.0]])
    torch.testing.assert_close(bound(clean), expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gaussian.vp((1,), ALPHA_BAR, eta=1.5), "eta=1.5"),
        (lambda: gaussian.flow((1,), SIGMA, eta=-0.1), "eta=-0.1"),
        (lambda: gaussian.flow((1,), SIGMA, times=torch.arange(3)), "number of steps"),
        (lambda: gaussian.vp((1,), torch.ones(4)), "zero before its last"),
        (lambda: ToClean(gaussian.flow((1,), SIGMA), "edm"), "'edm'"),
        (lambda: ToClean(gaussian.flow((1,), SIGMA), "epsilon"), "alpha = 0"),
    ],
)
def test_bad_tables_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
