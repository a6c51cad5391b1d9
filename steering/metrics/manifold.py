"""Precision, recall, density and coverage: quality and variety apart."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.metrics.features import checked, named

_BLOCK = 2048  # rows of the distance matrix held at a time
_FEW = 2048  # below this the balls around the items are so wide that the numbers say little


@dataclass(frozen=True)
class Manifold:
    """Four numbers on two sets, and what they rest on."""

    precision: float  # share of generated items inside some real item's ball
    recall: float  # share of real items inside some generated item's ball
    density: float  # real balls that hold a generated item, over k: not capped at 1
    coverage: float  # share of real items whose own ball holds a generated item
    k: int
    extractor: str
    n: tuple[int, int]  # real, generated

    def __str__(self) -> str:
        return (
            f"precision {self.precision:.3f}, recall {self.recall:.3f}, density "
            f"{self.density:.3f}, coverage {self.coverage:.3f} (k = {self.k}, extractor "
            f"{self.extractor}, {self.n[0]} real against {self.n[1]} generated)"
        )


def manifold(real: Tensor, generated: Tensor, *, extractor: str, k: int = 5) -> Manifold:
    """Precision, recall, density and coverage with balls that reach to the k-th neighbour.

    B(a) is the ball around item a that reaches to its k-th nearest neighbour in its own set:
    precision = mean_g 1[g in some B(r)], recall = mean_r 1[r in some B(g)],
    density = mean_g #{r: g in B(r)} / k, coverage = mean_r 1[some g in B(r)].
    Two sets of one law give a coverage of 1 - (1/2)^k for equal sizes, not 1.
    Kynkäänniemi et al. 2019, arXiv:1904.06991; Naeem et al. 2020, arXiv:2002.09797.

    Args:
        real: [N, d] features of the reference.
        generated: [M, d] features of what is judged.
        extractor: what made the features.
        k: neighbours; published with 3 for precision and recall and 5 for density and coverage.

    Raises:
        ValueError: N or M <= k, values that are not finite, dimensions that differ, k < 1, no
            extractor named.
    """
    named(extractor)
    r, g = checked("real", real), checked("generated", generated)
    if r.shape[1] != g.shape[1]:
        raise ValueError(f"real has {r.shape[1]} dimensions and generated has {g.shape[1]}.")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k={k!r}: give a whole number >= 1.")
    if min(len(r), len(g)) <= k:
        raise ValueError(
            f"k={k} neighbours of {min(len(r), len(g))} items: give more items, or a smaller k."
        )
    if min(len(r), len(g)) < _FEW:
        warnings.warn(
            f"precision and recall from {min(len(r), len(g))} items: below {_FEW} they depend on "
            "the number. Compare only at equal numbers.",
            stacklevel=2,
        )
    real_reach, generated_reach = _reach(r, k), _reach(g, k)
    inside = torch.zeros(len(g), dtype=torch.float64)  # real balls that hold each generated item
    recalled, covered = [], []
    for rows, reach in zip(r.split(_BLOCK), real_reach.split(_BLOCK), strict=True):
        distance = torch.cdist(rows, g)
        held = distance <= reach[:, None]
        inside += held.sum(0)
        covered.append(held.any(1))
        recalled.append((distance <= generated_reach).any(1))
    return Manifold(
        precision=float((inside > 0).double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=float(inside.mean()) / k,
        coverage=float(torch.cat(covered).double().mean()),
        k=k,
        extractor=extractor,
        n=(len(r), len(g)),
    )


def _reach(x: Tensor, k: int) -> Tensor:
    """Distance [N] from each item to its k-th nearest other one."""
    # the item itself is the nearest, at 0: hence k + 1
    parts = [torch.cdist(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(_BLOCK)]
    return torch.cat(parts)
