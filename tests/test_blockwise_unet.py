"""A UNet in blocks: which is asked when, that pipelines and samplers see one network, training."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from samplers import Ancestral, TreeSampling, sample
from steering import FlowChef, from_pipeline
from steering.finetune import noise_blocks
from steering.finetune.noise_blocks import NoiseBlocks
from steering.models.blockwise_unet import BlockwiseUNet2D, equal_mass
from steering.models.label_pipeline import LabelPipeline
from tests.finetune.small_blocks import same, states
from tests.tiny_pipelines import quiet

BOUNDS = [0, 250, 600, 1000]
SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "norm_num_groups": 4,
}


def random_of(seed=0):
    return torch.Generator().manual_seed(seed)


def unet(bounds=BOUNDS, **options):
    """Random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return BlockwiseUNet2D(bounds, **{**SMALL, **options}).eval()


def plain_unet(**options):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return diffusers.UNet2DModel(
            **{**SMALL, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, **options}
        ).eval()


def scheduler(**options):
    return diffusers.DDIMScheduler(**{"timestep_spacing": "trailing", **options})


def pipeline(net=None):
    pipe = diffusers.DDIMPipeline(net or unet(), scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(n, seed=0):
    """[n, 1, 8, 8] in [-1, 1]."""
    return 2 * torch.rand(n, 1, 8, 8, generator=random_of(seed)) - 1


# --- blocks --------------------------------------------------------------------------------------


def test_a_block_has_its_first_timestep_and_not_its_last():
    net = unet()
    times = torch.tensor([0.0, 249.0, 249.9, 250.0, 599.0, 600.0, 999.0, -3.0, 1000.0, 5000.0])
    assert net.block_of(times).tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 2, 2]
    assert net.block_of(times.long()[:6]).tolist() == [0, 0, 0, 1, 1, 2]
    assert unet([0, 1000]).block_of(times).tolist() == [0] * 10


@pytest.mark.parametrize("bounds", [[0], [], [0, 500, 500, 1000], [0, 600, 500], [1000, 0]])
def test_bounds_that_do_not_rise_are_refused(bounds):
    with pytest.raises(ValueError, match=r"bounds=.*give increasing timesteps, two at least"):
        unet(bounds)


@torch.no_grad()
@pytest.mark.parametrize("classes", [None, 3])
def test_a_call_is_that_of_the_blocks_own_networks(classes):
    net, n = unet(num_class_embeds=classes), 9
    x = torch.randn(n, 1, 8, 8, generator=random_of())
    t = torch.tensor([0, 999, 250, 249, 600, 599, 30, 700, 400])
    labels = {} if classes is None else {"class_labels": torch.arange(n) % 3}
    found = net(x, t, **labels).sample
    for k in range(n):
        mine = {name: v[k : k + 1] for name, v in labels.items()}
        block = net.blocks[int(net.block_of(t[k : k + 1]))]
        # float32 of another batch size
        alone = block(x[k : k + 1], t[k], **mine).sample
        torch.testing.assert_close(found[k : k + 1], alone, atol=1e-5, rtol=0)
        other = net.blocks[(int(net.block_of(t[k : k + 1])) + 1) % 3](x[k : k + 1], t[k], **mine)
        assert (other.sample - alone).abs().max() > 1e-2
    assert torch.equal(net(x, t, *labels.values(), return_dict=False)[0], found)
    assert (net.class_embedding is None) == (classes is None)


@torch.no_grad()
def test_one_timestep_serves_a_batch():
    net, x = unet(), torch.randn(4, 1, 8, 8, generator=random_of())
    expected = net(x, torch.full((4,), 300)).sample
    for t in (300, 300.0, torch.tensor(300)):
        assert torch.equal(net(x, t).sample, expected)
        assert torch.equal(net.blocks[1](x, 300).sample, expected)


def test_gradients_reach_states_and_the_blocks_that_were_asked():
    net, x = unet(), torch.randn(2, 1, 8, 8, generator=random_of(), requires_grad=True)
    net(x, torch.tensor([10, 900])).sample.square().sum().backward()
    assert bool((x.grad.flatten(1).abs().amax(1) > 0).all())
    asked = [any(p.grad is not None for p in b.parameters()) for b in net.blocks]
    assert asked == [True, False, True]


