"""A UNet for each range of noise: which one is asked, how each learns, how it is steered."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from samplers import TreeSampling, sample
from steering import FlowChef, from_pipeline, steer
from steering.finetune.noise_blocks import NoiseBlocks, noise_blocks
from steering.models.blockwise_unet import BlockwiseUNet2D, equal_mass
from steering.zoo.training import seeded

BOUNDS = (0, 300, 700, 1000)
TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


def tiny(**given) -> BlockwiseUNet2D:
    return seeded(lambda: BlockwiseUNet2D(BOUNDS, **{**TINY, **given}), 0).eval()


def scheduler(prediction: str = "v_prediction") -> DDIMScheduler:
    return DDIMScheduler(prediction_type=prediction, timestep_spacing="trailing", clip_sample=False)


def pipeline() -> DDIMPipeline:
    pipe = DDIMPipeline(unet=tiny(), scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_each_timestep_is_of_its_block():
    unet, x = tiny(), noise(8)
    t = torch.tensor([0, 299, 300, 699, 700, 999, 1000, 299])
    block = [0, 0, 1, 1, 2, 2, 2, 0]
    assert unet.block_of(t).tolist() == block
    out = unet(x, t).sample
    for n, k in enumerate(block):
        mine = unet.blocks[k](x[n : n + 1], t[n : n + 1]).sample
        other = unet.blocks[(k + 1) % 3](x[n : n + 1], t[n : n + 1]).sample
        # convolutions of other batch sizes differ by rounding; blocks, of random weights, by far
        torch.testing.assert_close(out[n : n + 1], mine, rtol=1e-4, atol=1e-5)
        assert (out[n : n + 1] - other).abs().max() > 1e-2
    assert torch.equal(unet(x, 500).sample, unet(x, torch.full((8,), 500)).sample)
    assert torch.equal(unet(x, t, return_dict=False)[0], out)


@torch.no_grad()
def test_labels_reach_the_blocks():
    unet, x, t = tiny(num_class_embeds=3), noise(2), torch.tensor([100, 900])
    a, b = (unet(x, t, torch.tensor(labels)).sample for labels in ([0, 0], [0, 2]))
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])
    assert unet.class_embedding is not None
    assert tiny().class_embedding is None


@pytest.mark.parametrize("bounds", [(0,), (0, 0, 5), (5, 2)])
def test_bounds_that_do_not_increase_are_refused(bounds):
    with pytest.raises(ValueError, match=r"bounds=.*increasing"):
        BlockwiseUNet2D(bounds, **TINY)


def test_bounds_of_equal_mass():
    assert equal_mass(torch.ones(1000), 4) == [0, 250, 500, 750, 1000]
    assert equal_mass(torch.ones(1000), 1) == [0, 1000]
    # masses 1, 2, 3, 4: half of 10 is reached within the third
    assert equal_mass(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2) == [0, 3, 4]
    # density in proportion to t: a share s lies below t = T sqrt(s), up to a timestep
    ramp = torch.arange(1000.0)
    for k, bound in enumerate(equal_mass(ramp, 5)):
        assert abs(bound - 1000 * (k / 5) ** 0.5) <= 1


@pytest.mark.parametrize(
    ("density", "blocks", "told"),
    [
        (torch.zeros(5), 2, "density"),
        (-torch.ones(5), 2, "density"),
        (torch.ones(5), 6, "blocks=6"),
        (torch.ones(5), 0, "blocks=0"),
        (torch.tensor([0.0, 0.0, 1.0]), 2, "too narrow"),
    ],
)
def test_masses_that_cannot_be_split_are_refused(density, blocks, told):
    with pytest.raises(ValueError, match=told):
        equal_mass(density, blocks)


def test_it_is_saved_and_loaded_like_any_model(tmp_path):
    pipe, x = pipeline(), noise(3)
    pipe.save_pretrained(tmp_path)
    again = DDIMPipeline.from_pretrained(tmp_path)
    assert isinstance(again.unet, BlockwiseUNet2D)
    t = torch.tensor([10, 500, 990])
    with torch.no_grad():
        assert torch.equal(again.unet(x, t).sample, pipe.unet(x, t).sample)


def test_from_pipeline_runs_the_pipelines_own_chain():
    # law of adapters: with eta = 0 our chain is the pipeline's, on the same noise
    pipe, steps = pipeline(), 7
    model = from_pipeline(pipe, steps=steps, eta=0.0)
    rng = torch.Generator().manual_seed(3)
    (theirs,) = pipe(2, rng, 0.0, steps, output_type="np", return_dict=False)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    row = torch.zeros(2, dtype=torch.int64)
    for k in range(steps):
        i = torch.full((2,), k)
        clean = model.denoiser(x, model.process.time(i), row)
        x = model.process.transition(x, i, clean).sample(torch.zeros(2, dtype=torch.int64))
    mine, theirs = model.decode(x), torch.from_numpy(theirs).movedim(-1, 1)
    assert (mine - theirs).abs().max() < 1e-4
    # a block that is another's is another chain
    pipe.unet.blocks[1] = pipe.unet.blocks[0]
    (other,) = pipe(2, torch.Generator().manual_seed(3), 0.0, steps, output_type="np",
                    return_dict=False)  # fmt: skip
    assert (torch.from_numpy(other).movedim(-1, 1) - theirs).abs().max() > 1e-2


def test_tree_sampling_and_flowchef_run_on_it():
    pipe = pipeline()
    model = from_pipeline(pipe, steps=6)
    result = sample(
        model, lambda x, _: x.mean((1, 2, 3)), TreeSampling(branch="even"), lam=5.0, nfe=300,
        progress=False,
    )  # fmt: skip
    assert result.tree is not None
    assert not result.tree.flat
    assert 0 < result.nfe <= 300

    def bright(images, prompts):
        return images.mean((1, 2, 3))

    bright.differentiable = True
    call = {"batch_size": 2, "num_inference_steps": 6, "output_type": "np"}
    means = []
    for step in (0.0, 0.1):
        with steer(pipe, FlowChef(bright, step=step)):
            drawn = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        means.append(float(drawn.mean()))
    assert means[1] > means[0] + 0.01


class Seen(torch.nn.Module):
    """Stands for a block: remembers its timesteps, and says what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.times, self.answer = [], answer

    def forward(self, x, t, return_dict=True):
        self.times += t.tolist()
        return (self.answer(x, t) + self.weight,)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_block_sees_all_of_its_range_and_aims_at_what_the_scheduler_says(prediction):
    unet, grid = tiny(), scheduler(prediction)
    clean = torch.full((1, 1, 8, 8), 0.5)
    level = grid.alphas_cumprod

    def exact(x, t):
        # of the one image there is, noise and v are known from x
        ab = level[t.long()].view(-1, 1, 1, 1)
        e = (x - ab.sqrt() * 0.5) / (1 - ab).sqrt()
        v = ab.sqrt() * e - (1 - ab).sqrt() * 0.5
        return {"epsilon": e, "v_prediction": v, "sample": torch.full_like(x, 0.5)}[prediction]

    for k in range(3):
        unet.blocks[k] = Seen(exact)
    rule = NoiseBlocks(unet, grid, clean)
    for k in range(3):
        loss = rule.loss(k, torch.zeros(400, dtype=torch.int64), torch.Generator().manual_seed(k))
        assert float(loss.detach()) < 1e-6  # rounding, at 1 - ab = 1e-4 the largest
        times = unet.blocks[k].times
        assert BOUNDS[k] <= min(times) <= max(times) < BOUNDS[k + 1]
        # stratified: of 400 in 300 or 400 timesteps each has a share, give or take one
        assert len(set(times)) > 0.6 * (BOUNDS[k + 1] - BOUNDS[k])


