"""Weights in log space: sizes, sums, and what each resampling scheme promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.resample import SCHEMES, ess, logsumexp_by, stratified, systematic

EDGE = 1 - 2.0**-53  # the largest uniform there is


def test_effective_size_between_one_item_and_all():
    assert ess(torch.zeros(7, dtype=torch.float64)) == pytest.approx(7)
    one = torch.tensor([0.0, -torch.inf, -torch.inf], dtype=torch.float64)
    assert ess(one) == pytest.approx(1)
    assert ess(torch.full((3,), -torch.inf, dtype=torch.float64)) == 0
    huge = torch.tensor([1e40, 1e40, -1e40], dtype=torch.float64)  # λ = 100, rewards of ±1e38
    assert ess(huge) == pytest.approx(2)


def test_sums_by_group():
    log_w = torch.tensor([0.0, 1.0, -torch.inf, 700.0, 800.0], dtype=torch.float64)
    total = logsumexp_by(log_w, torch.tensor([0, 0, 1, 3, 3]), 4)
    assert total[0] == pytest.approx(math.log(1 + math.e))
    assert total[1] == total[2] == -torch.inf
    assert total[3] == pytest.approx(800 + math.exp(-100))


weights = st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-9)


@given(weights, st.integers(1, 40), st.floats(0, EDGE))
@settings(max_examples=200, deadline=None)
def test_systematic_draws_the_floor_or_the_ceil(weight, n, u):
    w = torch.tensor(weight, dtype=torch.float64)
    count = torch.bincount(
        systematic(w.log(), torch.full((n,), u, dtype=torch.float64)), minlength=len(w)
    )
    assert count.sum() == n
    expected = n * w / w.sum()
    assert (count >= (expected - 1e-9).floor()).all()
    assert (count <= (expected + 1e-9).ceil()).all()


@given(weights, st.lists(st.floats(0, EDGE), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_scheme_draws_a_weight_of_zero(weight, u):
    w = torch.tensor(weight, dtype=torch.float64)
    for scheme in SCHEMES.values():
        index = scheme(w.log(), torch.tensor(u, dtype=torch.float64))
        assert len(index) == len(u)
        assert (w[index] > 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_item_is_drawn_in_proportion(scheme):
    w = torch.tensor([0.05, 0.0, 0.4, 0.25, 0.3], dtype=torch.float64)
    repeats, n = 4000, 7
    u = torch.rand(repeats, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = torch.stack(
        [torch.bincount(SCHEMES[scheme](w.log(), row), minlength=5) for row in u]
    ).double()
    # a count's variance is at most that of independent draws, n w (1 - w); 4 s.e. over 4,000
    allowed = 4 * (n * w * (1 - w) / repeats).sqrt()
    assert ((count.mean(0) - n * w).abs() <= allowed).all()


def test_strata_hold_one_point_each():
    # eight equal items in eight strata: one of each, whatever the uniforms are
    u = torch.tensor([0.0, 0.999, 0.3, 0.5, 0.999, 0.0, 0.9, 0.1], dtype=torch.float64)
    assert stratified(torch.zeros(8, dtype=torch.float64), u).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("log_w", "message"),
    [([-torch.inf] * 3, "all 3 weights are zero"), ([0.0, torch.nan], "nan"), ([torch.inf], "inf")],
)
def test_what_cannot_be_drawn_is_refused(log_w, message):
    with pytest.raises(ValueError, match=message):
        systematic(torch.tensor(log_w, dtype=torch.float64), torch.full((2,), 0.5).double())
