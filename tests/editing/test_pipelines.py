"""Edits of a real pipeline: the built-in flow, natively and driven."""

from __future__ import annotations

import pytest
import torch

from samplers import Ancestral, sample
from steering import FlowChefEdit, flow_edit, from_pipeline, zoo


def opened(route):
    pipe, scales = zoo.load("mnist-flow"), [3.0, 1.5]
    return from_pipeline(pipe, [9, 4], guidance_scale=scales, steps=4, eta=0.0, route=route)


def nothing(items, prompts):
    return items.new_zeros(len(items))


@pytest.fixture(scope="module")
def four():
    images, labels = zoo.mnist_slice()
    return images[labels == 4][:1, None].float() / 255


def test_both_routes_make_the_same_edits(four):
    keep = torch.ones(28, 28)
    keep[:14] = 0
    found, source = {}, 2 * four - 1
    for route in ("native", "driven"):
        model = opened(route)
        masked = FlowChefEdit(source, keep, base={0: 1}, scale=2.0, step=1.0)
        options = {"weights": "none", "progress": False}
        a = sample(model, nothing, Ancestral(1), guidance=masked, **options)
        made = flow_edit(model, source, from_row=1, to_row=0, start=0.25)
        b = sample(made, nothing, Ancestral(1), progress=False)
        assert b.spent.rows.tolist() == [3 * 4]  # both conditions are guided
        found[route] = a.items[0], b.items[0]
    for native, driven in zip(*found.values(), strict=True):
        torch.testing.assert_close(native, driven, rtol=0, atol=1e-4)
    encode = opened("native").encode
    assert encode is not None
    torch.testing.assert_close(encode(four), source)
    masked, free = found["native"]
    below = four[0, :, 14:]
    torch.testing.assert_close(masked[:, 14:], below, rtol=0, atol=1e-5)
    assert (masked - four[0])[:, :14].abs().max() > 0.2
    assert 0.01 < (free - four[0]).abs().mean() < 0.3
