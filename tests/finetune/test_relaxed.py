"""Gradients of relaxed paths against finite differences and against themselves."""

from __future__ import annotations

import pytest
import torch

from steering.finetune.drakes import Paths
from steering.noise import root_key
from tests.exact.smooth_tokens import Chain, token_chain

ALPHA = 0.7
N = 5
TABLE = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)


def pair(kind: str, schedule: str, steps: int = 3) -> tuple[Chain, Chain]:
    """A chain to tune, and another."""
    return token_chain(kind, schedule, steps=steps), token_chain(
        kind, schedule, steps=steps, seed=1
    )


def loss(paths: Paths) -> torch.Tensor:
    """-E[reward] + alpha KL of N paths under fixed keys."""
    row, key = torch.zeros(N, dtype=torch.int64), root_key(3, torch.arange(N))
    spent = []
    x = paths.start(row, key, spent.append)
    items, apart = paths.end(x, row, key)
    reward = (items * TABLE).sum((1, 2)) + 1.5 * items[:, 0, 0] * items[:, 1, 1]
    return (ALPHA * (apart + sum(spent)) - reward).mean()


def gradient(paths: Paths, chain: Chain) -> torch.Tensor:
    """Of `loss` in all weights, flat."""
    parts = torch.autograd.grad(loss(paths), list(chain.guess.parameters()))
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(
    ("kind", "schedule", "kl"),
    [
        ("masked", "loglinear", "path"),
        ("masked", "cosine", "path"),
        ("uniform", "loglinear", "path"),
    ],
)
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_gradients_are_finite_differences(kind, schedule, kl, tau):
    # Everything relaxed and nothing straight through: the loss is smooth. Central differences of
    # h = 1e-4 along directions of length 14 err by h² · 200 ~ 1e-6 · a third derivative of parts,
    # and by rounding, 1e-16 / h. The uniform chain's law is rounded to float32: 1e-7 / h needs a
    # larger h = 2e-3.
    chain, other = pair(kind, schedule)
    paths = Paths(chain.model, other.model, 3, tau, "none", kl)
    found = gradient(paths, chain)
    weights = list(chain.guess.parameters())
    g = torch.Generator().manual_seed(0)
    h, tolerance = (1e-4, 1e-6) if kind == "masked" else (2e-3, 2e-3)
    for _ in range(4):
        direction = torch.randn(len(found), generator=g, dtype=torch.float64)
        parts = direction.split([w.numel() for w in weights])
        values = []
        for sign in (1, -2, 1):  # forth, back, and where it was
            with torch.no_grad():
                for w, part in zip(weights, parts, strict=True):
                    w += sign * h * part.view_as(w)
                values.append(float(loss(paths)))
        slope = (values[0] - values[1]) / (2 * h)
        assert slope == pytest.approx(float(found @ direction), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kl", ["path", "published"])
@pytest.mark.parametrize("straight_through", ["end", "step"])
def test_checkpointed_gradients_are_equal(straight_through, kl):
    chain, other = pair("masked", "loglinear", steps=4)
    made = [
        gradient(Paths(chain.model, other.model, 3, 1.0, straight_through, kl, keep), chain)
        for keep in (True, False)
    ]
    assert made[0].norm() > 0.01
    assert torch.equal(*made)


@pytest.mark.parametrize("straight_through", ["end", "step"])
def test_items_are_exactly_one_hot(straight_through):
    chain, _ = pair("masked", "loglinear")
    paths = Paths(chain.model, None, 3, 1.0, straight_through)
    row, key = torch.zeros(50, dtype=torch.int64), root_key(0, torch.arange(50))
    items, _ = paths.end(paths.start(row, key), row, key)
    assert set(items.flatten().tolist()) == {0.0, 1.0}
    assert (items.sum(-1) == 1).all()
    assert items.requires_grad


def test_straight_through_steps_walk_as_the_chain_does():
    # z is hard where the noise is largest, which is a draw from the law (Gumbel's trick): the ends
    # of 20000 paths against the enumerated law, whose counts spread by sqrt(p (1 - p) / n)
    from tests.exact.smooth_tokens import enumerated
    from tests.exact.tokens import every

    chain, _ = pair("masked", "loglinear")
    n = 20000
    row, key = torch.zeros(n, dtype=torch.int64), root_key(0, torch.arange(n))
    paths = Paths(chain.model, None, 3, 1.0, "step")
    with torch.no_grad():
        ends = paths.end(paths.start(row, key), row, key)[0].argmax(-1)
    states = every(paths.process.states, paths.process.length)
    law = enumerated(chain.model)[0]
    found = (ends[:, None] == states).all(-1).double().mean(0)
    z = (found - law) / (law * (1 - law) / n).clamp(min=1e-12).sqrt()
    assert z.abs().max() < 4
    assert law[(states < 3).all(1)].min() > 0.005


def test_early_steps_pass_their_cost_alone():
    # the gradient of the whole is that of the relaxed end, plus each early step's own
    chain, other = pair("masked", "loglinear", steps=4)
    paths = Paths(chain.model, other.model, 2, 1.0, "none")
    weights = list(chain.guess.parameters())
    row, key = torch.zeros(N, dtype=torch.int64), root_key(3, torch.arange(N))
    parts = []
    x = paths.start(row, key, parts.append)
    assert len(parts) == 2
    assert not x.is_floating_point()
    assert all((part >= 0).all() and part.sum() > 0.01 and part.requires_grad for part in parts)
    assert all(g.norm() > 0 for g in torch.autograd.grad(sum(parts).mean(), weights))
