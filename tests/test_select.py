"""Selection: the probabilities are those of the formula, narrow and wide alike."""

import math
from array import array

import pytest
import torch

from search.select import WIDE, boltzmann, upper_confidence
from steering.noise import uniform


def children(n: int) -> tuple[array, array]:
    values = uniform(torch.tensor([n]), (2, n))[0] * 4 - 2
    return array("d", values[0].tolist()), array("d", values[1].tolist())


@pytest.mark.parametrize("n", [2, 5, WIDE, WIDE + 1, 100])
@pytest.mark.parametrize(("eps", "beta"), [(0.5, 0.5), (0.0, 1.0), (0.5, 0.0)])
def test_a_fine_grid_of_uniforms_meets_every_child_in_proportion(n, eps, beta):
    score, ratio = children(n)
    both = torch.tensor([score.tolist(), ratio.tolist()], dtype=torch.float64).sum(0)
    q = (beta * both).softmax(0)
    q = (1 - eps) * q + eps / n
    grid = 2_000
    met = torch.zeros(n, dtype=torch.float64)
    for k in range(grid):
        child, log_nq = boltzmann(score, ratio, (k + 0.5) / grid, eps, beta)
        met[child] += 1 / grid
        assert math.isclose(log_nq, math.log(n * q[child]), abs_tol=1e-12)
    assert (met - q).abs().max() <= 1.01 / grid  # each interval, to one grid point


def test_a_weight_is_bounded():
    score, ratio = array("d", [0.0, -1e300, -1e38, -5.0]), array("d", [0.0] * 4)
    for k in range(1000):
        _, log_nq = boltzmann(score, ratio, (k + 0.5) / 1000, 0.5, 0.5)
        assert -log_nq <= math.log(2) + 1e-12


def test_an_only_child_is_certain():
    assert boltzmann(array("d", [-3.0]), array("d", [1.0]), 0.9, 0.5, 0.5) == (0, 0.0)
    assert upper_confidence(array("d", [-3.0]), array("d", [1.0]), 1.0) == 0


@pytest.mark.parametrize("n", [2, WIDE, WIDE + 1, 100])
def test_the_upper_bound_is_the_formula(n):
    score, visits = children(n)
    visits = array("d", [1 + round(abs(v) * 10) for v in visits])
    s, v = torch.tensor([score.tolist(), visits.tolist()], dtype=torch.float64)
    for width in (0.0, 0.3, 10.0):
        bound = s + width * (v.sum().log() / v).sqrt()
        assert upper_confidence(score, visits, width) == int(bound.argmax())
    rare = array("d", [1000.0] * (n - 1) + [1.0])
    assert upper_confidence(score, rare, 1e3) == n - 1  # what was hardly seen is looked at
