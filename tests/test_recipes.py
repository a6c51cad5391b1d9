"""The recipes of the published image experiments run, on random weights and without a download."""

import json
import runpy
import sys

import pytest
import torch

from benchmarks.cifar10 import HubClassifier


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "samplers", "key"),
    [
        ("cifar10", {"importance", "DTS", "SMC", "best-of-N", "DTS, published law"}, "mmd"),
        ("drawbench", {"best-of-N", "DTS*", "FK steering, max"}, "best"),
    ],
)
def test_a_recipe_runs(name, samplers, key, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--out", str(tmp_path / name)])
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])[key]
    assert {label.split("/")[-2] for label in figures} == samplers
    assert "refused" not in printed
    assert (tmp_path / f"{name}-quick" / f"{name}-quick.png").exists()


def test_a_recipe_says_what_it_lacks(monkeypatch):
    for name, missing in (("cifar10", "--classifier"), ("drawbench", "--prompts")):
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(SystemExit, match=missing):
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")


def test_a_hub_classifier_sees_what_its_own_processor_makes(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, num_labels=10,
    )  # fmt: skip
    net = ViTForImageClassification(config).eval()
    net.save_pretrained(tmp_path)
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(tmp_path)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = (images * 255).round() / 255  # the processor takes bytes
    arrays = list((images * 255).byte().permute(0, 2, 3, 1).numpy())
    ours = HubClassifier(str(tmp_path)).eval()
    with torch.no_grad():
        theirs = net(**processor(images=arrays, return_tensors="pt")).logits
        # no resizing here, so they differ by float32 rounding alone
        torch.testing.assert_close(ours(images), theirs, rtol=1e-4, atol=1e-5)
        assert ours(torch.rand(2, 3, 20, 28)).shape == (2, 10)