# --- equal mass ----------------------------------------------------------------------------------


def test_equal_mass_of_known_densities():
    assert equal_mass(torch.ones(1000), 4) == [0, 250, 500, 750, 1000]
    assert equal_mass(torch.ones(10), 1) == [0, 10]
    assert equal_mass(torch.ones(5), 5) == [0, 1, 2, 3, 4, 5]
    assert equal_mass(7 * torch.ones(9), 3) == [0, 3, 6, 9]
    # half of all at the last tenth
    lumps = torch.cat([torch.full((90,), 1 / 90), torch.full((10,), 1 / 10)])
    assert equal_mass(lumps, 2) == [0, 90, 100]
    assert equal_mass(lumps, 4) == [0, 45, 90, 95, 100]
    # density 2 t: a block ends where the square of its share does
    rising = 2 * torch.arange(10_000) + 1.0
    assert equal_mass(rising, 4) == [0, 5000, 7072, 8661, 10_000]  # √½ and √¾, rounded up


@pytest.mark.parametrize("blocks", [2, 3, 7])
def test_masses_are_equal_up_to_one_timestep(blocks):
    density = torch.rand(1000, generator=random_of(), dtype=torch.float64)
    bounds = equal_mass(density, blocks)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, 1000, blocks + 1)
    reached = density.cumsum(0) / density.sum()
    for k, end in enumerate(bounds[1:-1], 1):  # the first timestep at which a share is reached
        assert float(reached[end - 2]) < k / blocks <= float(reached[end - 1])


@pytest.mark.parametrize(
    ("density", "blocks", "words"),
    [
        (torch.tensor([1.0, -1.0, 1.0]), 2, "density: give"),
        (torch.zeros(5), 2, "density: give"),
        (torch.ones(2, 5), 2, "density: give"),
        (torch.full((5,), torch.nan), 2, "density: give"),
        (torch.ones(5), 6, "blocks=6: give a number from 1 to 5"),
        (torch.ones(5), 0, "blocks=0"),
        (torch.ones(5), 2.0, "blocks=2.0"),
        (torch.tensor([0.0, 0.0, 1.0]), 2, "density is too narrow for 2 blocks"),
    ],
)
def test_densities_that_cannot_be_split_are_refused(density, blocks, words):
    with pytest.raises(ValueError, match=words):
        equal_mass(density, blocks)


# --- pipelines and samplers ----------------------------------------------------------------------


@torch.no_grad()
def chain_of(model, x):
    """Where our chain ends from noise x [N, *D], decoded, as it is without noise."""
    row = torch.arange(len(x)) % len(model.prompts)
    for k in range(model.process.steps):
        i = torch.full((len(x),), k)
        clean = model.denoiser(x, model.process.time(i), row)
        x = model.process.transition(x, i, clean).mean
    return model.decode(x)


def test_our_chain_reproduces_a_stock_pipeline():
    pipe = pipeline()
    made = pipe(
        batch_size=3, generator=random_of(1), num_inference_steps=10, eta=0.0, output_type="np"
    ).images
    x = torch.randn(3, 1, 8, 8, generator=random_of(1))
    found = chain_of(from_pipeline(pipe, steps=10, eta=0.0), x)
    expected = torch.from_numpy(np.moveaxis(made, -1, 1))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # the house's bound for adapters
    # each block has its part in it
    for k in range(3):
        other = unet()
        other.blocks[k] = unet().blocks[(k + 1) % 3]
        moved = chain_of(from_pipeline(pipeline(other), steps=10, eta=0.0), x)
        assert (moved - found).abs().max() > 100 * 1e-4


def test_our_chain_reproduces_a_pipeline_of_labels():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = LabelPipeline(unet(num_class_embeds=4), flow)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(2, 1, 8, 8, generator=random_of(1))
    made = pipe([0, 2], 6, 2.0, latents=x, output_type="pt").images
    model = from_pipeline(pipe, [0, 2], steps=6, guidance_scale=2.0, eta=0.0)
    torch.testing.assert_close(chain_of(model, x), made, atol=1e-4, rtol=0)
    other = from_pipeline(pipe, [1, 3], steps=6, guidance_scale=2.0, eta=0.0)
    assert (chain_of(other, x) - made).abs().max() > 100 * 1e-4


