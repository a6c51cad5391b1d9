"""The bar that a run shows."""

from __future__ import annotations

import math

from tqdm.auto import tqdm

from samplers.engine import Engine


class Progress:
    """A bar over network rows, with the best and the mean reward.

    Args:
        total: network rows expected, None if unknown.
        show: False draws nothing.
        what: stands before the bar.
    """

    def __init__(self, total: int | None, show: bool, what: str | None = None) -> None:
        self._seen, self._finite, self._sum, self._best = 0, 0, 0.0, -math.inf
        self._bar = tqdm(total=total, unit="row", desc=what, disable=not show, mininterval=0.2)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    def update(self, engine: Engine) -> None:
        """Show what the engine has done by now."""
        if self._bar.disable:
            return
        for r in engine.history.reward[self._seen :]:
            if math.isfinite(r):
                self._best = max(self._best, r)
                self._sum += r
                self._finite += 1
        self._seen = len(engine.history.reward)
        if self._finite:
            self._bar.set_postfix(
                best=f"{self._best:.4g}", mean=f"{self._sum / self._finite:.4g}", refresh=False
            )
        self._bar.update(int(engine.ledger.rows.sum()) - self._bar.n)
