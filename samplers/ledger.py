"""What a run spent, and what it saw: one place counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Ledger:
    """What a run spent. Network rows count each half of a classifier-free-guidance pair."""

    rows: Tensor  # [R] int64, useful network rows per condition; hard-limited by `nfe`
    reward_calls: Tensor  # [R] int64, items scored
    rescored: int = 0  # items scored again alone, after a batch of them raised
    calls: int = 0  # network calls
    padded: int = 0  # rows that only filled a call up to a fixed size
    backward: int = 0  # rows differentiated through the network
    decodes: int = 0  # states decoded
    replayed: int = 0  # of `rows`, those answered from a record
    seconds: float = 0.0  # of wall clock
    first_error: str | None = None  # the first failure of a reward

    @staticmethod
    def empty(conditions: int) -> Ledger:
        """Nothing spent on R conditions."""
        zeros = torch.zeros(conditions, dtype=torch.int64)
        return Ledger(zeros, zeros.clone())


@dataclass
class History:
    """Every reward in the order it was seen."""

    nfe: list[int] = field(default_factory=list)  # network rows spent in all, when it was seen
    reward: list[float] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
