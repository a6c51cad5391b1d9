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
    guided: int = 0  # items that a guidance asked its reward about, beside `reward_calls`
    decodes: int = 0  # states decoded
    replayed: int = 0  # of `rows`, those answered from a record
    seconds: float = 0.0  # of wall clock
    scoring_seconds: float = 0.0  # decoding and scoring took, partly while denoising went on
    waited_seconds: float = 0.0  # of them, nothing else could be done
    first_error: str | None = None  # the first failure of a reward

    @staticmethod
    def empty(conditions: int) -> Ledger:
        """Nothing spent on R conditions."""
        zeros = torch.zeros(conditions, dtype=torch.int64)
        return Ledger(zeros, zeros.clone())

    def add(self, other: Ledger) -> None:
        """Count what another ledger of the same conditions has counted."""
        for name in ("rows", "reward_calls", "rescored", "calls", "padded", "backward", "guided"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("decodes", "replayed", "seconds", "scoring_seconds", "waited_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_error = self.first_error or other.first_error


@dataclass
class History:
    """Every reward in the order it was seen."""

    nfe: list[int] = field(default_factory=list)  # network rows spent in all, when it was seen
    reward: list[float] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
