"""Sweeps: nothing is done twice, nothing is lost, and the figures are those of the runs."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
import time

import pytest
import torch

from samplers import SMC, Ancestral, BestOfN, Importance, sample, table
from samplers.journal import read as read_record
from steering.metrics import Moments, frechet, mmd
from tests.brownian import brownian, first
from tests.sweeping import second, small

pytestmark = pytest.mark.filterwarnings("ignore:Fréchet distance from")


def without_seconds(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished sweep, and what it said."""
    out, said = tmp_path_factory.mktemp("sweep"), []
    assert small().run(out, report=said.append)
    return out, said


def test_every_run_is_there_once(done):
    out, said = done
    rows = table.read(out)
    keys = [(r["task"], r["sampler"], r["nfe"], r["seed"], r["prompt"]) for r in rows]
    assert len(set(keys)) == len(keys) == 2 * 3 * 2 * 2 * 2
    # 2 parts of the reference, 2 candidates on one seed of each task and budget, and the runs
    assert len(said) == 2 + 2 * 4 + 24
    assert all(row["rows"] <= row["nfe"] for row in rows)


def test_the_figures_are_those_of_the_run(done):
    out, _ = done
    row = next(r for r in table.read(out) if (r["task"], r["sampler"]) == ("first", "importance")
               and (r["nfe"], r["seed"], r["prompt"]) == (400, 1, 1))  # fmt: skip
    run = sample(
        brownian(prompts=("a", "b")), first, Importance(), nfe=400, lam=1.0, draws=200, seed=1,
        also=[second], progress=False,
    )  # fmt: skip
    mine = run.rows == 1
    share = run.counts[mine] / 200
    assert row["reward"] == pytest.approx(float(share.double() @ run.rewards[mine]))
    assert row["also: second"] == pytest.approx(float(share.double() @ run.also["second"][mine]))
    assert row["ess"] == pytest.approx(float(run.ess[1]))
    # the reference by hand: 700 walks of seeds that no run has
    pool = [
        sample(brownian(prompts=("a", "b")), first, Ancestral(n), seed=2_000_000 + k,
               progress=False)
        for k, n in enumerate((500, 200))
    ]  # fmt: skip
    x = torch.cat([p.items[p.rows == 1] for p in pool])
    weights = x[:, 0].double().exp()
    draws = run.items[mine].repeat_interleave(run.counts[mine], 0)
    expected = frechet(draws, Moments.of(x, weights), extractor="identity")
    assert row["frechet"] == pytest.approx(float(expected), rel=1e-9)
    assert row["reference_ess"] == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum()))
    near = mmd(draws, x, weights_y=weights, bandwidth=2.0).value
    assert abs(row["mmd"] - near) < 0.1  # another bandwidth: the same order


def test_settings_are_chosen_on_other_seeds_and_the_search_is_counted(done):
    out, _ = done
    for row in table.read(out):
        if row["sampler"] != "SMC":
            assert row["tuning_rows"] == 0
            continue
        folder = out / "runs" / table.slug(row["task"]) / "smc" / str(row["nfe"])
        tried = [table.read_rows(out, folder / f"tuning-{c}" / "1000000") for c in range(2)]
        means = [sum(r["mmd"] for r in rows) / 2 for rows in tried]
        assert row["setting"].startswith(f"SMC(particles={(8, 16)[means[1] < means[0]]},")
        assert row["tuning_rows"] == sum(r["rows"] for rows in tried for r in rows)
        assert {r["seed"] for rows in tried for r in rows} == {1_000_000}


def test_asked_again_nothing_is_done_and_more_is_added(done):
    out, _ = done
    said = []
    assert small().run(out, report=said.append)
    assert said == []
    before = {p: p.read_bytes() for p in out.rglob(table.ROW)}
    more = {"seeds": 3, "nfe": [200], "samplers": {"best": BestOfN(), "importance": Importance()}}
    assert small(**more).run(out, report=said.append)
    assert len(said) == 2 * 3 + 2 * 1
    assert all(path.read_bytes() == content for path, content in before.items())
    plan = json.loads((out / table.PLAN).read_text())
    assert set(plan["samplers"]) == {"importance", "DTS", "SMC", "best"}


def test_a_sweep_of_another_kind_is_refused(done):
    out, _ = done
    for changed, named in (
        ({"lam": 2.0}, "lam"),
        ({"model": brownian(prompts=("a", "c"))}, "prompts"),
        ({"samplers": {"SMC": SMC(9)}}, "SMC"),
        ({"tasks": {"first": second}}, "first"),
        ({"tasks": {"third": second}}, "reference"),
        ({"reference": 900}, "reference"),
    ):
        with pytest.raises(ValueError, match=named):
            small(**changed).run(out)