class Bright:
    """Mean of an image in [0, 1]."""

    differentiable = True

    def __call__(self, items, prompts):
        return items.mean((1, 2, 3))


def test_trees_and_guidance_steer_it():
    model = from_pipeline(pipeline(), steps=6)
    plain = sample(model, Bright(), Ancestral(24), progress=False)
    tree = sample(
        model, Bright(), TreeSampling(branch=(0, 2, 4)), nfe=200, lam=50.0, progress=False
    )
    assert not tree.tree.flat
    assert tree.rewards.isfinite().all()
    share = (tree.weights * tree.rewards).sum() / tree.weights.sum()
    assert float(share) > float(plain.rewards.mean()) + 2 * float(plain.rewards.std() / 24**0.5)
    bent = sample(model, Bright(), Ancestral(24), guidance=FlowChef(), weights="none",
                  progress=False)  # fmt: skip
    assert float(bent.rewards.mean()) > float(plain.rewards.mean() + 3 * plain.rewards.std())


def test_a_walk_does_not_depend_on_who_walks_beside_it():
    model = from_pipeline(pipeline(), steps=6)
    runs = [sample(model, Bright(), Ancestral(5), batch=b, progress=False) for b in (1, 5)]
    # walks of one call are at different timesteps, and so in different blocks; float32 of networks
    # over another batch size
    torch.testing.assert_close(runs[0].items, runs[1].items, atol=1e-4, rtol=0)


def test_it_comes_back_from_a_folder(tmp_path):
    pipe = pipeline(unet([0, 300.5, 1000]))
    pipe.save_pretrained(tmp_path)
    back = quiet(diffusers.DDIMPipeline.from_pretrained(tmp_path, local_files_only=True))
    assert isinstance(back.unet, BlockwiseUNet2D)
    assert list(back.unet.config.bounds) == [0, 300.5, 1000]
    ends = [p(generator=random_of(), num_inference_steps=4, output_type="np").images
            for p in (pipe, back)]  # fmt: skip
    assert np.array_equal(*ends)


def test_half_precision_works():
    net = unet().to(torch.bfloat16)
    x = torch.randn(3, 1, 8, 8, generator=random_of())
    t = torch.tensor([10, 400, 900])
    found = net(x.to(torch.bfloat16), t).sample
    assert found.dtype == torch.bfloat16
    # 8 bits through some ten layers
    torch.testing.assert_close(found.float(), unet()(x, t).sample, atol=0.1, rtol=0)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("block", range(3))
