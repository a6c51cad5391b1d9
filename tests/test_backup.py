"""Backups: three means, narrow and wide alike, that commute with a shift."""

import math
from array import array

import pytest
import torch

from search.backup import log_mean_exp, maximum, mean
from search.select import WIDE
from tests.test_select import children


@pytest.mark.parametrize("n", [1, 2, WIDE, WIDE + 1, 100])
def test_the_formulas(n):
    score, ratio = children(n)
    s, r = torch.tensor([score.tolist(), ratio.tolist()], dtype=torch.float64)
    assert math.isclose(log_mean_exp(score, ratio), (s + r).exp().mean().log(), abs_tol=1e-12)
    assert math.isclose(mean(score, ratio), (r.exp() * s).sum() / r.exp().sum(), abs_tol=1e-12)
    assert maximum(score, ratio) == s.max()


@pytest.mark.parametrize("backup", [log_mean_exp, mean, maximum])
def test_a_shift_passes_through(backup):
    for n in (3, 50):
        score, ratio = children(n)
        shifted = array("d", [s - 7 for s in score])
        assert math.isclose(backup(shifted, ratio), backup(score, ratio) - 7, abs_tol=1e-12)


@pytest.mark.parametrize("backup", [log_mean_exp, mean, maximum])
@pytest.mark.parametrize("n", [2, 50])
def test_hostile_scores_stay_finite(backup, n):
    score = array("d", [0.0, -1e300] * (n // 2))
    assert math.isfinite(backup(score, array("d", [0.0, -1e300] * (n // 2))))
