"""SVDD's weights against closed forms: the tilted law at any number of proposals and any guess.

Standard errors come from independent repetitions, one per condition, each weighed by its own Ẑ,
which has no bias at any number of particles. The bounds on the errors keep a noisy estimate from
passing.
"""

import math

import pytest
import torch

from samplers import SVDD, Beam, sample
from tests.brownian import brownian, first
from tests.exact import finite_chain, gaussian_chain, tilted
from tests.exact.estimates import average, ratio, tilted_moments
from tests.exact.guided import Push

REPEATS, K = 60, 40
QUIET = {"batch": 4096, "progress": False}


def line(x, _):
    return x[:, 0]


def check(found, truth, largest):
    for name, value in truth.items():
        estimate, error = found[name]
        assert error < largest, name
        assert abs(estimate - value) < 3 * error, name


@pytest.mark.parametrize(
    ("kind", "steps", "levels", "proposals"),
    [
        ("vp", 6, None, 2),
        ("vp", 6, (2, 4), 5),
        ("flow", 6, None, 3),
        ("student", 4, None, 3),  # re-noised in four steps
    ],
)
def test_weighted_particles_follow_the_tilted_law(kind, steps, levels, proposals):
    model = gaussian_chain(0.3, 1.0, steps=steps, kind=kind, conditions=REPEATS)
    new_mean, new_var, log_z = tilted(*model.denoiser.law(), 0.8)
    sampler = SVDD(K, proposals, levels)
    result = sample(model, line, sampler, lam=0.8, seed=1, **QUIET)
    truth = {"z": 1.0, "mean": float(new_mean), "var": float(new_var)}
    check(tilted_moments(result, log_z), truth, largest=0.08)
    # a look is the first row of the walk from there
    assert (result.spent.rows == K * proposals * steps).all()


def test_without_their_weights_the_particles_are_biased():
    """What the weights are for: 2,400 particles as they come, the paper's draws, miss the mean of
    the target by many standard errors, and more by three proposals than by twelve."""
    model = gaussian_chain(0.3, 1.0, steps=6, conditions=REPEATS)
    new_mean, _, _ = tilted(*model.denoiser.law(), 0.8)
    misses = []
    for proposals in (3, 12):
        result = sample(model, line, SVDD(K, proposals), lam=0.8, **QUIET)
        # of a particle's items at the data one is kept by softmax(λ · reward)
        particle = result.ids // (proposals * 5)  # four levels and the data: 5 M handles each
        _, group = particle.unique(return_inverse=True)
        tilt = (0.8 * result.rewards).exp()
        total = torch.zeros(REPEATS * K, dtype=torch.float64)
        mean = total.index_add(0, group, tilt * result.rewards) / total.index_add(0, group, tilt)
        value, error = average(mean)
        misses.append(abs(value - float(new_mean)) / error)
    assert misses[0] > 5
    assert misses[0] > misses[1]


def test_guided_proposals_are_weighed_back():
    model = gaussian_chain(0.3, 1.0, steps=6, conditions=REPEATS)
    new_mean, new_var, log_z = tilted(*model.denoiser.law(), 0.8)
    result = sample(model, line, SVDD(K, 3), lam=0.8, guidance=Push(0.4), **QUIET)
    truth = {"z": 1.0, "mean": float(new_mean), "var": float(new_var)}
    check(tilted_moments(result, log_z), truth, largest=0.08)


@pytest.mark.parametrize("levels", [None, (1,)])
def test_svdd_on_the_finite_chain(levels):
    model = finite_chain(conditions=REPEATS)
    table = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)

    def reward(items, _):
        return (items * table).sum((1, 2)) + 1.5 * items[:, 0, 0] * items[:, 1, 1]

    log_w = model.process.law().log() + reward(model.decode(model.process.states()), None)
    posterior, log_z = log_w.softmax(0), log_w.logsumexp(0)
    result = sample(model, reward, SVDD(K, 3, levels), **QUIET)
    z = (result.log_z - log_z).exp()
    estimate, error = average(z)
    assert abs(estimate - 1) < 3 * error < 0.08
    state = model.process.index(result.items.argmax(-1))
    share = torch.zeros(REPEATS, len(posterior), dtype=torch.float64)
    share.index_put_((result.rows, state), result.weights, accumulate=True)
    for s, p in enumerate(posterior):
        estimate, error = ratio(z * share[:, s], z)
        assert abs(estimate - p) < 3.5 * error < 0.05


@pytest.mark.parametrize("proposals", [2, 4])
@pytest.mark.parametrize("kind", [SVDD, Beam])
def test_greedy_choice_is_a_sum_of_largest_normals(kind, proposals):
    """Two steps that add N(0, 1/2) each, guessed without error: the best item of a particle is
    (m + m') / sqrt(2), m the largest of M standard normals, at each step."""
    repeats, particles = 20, 60
    model = brownian(steps=2, prompts=(None,) * repeats)
    if kind is SVDD:
        sampler = SVDD(particles, proposals, selection="argmax")
        reward = sample(model, first, sampler, **QUIET).rewards
    else:
        sampler, rows = Beam(1, proposals), particles * proposals * 2
        found = sample(model, first, sampler, nfe=rows, **QUIET)
        search = found.ids // (2 * proposals)  # a search has 2 M handles
        reward = torch.stack([found.rewards[search == s].max() for s in search.unique()])
    n = repeats * particles
    assert len(reward) == n
    # mean and variance of the largest of two and of four standard normals
    top, spread = {2: (math.pi**-0.5, 1 - 1 / math.pi), 4: (1.029375, 0.491715)}[proposals]
    assert abs(float(reward.mean()) - math.sqrt(2) * top) < 3 * math.sqrt(spread / n)
    # the variance of a sample variance is about 2 var² / n for laws as close to normal as these
    assert abs(float(reward.var()) - spread) < 3 * spread * math.sqrt(2.5 / n)
