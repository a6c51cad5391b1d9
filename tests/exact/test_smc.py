"""SMC against closed forms: every potential, scheme and threshold aims at the same law.

Standard errors come from independent repetitions, one per condition: populations are small and
many, because a bias of self-normalisation would fall like 1 / K while the estimates tested, each
repetition weighed by its own Ẑ, have none at any K. The bounds on the errors themselves keep a
noisy estimate from passing.
"""

import pytest
import torch

from samplers import DAS, SMC, TDS, sample
from tests.exact import finite_chain, gaussian_chain, tilted
from tests.exact.estimates import average, ratio, tilted_moments
from tests.exact.guided import Push

REPEATS, K = 50, 60


def check(found, truth, largest):
    for name, value in truth.items():
        estimate, error = found[name]
        assert error < largest, name
        assert abs(estimate - value) < 3 * error, name


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize(
    ("potential", "ess", "scheme"),
    [
        ("difference", 0.8, "systematic"),
        ("difference", 1.0, "stratified"),
        ("max", 0.8, "systematic"),
        ("add", 0.9, "multinomial"),
    ],
)
def test_smc_follows_the_tilted_law(kind, potential, ess, scheme):
    model = gaussian_chain(0.3, 1.0, steps=6, kind=kind, conditions=REPEATS)
    new_mean, new_var, log_z = tilted(*model.denoiser.law(), 0.8)
    sampler = SMC(K, potential, levels=(1, 2, 3, 4), ess=ess, scheme=scheme)
    result = sample(
        model, lambda x, _: x[:, 0], sampler, lam=0.8, seed=1, batch=4096, progress=False
    )
    truth = {"z": 1.0, "mean": float(new_mean), "var": float(new_var)}
    check(tilted_moments(result, log_z), truth, largest=0.15)
    assert (result.spent.rows == K * 6).all()  # a look is the first row of the walk from there


@pytest.mark.parametrize("potential", ["difference", "max"])
def test_guided_particles_are_weighed_back(potential):
    model = gaussian_chain(0.3, 1.0, steps=6, conditions=REPEATS)
    new_mean, new_var, log_z = tilted(*model.denoiser.law(), 0.8)
    sampler = SMC(K, potential, levels=(1, 2, 3, 4), ess=0.8)
    result = sample(
        model,
        lambda x, _: x[:, 0],
        sampler,
        lam=0.8,
        guidance=Push(0.4),
        batch=4096,
        progress=False,
    )
    truth = {"z": 1.0, "mean": float(new_mean), "var": float(new_var)}
    check(tilted_moments(result, log_z), truth, largest=0.15)


@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize(
    "sampler",
    [
        TDS(K),
        TDS(K, ess=1.0, jacobian="skip"),
        DAS(K, tempering=0.004),
        DAS(K, tempering=0.02, jacobian="skip"),
        SMC(K, "max", tempering=0.01),
        SMC(K, "add", tempering=0.004, ess=0.9),
    ],
    ids=str,
)
def test_twisted_and_tempered_particles_follow_the_tilted_law(kind, sampler):
    """A quadratic reward, over which the twist is neither optimal nor constant."""
    model = gaussian_chain(0.3, 2.0, steps=6, kind=kind, conditions=REPEATS)
    new_mean, new_var, log_z = tilted(*model.denoiser.law(), 1.0, 1.0)

    def bowl(x, _):
        return x[:, 0] - x[:, 0] ** 2 / 2

    result = sample(model, bowl, sampler, seed=1, batch=4096, progress=False)
    truth = {"z": 1.0, "mean": float(new_mean), "var": float(new_var)}
    check(tilted_moments(result, log_z), truth, largest=0.05)
    looks = 4 if isinstance(sampler, TDS) and sampler.jacobian == "full" else 0
    # a differentiated step cannot take the look's guess for its own: levels 1 to 4 are paid for
    assert (result.spent.rows == K * (6 + looks)).all()


@pytest.mark.parametrize("ess", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("potential", ["difference", "max", "add"])
def test_smc_on_the_finite_chain(potential, ess):
    model = finite_chain(conditions=REPEATS)
    table = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)

    def reward(items, _):
        return (items * table).sum((1, 2)) + 1.5 * items[:, 0, 0] * items[:, 1, 1]

    log_w = model.process.law().log() + reward(model.decode(model.process.states()), None)
    posterior, log_z = log_w.softmax(0), log_w.logsumexp(0)
    result = sample(
        model, reward, SMC(K, potential, levels=(1, 2), ess=ess), batch=4096, progress=False
    )
    z = (result.log_z - log_z).exp()
    estimate, error = average(z)
    assert abs(estimate - 1) < 3 * error < 0.08
    state = model.process.index(result.items.argmax(-1))
    share = torch.zeros(REPEATS, len(posterior), dtype=torch.float64)
    share.index_put_((result.rows, state), result.weights, accumulate=True)
    for s, p in enumerate(posterior):
        estimate, error = ratio(z * share[:, s], z)
        assert abs(estimate - p) < 3.5 * error < 0.05