def test_time_runs_out_between_runs_and_shards_share_the_work(tmp_path, done):
    whole, _ = done
    quick = {"samplers": {"importance": Importance(), "SMC": [SMC(8), SMC(16)]}, "nfe": [200]}
    assert not small(**quick).run(tmp_path, minutes=0.0)
    assert not list(tmp_path.rglob(table.ROW))
    said = [[], []]
    for k in (1, 0):
        assert small(**quick).run(tmp_path, shard=(k, 2), report=said[k].append)
    assert min(map(len, said)) >= 4
    assert sum(map(len, said)) >= 2 + 2 * 2 + 8  # the reference perhaps twice
    chosen = [r for r in table.read(whole) if r["nfe"] == 200 and r["seed"] < 2
              and r["sampler"] in quick["samplers"]]  # fmt: skip
    assert without_seconds(table.read(tmp_path)) == without_seconds(chosen)


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path, done):
    """SIGKILL at 20 random moments; then rows and records equal those of an uninterrupted sweep."""
    whole, _ = done
    chance = random.Random(0)
    folders, kills = [tmp_path / "0"], 0
    folders[0].mkdir()
    while kills < 20:
        process = subprocess.Popen([sys.executable, "-m", "tests.sweeping", str(folders[-1])])
        before = len(list(folders[-1].rglob("*")))
        while process.poll() is None and len(list(folders[-1].rglob("*"))) < before + 1:
            time.sleep(0.01)  # it has begun: python takes seconds to start
        time.sleep(chance.uniform(0, 0.2))
        kills += process.poll() is None
        process.kill()
        if process.wait() == 0:  # finished between two kills: another one
            folders.append(tmp_path / str(len(folders)))
            folders[-1].mkdir()
    expected = [r for r in table.read(whole) if r["seed"] < 2 and r["sampler"] != "best"]
    for out in folders:
        small().run(out)
        assert without_seconds(table.read(out)) == without_seconds(expected)
        for path in out.rglob("record"):
            mine, theirs = (
                {w.question[1:]: str((w.reward, w.failed)) for w in read_record(p).record.walks}
                for p in (path, whole / path.relative_to(out))
            )
            assert mine.keys() >= theirs.keys()
            assert {q: mine[q] for q in theirs} == theirs  # the toy's states are equal to the bit


def test_a_budget_that_one_sampler_cannot_use_stops_no_other(tmp_path):
    sweep = small(samplers={"SMC": SMC(100), "importance": Importance()}, seeds=1, nfe=[200])
    said = []
    sweep.run(tmp_path, report=said.append)
    rows = table.read(tmp_path)
    assert {r["sampler"] for r in rows if "refused" in r} == {"SMC"}
    assert "population of 100" in "".join(said)
    assert {p.sampler for p in table.points(rows, "reward")} == {"importance"}


@pytest.mark.parametrize(("seeds", "prompts"), [(8, 8), (3, 1), (2, 1), (1, 4), (3, 5)])
def test_intervals_cover_the_mean_as_often_as_they_say(seeds, prompts):
    """Seeds and prompts with effects of their own: of 200 intervals of 95 %, 180 to 200 cover the
    mean. Three deviations below 190 are 181; two axes take the smaller number's quantile, which is
    on the safe side."""
    covered = 0
    for case in range(200):
        z = torch.randn(3, seeds, prompts, generator=torch.Generator().manual_seed(case)).double()
        grid = z[0, :, :1] + 2 * z[1, :1, :] * (prompts > 1) + z[2]
        rows = [
            {"task": "t", "sampler": "s", "nfe": 1, "seed": s, "prompt": p, "seconds": None,
             "reward": float(grid[s, p])}
            for s in range(seeds) for p in range(prompts)
        ]  # fmt: skip
        (point,) = table.points(rows, "reward")
        assert point.mean == pytest.approx(float(grid.mean()))
        covered += point.low <= 0 <= point.high
    assert 180 <= covered <= 200


def test_a_mistake_in_a_reward_ends_the_sweep_and_is_not_kept(tmp_path):
    def wrong(x, prompts):
        return x[:, :1]

    wrong.__name__ = "first"
    few = {"samplers": {"importance": Importance()}, "seeds": 1, "nfe": [200], "reference": 0}
    few |= {"objective": "reward", "extractor": None}
    with pytest.raises(ValueError, match=r"returned shape \(16, 1\)"):
        small(**few, tasks={"first": wrong}).run(tmp_path)
    assert small(**few, tasks={"first": first}).run(tmp_path)
    assert not any("refused" in row for row in table.read(tmp_path))


