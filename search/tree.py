"""Trees of kept states: the finished picture, and the law by which leaves are drawn from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """M nodes of R trees, one tree per condition; a parent stands before its children."""

    parent: Tensor  # [M] int64 index of the parent; -1 at the R dummy roots
    step: Tensor  # [M] int64 step index of the state; -1 at dummy roots, T at leaves
    handle: Tensor  # [M] int64 id under which the state is kept; -1 at dummy roots
    row: Tensor  # [M] int64 condition
    value: Tensor  # [M] float64 in units of the reward; nan where no finished leaf lies below
    visits: Tensor  # [M] int64 finished rollouts that passed through
    reward: Tensor  # [M] float64; nan at inner nodes and failures
    failed: Tensor  # [M] bool
    log_ratio: Tensor  # [M] float64, log p - log q of the walk from the parent
    log_w: Tensor  # [M] float64, path weight of a leaf; -inf elsewhere
