"""Compute against quality: one panel per task, one line per sampler, intervals as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samplers.table import Point, Row, points

# Okabe and Ito's colours, told apart by the colour-blind; markers and dashes tell lines apart in
# black and white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", "-.", ":")
_BETTER = {
    **dict.fromkeys(("frechet", "mmd"), " (lower is better)"),
    **dict.fromkeys(("reward", "best"), " (higher is better)"),
}
_AXES = {"nfe": "network rows per prompt", "seconds": "seconds per run and prompt"}


def plot(
    rows: Sequence[Row],
    path: str | Path,
    metric: str,
    *,
    against: str = "nfe",
    note: str = "",
) -> Path:
    """Draw a figure of a sweep against compute, with 95 % intervals over seeds and prompts.

    An axis over which means vary more than fivefold is logarithmic, and its bars are intervals of
    the logarithm.

    Args:
        rows: from `samplers.table.read`.
        path: file to write; its ending says the format: .png, .pdf or .svg.
        metric: a column, as for `samplers.table.points`.
        against: "nfe", network rows, or "seconds"; both on a logarithmic axis.
        note: a line below the panels, for instance the extractor.

    Raises:
        ValueError: no row has the metric, or no time is known.
        ImportError: matplotlib is not installed.
    """
    if against not in _AXES:
        raise ValueError(f"against={against!r}: give nfe or seconds.")
    found = points(rows, metric)
    if against == "seconds":
        found = [p for p in found if math.isfinite(p.seconds)]
        if not found:
            raise ValueError("seconds are not known: every run went on from its record.")
    figures, rc_context = _matplotlib()
    tasks = list(dict.fromkeys(p.task for p in found))
    samplers = list(dict.fromkeys(p.sampler for p in found))
    columns = 2 if len(tasks) == 4 else min(len(tasks), 3)
    lines = math.ceil(len(tasks) / columns)
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        # no pyplot: it would change the caller's backend
        figure = figures.Figure(
            figsize=(1.2 + 3.2 * columns, 0.9 + 2.7 * lines), layout="constrained"
        )
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        handles: dict[str, Any] = {}
        for task, axis in zip(tasks, axes.flat, strict=False):
            _panel(axis, [p for p in found if p.task == task], samplers, against, handles)
            axis.set_title(task, loc="left", fontweight="bold")
        for line in range(lines):
            axes[line, 0].set_ylabel(metric + _BETTER.get(metric, ""))
        for axis in axes[-1]:
            axis.set_xlabel(_AXES[against])
        names = math.ceil(len(samplers) / math.ceil(len(samplers) / 5))  # in a line: at most five
        figure.legend(
            [handles[s] for s in samplers], samplers, loc="outside lower center", ncols=names,
            frameon=False, title=note or None,
        )  # fmt: skip
        figure.savefig(path, dpi=160)
    return Path(path)


def _panel(
    axis: Any,
    found: Sequence[Point],
    samplers: Sequence[str],
    against: str,
    handles: dict[str, Any],
) -> None:
    """Draw one task; what was drawn for each sampler goes into `handles`."""
    from matplotlib import ticker

    means = [p.mean for p in found]
    logarithmic = min(means) > 0 and max(means) > 5 * min(means)
    for k, sampler in enumerate(samplers):
        mine = sorted((p for p in found if p.sampler == sampler), key=lambda p: p.nfe)
        if not mine:
            continue
        x = [getattr(p, against) for p in mine]
        # lines of one budget would hide each other's bars: each stands a little aside
        x = [v * 1.04 ** (k - (len(samplers) - 1) / 2) for v in x]
        bars = list(zip(*(_bar(p, logarithmic) for p in mine), strict=True))
        handles[sampler] = axis.errorbar(
            x, [p.mean for p in mine], yerr=bars, color=_COLOURS[k % 7],
            marker=_MARKERS[k % 7], linestyle=_DASHES[k // 7 % 4 if k >= 7 else k % 4],
            markersize=4.5, linewidth=1.4, elinewidth=0.8, capsize=1.5,
        )  # fmt: skip
    axis.set_xscale("log")
    if logarithmic:
        axis.set_yscale("log")
        axis.set_ylim(min(means) / 2, 2 * max(means))  # bars may run out of it
    ruled = [axis.xaxis, axis.yaxis] if logarithmic else [axis.xaxis]
    for ruler in ruled:
        ruler.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
        ruler.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:,.10g}"))
        ruler.set_minor_formatter(ticker.NullFormatter())
    axis.grid(True, which="major", linewidth=0.4, alpha=0.5)


def _bar(point: Point, logarithmic: bool) -> tuple[float, float]:
    """Lengths of a bar below and above; on a logarithmic axis the interval of the logarithm, to
    first order. 0 where there is no interval."""
    if not math.isfinite(point.low):
        return 0.0, 0.0
    half = (point.high - point.low) / 2
    if not logarithmic:
        return half, half
    factor = math.exp(min(half / point.mean, 50.0))
    return point.mean * (1 - 1 / factor), point.mean * (factor - 1)


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib import figure, rc_context
    except ImportError as error:
        raise ImportError(
            'plots need matplotlib: pip install "diffusion-steering[plot]".'
        ) from error
    return figure, rc_context
