"""From images to clean states and back, and the gradient of what is wanted of pixels."""

from dataclasses import replace

import diffusers
import pytest
import torch

from steering import from_pipeline, measure, noise, operators
from steering.core import Model, images_in_unit_range
from steering.pipelines.latent import PIXELS_AT_ONCE, LatentCodec
from tests.tiny_pipelines import (
    autoencoder,
    dit,
    flux,
    pixel_pipeline,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

ASKED = {  # every latent family, and what is asked of it
    stable_diffusion: ["cat"],
    stable_diffusion_xl: ["cat"],
    stable_diffusion_3: ["cat"],
    flux: ["cat"],
    dit: [3],
}
SHIFTED = (stable_diffusion_3, flux)  # the others have a shift in the configuration, and ignore it


class Law:
    """What an autoencoder's encoder puts out: its draws are not its mean."""

    def __init__(self, mean):
        self.mean = mean

    def mode(self):
        return self.mean

    def sample(self, generator=None):
        return self.mean + 1


def invertible(vae):
    """The autoencoder with a decoder that its encoder undoes: four channels are one, unfolded."""

    def decode(latents, return_dict=True, **_):
        assert latents.shape[1:] == (4, 8, 8)
        return (torch.nn.functional.pixel_shuffle(latents, 2).expand(-1, 3, -1, -1),)

    def encode(images, **_):
        mean = torch.nn.functional.pixel_unshuffle(images.mean(1, keepdim=True), 2)
        return type("Encoded", (), {"latent_dist": Law(mean)})()

    vae.decode, vae.encode = decode, encode
    return vae


def opened(family, pipe=None, **options) -> Model:
    return from_pipeline(pipe or family(), ASKED[family], steps=4, route="native", **options)


def states(model, n=3, scale=1.0):
    return scale * model.process.prior(noise.root_key(0, torch.arange(n)))


@pytest.mark.parametrize("family", ASKED)
def test_encoding_undoes_decoding_shift_and_packing_included(family):
    pipe = family()
    invertible(pipe.vae)
    model = opened(family, pipe)
    # small ones: below the clamp, |x| / scaling + shift < 1
    z = states(model).clamp(-3, 3) * 0.05
    images = model.decode(z)
    assert 0 < images.min() < images.max() < 1
    assert images.shape == (3, 3, 16, 16)
    # float32 rounding of numbers near 1, times the scaling
    torch.testing.assert_close(model.encode(images), z, atol=1e-5, rtol=0)
    # an encoder that forgets the shift is out by it times the scaling, a thousand tolerances
    assert pipe.vae.config.shift_factor == 0.06
    if family is flux:
        forgetful = replace(model.decode, latents=replace(model.decode.latents, shift=0.0))
    else:
        forgetful = replace(model.decode, shift=0.0)
    error = (forgetful.encode(images) - z).abs().max()
    expected = 0.06 * pipe.vae.config.scaling_factor if family in SHIFTED else 0
    assert error.item() == pytest.approx(expected, abs=1e-5)


def test_pixels_are_encoded_by_their_range_alone():
    model = from_pipeline(pixel_pipeline(diffusers.DDIMScheduler()), steps=4)
    x = states(model).clamp(-1, 1)
    torch.testing.assert_close(model.encode(model.decode(x)), x, atol=1e-6, rtol=0)


def test_a_driven_model_has_no_way_back():
    assert from_pipeline(flux(), ["cat"], steps=4, route="driven").encode is None


@pytest.mark.parametrize("family", ASKED)
def test_encoding_is_what_the_autoencoder_says(family):
    pipe = family()
    model, vae = opened(family, pipe), pipe.vae
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = vae.encode(2 * images - 1).latent_dist.mean
        found = model.encode(images)
    expected = (mean - (0.06 if family in SHIFTED else 0)) * vae.config.scaling_factor
    if family is flux:  # patches of 2 x 2, from left to right and from top to bottom
        patches = torch.nn.functional.unfold(expected, 2, stride=2)
        expected = patches.transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found.shape[1:] == model.process.shape
    assert found.dtype == torch.float32


def test_encoding_in_chunks_changes_nothing_and_is_differentiable():
    vae = autoencoder(latent_channels=4)
    images = torch.rand(5, 3, 16, 16, requires_grad=True)
    whole = LatentCodec(vae, pixels=256).encode(images)
    chunked = torch.cat([LatentCodec(vae, pixels=256).encode(part) for part in images.split(1)])
    torch.testing.assert_close(whole, chunked, atol=1e-6, rtol=0)
    assert LatentCodec(vae, pixels=PIXELS_AT_ONCE // 2)._chunk == 2
    (gradient,) = torch.autograd.grad(whole.sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 16, 8), (3, 16, 16), (1, 3, 32, 32)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match="256 pixels"):
        LatentCodec(autoencoder(latent_channels=4), pixels=256).encode(torch.rand(shape))


def small_autoencoder(**_):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AutoencoderTiny(
            latent_channels=4,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).eval()


def test_a_small_autoencoder_encodes_too():
    small = small_autoencoder()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        found = LatentCodec(small, pixels=256).encode(images)
        assert torch.equal(found, small.encode(2 * images - 1).latents)  # scaling 1


def tiled(pipe):
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 8, 4


def in_half(pipe):
    pipe.vae.half()


WAYS = {"whole": lambda pipe: None, "tiled": tiled, "float16": in_half, "preview": None}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ASKED)
def test_the_gradient_of_a_pixel_reward_reaches_the_latents(family, way):
    pipe, small = family(), small_autoencoder()
    for last, middle in ((pipe.vae.decoder.conv_out, 0.0), (small.decoder.layers[-1], 0.5)):
        with torch.no_grad():  # pale images, which the clamp leaves alone: slopes can be checked
            last.weight.mul_(0.05)
            last.bias.fill_(middle)
    if way == "preview":
        decode = opened(family, pipe, preview=small).preview
        x = states(opened(family, pipe))
    else:
        plain = opened(family, pipe).decode
        WAYS[way](pipe)
        model = opened(family, pipe)
        decode, x = model.decode, states(model)
        if way == "tiled":
            with torch.no_grad():
                pipe.vae.use_tiling = False
                whole = plain(x)
                pipe.vae.use_tiling = True
                assert not torch.equal(decode(x), whole)  # it is tiled
    reward = measure(operators.Downsample(2), torch.full((1, 3, 8, 8), 0.4))
    x.requires_grad_()
    images = decode(x)
    assert 0 < images.min() < images.max() < 1
    scores = reward(images, [None] * 3)
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    assert gradient.shape == x.shape
    assert gradient.isfinite().all()
    # the slope along it, by differences: a curvature over a hundredth of x's spread is small
    slope = gradient.flatten(1).norm(dim=1)
    along = 0.01 * gradient / slope.view(-1, *[1] * (x.ndim - 1))
    with torch.no_grad():
        up, down = (reward(decode(x + way * along), [None] * 3) for way in (1, -1))
    torch.testing.assert_close((up - down) / 0.02, slope, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clamping_is_exact_and_lets_gradients_pass_that_lead_back(dtype):
    x = (2 * noise.normal(noise.root_key(0, torch.arange(1)), (1000,))[0]).to(dtype)
    x[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    x.requires_grad_()
    images = images_in_unit_range(x)
    expected = (x.detach() / 2 + 0.5).clamp(0, 1)
    assert images.dtype == dtype
    assert torch.equal(images[3:], expected[3:])
    assert images[:2].tolist() == [1, 0]
    assert images[2].isnan()
    with torch.no_grad():
        assert torch.equal(images_in_unit_range(x)[3:], expected[3:])
    pixels = (x.detach() / 2 + 0.5)[3:]
    for way, stuck in ((1, pixels > 1), (-1, pixels < 0)):
        (gradient,) = torch.autograd.grad(way * images[3:].sum(), x, retain_graph=True)
        assert torch.equal(gradient[3:], torch.where(stuck, 0.0, way * 0.5).to(dtype))
        assert 0.25 < stuck.float().mean() < 0.37  # of normal noise z, z > .5 in 31 %


@pytest.mark.parametrize(
    "family", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux]
)
def test_both_routes_have_the_same_images_and_gradients_where_images_are_clamped(family):
    pipe = family()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.mul_(5)  # loud images
    processor, names = pipe.image_processor, vars(pipe.image_processor).copy()
    found = []
    for route in ("native", "driven"):
        model = from_pipeline(pipe, ["cat"], steps=4, route=route)
        x = states(model).requires_grad_()
        images = model.decode(x)
        assert ((images == 0) | (images == 1)).float().mean() > 0.1
        found.append((images.detach(), *torch.autograd.grad(images.sum(), x)))
    for native, driven in zip(*found, strict=True):
        # float32 rounding through the same decoder
        torch.testing.assert_close(native, driven, atol=1e-5, rtol=1e-4)
    assert pipe.image_processor is processor
    assert vars(processor) == names


def test_a_guess_out_of_range_is_pulled_back():
    x = torch.full((1, 1, 4, 4), 3.0, requires_grad=True)  # a pixel of 2, clamped to 1
    reward = measure(lambda x: x, torch.full((1, 1, 4, 4), 0.25))
    (gradient,) = torch.autograd.grad(reward(images_in_unit_range(x), [None]).sum(), x)
    assert (gradient < 0).all()