@pytest.mark.parametrize("left", [b"", b'{"crc":"12345678","data":{"kind"'])
def test_a_record_killed_in_its_first_line_is_begun_anew(tmp_path, left):
    few = {"samplers": {"importance": Importance()}, "seeds": 1, "nfe": [200], "reference": 0}
    few |= {"objective": "reward", "extractor": None}
    journal = tmp_path / "runs" / "first" / "importance" / "200" / "0" / "record" / "journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(left)
    assert small(**few).run(tmp_path)
    rows = [r for r in table.read(tmp_path) if r["task"] == "first"]
    assert [r["found"] for r in rows] == [20, 20]


def test_names_that_share_a_folder_are_refused_whenever_they_come(tmp_path):
    few = {"seeds": 1, "nfe": [200], "reference": 0, "objective": "reward", "extractor": None}
    assert small(**few, samplers={"DTS": Importance(), "DTS*": BestOfN()}).run(tmp_path)
    assert {r["sampler"] for r in table.read(tmp_path)} == {"DTS", "DTS*"}
    with pytest.raises(ValueError, match="'dts' has no folder of its own beside 'DTS'"):
        small(**few, samplers={"dts": Importance()}).run(tmp_path)
    with pytest.raises(ValueError, match=r"'\*\*' has|'!' has"):
        small(**few, samplers={"!": Importance()})


def test_runs_without_a_figure_are_told_and_one_item_is_a_distance(tmp_path):
    base = {"task": "t", "sampler": "s", "nfe": 1, "prompt": 0, "seconds": None}
    rows = [base | {"seed": s, "reward": v} for s, v in enumerate([1.0, 2.0, None])]
    (point,) = table.points(rows, "reward")
    assert (point.runs, point.of) == (2, 3)
    assert "(2 of 3 runs)" in table.markdown(rows, "reward")
    few = {"samplers": {"one": Importance(n=1)}, "seeds": 1, "nfe": [200]}
    assert small(**few).run(tmp_path)
    assert all(r["frechet"] > 0 and r["diversity"] == 0 for r in table.read(tmp_path))


def test_a_law_too_sharp_for_its_reference_has_no_distances_but_rewards(tmp_path):
    few = {"samplers": {"importance": Importance()}, "seeds": 1, "nfe": [200], "lam": 3000.0}
    assert small(**few).run(tmp_path)
    rows = table.read(tmp_path)
    assert all("frechet" not in r and r["reward"] is not None for r in rows)
    assert "No distance for first, 2nd one" in table.notes(rows, tmp_path)


def test_what_the_figures_rest_on_is_told(done):
    out, _ = done
    told = table.notes(table.read(out), out)
    assert "Extractor identity; reference of 700 independent walks per prompt" in told
    assert "SMC on first: 200: SMC(particles=" in told
    assert "rows of search" in told
    assert "fewer than 2,048 draws are biased" in told


def test_tables_hold_every_row(tmp_path, done):
    out, _ = done
    rows = table.read(out)
    table.write_csv(rows, tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        back = list(csv.DictReader(file))
    assert [float(r["reward"]) for r in back] == [r["reward"] for r in rows]
    text = table.markdown(rows, "mmd")
    assert "**2nd one**: mmd" in text
    assert text.count("| importance |") == 2
    with pytest.raises(ValueError, match="metric='fid' is in no row: there are"):
        table.markdown(rows, "fid")
    parquet = pytest.importorskip("pyarrow.parquet")
    table.write_parquet(rows, tmp_path / "t.parquet")
    assert parquet.read_table(tmp_path / "t.parquet").column("reward").to_pylist() == [
        r["reward"] for r in rows
    ]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tasks": {}}, "tasks"),
        ({"tasks": {"a": 3}}, "tasks"),
        ({"tasks": {"a b": first, "a-b": first}}, "folder of its own"),
        ({"samplers": {"x": []}}, "samplers"),
        ({"samplers": {"x": 3}}, "samplers"),
        ({"nfe": []}, "nfe"),
        ({"nfe": [0]}, "nfe"),
        ({"seeds": 0}, "seeds"),
        ({"draws": 1}, "draws"),
        ({"objective": "fid"}, "objective"),
        ({"lam": -1.0}, "lam"),
        ({"lam": math.nan}, "lam"),
        ({"batch": 0}, "batch"),
        ({"also": [3]}, "also"),
        ({"extractor": None, "reference": 0}, "objective"),
        ({"extractor": None, "objective": "reward"}, "extractor"),
    ],
)
def test_bad_sweeps_are_refused(changed, named):
    with pytest.raises((ValueError, TypeError), match=named):
        small(**changed)


def test_an_empty_folder_is_no_sweep(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sweep\.json"):
        table.read(tmp_path)
    with pytest.raises(ValueError, match="shard"):
        small().run(tmp_path, shard=(2, 2))
    one = {"task": "t", "sampler": "s", "nfe": 1, "seed": 0, "prompt": 0, "seconds": None}
    (point,) = table.points([one | {"reward": 1.0}], "reward")
    assert point.mean == 1
    assert math.isnan(point.low)  # one run has no interval
