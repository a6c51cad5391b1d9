"""Where a tree branches: what the pilot reads off its walks and siblings."""

import math
from dataclasses import replace

import pytest
import torch

from samplers.branching import USUAL, agreement, chosen, common, levels
from tests.fake_engine import make_plan

PLANTED = (10, 20, 28, 35, 40, 44)


def test_common_is_an_effective_number():
    one_in_five = torch.tensor([0.0, -50, -50, -50, -50] * 8).double()  # effective number 8 of 40
    assert common(one_in_five, 1.0)
    assert not common(torch.tensor([0.0] * 3 + [-50.0] * 97).double(), 1.0)  # 3 of 100
    assert common(torch.tensor([0.0] * 3 + [-50.0] * 97).double(), 0.0)  # λ = 0 prefers none
    assert not common(torch.tensor([0.0, -50.0, -50.0]).double(), 1.0)  # 1 of 3: too few to say
    assert common(torch.tensor([]).double(), 1.0)
    assert common(torch.tensor([1e38] * 5 + [-1e38]).double(), 1e3)


def test_agreement_is_a_correlation():
    """Siblings a = s + e, b = s + e' of normals with Var s = ρ: on ranks, (6/π) asin(ρ/2)."""
    generator = torch.Generator().manual_seed(0)
    shared, a, b = torch.randn(3, 4000, generator=generator).double()
    for rho in (0.2, 0.5, 0.9):
        own = math.sqrt(1 - rho)
        pairs = [math.sqrt(rho) * shared + own * e for e in (a, b)]
        walks = pairs[0].tolist()
        found = agreement(walks, list(zip(*(p.tolist() for p in pairs), strict=True)), 0.5)
        # standard error at most 1 / sqrt(4000)
        assert abs(found - 6 / math.pi * math.asin(rho / 2)) < 3 / math.sqrt(4000)


def test_without_pairs_agreement_is_what_is_usual():
    assert agreement([1.0, 2.0, 3.0], [], 0.5) == pytest.approx(0.5)
    assert agreement([7.0, 7.0, 7.0], [(7.0, 7.0)], 0.5) == 0.5  # nothing to tell apart


def test_steps_are_chosen_where_siblings_begin_to_agree():
    assert chosen(PLANTED, 50, USUAL) == (20, 28, 35, 40, 44)
    assert chosen(PLANTED, 50, {0.55: 0.05, 0.8: 0.3}) == (44,)  # decided at the very end
    assert chosen(PLANTED, 50, {0.55: 0.95, 0.8: 0.999}) == (10, 20, 28, 35)  # early
    # agreement never falls: noise in the estimates must not turn levels around
    assert chosen(PLANTED, 50, {0.55: 0.9, 0.8: 0.2}) == PLANTED


def test_levels_of_short_and_partly_silent_chains():
    for steps in range(2, 30):
        for branch in ("auto", "even"):
            found = levels(branch, 8, make_plan(steps=steps))
            assert list(found) == sorted(set(found))
            assert all(0 <= i < steps for i in found)
    silent = make_plan(steps=10, stochastic=torch.arange(10) < 7)
    assert levels("auto", 8, silent) == (2, 4, 6)
    assert levels("even", 0, silent) == (0, 2, 4, 6)
    assert levels((0, 6), 0, silent) == (0, 6)
    with pytest.raises(ValueError, match="no step from 7 on"):
        levels((0, 7), 0, silent)


def test_a_chain_that_starts_from_one_state_does_not_branch_at_it():
    masked = replace(make_plan(steps=10), varied=False)
    assert levels("even", 0, masked) == (2, 4, 6, 8)
    assert levels((2, 6), 0, masked) == (2, 6)
    assert levels((0, 6), 0, masked) == (6,)
