"""A result as files: pictures, one image per draw or all texts, and an account in JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from samplers.result import Result
from samplers.view.curve import curve
from samplers.view.grid import image_grid
from samplers.view.ink import number
from samplers.view.page import tree_page
from samplers.view.strip import strip
from samplers.view.tree import tree_picture

_MOST_IN_GRID, _MOST_TREES = 64, 4
_FRAME_MS = 125  # of a clip


def write_files(result: Result, folder: Path, settings: dict[str, Any]) -> list[Path]:
    """Write grid.png, images/, tree.png, tree.html, strip.png, curve.png and result.json; of
    sequences draws.txt, tree.png, tree.html, curve.png and result.json.

    Args:
        result: items must be images, clips or sequences; pictures show clips by their middle
            frames.
        folder: made if missing; files of the same name are replaced.
        settings: how the run was asked for, kept in result.json as it is given.

    Returns:
        What was written, the folder of images as one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "result.json"]
    if result.distinct and result.written:
        written.append(_texts(result, folder / "draws.txt"))
    elif result.distinct:
        written += [draws_picture(result, folder / "grid.png"), _images(result, folder / "images")]
    if any(map(math.isfinite, result.history.reward)):
        written.append(folder / "curve.png")
        curve(result.history).save(written[-1])
    written += trees(result, folder)
    if result.tree is not None and result.distinct and not result.written:
        written.append(folder / "strip.png")
        strip(result, result.best).save(written[-1])
    (folder / "result.json").write_text(
        json.dumps({"settings": settings, **account(result)}, indent=1, allow_nan=False) + "\n"
    )
    return written


def draws_picture(result: Result, path: Path, title: str | None = None) -> Path:
    """Grid of the first 64 draws, each with its reward and how often it was drawn."""
    some = slice(0, _MOST_IN_GRID)
    captions = [
        number(reward) + (f"  x{count}" if count > 1 else "")
        for reward, count in zip(result.rewards.tolist(), result.counts.tolist(), strict=True)
    ]
    image_grid(result.images[some], captions[some], title=title).save(path)
    return path


def trees(result: Result, folder: Path, title: str = "") -> list[Path]:
    """tree.html of all conditions, and tree.png, or tree-0.png, tree-1.png, ... of the first ones;
    none without a tree that has a leaf."""
    if result.tree is None:
        return []
    conditions, written = len(result.tree.ended), []
    for r in range(min(conditions, _MOST_TREES)):
        if ((result.tree.row == r) & result.tree.reward.isfinite()).any():
            path = folder / ("tree.png" if conditions == 1 else f"tree-{r}.png")
            tree_picture(result.tree, result.thumbnails, condition=r, title=title).save(path)
            written.append(path)
    if result.tree.reward.isfinite().any():
        asked = dict(zip(result.rows.tolist(), result.prompts, strict=True))
        prompts = [asked.get(r, f"condition {r}, nothing found") for r in range(conditions)]
        page = tree_page(result.tree, result.thumbnails, prompts=prompts, title=title)
        written.append(folder / "tree.html")
        written[-1].write_text(page, encoding="utf-8")
    return written


def account(result: Result) -> dict[str, Any]:
    """All figures of a result as JSON: numbers that are not finite become null."""
    spent = {f.name: getattr(result.spent, f.name) for f in dataclasses.fields(result.spent)}
    columns = {
        name: getattr(result, name) for name in ("ids", "rows", "rewards", "counts", "weights")
    }
    draws = {
        **columns,
        "finished": result.finished,
        **{f"also: {k}": v for k, v in result.also.items()},
        **({"texts": result.texts} if result.written and result.distinct else {}),
    }
    return _plain(
        {
            "status": result.status,
            "nfe": result.nfe,
            "lam": result.lam,
            "biased": result.biased,
            "distinct": result.distinct,
            "found": result.found,
            "failed": result.failed,
            "ess": result.ess,
            "root_ess": result.root_ess,
            "log_z": result.log_z,
            "spent": spent,
            "draws": draws,
        }
    )


def _texts(result: Result, path: Path) -> Path:
    """All draws as FASTA has them: a line about each, then its text."""
    columns = zip(
        result.texts, result.rewards.tolist(), result.counts.tolist(), result.prompts, strict=True
    )
    lines = []
    for k, (text, reward, count, prompt) in enumerate(columns):
        asked = "" if prompt is None else f" prompt={prompt!r}"
        lines += [f">{k:04d} reward={reward:.6g} count={count}{asked}", text]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _images(result: Result, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9][0-9].*"):
        old.unlink()
    if result.items.ndim == 5:
        for k, (first, *others) in enumerate(result.clips):
            clip = {"save_all": True, "append_images": others, "duration": _FRAME_MS, "loop": 0}
            first.save(folder / f"{k:04d}.webp", lossless=True, **clip)
        return folder
    for k, image in enumerate(result.images):
        image.save(folder / f"{k:04d}.png")
    return folder


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
