"""Plots of sweeps: every format, every task, one run or many."""

import math
import sys

import pytest
from PIL import Image

from samplers.view.plot import plot


def rows(tasks=2, samplers=3, seeds=3, seconds=1.0):
    return [
        {"task": f"task {t}", "sampler": f"sampler {s}", "nfe": nfe, "seed": seed, "prompt": 0,
         "reward": (s + 1) * 100 / math.sqrt(nfe) + 0.1 * seed, "seconds": seconds,
         "rows": nfe}
        for t in range(tasks) for s in range(samplers) for nfe in (100, 1000, 10_000)
        for seed in range(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_plot_is_written_in_every_format(tmp_path, kind):
    path = plot(rows(), tmp_path / f"p.{kind}", "reward", note="extractor x")
    assert path.stat().st_size > 5000
    if kind == "svg":
        text = path.read_text()
        assert "<!-- sampler 1 -->" in text
        assert "<!-- reward (higher is better) -->" in text
        assert "<!-- extractor x -->" in text


def test_one_run_has_no_bars_and_many_tasks_get_lines_of_three(tmp_path):
    one, many = (
        Image.open(plot(rows(tasks=t, seeds=1), tmp_path / f"{t}.png", "reward")).size
        for t in (1, 5)
    )
    assert many[0] > 2 * one[0]
    assert many[1] > 1.5 * one[1]


def test_any_name_has_its_line_and_the_callers_backend_stays(tmp_path):
    import matplotlib

    matplotlib.use("svg")
    named = [row | {"sampler": "_" + row["sampler"]} for row in rows()]
    text = plot(named, tmp_path / "p.svg", "reward").read_text()
    assert "<!-- _sampler 1 -->" in text
    assert matplotlib.get_backend() == "svg"


def test_what_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="against"):
        plot(rows(), tmp_path / "p.png", "reward", against="hours")
    with pytest.raises(ValueError, match="in no row"):
        plot(rows(), tmp_path / "p.png", "fid")
    with pytest.raises(ValueError, match="seconds are not known"):
        plot(rows(seconds=None), tmp_path / "p.png", "reward", against="seconds")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"diffusion-steering\[plot\]"):
        plot(rows(), tmp_path / "p.png", "reward")
