"""Extractors: named, in batches, and what they need is told."""

import sys
import types

import pytest
import torch

from steering import zoo
from steering.metrics import extractor

IMAGES = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_the_builtin_extractor_is_the_classifiers_hidden_layer(monkeypatch):
    ours = extractor("mnist-classifier")
    with torch.no_grad():
        expected = zoo.load("mnist-classifier").features(IMAGES)
    assert ours.name == "mnist-classifier"
    assert torch.equal(ours(IMAGES), expected)
    monkeypatch.setattr(sys.modules["steering.metrics.extractors"], "_BATCH", 3)
    # float32 sums of a few hundred numbers of order 1, in another order
    torch.testing.assert_close(ours(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_inception_gets_bytes_of_three_channels(monkeypatch):
    seen = []

    class Net(torch.nn.Module):
        def __init__(self, name, layers):
            super().__init__()
            assert layers == ["2048"]

        def forward(self, x):
            seen.append(x)
            return (x.float().mean((2, 3)),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Net  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert extractor("inception")(IMAGES).shape == (7, 3)
    assert seen[0].dtype == torch.uint8
    assert seen[0].shape == (7, 3, 28, 28)
    assert torch.equal(seen[0][:, 0], (IMAGES[:, 0] * 255).round().byte())


def test_clip_embeds_any_size(tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, projection_dim=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    size = {"shortest_edge": 32}
    CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    clip = extractor(f"clip:{tmp_path}")
    features = clip(IMAGES)
    assert features.shape == (7, 8)
    # one at a time is the same: no statistics of the batch, to float32 rounding
    alone = torch.cat([clip(image[None]) for image in IMAGES])
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)


def test_an_extractor_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "def rows(images):\n    return images.mean((1, 3))\n\n"
        "def flat(images):\n    return images\n\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = extractor("my_features:rows")
    assert torch.equal(own(IMAGES), IMAGES.mean((1, 3)))
    with pytest.raises(TypeError, match=r"my_features:flat returned shape \(7, 1, 28, 28\)"):
        extractor("my_features:flat")(IMAGES)
    with pytest.raises(ValueError, match="no function number"):
        extractor("my_features:number")


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match="mnist-classifier, inception, clip"):
        extractor("fid")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"diffusion-steering\[fid\]"):
        extractor("inception")
