"""The denoiser as the engine calls it: at a few fixed sizes, counted, smaller if memory ends."""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.ledger import Ledger
from steering.core import Model

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_CPU_NUMBERS = 2**15  # of the states in one call on a CPU: more rows only overflow its caches


class Network:
    """Counts what its denoiser is called for; `rows` [R, T] int64 is the price of every call.

    Compiled graphs want few shapes, and networks are not bit-equal over batch sizes below 16. So a
    call is filled up with copies of its first row to one of a few sizes, at most `batch` (what
    memory was said to hold); where rows cost little, small states on a CPU, to 16 at least. A
    denoiser that makes several calls of one says `fills = False`, and is not filled up. On a CPU,
    where a batch gains little and caches are small, a batch of images goes in several calls (32
    images of 28 x 28 at a time), never below 16 rows.
    """

    def __init__(self, model: Model, ledger: Ledger, batch: int) -> None:
        self._model, self._ledger, self._largest = model, ledger, batch
        self._fills = getattr(model.denoiser, "fills", True)
        self._memory = _SIZES[-1] + batch  # rows that fit into memory, as far as is known
        steps = torch.arange(model.process.steps, device=model.device)
        time = model.process.time(steps)
        # read once: asking the device in every round would wait for it
        self.rows = torch.stack(
            [
                model.denoiser.rows(time, torch.full((len(steps),), r)).cpu()
                for r in range(len(model.prompts))
            ]
        )

    def __call__(self, x: Tensor, i: Tensor, at: Tensor, row: Tensor) -> Tensor:
        """Clean guesses [N, *D], without gradients.

        A call that runs out of memory is tried again at the next smaller size, from there on for
        good; what was computed before it is kept.

        Args:
            x: [N, *D] states.
            i: [N] their steps, on x's device; `at` [N] the same on the CPU.
            row: [N] their conditions, on the CPU.
        """
        t = self._model.process.time(i)
        parts, done = [], 0
        on_cpu = x.device.type == "cpu"
        said = x[0].numel() * getattr(self._model.process, "tokens", 1)  # numbers in a guess
        least = 16 if on_cpu and 16 * said <= _CPU_NUMBERS else 1  # rows that cost little
        fits = self.at_once(x)
        while done < len(x):
            size = min(len(x) - done, self._largest, self._memory, fits)
            full = next((s for s in _SIZES if s >= max(size, least)), size)
            full = min(full, max(self._largest, least), self._memory) if self._fills else size
            part = slice(done, done + size)
            filled = (_filled(v[part], full) for v in (x, t, row))
            try:
                with torch.no_grad():
                    guess = self._model.denoiser(*filled)
            except torch.OutOfMemoryError:
                if full == 1:
                    raise
                self._memory = max((s for s in _SIZES if s < full), default=full // 2)
                torch.cuda.empty_cache()
                continue
            if x.is_floating_point() and guess.shape[1:] != x.shape[1:]:
                raise TypeError(
                    f"denoiser returned shape {tuple(guess.shape)} for states of shape "
                    f"{(full, *x.shape[1:])}: return one clean guess per state, of the same shape."
                )
            parts.append(guess[:size])
            self._count(row[part], at[part], full - size)
            done += size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def at_once(self, x: Tensor) -> int:
        """How many of the states x [N, *D] go into one call where their device gains by it."""
        fits = max(16, _CPU_NUMBERS // x[0].numel()) if x.device.type == "cpu" else len(x)
        return max((s for s in _SIZES if s <= fits), default=fits) if fits < len(x) else len(x)

    def differentiable(self, x: Tensor, i: Tensor, row: Tensor) -> Tensor:
        """Clean guesses [N, *D] in one call, with gradients; the rows that use them are counted."""
        self._count(row, i.cpu(), 0)
        clean = self._model.denoiser(x, self._model.process.time(i), row)
        if clean.requires_grad:
            clean.register_hook(lambda grad: self._differentiated(len(grad)))
        return clean

    def cost(self, row: Tensor, at: Tensor) -> list[int]:
        """Network rows of one call of conditions `row` [N] at steps `at` [N]."""
        return self.rows[row, at].tolist()

    def _count(self, row: Tensor, at: Tensor, padded: int) -> None:
        self._ledger.calls += 1
        self._ledger.padded += padded
        self._ledger.rows.index_add_(0, row, self.rows[row, at])

    def _differentiated(self, n: int) -> None:
        self._ledger.backward += n


def _filled(x: Tensor, size: int) -> Tensor:
    missing = size - len(x)
    return x if missing <= 0 else torch.cat([x, x[:1].expand(missing, *x.shape[1:])])
