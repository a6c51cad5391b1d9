"""Metrics against closed forms and independent implementations."""

import math
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from steering.metrics import (
    Moments,
    cmmd,
    diversity,
    frechet,
    kid,
    kl,
    manifold,
    mmd,
    total_variation,
    within,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Fréchet distance from"),
    pytest.mark.filterwarnings("ignore:precision and recall from"),
]


def normal(n, d=4, seed=0, mean=0.0, scale=1.0):
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + scale * drawn


def covariance(d, rank, seed):
    root = normal(rank, d, seed)
    return root.T @ root / rank


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    # diagonal covariances: d² = |m_a - m_b|² + sum (s_a - s_b)², s the standard deviations
    a = Moments(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double(), 9)
    b = Moments(
        torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 25.0])).double(), 9
    )
    # a few float64 eigendecompositions of numbers of order 10
    assert float(frechet(a, b, extractor="x")) == pytest.approx(9 + 1 + 4, rel=1e-12)
    assert float(frechet(a, a, extractor="x")) == pytest.approx(0, abs=1e-12)


def test_frechet_agrees_with_scipys_matrix_root():
    for seed in range(50):
        a, b = covariance(8, 20, 2 * seed), covariance(8, 20, 2 * seed + 1)
        m = normal(2, 8, seed)
        root = scipy.linalg.sqrtm((a @ b).numpy())
        expected = float((m[0] - m[1]).square().sum() + a.trace() + b.trace()) - 2 * float(
            np.trace(root).real
        )
        ours = frechet(Moments(m[0], a, 20), Moments(m[1], b, 20), extractor="x")
        assert float(ours) == pytest.approx(expected, rel=1e-6)


def test_frechet_stands_covariances_of_low_rank():
    a, b = normal(5, 32, 0), normal(7, 32, 1)  # rank 4 and 6 of 32
    centred = [x - x.mean(0) for x in (a, b)]
    # tr (C_a^½ C_b C_a^½)^½ is the nuclear norm of A B' up to the divisors
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / math.sqrt(4 * 6)
    traces = centred[0].square().sum() / 4 + centred[1].square().sum() / 6
    expected = (a.mean(0) - b.mean(0)).square().sum() + traces - 2 * nuclear
    # the clamped eigenvalues: 28 of size 1e-16 may each add a root of 1e-8
    assert float(frechet(a, b, extractor="x")) == pytest.approx(float(expected), abs=1e-6)


def test_frechet_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1)

    a, b = (torch.rand(64, 3, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    theirs = FrechetInceptionDistance(feature=Pixels(), normalize=True)
    theirs.update(a, real=True)
    theirs.update(b**2, real=False)
    ours = frechet(a.flatten(1), (b**2).flatten(1), extractor="pixels")
    # theirs is returned in float32
    assert float(ours) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_weighted_moments_of_repeats_are_those_of_the_repeated_set():
    x = normal(5)
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0])
    repeated = x.repeat_interleave(weights.long(), 0)
    ours = Moments.of(x, weights)
    torch.testing.assert_close(ours.mean, repeated.mean(0))
    # same shares, other divisor: weights are of independent items, not counts
    plain = torch.cov(repeated.T, correction=0)
    squares = float((weights / weights.sum()).square().sum())
    torch.testing.assert_close(ours.covariance, plain / (1 - squares))
    assert ours.n == pytest.approx(1 / squares)
    torch.testing.assert_close(Moments.of(x).covariance, torch.cov(x.T))


