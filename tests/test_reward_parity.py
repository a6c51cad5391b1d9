"""The benchmarks of rewards run, and see what they are there to see."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from benchmarks import reward_contracts, reward_parity
from steering.clip import Pixels
from steering.rewards import ClipScore
from tests import tiny_rewards


def figures(benchmark, monkeypatch, capsys):
    """The last line of a benchmark."""
    monkeypatch.setattr(sys, "argv", [benchmark.__name__.split(".")[1], "--quick"])
    benchmark.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_reward_keeps_the_contract(monkeypatch, capsys):
    found = figures(reward_contracts, monkeypatch, capsys)
    assert found["max_batch_difference"] <= 1e-4
    assert found["gradient_flags_true"]
    assert found["broken_images_failed"] == 1
    assert found["whole_images_failed"] == 0


class Leaky:
    """Breaks the contract: scores are relative to the batch, and broken pixels are numbers."""

    differentiable = True
    name = "leaky"

    def __call__(self, items, prompts):
        means = items.nan_to_num(0.5, 1, 0).mean((1, 2, 3))
        return means - means.mean()


class Mute(Leaky):
    """Says it is differentiable, and is not where it says so; or the other way round."""

    differentiable = False


def test_a_broken_contract_is_seen():
    (_, _, found), (_, _, mute) = reward_contracts.rows(
        {"leaky": Leaky(), "mute": Mute()}, range(1), [(3, 8, 8)]
    )
    assert found.batch > 1e-2
    assert found.leak > 0
    assert found.failed == 0 < found.broken
    assert not mute.flag


def test_parity_with_the_processor_and_the_model(monkeypatch, capsys):
    found = figures(reward_parity, monkeypatch, capsys)["differences"]
    # rounding to bytes, through random networks made thirty times too loud: hundredths of the
    # spread of scores, which is 9, 1.2 and .2
    assert found["clip"] < 0.3
    assert found["pickscore"] < 0.04
    assert found["aesthetic"] < 0.006


def test_parity_sees_other_pixels(tmp_path, monkeypatch):
    reward = ClipScore(tiny_rewards.clip(tmp_path))
    images, prompts = reward_parity.patterns(), ["a red fox"] * 8
    good = reward_parity.compare("clip", reward, images, prompts)
    call = Pixels.__call__
    for wrong in (
        lambda self, x: call(self, x) + 0.05,
        lambda self, x: call(self, x.flip(-1)),
        lambda self, x: call(self, torch.nn.functional.interpolate(x, (32, 32))),
    ):
        monkeypatch.setattr(Pixels, "__call__", wrong)
        assert reward_parity.compare("clip", reward, images, prompts) > 4 * good


@pytest.mark.parametrize("name", ["imagereward", "hpsv2"])
def test_parity_with_the_authors_packages_compares_pairs(name, tmp_path, monkeypatch):
    # stand-ins of the packages: what is checked is that images and prompts are paired alike
    def theirs(image, prompt):
        pixels = np.asarray(image, dtype="float32") / 255
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return tiny_rewards.StandIn().score(tensor, [prompt]).item()

    packages = {
        "ImageReward": {
            "load": lambda name: types.SimpleNamespace(score=lambda p, i: theirs(i, p))
        },
        "hpsv2": {"score": lambda image, prompt, hps_version: [theirs(image, prompt)]},
    }
    for package, functions in packages.items():
        module = types.ModuleType(package)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, package, module)
    images, prompts = reward_parity.patterns(), ["a red fox", "two"] * 4
    with tiny_rewards.imscore():
        reward = reward_parity.OURS[name](model=tiny_rewards.stand_in(tmp_path))
        # the same float32 numbers on both sides
        assert reward_parity.compare(name, reward, images, prompts) < 1e-5


def test_parity_asks_which_reward(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reward_parity"])
    with pytest.raises(SystemExit):
        reward_parity.main()