def test_training_lowers_the_loss_of_the_blocks_that_are_trained():
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    images[:, :, 2:6, 2:6] = 255
    unet = tiny()
    given = {"epochs": 10, "batch": 16, "average": 0.0, "progress": False}
    histories = noise_blocks(unet, scheduler(), images, blocks=[0, 2], **given)
    assert sorted(histories) == [0, 2]
    for history in histories.values():
        assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    # one network is one block: training end to end
    settings = {k: v for k, v in TINY.items() if k != "sample_size"}
    plain = seeded(lambda: UNet2DModel(sample_size=8, in_channels=1, out_channels=1,
                                       layers_per_block=1, **settings), 0)  # fmt: skip
    (history,) = noise_blocks(plain, scheduler(), images, **given).values()
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_what_does_not_fit_is_refused():
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    images = torch.zeros(4, 1, 8, 8)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        NoiseBlocks(tiny(), FlowMatchEulerDiscreteScheduler(), images)
    with pytest.raises(ValueError, match=r"images have shape \[4, 1, 9, 8\]"):
        NoiseBlocks(tiny(), scheduler(), torch.zeros(4, 1, 9, 8))
    with pytest.raises(ValueError, match="labels"):
        NoiseBlocks(tiny(), scheduler(), images, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels"):
        NoiseBlocks(tiny(num_class_embeds=2), scheduler(), images)
