"""The NoProp pipeline: images that are labelled often are encoded once."""

import pytest
import torch

from steering.models.noprop import VARIANTS, NoPropDenoiser, scheduler
from steering.models.noprop_pipeline import NoPropPipeline
from steering.zoo.training import seeded


def pipeline(variant):
    net = seeded(
        lambda: NoPropDenoiser(variant, 4, 5, image_size=8, channels=(4, 4, 6), hidden=16), 0
    )
    pipe = NoPropPipeline(net.eval(), scheduler(net))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_label_as_their_images_do(variant):
    pipe, random = pipeline(variant), torch.Generator().manual_seed(1)
    images, others = torch.rand(2, 3, 1, 8, 8, generator=random)
    with torch.no_grad():
        features, wrong = pipe.network.encode(images), pipe.network.encode(others)

    def ends(**given):
        return pipe(**given, generator=torch.Generator().manual_seed(2)).states

    assert torch.equal(ends(images=images), ends(features=features))
    assert not torch.equal(ends(images=images), ends(features=wrong))


@pytest.mark.parametrize("given", [(), ("images", "features")])
def test_images_or_features_are_given(given):
    with pytest.raises(ValueError, match="give images, or their features: one of the two"):
        pipeline("fm")(**{name: torch.zeros(2, 1, 8, 8) for name in given})


def test_bytes_and_what_is_out_of_range_are_refused():
    pipe = pipeline("fm")
    for images in (
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.full((2, 1, 8, 8), 1.5),
        torch.full((2, 1, 8, 8), torch.nan),
    ):
        with pytest.raises(ValueError, match=r"images: give floats in \[0, 1\]"):
            pipe(images)
    with pytest.raises(ValueError, match="images: give a tensor"):
        pipe([[0.5]])
