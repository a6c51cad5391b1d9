"""The record on disk: what was acknowledged is read back, damage is named, a torn end is cut."""

import dataclasses
import json
import math
import random
import time
import warnings

import pytest
import torch

from samplers import (
    SMC,
    SVDD,
    Beam,
    BestOfN,
    CorruptRecordError,
    Importance,
    TreeSampling,
    TreeSearch,
    Widening,
    ZeroOrder,
    load,
    sample,
)
from samplers.journal import Journal, Walk, read
from samplers.store import Store
from tests.brownian import brownian, first


def walk(entry, **changes):
    usual = {
        "entry": entry, "src": -1, "row": 0, "key": entry - 2**63, "start": 0, "stop": 3,
        "score": True, "angle": math.nan, "rows": 3, "reward": 0.1 * entry, "log_ratio": -0.3,
        "failed": False,
    }  # fmt: skip
    return Walk(**{**usual, **changes})


def written(folder, lines=3):
    journal = Journal(folder, {"model": "toy"})
    for line in range(lines):
        walks = [walk(2 * line), walk(2 * line + 1, reward=math.nan, failed=True, angle=0.2)]
        states = Store()
        states.put([w.entry for w in walks], torch.full((2, 3), float(line)))
        journal.walks(walks, states, Store())
    return folder


def test_walks_and_states_come_back_bit_for_bit(tmp_path):
    saved = read(written(tmp_path))
    assert saved.header["model"] == "toy"
    assert [w.entry for w in saved.record.walks] == list(range(6))
    assert saved.record.walks[2] == walk(2)  # keys of 64 bits and float64 rewards survive JSON
    assert math.isnan(saved.record.walks[3].reward)
    assert saved.states.get([4])[0].tolist() == [2.0, 2.0, 2.0]


def test_a_record_cut_at_any_byte_of_its_last_line_keeps_all_lines_before(tmp_path):
    path = written(tmp_path) / "journal.jsonl"
    raw = path.read_bytes()
    begin = raw[:-1].rfind(b"\n") + 1
    for end in range(begin, len(raw)):
        path.write_bytes(raw[:end])
        assert len(read(tmp_path).record.walks) == 4
    Journal(tmp_path, {}).walks([walk(9)], Store(), Store())  # opening it cuts the torn end
    assert [w.entry for w in read(tmp_path).record.walks] == [0, 1, 2, 3, 9]


def test_damage_gives_one_typed_error_or_the_same_record(tmp_path):
    folder = written(tmp_path)
    whole = read(folder).record.walks
    chance = random.Random(0)
    files = sorted(folder.iterdir())
    for _ in range(400):
        path = chance.choice(files)
        raw = path.read_bytes()
        changed = bytearray(raw)
        for _ in range(chance.choice([1, 3])):
            changed[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(bytes(changed))
        try:
            walks = read(folder).record.walks
            # only a last line that lost its end, or state bytes, can change unnoticed
            assert walks == whole[: len(walks)] or len(walks) == len(whole)
        except CorruptRecordError:
            pass
        path.write_bytes(raw)


def test_a_missing_file_of_states_is_named(tmp_path):
    (written(tmp_path) / "latents-000001.safetensors").unlink()
    with pytest.raises(CorruptRecordError, match="latents-000001"):
        read(tmp_path)


def test_a_record_cannot_point_outside_its_folder(tmp_path):
    path = written(tmp_path / "run") / "journal.jsonl"
    import zlib

    body = json.dumps({"kind": "walks", "latents": "../x", **{name: [] for name in Walk.__slots__}})
    crc = f"{zlib.crc32(body.encode()):08x}"
    path.write_text(path.read_text() + f'{{"crc":"{crc}","data":{body}}}\n')
    with pytest.raises(CorruptRecordError):
        read(tmp_path / "run")


def test_no_record_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"journal\.jsonl"):
        load(tmp_path, brownian(), first)


TREE = {"branch": (0, 4, 7), "parallel": 4}


@pytest.mark.parametrize(
    "sampler",
    [
        BestOfN(),
        Importance(),
        SVDD(proposals=4),
        SVDD(proposals=3, levels=(3, 6), selection="argmax"),
        Beam(4, 3),
        ZeroOrder(),
        TreeSampling(**TREE, widening=Widening(1.0, 0.5)),
        TreeSearch(**TREE),
        TreeSearch(**TREE, value="clean"),
    ],
)
def test_a_saved_run_is_the_same_and_goes_on(tmp_path, sampler):
    settings = {"draws": 20, "lam": 1.0, "seed": 5, "progress": False}
    run = sample(brownian(), first, sampler, nfe=1000, **settings)
    run.save(tmp_path / "run")
    model = brownian()
    back = load(tmp_path / "run", model, first, draws=20)
    assert model.denoiser.rows_seen == []  # nothing is drawn again
    for name in ("ids", "rewards", "counts", "weights", "items"):
        assert torch.equal(getattr(back, name), getattr(run, name)), name
    assert back.nfe == run.nfe > 950

    grown = back.more(nfe=500, progress=False)
    whole = sample(brownian(), first, sampler, nfe=1500, **settings)
    assert torch.equal(grown.rewards, whole.rewards)
    # only what is new
    assert sum(model.denoiser.rows_seen) == grown.nfe - run.nfe + grown.spent.padded
    again = load(tmp_path / "run", brownian(), first, draws=20)  # `more` went on in the folder
    assert torch.equal(again.rewards, whole.rewards)