@pytest.mark.parametrize("weighted", [False, True])
def test_merged_shards_are_the_moments_of_one_pass(weighted):
    x = normal(100, 6, scale=3.0, mean=50.0)
    weights = normal(100, 1, 1)[:, 0].exp() if weighted else None
    whole = Moments.of(x, weights)
    sizes = [2, 41, 7, 50]
    weights_of = [None] * 4 if weights is None else list(weights.split(sizes))
    shards = [Moments.of(a, w) for a, w in zip(x.split(sizes), weights_of, strict=True)]
    ours = shards[0].merged(shards[1]).merged(shards[2].merged(shards[3]))
    # float64 sums of numbers of order 50² over 100 items
    torch.testing.assert_close(ours.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.covariance, whole.covariance, rtol=0, atol=1e-11)
    assert ours.n == pytest.approx(whole.n, rel=1e-12)
    assert ours.weight == pytest.approx(whole.weight, rel=1e-12)


def test_frechet_names_its_extractor_and_its_numbers():
    text = str(frechet(normal(30), normal(40, seed=1), extractor="mnist-classifier"))
    assert "mnist-classifier" in text
    assert "30 against 40" in text


@pytest.mark.filterwarnings("default")
def test_frechet_warns_of_few_items_only():
    with pytest.warns(UserWarning, match="from 30 items"):
        frechet(normal(30), normal(3000), extractor="x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet(normal(2048), normal(3000, seed=1), extractor="x")


def test_mmd_of_gaussians_is_the_closed_form():
    # E k of N(a, I) and N(b, I) in d dimensions: (h²/(h²+2))^(d/2) exp(-|a-b|² / 2(h²+2))
    d, h, shift = 2, 1.5, 1.0
    factor = (h * h / (h * h + 2)) ** (d / 2)
    gap = torch.tensor([shift] * d).square().sum().item()
    expected = 2 * factor * (1 - math.exp(-gap / (2 * (h * h + 2))))
    estimates = [
        mmd(normal(400, d, 2 * s), normal(400, d, 2 * s + 1, shift), bandwidth=h).value
        for s in range(40)
    ]
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - expected) < 3 * error
    assert error < 0.02 * expected


def test_mmd_is_unbiased_where_the_laws_agree():
    estimates = [
        mmd(normal(50, 2, 2 * s), normal(50, 2, 2 * s + 1), bandwidth=1.0).value for s in range(200)
    ]
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates)) < 3 * error
    # a V-statistic would be above 2 (1 - E k) / 50 = .03: the standard error must tell them apart
    assert error < 0.003


def test_weighted_mmd_reaches_the_tilted_law():
    # N(0, 1) weighted by exp(x) is N(1, 1)
    values = []
    for s in range(40):
        pool, target = normal(500, 1, 2 * s), normal(500, 1, 2 * s + 1, 1.0)
        values.append(mmd(pool, target, bandwidth=1.0, weights_x=pool[:, 0].exp()).value)
    unweighted = mmd(normal(500, 1, 0), normal(500, 1, 1, 1.0), bandwidth=1.0).value
    # self-normalised weights are biased by O(1 / ESS), here 1 / 184, hence the floor of .006
    assert abs(np.mean(values)) < 0.006
    assert unweighted > 0.1


def test_mmd_of_counts_is_that_of_repeats_and_a_reference_keeps_its_part():
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) + 5 for n in (40, 70))
    counts = torch.randint(1, 6, (40,), generator=generator)
    weights = torch.rand(70, generator=generator, dtype=torch.float64)
    own = within(y, bandwidth=1.5, weights=weights)
    fast = mmd(x, y, bandwidth=1.5, counts_x=counts, weights_y=weights, within_y=own)
    slow = mmd(x.repeat_interleave(counts, 0), y, bandwidth=1.5, weights_y=weights)
    assert fast.value == pytest.approx(slow.value, rel=1e-11)  # float64 sums in another order
    assert fast.n == slow.n
    for bad, named in (
        ({"counts_x": counts, "weights_x": counts, "bandwidth": 1.0}, "counts_x"),
        ({"within_y": own}, "within_y"),
    ):
        with pytest.raises(ValueError, match=named):
            mmd(x, y, **bad)


