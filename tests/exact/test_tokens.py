"""Masked and uniform chains, enumerated: what they end in, and that samplers, guided or not, draw
from it, tilted.

Standard errors come from independent repetitions, one per condition, each weighed by its own Ẑ,
whose expectation is Z. The bounds on the errors keep a noisy estimate from passing.
"""

import pytest
import torch

from samplers import DAS, SMC, SVDD, TDS, Ancestral, Importance, TreeSampling, sample
from steering import Twist
from steering.discrete import MaskedProcess
from tests.exact.estimates import average, ratio
from tests.exact.tokens import TokenTable, every, noised_law, posterior, token_chain

REPEATS, K = 50, 40
QUIET = {"batch": 4096, "progress": False}
CHAINS = {
    "masked": {},
    "remasked": {"remask": 0.4},
    "uniform": {"kind": "uniform"},
}
TABLE = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def pair(items, _):
    """A sum over sites, and one pair."""
    return (items * TABLE).sum((1, 2)) + 1.5 * items[:, 0, 0] * items[:, 1, 1]


def check(model, result, largest):
    """Ẑ / Z and the probability of every state, the rare ones together, within 4 errors: of some
    400 estimates one is beyond 3.5 by chance."""
    table = model.denoiser
    log_w = table.laws()[-1].log() + pair(model.decode(table.states()), None)
    truth, log_z = log_w.softmax(0), log_w.logsumexp(0)
    z = (result.log_z - log_z).exp()
    estimate, error = average(z)
    assert abs(estimate - 1) < 4 * error < largest
    state = table.index(result.items.argmax(-1))
    share = torch.zeros(len(z), len(truth), dtype=torch.float64)
    share.index_put_((result.rows, state), result.weights, accumulate=True)
    assert (share[:, truth == 0] == 0).all()  # no mask is left
    rare = truth < 0.02  # too few draws for a standard error of each
    parts = [*torch.eye(len(truth))[~rare].double(), rare.double()]
    for part in parts:
        estimate, error = ratio(z * (share @ part), z)
        assert abs(estimate - truth @ part) < 4 * error < largest


@pytest.mark.parametrize("chain", [*CHAINS.values(), {"schedule": "cosine"}], ids=str)
def test_a_chain_ends_in_the_law_enumerated(chain):
    model = token_chain(**chain)
    law = model.denoiser.laws()[-1]
    assert law.sum() == pytest.approx(1, abs=1e-6)  # float32 kernels
    items = sample(model, pair, Ancestral(4000), **QUIET).items
    count = torch.bincount(model.denoiser.index(items.argmax(-1)), minlength=len(law))
    expected = 4000 * law[law > 0]
    # chi-square with 8 degrees of freedom: above 30.1 once in 5,000
    assert ((count[law > 0] - expected) ** 2 / expected).sum() < 30.1
    assert count[law == 0].sum() == 0


@chains
@pytest.mark.parametrize(
    "sampler",
    [
        Importance(K),
        SMC(K, levels=(1, 2), ess=0.9),
        SMC(K, "max", levels=(1, 2)),
        SMC(K, "add", levels=(1, 2)),
        SVDD(K, 3),
    ],
    ids=str,
)
def test_samplers_follow_the_tilted_law(chain, sampler):
    model = token_chain(**chain, conditions=REPEATS)
    check(model, sample(model, pair, sampler, **QUIET), largest=0.07)


GUIDED = {
    "importance": (Importance(K), Twist()),
    "importance, skip": (Importance(K), Twist(jacobian="skip")),
    "SMC, late": (SMC(K, levels=(1, 2), ess=0.9), Twist(window=(0.4, 1.0), step=2.0)),
    "SMC, skip": (SMC(K, levels=(1, 2), ess=0.9), Twist(jacobian="skip", tempering=0.01)),
    "TDS": (TDS(K, ess=1.0), None),
    "TDS, skip": (TDS(K, ess=1.0, jacobian="skip"), None),
    "DAS": (DAS(K, tempering=0.01), None),
    "SVDD, skip": (SVDD(K, 2), Twist(jacobian="skip")),
}


@chains
@pytest.mark.parametrize(("sampler", "guidance"), GUIDED.values(), ids=GUIDED)
def test_twisted_particles_follow_the_tilted_law(chain, sampler, guidance):
    model = token_chain(**chain, conditions=REPEATS)
    result = sample(model, pair, sampler, guidance=guidance, **QUIET)
    check(model, result, largest=0.08)


@chains
@pytest.mark.parametrize("guidance", [None, Twist(jacobian="skip"), Twist()], ids=str)
def test_trees_follow_the_tilted_law(chain, guidance):
    """Path weights leave a bias that is below the errors at this budget."""
    model = token_chain(**chain, conditions=20)
    result = sample(model, pair, TreeSampling(), guidance=guidance, nfe=900, **QUIET)
    check(model, result, largest=0.07)


@pytest.mark.parametrize("remask", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
def test_remasking_keeps_the_levels(schedule, remask):
    """Sites of independent data, guessed by their law: the states at every step have the law that
    the data have when they are noised to its level, whatever is masked again (float32 kernels)."""
    process = MaskedProcess.of(2, 3, 5, schedule, remask=remask)
    random = torch.Generator().manual_seed(3)
    sites = torch.randn(2, 3, generator=random, dtype=torch.float64).softmax(1)
    data = sites[torch.arange(2), every(3, 2)].prod(1)
    laws = TokenTable(process, posterior(process, data)).laws()
    for i, law in enumerate(laws):
        torch.testing.assert_close(law, noised_law(process, data, i), rtol=0, atol=2e-6)
    again = process.transition(torch.zeros(1, 2).long(), torch.tensor([2]), torch.zeros(1, 2, 3))
    masked = torch.full((1, 2), 3)
    assert (again.log_prob(masked) > -50).item() == (remask > 0)  # and it is masked again