def test_a_run_continued_is_the_run_with_both_budgets():
    """60 random samplers, costs and budgets, and a reward that fails now and then."""
    chance = random.Random(0)

    def flaky(items, prompts):
        return torch.where(items[:, 1] > 1.3, torch.nan, items[:, 0].double())

    for _ in range(60):
        wide = Widening(chance.choice([1.0, 2.0]), chance.choice([0.3, 0.5, 0.8]))
        parallel = chance.choice([1, 3, 8])
        sampler = chance.choice(
            [
                BestOfN(), BestOfN(of=3), Importance(),
                SVDD(proposals=2), SVDD(proposals=2, levels=(3, 7), selection="argmax"),
                Beam(), Beam(2, 3), ZeroOrder(neighbours=3, pivots=2),
                TreeSampling(branch="even", widening=wide, parallel=parallel),
                TreeSampling(law="published", parallel=parallel),
                TreeSampling(pilot=4, parallel=parallel),
                TreeSearch(widening=wide, parallel=parallel, pilot=chance.choice([0, 4])),
                TreeSearch(value="clean", branch=(2, 5), parallel=parallel),
            ]
        )  # fmt: skip
        model = {"prompts": ("a", "b")[: chance.randint(1, 2)], "price": chance.randint(1, 2)}
        settings = {"lam": chance.choice([0.0, 1.0, 3.0]), "seed": chance.randint(0, 9)}
        first_part, second = chance.randint(200, 500), chance.randint(30, 400)
        quiet = {"progress": False, "draws": 15}
        run = sample(brownian(**model), flaky, sampler, nfe=first_part, **settings, **quiet)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some afford no walk more
            grown = run.more(nfe=second, progress=False)
        whole = sample(
            brownian(**model),
            flaky,
            run._spec.sampler,
            nfe=first_part + second,
            **settings,
            **quiet,
        )
        assert torch.equal(grown.rewards, whole.rewards), sampler
        assert torch.equal(grown.counts, whole.counts)
        assert torch.equal(grown.log_z, whole.log_z) or grown.log_z.isnan().all()
        assert grown.nfe == whole.nfe


@pytest.mark.parametrize("sampler", [Importance(), SVDD(proposals=4), Beam(4, 4), ZeroOrder()])
def test_an_interrupted_run_goes_on_in_its_folder(tmp_path, sampler):
    """Stopped after any number of walks, the resumed run equals the uninterrupted one."""
    settings = {"nfe": 3000, "lam": 1.0, "seed": 1, "draws": 30, "progress": False}
    whole = sample(brownian(), first, sampler, **settings)

    for walks in (0, 17, 130):
        folder = tmp_path / str(walks)
        stopped = sample(brownian(), _stops_after(walks), sampler, record=folder, **settings)
        assert stopped.status == "interrupted"
        model = brownian()
        resumed = sample(model, first, sampler, record=folder, **settings)
        assert resumed.status == "done"
        assert torch.equal(resumed.rewards, whole.rewards)
        assert torch.equal(resumed.weights, whole.weights)


def test_a_record_goes_on_under_a_larger_budget(tmp_path):
    """Asked for more, the same call goes on; killed on the way, it still does."""
    sampler = TreeSampling()  # takes leaves in flight and its pilot from the first budget
    settings = {"lam": 1.0, "seed": 1, "progress": False}
    folder = tmp_path / "run"
    small = sample(brownian(), first, sampler, nfe=1700, record=folder, **settings)
    aside = sample(brownian(), first, sampler, nfe=1700, **settings).more(nfe=1300, progress=False)
    sample(brownian(), _stops_after(40), sampler, nfe=3000, record=folder, **settings)
    model = brownian()
    large = sample(model, first, sampler, nfe=3000, record=folder, **settings)
    assert large.nfe > small.nfe + 1000
    assert sum(model.denoiser.rows_seen) - large.spent.padded < 1300
    assert torch.equal(large.rewards, aside.rewards)
    with pytest.raises(ValueError, match="nfe=2000: the record"):
        sample(brownian(), first, sampler, nfe=2000, record=folder, **settings)
    again = sample(brownian(), first, sampler, nfe=1700, record=folder, **settings)
    assert torch.equal(again.rewards, small.rewards)