def test_mmd_does_not_depend_on_the_block_size(monkeypatch):
    x, y = normal(50), normal(70, seed=1)
    whole = mmd(x, y)
    monkeypatch.setattr(sys.modules["steering.metrics.mmd"], "_BLOCK", 7)
    assert mmd(x, y).value == pytest.approx(whole.value, rel=1e-9)
    direct = torch.cdist(torch.cat([x, y]), torch.cat([x, y]))
    upper = direct[torch.triu(torch.ones_like(direct), 1).bool()]
    assert whole.bandwidth == pytest.approx(float(upper.median()), rel=1e-9)


def test_kid_is_the_mean_over_all_pairs():
    x, y = normal(8, 3), normal(6, 3, 1, 0.5)

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    def within(z):
        return np.mean([kernel(a, b) for i, a in enumerate(z) for b in z[:i]])

    across = np.mean([kernel(a, b) for a in x for b in y])
    ours = kid(x, y, extractor="pixels")
    assert ours.value == pytest.approx(within(x) + within(y) - 2 * across, rel=1e-12)
    assert all(part in str(ours) for part in ("KID", "cubic", "pixels", "8 against 6"))


def test_kid_agrees_with_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    class Pixels(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1)

    a, b = (torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    # one subset that holds everything: the same unbiased estimator without its randomness
    theirs = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=40, normalize=True)
    theirs.update(a, real=True)
    theirs.update(b**2, real=False)
    ours = kid(a.flatten(1), (b**2).flatten(1), extractor="pixels")
    # theirs is computed in float32, from kernel values of order 1
    assert float(ours) == pytest.approx(float(theirs.compute()[0]), abs=1e-5)


def test_cmmd_is_the_mmd_of_directions():
    x, y = normal(30, 3), normal(40, 3, 1, 0.5)
    ours = cmmd(x, 5 * y, extractor="clip")
    unit = [z / z.norm(dim=1, keepdim=True) for z in (x, y)]
    assert ours.value == pytest.approx(1000 * mmd(unit[0], unit[1], bandwidth=10.0).value)
    assert "CMMD" in str(ours)


def test_weighted_kernels_of_equal_weights_are_the_plain_ones():
    x, y = normal(30, 3), normal(40, 3, 1)
    for distance in (kid, cmmd, mmd):
        plain = distance(x, y, extractor="x").value
        weighted = distance(x, y, extractor="x", weights_x=torch.full((30,), 7.0)).value
        assert weighted == pytest.approx(plain, rel=1e-9)


def test_manifold_of_one_law_is_the_closed_form():
    # Naeem et al., lemma 2: E coverage = 1 - C(2n-1-k, n) / C(2n-1, n), whatever the law
    n, k = 40, 5
    expected = 1 - math.comb(2 * n - 1 - k, n) / math.comb(2 * n - 1, n)
    runs = [
        manifold(normal(n, 3, 2 * s), normal(n, 3, 2 * s + 1), extractor="x", k=k)
        for s in range(60)
    ]
    for values, mean in (
        ([r.coverage for r in runs], expected),
        ([r.density for r in runs], 1.0),  # each ball holds k of n others, so k of n strangers
    ):
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert abs(np.mean(values) - mean) < 3 * error
        assert error < 0.02


def test_manifold_tells_quality_from_variety():
    real = torch.cat([normal(60, 2, 0), normal(60, 2, 1, 20.0)])
    one_mode = normal(120, 2, 2)
    r = manifold(real, one_mode, extractor="x", k=3)
    assert r.precision > 0.9
    assert r.recall < 0.6
    assert r.coverage < 0.6
    junk = manifold(real, normal(120, 2, 3, -50.0), extractor="x", k=3)
    assert (junk.precision, junk.recall, junk.density, junk.coverage) == (0, 0, 0, 0)
    swapped = manifold(one_mode, real, extractor="x", k=3)
    assert (swapped.precision, swapped.recall) == (r.recall, r.precision)


