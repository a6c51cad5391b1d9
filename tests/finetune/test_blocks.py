"""No gradient crosses a block; a block becomes the same wherever and whenever it is trained."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from steering.finetune import LocalityError, NotFiniteError, train_blocks
from steering.finetune.blocks import alone
from tests.finetune.local_rules import Layers

ROOT = Path(__file__).parents[2]


def state(rule: Layers) -> list[torch.Tensor]:
    """All weights and buffers."""
    return [t.clone() for block in rule.blocks for t in block.state_dict().values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def train(rule: Layers, **given):
    return train_blocks(rule, **{"epochs": 3, "batch": 8, "progress": False} | given)


@pytest.fixture(scope="module")
def whole() -> Layers:
    """All blocks trained in one go."""
    rule = Layers()
    train(rule)
    return rule


@pytest.mark.parametrize("mine", range(3))
def test_only_one_block_learns(mine):
    rule = Layers()
    before = [copy.deepcopy(block.state_dict()) for block in rule.blocks]
    with alone(rule.blocks, mine):
        rule.loss(mine, torch.arange(8), torch.Generator()).backward()
    for k, block in enumerate(rule.blocks):
        assert all((p.grad is not None) == (k == mine) for p in block.parameters())
        block.zero_grad()
    train(rule, blocks=[mine])
    for k, block in enumerate(rule.blocks):
        changed = [not torch.equal(v, before[k][name]) for name, v in block.state_dict().items()]
        assert all(changed) if k == mine else not any(changed)
        assert all(p.requires_grad for p in block.parameters())


@pytest.mark.parametrize("crossing", ["before", "after"])
def test_a_gradient_that_crosses_raises(crossing):
    # block 1's loss through block 0, whose weights are frozen, on an input that learns; or through
    # block 2, which comes after it
    rule = Layers(crossing=crossing)
    other = {"before": 0, "after": 2}[crossing]
    with pytest.raises(LocalityError, match=f"a gradient of block 1 passes block {other}"):
        train(rule, blocks=[1])
    assert all(p.requires_grad for block in rule.blocks for p in block.parameters())
    rule.crossing = None
    train(rule, blocks=[1], epochs=1)  # no hook was left behind


def test_blocks_that_share_weights_are_refused():
    rule = Layers()
    rule.blocks[2] = nn.Sequential(rule.blocks[0], nn.Linear(3, 3))
    with pytest.raises(LocalityError, match="blocks 2 and 0 share weights"):
        train(rule)


@pytest.mark.parametrize("order", [[2], [2, 0, 1], [1, 2]])
def test_a_block_is_the_same_alone_and_in_any_order(whole, order):
    rule = Layers()
    train(rule, blocks=order)
    for k in order:
        mine, other = rule.blocks[k].state_dict(), whole.blocks[k].state_dict()
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_another_seed_is_another_block(whole):
    rule = Layers()
    train(rule, seed=1)
    assert not equal(state(rule), state(whole))


def test_an_interrupted_run_goes_on_to_the_bit(whole, tmp_path):
    rule = Layers(breaks_at=(1, 8))  # in the second of three epochs of block 1
    with pytest.raises(KeyboardInterrupt):
        train(rule, out=tmp_path)
    again = Layers()
    histories = train(again, out=tmp_path)
    assert equal(state(again), state(whole))
    assert again.asked[0] == 0  # block 0 was done
    assert 0 < again.asked[1] < 15  # of five updates an epoch
    for k, history in histories.items():
        assert [line["update"] for line in history] == list(range(1, 16)), k
        lines = (tmp_path / f"block-{k:02d}" / "history.jsonl").read_text().splitlines()
        assert [json.loads(line)["loss"] for line in lines] == [h["loss"] for h in history]


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(Layers(), out=tmp_path, blocks=[0])
    for given, told in (
        ({"lr": 0.1}, r"lr=0.001, not 0\.1"),
        ({"epochs": 4}, "epochs=3, not 4"),
        ({"batch": 4}, "batch=8, not 4"),
        ({"seed": 2}, "seed=0, not 2"),
        ({"clip": 2.0}, r"clip=1\.0, not 2\.0"),
    ):
        with pytest.raises(ValueError, match=told):
            train(Layers(), out=tmp_path, blocks=[0], **given)


@pytest.mark.slow
def test_processes_share_blocks_and_get_the_same_weights(whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.finetune.local_rules", str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads((tmp_path / f"process-{p}.json").read_text()) for p in range(2)]
    assert [t["trained"] for t in told] == [[0, 2], [1]]
    expected = [t.flatten().tolist() for t in state(whole)]
    assert all(t["state"] == expected for t in told)


def test_a_moving_average_is_what_is_left():
    # decay .5: after n updates the mean of weights w_1 .. w_n with shares .5, .25, ..., the first
    # of which is doubled, because the average begins there
    rule = Layers()
    seen: list[torch.Tensor] = []
    rule.looks = lambda k: seen.append(rule.blocks[k][0].weight.detach().clone())
    train(rule, blocks=[0], average=0.5, epochs=1)
    last = Layers()
    train(last, blocks=[0], epochs=1)
    seen = [*seen[1:], last.blocks[0][0].weight.detach()]
    mean = seen[0]
    for w in seen[1:]:
        mean = mean.lerp(w, 0.5)
    # float32 sums in another order
    torch.testing.assert_close(rule.blocks[0][0].weight.detach(), mean, rtol=1e-6, atol=1e-7)


def test_an_average_is_resumed_to_the_bit(tmp_path):
    rule = Layers()
    train(rule, average=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(Layers(breaks_at=(0, 12)), average=0.9, out=tmp_path)
    again = Layers()
    train(again, average=0.9, out=tmp_path)
    assert equal(state(again), state(rule))


def test_the_global_generator_is_left_as_it_was():
    before = torch.default_generator.get_state()
    train(Layers(), epochs=1)
    assert torch.equal(torch.default_generator.get_state(), before)


def test_a_fraction_of_an_epoch_and_a_rate_that_falls_to_zero():
    rule = Layers()
    assert [len(h) for h in train(rule, epochs=0.4).values()] == [2, 2, 2]  # of five updates
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    try:
        train(rule, epochs=20, blocks=[0], lr=1e-2)
    finally:
        hook.remove()
    assert rates[0] < max(rates) == pytest.approx(1e-2, rel=1e-3)
    assert 0 < rates[-1] < 1e-4


def test_updates_that_are_not_finite_are_left_out_and_then_end_the_run():
    rule = Layers(bad=range(3, 5))
    history = train(rule, blocks=[0])[0]
    assert [line["update"] for line in history if line["skipped"]] == [4, 5]
    assert all(bool(t.isfinite().all()) for t in state(rule))
    with pytest.raises(NotFiniteError, match=r"5 updates in a row.*Lower lr"):
        train(Layers(bad=range(3, 15)), blocks=[0])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 41}, "batch=41 is more than there is: give 40"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"clip": float("nan")}, "clip=nan"),
        ({"decay": -1}, "decay=-1"),
        ({"average": 1.0}, r"average=1\.0"),
        ({"blocks": [3]}, "blocks has 3: give numbers from 0 to 2"),
        ({"blocks": [True]}, "blocks has True"),
    ],
)
def test_bad_arguments_are_told_before_the_first_update(given, told):
    rule = Layers()
    with pytest.raises(ValueError, match=told):
        train(rule, **given)
    assert not any(rule.asked)