def test_what_more_adds_to_a_saved_run_is_saved(tmp_path):
    run = sample(brownian(), first, Importance(), nfe=300, progress=False)
    run.save(tmp_path / "run")
    run.save(tmp_path / "run")  # it is there already
    longer = run.more(nfe=200, progress=False)
    assert torch.equal(load(tmp_path / "run", brownian(), first).rewards, longer.rewards)
    with pytest.raises(FileExistsError):
        sample(brownian(), first, Importance(), nfe=300, progress=False).save(tmp_path / "run")


def test_a_run_limited_by_seconds_alone_is_read_back(tmp_path):
    def slow(items, prompts):
        time.sleep(0.01)
        return items[:, 0]

    slow.__name__ = "first"
    for sampler in (BestOfN(), SMC(20), TreeSampling()):
        folder = tmp_path / type(sampler).__name__
        run = sample(brownian(), slow, sampler, seconds=0.2, progress=False, batch=8)
        assert run.status == "seconds"
        run.save(folder)
        back = load(folder, brownian(), first)
        assert back.status == "seconds"
        assert torch.equal(back.rewards, run.rewards)


def test_more_that_adds_nothing_says_so():
    run = sample(brownian(), first, BestOfN(10), nfe=3000, progress=False)
    with pytest.warns(UserWarning, match="added no walk"):
        run.more(nfe=100, progress=False)


def test_a_record_of_other_prompts_is_refused(tmp_path):
    run = sample(brownian(prompts=("cat", "dog")), first, BestOfN(3), progress=False)
    run.save(tmp_path / "run")
    with pytest.raises(ValueError, match="prompts"):
        load(tmp_path / "run", brownian(prompts=("fox", "dog")), first)
    with pytest.raises(ValueError, match="draws"):
        load(tmp_path / "run", brownian(prompts=("cat", "dog")), first, draws=-1)


def _stops_after(n):
    """A reward that sends Ctrl-C once it has scored n items."""
    import os
    import signal

    seen = 0

    def reward(items, prompts):
        nonlocal seen
        seen += len(items)
        if seen >= n and seen - len(items) < max(n, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return items[:, 0]

    reward.__name__ = first.__name__  # a record tells rewards apart by their names
    return reward


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"lam": 2.0}, "lam"),
        ({"nfe": 200}, "nfe=200"),
        ({"nfe": None, "reward_calls": 9}, "nfe=None"),
    ],
)
def test_a_record_of_another_run_is_refused(tmp_path, change, named):
    settings = {"nfe": 300, "lam": 1.0, "seed": 1, "progress": False, "record": tmp_path / "run"}
    sample(brownian(), first, BestOfN(), **settings)
    with pytest.raises(ValueError, match=named):
        sample(brownian(), first, BestOfN(), **{**settings, **change})


def test_a_record_of_another_model_is_refused(tmp_path):
    sample(brownian(), first, BestOfN(), nfe=300, progress=False).save(tmp_path / "run")
    with pytest.raises(ValueError, match="steps"):
        load(tmp_path / "run", brownian(steps=11), first)
    with pytest.raises(ValueError, match="reward"):
        load(tmp_path / "run", brownian(), lambda items, prompts: items[:, 1])
    with pytest.raises(FileExistsError, match="another folder"):
        sample(brownian(), first, BestOfN(), nfe=300, progress=False).save(tmp_path / "run")


def saved_of_three(tmp_path):
    folder = tmp_path / "three"
    sample(brownian(), first, BestOfN(3), nfe=400, seed=1, progress=False).save(folder)
    return folder


@pytest.mark.parametrize("sampler", [TreeSearch(), TreeSampling(branch="even"), SMC()])
def test_a_saved_run_goes_on_when_it_is_asked_for_again(tmp_path, sampler):
    """What a sampler left to its budget is filled in in a saved record, and is no other sampler."""
    options = {"seed": 1, "progress": False}
    sample(brownian(), first, sampler, nfe=400, **options).save(tmp_path / "run")
    longer = sample(brownian(), first, sampler, nfe=800, record=tmp_path / "run", **options)
    assert longer.spent.replayed == 400
    assert 400 < longer.nfe <= 800
    with pytest.raises(ValueError, match="another run: its sampler"):
        sample(brownian(), first, BestOfN(), nfe=900, record=saved_of_three(tmp_path), **options)
    other = dataclasses.replace(sampler, **{"parallel": 3} if "SMC" not in repr(sampler) else
                                {"particles": 3})  # fmt: skip
    with pytest.raises(ValueError, match="another run: its sampler"):
        sample(brownian(), first, other, nfe=900, record=tmp_path / "run", **options)