def test_manifold_does_not_depend_on_the_block_size(monkeypatch):
    sets = normal(50), normal(70, seed=1)
    whole = manifold(*sets, extractor="x")
    monkeypatch.setattr(sys.modules["steering.metrics.manifold"], "_BLOCK", 7)
    assert manifold(*sets, extractor="x") == whole


def test_exact_divergences_are_the_closed_forms():
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert kl(p, q) == pytest.approx(0.5 * math.log(2))
    assert kl(q, p) == math.inf
    assert total_variation(p, q) == pytest.approx(0.25)
    assert kl(p, p) == total_variation(p, p) == 0
    assert kl(p + 700, q - 700) == pytest.approx(0.5 * math.log(2))  # need not be normalised


def test_mmd_says_what_it_is():
    text = str(mmd(normal(5), normal(6, seed=1), extractor="pixels"))
    for part in ("unbiased", "RBF", "pixels", "5 against 6"):
        assert part in text


def test_diversity_is_the_mean_over_pairs():
    x = normal(20)
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(20) for j in range(i)]
    assert float(diversity(x, extractor="x")) == pytest.approx(float(sum(pairs) / len(pairs)))
    assert float(diversity(torch.eye(5), extractor="x")) == pytest.approx(1)
    assert float(diversity(torch.ones(5, 3), extractor="x")) == pytest.approx(0, abs=1e-12)
    assert float(diversity(torch.tensor([[1.0], [-2.0]]), extractor="x")) == pytest.approx(2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: frechet(normal(1), normal(9), extractor="x"), "has 1 item"),
        (lambda: frechet(normal(9), normal(9, 3), extractor="x"), "4 features and b has 3"),
        (lambda: frechet(normal(9), normal(9), extractor=""), "extractor"),
        (lambda: frechet(normal(9) * math.inf, normal(9), extractor="x"), "not finite"),
        (lambda: frechet(torch.ones(9, 4), normal(9), extractor="x"), "do not vary"),
        (lambda: frechet(torch.rand(9, 1, 4, 4), normal(9), extractor="x"), r"\[N, d\]"),
        (lambda: Moments.of(normal(3), torch.tensor([1.0, 0.0, 0.0])), "at least two"),
        (lambda: Moments.of(normal(3), torch.ones(2)), "one weight per item"),
        (lambda: mmd(normal(1), normal(9)), "has 1 item"),
        (lambda: mmd(normal(9), normal(9, 3)), "4 dimensions and y has 3"),
        (lambda: mmd(normal(9), normal(9), bandwidth=0.0), "bandwidth"),
        (lambda: mmd(torch.ones(9, 2), torch.ones(9, 2)), "median"),
        (lambda: Moments.of(normal(3)).merged(Moments.of(normal(3, 3))), "use one extractor"),
        (lambda: kid(normal(9), normal(9), extractor=""), "extractor"),
        (lambda: cmmd(torch.zeros(9, 4), normal(9), extractor="x"), "zeros"),
        (lambda: manifold(normal(5), normal(9), extractor="x"), "k=5 neighbours of 5"),
        (lambda: manifold(normal(9), normal(9), extractor="x", k=0), "k=0"),
        (lambda: manifold(normal(9), normal(9, 3), extractor="x"), "4 dimensions and"),
        (lambda: kl(torch.tensor([0.0, math.nan]), torch.zeros(2)), "log_p holds nan"),
        (lambda: kl(torch.zeros(3), torch.zeros(2)), "3 states and log_q has 2"),
        (lambda: total_variation(torch.zeros(2), torch.full((2,), -math.inf)), "log_q has no"),
        (lambda: diversity(torch.zeros(3, 2), extractor="x"), "zeros"),
        (lambda: diversity(normal(1), extractor="x"), "has 1 item"),
        (lambda: diversity(normal(3), extractor=None), "extractor"),
    ],
)
def test_bad_input_gets_a_clear_error(call, match):
    with pytest.raises(ValueError, match=match):
        call()
