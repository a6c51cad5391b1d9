"""The bar that a run shows, and in a notebook the curve of its rewards, drawn while it runs."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm.auto import tqdm

from samplers.engine import Engine

_REDRAW_SECONDS = 1.5  # between two drawings of the curve, at least
_SHARE = 0.02  # of the time, at most, goes into drawing it


class Progress:
    """A bar over network rows, with the best and the mean reward; in a notebook their curve too.

    Args:
        total: network rows expected, None if unknown.
        show: False draws nothing.
        what: stands before the bar.
    """

    def __init__(self, total: int | None, show: bool, what: str | None = None) -> None:
        self._seen, self._finite, self._sum, self._best = 0, 0, 0.0, -math.inf
        self._bar = tqdm(total=total, unit="row", desc=what, disable=not show, mininterval=0.2)
        self._curve = _Curve() if show and _in_notebook() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._curve is not None:
            self._curve.draw(last=True)
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
            if self._curve is not None:
                self._curve.history = engine.history
                self._curve.draw()
        self._bar.update(int(engine.ledger.rows.sum()) - self._bar.n)


class _Curve:
    """The picture in a notebook's cell, drawn anew from time to time."""

    def __init__(self) -> None:
        self.history: Any = None
        self._handle: Any = None
        self._next = 0.0  # when it may be drawn again

    def draw(self, last: bool = False) -> None:
        """Draw what has come in; not before its time, unless it is the last."""
        if self.history is None or (not last and time.monotonic() < self._next):
            return
        from samplers.view.curve import curve

        began = time.monotonic()
        picture = curve(self.history)
        if self._handle is None:
            show: Any = sys.modules["IPython"].display.display
            self._handle = show(picture, display_id=True)
        else:
            self._handle.update(picture)
        ended = time.monotonic()
        self._next = ended + max(_REDRAW_SECONDS, (ended - began) / _SHARE)


def _in_notebook() -> bool:
    """Are cells being run, with somewhere to draw to? IPython is there then; it is not needed."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"
