"""No gradient crosses a block, and what a block becomes depends on nothing but itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steering.finetune import train_blocks
from steering.finetune.blocks import LocalityError, alone
from steering.finetune.loop import NotFiniteError
from tests.finetune.block_processes import SETTINGS
from tests.finetune.small_blocks import ROWS, Chain, Watched, same, small_rule, states

ROOT = Path(__file__).parents[2]
QUICK = {"epochs": 1, "batch": 8, "progress": False}


# --- locality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(3))
def test_only_the_block_that_is_trained_learns(k):
    rule, gathered = small_rule(), []

    class Looking(Watched):
        def watch(self, block):  # right after an update, before gradients are cleared
            gathered.append([{p.grad is None for p in b.parameters()} for b in self.blocks])
            return {}

    before = states(rule)
    train_blocks(Looking(rule, lambda *_: None), blocks=[k], **QUICK)
    assert gathered == [[{j != k} for j in range(3)]]
    for j, (was, block) in enumerate(zip(before, rule.blocks, strict=True)):
        assert same(was, block.state_dict()) == (j != k)
    moved = [not torch.equal(before[k][n], p) for n, p in rule.blocks[k].named_parameters()]
    assert all(moved)
    assert all(p.requires_grad for b in rule.blocks for p in b.parameters())
    assert all(p.grad is None for b in rule.blocks for p in b.parameters())


def after(blocks, k, x):
    return blocks[(k + 1) % 3](blocks[k](x))


def inside(blocks, k, x):
    return blocks[(k + 1) % 3][0](blocks[k](x))


def before(blocks, k, x):
    return blocks[k](blocks[k - 1](x.requires_grad_()))


def around(blocks, k, x):
    return blocks[k](blocks[k - 1](blocks[k](x)))


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("path", [after, inside, before, around])
def test_a_gradient_that_would_cross_is_an_error(path, k):
    rule = Chain(path)
    was, other = states(rule), k - 1 if path in (before, around) else (k + 1) % 3
    with pytest.raises(LocalityError, match=rf"gradient of block {k} passes block {other % 3}"):
        train_blocks(rule, blocks=[k], **QUICK)
    assert all(same(a, b) for a, b in zip(was, states(rule), strict=True))
    # all is as it was found: nothing is frozen, and no hook is left
    rule.path(rule.blocks, k, torch.ones(1, 2)).sum().backward()
    assert all(p.requires_grad for b in rule.blocks for p in b.parameters())


def test_what_others_hand_on_is_welcome():
    def path(blocks, k, x):
        with torch.no_grad():
            x = blocks[k - 1](x)
        h = blocks[k - 1](x)  # whose weights carry no gradient here
        return blocks[k - 1](blocks[k](h).detach()) + blocks[k](h)

    rule = Chain(path)
    was = states(rule)
    train_blocks(rule, blocks=[1], **QUICK)
    assert [same(a, b) for a, b in zip(was, states(rule), strict=True)] == [True, False, True]


def test_shared_weights_are_an_error():
    rule = Chain(lambda blocks, k, x: blocks[k](x))
    rule.blocks[2][0].weight = rule.blocks[0][0].weight
    with pytest.raises(LocalityError, match="blocks 2 and 0 share weights: give each its own"):
        train_blocks(rule, **QUICK)
    train_blocks(rule, blocks=[1], **QUICK)  # which shares none


def test_weights_that_were_frozen_stay_so():
    rule = small_rule()
    for block in rule.blocks:
        block.join[0].weight.requires_grad_(False)
    was = states(rule)
    train_blocks(rule, **QUICK)
    for block, old in zip(rule.blocks, was, strict=True):
        assert not block.join[0].weight.requires_grad
        assert torch.equal(block.join[0].weight, old["join.0.weight"])
        assert not torch.equal(block.join[-1].weight, old["join.6.weight"])


def test_alone_is_a_rule_for_other_loops_too():
    rule = Chain(after)
    with alone(rule.blocks, 0):
        rule.blocks[0](torch.ones(1, 2)).sum().backward()
        with pytest.raises(LocalityError):
            after(rule.blocks, 0, torch.ones(1, 2))
    assert [b[0].weight.grad is None for b in rule.blocks] == [False, True, True]


# --- what a run is a function of -----------------------------------------------------------------


def test_a_block_becomes_the_same_alone_and_in_any_order():
    whole, backwards = small_rule(), small_rule()
    train_blocks(whole, **QUICK)
    train_blocks(backwards, blocks=[2, 1, 0], **QUICK)
    for k, end in enumerate(states(whole)):
        single = small_rule()
        torch.rand(k + 1)  # the state of the global generator has no part in it
        train_blocks(single, blocks=[k], **QUICK)
        assert same(end, states(single)[k])
        assert same(end, states(backwards)[k])


def test_every_update_of_every_block_has_streams_of_its_own():
    orders, drawn, net = [], [], small_rule()

    class Drawing(Watched):
        def loss(self, block, numbers, rng):
            assert self.blocks[block].training
            mine = torch.Generator().set_state(rng.get_state())  # which stays as it is
            drawn.append((float(torch.rand((), generator=mine)), float(torch.rand(()))))
            return self.rule.loss(block, numbers, rng)

    for seed in (0, 1):
        rule = Drawing(net, lambda k, numbers: None)
        rule = Watched(rule, lambda k, numbers: orders.append(tuple(numbers.tolist())))
        train_blocks(rule, seed=seed, **QUICK)
    assert len(orders) == len(set(orders)) == 24  # batches of 8 of 32
    for values in zip(*drawn, strict=True):  # of `rng`, and of the generator that dropout has
        assert len(set(values)) == 24


class Stop(Exception):
    pass


@pytest.mark.parametrize("average", [0.0, 0.6])
@pytest.mark.parametrize("fresh", [True, False])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, average, fresh):
    settings = {**QUICK, "epochs": 3, "average": average}
    whole, calls = small_rule(), []
    straight = train_blocks(whole, **settings)

    def stop(block, numbers):
        calls.append(block)
        if len(calls) == 12 + 6:  # block 1, in its second epoch
            raise Stop

    broken = small_rule()
    with pytest.raises(Stop):
        train_blocks(Watched(broken, stop), out=tmp_path, **settings)
    assert all(p.requires_grad for b in broken.blocks for p in b.parameters())
    again = small_rule() if fresh else broken
    resumed, calls = [], []
    histories = train_blocks(
        Watched(again, lambda k, _: resumed.append(k)), out=tmp_path, **settings
    )
    assert resumed == [1] * 8 + [2] * 12  # block 0 was done, and a whole epoch of block 1
    assert all(same(a, b) for a, b in zip(states(whole), states(again), strict=True))

    def figures(found):
        return {k: [h["loss"] for h in lines] for k, lines in found.items()}

    assert figures(histories) == figures(straight)
    # a finished run is read, not trained again
    read, calls = small_rule(), []
    train_blocks(Watched(read, lambda k, _: calls.append(k)), out=tmp_path, **settings)
    assert not calls
    assert all(same(a, b) for a, b in zip(states(whole), states(read), strict=True))


@pytest.mark.parametrize("other", [{"lr": 2e-3}, {"seed": 1}, {"average": 0.5}, {"batch": 4}])
def test_a_folder_of_other_settings_is_refused(tmp_path, other):
    train_blocks(small_rule(), blocks=[0], out=tmp_path, **QUICK)
    (name,) = other
    was = (tmp_path / "block-00" / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=rf"holds a run with {name}=.*give the same, or another"):
        train_blocks(small_rule(), blocks=[0], out=tmp_path, **{**QUICK, **other})
    assert (tmp_path / "block-00" / "state.safetensors").read_bytes() == was


def test_a_folder_of_other_data_is_refused(tmp_path):
    train_blocks(small_rule(), blocks=[0], out=tmp_path, **QUICK)
    rule = small_rule()
    rule.labels[0] = 3
    with pytest.raises(ValueError, match="holds a run with data="):
        train_blocks(rule, blocks=[0], out=tmp_path, **QUICK)


def test_the_global_generator_is_left_as_it_was():
    def stop(block, numbers):
        torch.rand(3)
        raise Stop

    rule = small_rule()
    was = torch.get_rng_state()
    with pytest.raises(Stop):
        train_blocks(Watched(rule, stop), **QUICK)
    assert torch.equal(torch.get_rng_state(), was)
    train_blocks(rule, **QUICK)
    assert torch.equal(torch.get_rng_state(), was)


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_one_to_the_bit(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.finetune.block_processes", str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rule = small_rule()
    train_blocks(rule, **SETTINGS)
    for rank in range(2):  # each has all blocks, its own and the other's
        found = load_file(tmp_path / f"process-{rank}.safetensors")
        assert same(found, rule.network.state_dict())
    lines = (tmp_path / "block-01" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [*range(1, 9)]  # trained once


def test_several_processes_need_a_folder(monkeypatch):
    import accelerate

    class Two:
        num_processes = 2
        process_index = 0
        mixed_precision = "no"
        device = torch.device("cpu")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", Two)
    with pytest.raises(ValueError, match="out is missing: several processes exchange"):
        train_blocks(small_rule(), **QUICK)


# --- updates -------------------------------------------------------------------------------------


def test_a_moving_average_is_what_is_left():
    on_the_way, raw = [], small_rule()

    def look(block, numbers):
        on_the_way.append(states(raw)[0])

    train_blocks(Watched(raw, look), blocks=[0], **QUICK)
    path = [*on_the_way[1:], states(raw)[0]]  # after each of the four updates
    mean = small_rule()
    train_blocks(mean, blocks=[0], average=0.75, **QUICK)
    found = states(mean)[0]
    for name, _ in mean.blocks[0].named_parameters():
        expected = path[0][name]
        for weights in path[1:]:
            expected = 0.75 * expected + 0.25 * weights[name]
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)  # float32
        assert not torch.equal(found[name], path[-1][name])
    for name, _ in mean.blocks[0].named_buffers():
        assert torch.equal(found[name], path[-1][name])


@pytest.mark.parametrize(
    ("epochs", "batch", "updates"), [(1, 8, 4), (0.5, 8, 2), (1.75, 8, 7), (2, 12, 4), (0.01, 8, 1)]
)
def test_epochs_are_counted_in_whole_batches(epochs, batch, updates):
    seen, looked = [], []

    class Looking(Watched):
        def watch(self, block):
            assert not self.blocks[block].training
            looked.append(len(seen))
            return {"seen": 1.0}

    rule = Looking(small_rule(), lambda k, numbers: seen.append(numbers.tolist()))
    (history,) = train_blocks(
        rule, blocks=[1], epochs=epochs, batch=batch, progress=False
    ).values()  # fmt: skip
    assert [len(numbers) for numbers in seen] == [batch] * updates
    assert [line["update"] for line in history] == [*range(1, updates + 1)]
    every = ROWS // batch
    whole = [*range(every, updates + 1, every)]
    assert looked == whole + [updates] * (updates not in whole)
    assert ["seen" in line for line in history] == [n in looked for n in range(1, updates + 1)]
    for end in whole:  # an epoch shows no example twice
        shown = [n for numbers in seen[end - every : end] for n in numbers]
        assert len(set(shown)) == len(shown)
    if len(whole) > 1:
        assert seen[0] != seen[every]
    assert all(math.isfinite(line["loss"]) and line["gradient"] > 0 for line in history)
    assert not rule.blocks[1].training


def test_an_update_that_is_not_finite_is_left_out():
    class Bad(Watched):
        calls = 0

        def loss(self, block, numbers, rng):
            self.calls += 1
            return self.rule.loss(block, numbers, rng) * (math.nan if self.calls == 2 else 1)

    rule = Bad(small_rule(), lambda *_: None)
    (history,) = train_blocks(rule, blocks=[0], average=0.5, **QUICK).values()
    assert [line["skipped"] for line in history] == [False, True, False, False]
    assert all(bool(v.isfinite().all()) for v in rule.blocks[0].state_dict().values())


def test_updates_that_stay_not_finite_end_the_run():
    rule = Chain(lambda blocks, k, x: blocks[k](x) * math.inf)
    was = states(rule)
    with pytest.raises(NotFiniteError, match=r"5 updates in a row.*Lower lr, or weigh the loss"):
        train_blocks(rule, epochs=8, batch=8, progress=False)
    assert all(same(a, b) for a, b in zip(was, states(rule), strict=True))


def test_the_gradient_is_clipped_and_weights_decay():
    ends = []
    for more in ({}, {"clip": 1e-9}, {"decay": 100.0}):
        rule = small_rule()
        train_blocks(rule, blocks=[0], **QUICK, **more)
        ends.append(states(rule)[0]["join.0.weight"])
    start = states(small_rule())[0]["join.0.weight"]
    assert (ends[1] - start).abs().max() < 0.5 * (ends[0] - start).abs().max()
    assert ends[2].norm() < 0.95 * start.norm()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"epochs": 0}, "epochs=0: give a finite number above 0"),
        ({"epochs": math.inf}, "epochs=inf"),
        ({"batch": 0}, "batch=0: give a whole number"),
        ({"batch": ROWS + 1}, f"batch={ROWS + 1} is more than there is: give {ROWS} at most"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": "fast"}, "lr='fast'"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"decay": -1.0}, "decay=-1.0"),
        ({"average": 1.0}, "average=1.0: give a number from 0 to below 1"),
        ({"average": -0.1}, "average=-0.1"),
        ({"blocks": [0, 3]}, "blocks has 3: give numbers from 0 to 2"),
        ({"blocks": [-1]}, "blocks has -1"),
        ({"blocks": [0.0]}, "blocks has 0.0"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(wrong, words):
    rule = small_rule()
    was = states(rule)
    with pytest.raises(ValueError, match=words):
        train_blocks(rule, **{**QUICK, **wrong})
    assert all(same(a, b) for a, b in zip(was, states(rule), strict=True))