def test_the_loss_is_of_the_blocks_own_timesteps(block, prediction):
    net, images, n = unet(), pictures(40), 35
    schedule = scheduler(prediction_type=prediction)
    rule = NoiseBlocks(net, schedule, images)
    asked = {}
    for k, module in enumerate(net.blocks):
        module.register_forward_pre_hook(lambda _, args, k=k: asked.update({k: args}))
    loss = rule.loss(block, torch.arange(n), random_of())
    assert list(asked) == [block]
    x, t = asked[block]
    low, high = BOUNDS[block : block + 2]
    assert t.dtype == torch.int64
    assert bool(((t >= low) & (t < high)).all())
    assert net.block_of(t).unique().tolist() == [block]
    # one in each n-th of the range
    assert ((t - low) * n // (high - low) - torch.arange(n)).abs().max() <= 1
    level = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    drawn = (x - level.sqrt() * images[:n]) / (1 - level).sqrt()
    target = {
        "epsilon": drawn,
        "v_prediction": schedule.get_velocity(images[:n], drawn, t),
        "sample": images[:n],
    }[prediction]
    assert abs(float(drawn.mean())) < 5 / drawn.numel() ** 0.5  # standard normal noise
    assert float(drawn.var()) == pytest.approx(1, abs=5 * (2 / drawn.numel()) ** 0.5)
    expected = (net.blocks[block](x, t).sample - target).square().mean()
    # noise is read back from x, at the cleanest level by a division by .01
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bounds", [[0, 3, 10], [0, 2.5, 10]])
def test_every_timestep_of_a_range_is_trained_and_no_other(bounds):
    rule = NoiseBlocks(unet(bounds), scheduler(num_train_timesteps=10), pictures(8))
    seen = {0: set(), 1: set()}
    for k, module in enumerate(rule.blocks):
        module.register_forward_pre_hook(lambda _, args, k=k: seen[k].update(args[1].tolist()))
        for seed in range(20):
            rule.loss(k, torch.arange(8), random_of(seed))
    assert seen == {0: {0, 1, 2}, 1: {3, 4, 5, 6, 7, 8, 9}}  # as `block_of` has them


def test_bytes_are_images_from_minus_one_to_one():
    floats = pictures(8)
    bytes_ = ((floats + 1) * 127.5).round().to(torch.uint8)
    again = bytes_.float() / 127.5 - 1
    found = [NoiseBlocks(unet(), scheduler(), images).loss(1, torch.arange(8), random_of())
             for images in (bytes_, again)]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("make", [unet, plain_unet])
def test_blocks_and_a_whole_network_are_trained_alike(make):
    """A plain network is one block: training end to end."""
    net, images = make(), pictures(4).repeat(8, 1, 1, 1)
    count = len(getattr(net, "blocks", [net]))
    histories = noise_blocks(
        net, scheduler(), images, epochs=12, batch=16, average=0.5, lr=1e-2, progress=False
    )
    assert sorted(histories) == [*range(count)]
    for history in histories.values():
        told = [line["loss"] for line in history]
        assert sum(told[-8:]) < 0.9 * sum(told[:8])
    assert not net.training
    made = diffusers.DDIMPipeline(net, scheduler())
    made.set_progress_bar_config(disable=True)
    assert np.isfinite(made(num_inference_steps=3, output_type="np").images).all()


def test_a_block_is_trained_alone_to_the_same_bits(tmp_path):
    quick = {"epochs": 2, "batch": 8, "progress": False}
    images, labels = pictures(16), torch.arange(16) % 3
    whole, one = unet(num_class_embeds=3), unet(num_class_embeds=3)
    rules = [NoiseBlocks(net, scheduler(), images, labels) for net in (whole, one)]
    start = states(rules[1])
    noise_blocks(whole, scheduler(), images, labels, out=tmp_path, **quick)
    noise_blocks(one, scheduler(), images, labels, blocks=[1], **quick)
    assert same(states(rules[0])[1], states(rules[1])[1])
    assert same(start[0], states(rules[1])[0])
    with pytest.raises(ValueError, match="holds a run with data="):
        noise_blocks(whole, scheduler(), images[:-1], labels[:-1], out=tmp_path, **quick)
    with pytest.raises(ValueError, match=r"holds a run with average=0\.999, not 0"):
        noise_blocks(whole, scheduler(), images, labels, average=0.0, out=tmp_path, **quick)
    with pytest.raises(ValueError, match="holds a run with levels="):
        noise_blocks(
            whole, scheduler(beta_schedule="scaled_linear"), images, labels, out=tmp_path, **quick
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}, "give one with alphas_cumpro"),
        (
            {"scheduler": diffusers.DDIMScheduler(num_train_timesteps=900)},
            r"bounds=\[0, 250, 600, 1000\]: .* 0 to 899",
        ),
        ({"unet": unet([0, 0.3, 0.6, 1000])}, r"bounds=.*and each block needs one"),
        ({"unet": unet([-10, 500, 1000])}, r"bounds=\[-10"),
        ({"images": pictures(8)[:, 0]}, r"images have shape \[8, 8, 8\]: give \[N, \*\(1, 8, 8\)"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, "labels: give them where the network take"),
        ({"unet": unet(num_class_embeds=3)}, "labels: give them where the network takes labels"),
        ({"batch": 9}, "batch=9 is more than there is: give 8 at most"),
        ({"blocks": [3]}, "blocks has 3: give numbers from 0 to 2"),
    ],
)
def test_a_mistake_is_one_clear_error(change, words):
    given = {"unet": unet(), "scheduler": scheduler(), "images": pictures(8), **change}
    with pytest.raises(ValueError, match=words):
        noise_blocks(**{"epochs": 1, "batch": 4, "progress": False, **given})


def test_labels_are_one_for_each_image():
    with pytest.raises(ValueError, match=r"labels have shape \[7\]: give one an image"):
        NoiseBlocks(unet(num_class_embeds=3), scheduler(), pictures(8), torch.zeros(7))
