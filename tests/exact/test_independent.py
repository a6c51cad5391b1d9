"""Importance sampling, rejection and best-of-N against closed forms."""

import math

import pytest
import torch

from samplers import BestOfN, Importance, sample
from tests.exact import finite_chain, gaussian_chain, tilted
from tests.exact.estimates import tilted_moments
from tests.exact.guided import Push


def line(x, _):
    return x[:, 0]


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_importance_follows_the_tilted_law(kind):
    repeats, n, lam = 40, 400, 0.7
    model = gaussian_chain(0.3, 1.0, steps=6, kind=kind, conditions=repeats)
    mean, var = model.denoiser.law()
    new_mean, new_var, log_z = tilted(mean, var, lam)
    result = sample(model, line, Importance(n), lam=lam, batch=2048, progress=False)
    found = tilted_moments(result, log_z)
    # in closed form: Var(w) / Z² = exp(λ² var) - 1 for a normal
    z_error = math.sqrt(math.expm1(lam**2 * float(var)) / (n * repeats))
    assert abs(found["z"][0] - 1) < 3 * z_error < 0.03
    for name, truth in (("mean", new_mean), ("var", new_var)):
        value, error = found[name]  # standard error from the 40 repetitions
        assert abs(value - float(truth)) < 3 * error < 0.1


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_a_guided_proposal_is_weighed_back(kind):
    # without p / q the tilted mean would be off by what the push moves: more than ten errors
    repeats, lam = 40, 1.0
    model = gaussian_chain(0.3, 1.0, steps=6, kind=kind, conditions=repeats)
    new_mean, new_var, log_z = tilted(*model.denoiser.law(), lam)
    found = tilted_moments(
        sample(model, line, Importance(200), guidance=Push(0.5), batch=2048, progress=False), log_z
    )
    for name, truth in (("z", 1.0), ("mean", float(new_mean)), ("var", float(new_var))):
        value, error = found[name]
        assert abs(value - truth) < 3 * error < 0.12


def test_rejection_draws_exactly():
    # reward -(x - 1)² / 2 up to a constant, split into its slope and its curve
    model = gaussian_chain(-0.5, 1.0, steps=6)
    mean, var = model.denoiser.law()
    new_mean, new_var, log_z = tilted(mean, var, 1.0, 1.0)
    log_z -= 0.5
    n = 8000
    result = sample(
        model,
        lambda x, _: -0.5 * (x[:, 0] - 1) ** 2,
        Importance(n, rejection=True),
        batch=2048,
        progress=False,
    )
    x, kept = result.items[:, 0].double(), result.distinct
    z = math.exp(log_z)
    assert abs(kept / n - z) < 3 * math.sqrt(z * (1 - z) / n)
    assert abs(x.mean() - float(new_mean)) < 3 * math.sqrt(float(new_var) / kept)
    assert abs(x.var() / float(new_var) - 1) < 3 * math.sqrt(2 / kept)
    assert torch.allclose(result.weights, torch.tensor(1 / kept, dtype=torch.float64))


def test_importance_on_the_finite_chain():
    model = finite_chain()
    table = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)

    def reward(items, _):
        return (items * table).sum((1, 2)) + 1.5 * items[:, 0, 0] * items[:, 1, 1]

    n = 8000
    r = reward(model.decode(model.process.states()), None)
    law, weight = model.process.law(), r.exp()
    z = float((law * weight).sum())
    posterior = law * weight / z
    result = sample(model, reward, Importance(n), batch=2048, progress=False)
    state = model.process.index(result.items.argmax(-1))
    found = torch.zeros_like(law).index_add(0, state, result.weights)
    # self-normalised: n Var = E_p[(w/Z)² ([x = s] - posterior_s)²], in closed form
    hit = torch.eye(len(law), dtype=torch.float64) - posterior
    error = (((law * (weight / z) ** 2)[:, None] * hit**2).sum(0) / n).sqrt()
    assert ((found - posterior).abs() < 3.5 * error).all()
    z_error = math.sqrt(float((law * weight**2).sum()) / z**2 - 1) / math.sqrt(n)
    assert abs(math.exp(result.log_z[0]) / z - 1) < 3 * z_error


def test_the_best_of_n_is_the_maximum_of_n_normals():
    n, repeats = 16, 500
    model = gaussian_chain(0.0, 1.0, steps=4, conditions=repeats)
    mean, var = model.denoiser.law()
    result = sample(model, line, BestOfN(n), draws=1, batch=2048, progress=False)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    below = torch.special.ndtr(x) ** n  # law of the maximum
    mass = below.diff()
    middle = (x[1:] + x[:-1]) / 2
    best = float((mass * middle).sum())
    spread = math.sqrt(float((mass * (middle - best) ** 2).sum()))
    scaled = (result.rewards - mean) / var.sqrt()
    assert abs(float(scaled.mean()) - best) < 3 * spread / math.sqrt(repeats)
    assert len(result.rewards) == repeats


@pytest.mark.parametrize("of", [2, 4])
def test_best_of_follows_the_law_of_the_largest(of):
    """Of `of` normals the largest has a known mean and variance, and so has their logarithm Z."""
    n, repeats = 800, 40
    model = gaussian_chain(0.3, 1.0, steps=6, conditions=repeats)
    mean, var = (float(v) for v in model.denoiser.law())
    result = sample(model, line, BestOfN(n, of=of), batch=2048, progress=False)
    assert result.found.tolist() == [n // of] * repeats
    assert (result.weights * (n // of)).allclose(torch.ones(len(result.weights)).double())
    # order statistics of the standard normal: 1/sqrt(pi) and 1 - 1/pi of two, tables for four
    top, spread = {2: (math.pi**-0.5, 1 - 1 / math.pi), 4: (1.029375, 0.491715)}[of]
    x = (result.rewards - mean) / math.sqrt(var)
    error = math.sqrt(spread / len(x))
    assert abs(float(x.mean()) - top) < 3 * error < 0.03
    # the variance of a sample variance is about 2 var² / N for laws as close to normal as these
    assert abs(float(x.var()) - spread) < 3 * spread * math.sqrt(2.5 / len(x))
    assert "best of" in str(result)


def test_best_of_drops_a_group_that_is_not_whole_and_counts_failures():
    model = gaussian_chain(0.3, 1.0, steps=6, conditions=2)
    rewards = sample(model, line, BestOfN(11), progress=False)
    walks = {r: rewards.rewards[rewards.rows == r] for r in range(2)}
    order = {r: rewards.ids[rewards.rows == r].argsort() for r in range(2)}
    low = min(float(v[order[r]][:4].max()) for r, v in walks.items())

    def picky(x, _):  # the first group of one condition or the other fails throughout
        return torch.where(x[:, 0] <= low, math.nan, x[:, 0].double())

    for reward in (line, picky):
        found = sample(model, reward, BestOfN(11, of=4), progress=False)
        for r in range(2):
            groups = walks[r][order[r]][:8].view(2, 4)  # 3 of 11 are no group
            if reward is picky:
                groups = torch.where(groups <= low, -math.inf, groups)
            best = groups.max(1).values
            best = best[best > -math.inf].sort().values
            assert found.rewards[found.rows == r].sort().values.allclose(best)
