"""NoProp's network, its stock schedulers and its pipeline, against the paper's own equations."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from steering.gaussian import ToClean
from steering.models.noprop import NoPropBlock, NoPropDenoiser, scheduler
from steering.models.noprop_pipeline import NoPropPipeline
from steering.pipelines.schedulers import read_scheduler
from tests.tiny_noprop import TINY, exact, network, pictures, pipeline, told
from tests.tiny_pipelines import quiet

VARIANTS = ("dt", "ct", "fm")


def random_of(seed=0):
    return torch.Generator().manual_seed(seed)


def states(n, d=4, seed=1):
    return torch.randn(n, d, generator=random_of(seed))


def every_timestep(net):
    """One of each block's own, or a few of continuous time."""
    return torch.arange(net.steps) if not net.timed else torch.tensor([999, 640, 20, 1, 0])


# --- discrete time: the paper's update is DDPM's, time reversed ------------------------------


def paper_update(steps):
    """Equation 3 of the paper, its time running towards clean: a_t, b_t, c_t of t = 1 .. T in
    float64, from alpha_bar_t = Π_{s=t..T} alpha_s."""
    alpha_bar = np.array([math.sin(math.pi * t / (2 * steps)) ** 2 for t in range(steps + 1)])
    update = []
    for t in range(1, steps + 1):
        here, there = alpha_bar[t - 1], alpha_bar[t]
        alpha = here / there  # alpha_{t-1}
        a = math.sqrt(there) * (1 - alpha) / (1 - here)
        b = math.sqrt(alpha) * (1 - there) / (1 - here)
        c = (1 - there) * (1 - alpha) / (1 - here)
        update.append((a, b, c))
    return update


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_our_chain_is_equation_3(steps):
    net = network("dt", steps=steps)
    chain, prediction = read_scheduler(scheduler(net), (4,), steps=steps)
    z, u = states(3), states(3, seed=2)
    for t, (a, b, c) in enumerate(paper_update(steps), 1):
        i = torch.full((3,), t - 1)
        clean = ToClean(chain, prediction)(u, z, chain.time(i))
        assert torch.equal(clean, u)  # the network's output is the guess of u
        step = chain.transition(z, i, clean)
        # scheduler tables are float32 products of up to ten factors, values are of order 3
        torch.testing.assert_close(step.mean, (a * u + b * z).float(), atol=5e-6, rtol=0)
        assert step.std.double().square().tolist() == pytest.approx([c] * 3, abs=1e-6)
    # it starts at pure noise and ends clean
    assert float(chain.alpha[0]) == 0.0
    assert float(chain.sigma[-1]) == 0.0


@pytest.mark.parametrize("steps", [2, 10])
def test_diffusers_own_step_is_equation_3(steps):
    net = network("dt", steps=steps)
    stock: Any = scheduler(net)
    stock.set_timesteps(steps)
    z, u = states(3), states(3, seed=2)
    assert stock.timesteps.tolist() == [*range(steps)][::-1]
    for t, (a, b, c) in enumerate(paper_update(steps), 1):
        noise = torch.randn(z.shape, generator=random_of(7))
        found = stock.step(u, steps - t, z, generator=random_of(7), return_dict=False)[0]
        # the same noise is drawn, so that mean and variance are both seen
        expected = (a * u + b * z + math.sqrt(c) * noise).float()
        torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)  # as above


def test_block_0_is_asked_at_pure_noise():
    net = network("dt")
    chain, _ = read_scheduler(scheduler(net), (4,), steps=5)
    assert chain.times.tolist() == [4, 3, 2, 1, 0]
    assert net.block_of(chain.times).tolist() == [0, 1, 2, 3, 4]
    images, z = pictures(1), states(1)
    before = [net(z, torch.tensor(t), images).sample for t in range(5)]
    net.block(0).join[-1].bias.data += torch.tensor([3.0, 0.0, 0.0, 0.0])
    after = [net(z, torch.tensor(t), images).sample for t in range(5)]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False] * 4 + [True]  # timestep 4, the noisiest


# --- continuous time: the learned schedule and its ODE ---------------------------------------


def learned(seed, low=0.001, high=0.99):
    """A "ct" network whose schedule is far from where it began."""
    net = network("ct", alpha_bar_range=(low, high))
    for p in net.schedule.parameters():
        p.data += torch.randn(p.shape, generator=random_of(seed))
    return net


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("ends", [(0.001, 0.99), (0.02, 0.9)])
def test_schedules_rise_between_their_ends(seed, ends):
    net = network("ct", alpha_bar_range=ends) if seed is None else learned(seed, *ends)
    schedule = net.schedule.double()
    t = torch.linspace(0, 1, 1001, dtype=torch.float64, requires_grad=True)
    gamma, slope = schedule(t)
    alpha_bar = torch.sigmoid(-gamma)
    assert bool((alpha_bar.diff() > 0).all())
    assert alpha_bar[[0, -1]].tolist() == pytest.approx(ends, rel=1e-12)
    (by_autograd,) = torch.autograd.grad(gamma.sum(), t)
    torch.testing.assert_close(slope, by_autograd, rtol=1e-9, atol=0)
    assert bool((slope < 0).all())


def test_timesteps_count_down_to_the_clean_end():
    table = learned(1).alpha_bar()
    assert table.shape == (1000,)
    assert bool((table.diff() < 0).all())
    assert float(table[0]) == pytest.approx(0.99, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_schedule_stays_one_in_half_precision(dtype):
    net = learned(1)
    full = net.alpha_bar()
    half = net.to(dtype).alpha_bar()
    assert bool((half.diff() < 0).all())
    assert min(scheduler(net).config["trained_betas"]) > 0
    # its 48 weights are rounded; a level moves by a fourth of what their logit does
    torch.testing.assert_close(half, full, atol=8 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("seed", [1, 2])
def test_ddim_follows_the_ode(seed):
    """dz/dt = (√ab)' u + (√(1-ab))' (z - √ab u) / √(1-ab): for a guess that stays, the step is
    exact, however large."""
    net = learned(seed)
    chain, _ = read_scheduler(scheduler(net), (1,), steps=8, eta=0.0)
    net.double()

    def slopes(t, z, u):
        with torch.no_grad():
            gamma, slope = net.schedule(torch.tensor([t], dtype=torch.float64))
        ab = float(torch.sigmoid(-gamma))
        rise = -float(slope) * ab * (1 - ab)  # ab'
        signal, noise = math.sqrt(ab), math.sqrt(1 - ab)
        return rise / (2 * signal) * u - rise / (2 * noise) * (z - signal * u) / noise

    assert float(chain.times[0]) == 999  # the noisiest there is
    z, u = np.array([1.3, -0.4, 2.0]), np.array([0.0, 1.0, -0.7])
    times = 1 - chain.times.double() / 1000  # t of each step
    for i in range(7):
        ends = float(times[i]), float(times[i + 1])
        solved = solve_ivp(slopes, ends, z, args=(u,), rtol=1e-9, atol=1e-11).y[:, -1]
        x, clean = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (z, u))
        step = chain.transition(x, torch.full((3,), i), clean)
        assert not step.std.any()
        # tables of a thousand factors in float32: up to 1e-5 of a level
        assert step.mean[:, 0].tolist() == pytest.approx(solved.tolist(), abs=5e-5)
        assert abs(solved - z).max() > 1e-3  # it moved
        z = solved
    x, clean = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (z, u))
    last = chain.transition(x, torch.full((3,), 7), clean)
    assert last.mean[:, 0].tolist() == pytest.approx(u.tolist(), abs=1e-6)


# --- flow matching: the sign -----------------------------------------------------------------


class Velocity(NoPropBlock):
    """Logits that are the paper's exact velocity u - noise, with one-hot embeddings."""

    def __init__(self, velocity):
        super().__init__((4,), 1, 8, (1, 1, 1), 2, 4, 0.0, True)
        self.velocity = velocity

    def encode(self, images):
        return images.flatten(1)

    def forward(self, z, timestep, features):
        return self.velocity[: len(z)]


@pytest.mark.parametrize("timestep", [1000.0, 400.0, 5.0])
def test_flows_put_out_noise_minus_u(timestep):
    y, noise = torch.tensor([2, 0, 3]), states(3)
    u = torch.eye(4)[y]
    sigma = timestep / 1000
    z = (1 - sigma) * u + sigma * noise
    p = torch.full((3, 4), 1e-30)
    p[range(3), y] = 1  # the image leaves no doubt
    found = exact("fm")(z, torch.tensor(timestep), told(p)).sample
    # z and u of order 1 are subtracted in float32 and divided by sigma
    torch.testing.assert_close(found, noise - u, atol=1e-6 / sigma, rtol=0)


@pytest.mark.parametrize("steps", [1, 7])
def test_stock_euler_ends_at_u(steps):
    net = network("fm", output="velocity")
    noise = torch.randn(16, 4, generator=random_of(3))
    y = torch.arange(16) % 4
    net.blocks[0] = Velocity(torch.eye(4)[y] - noise)
    found = pipeline(net)(pictures(16), steps, generator=random_of(3))
    torch.testing.assert_close(found.states, torch.eye(4)[y], atol=1e-5, rtol=0)  # float32
    assert torch.equal(found.classes, y)
    assert found.labels == [str(k) for k in y.tolist()]


# --- calls -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("embedding", ["one-hot", "learned", "prototype"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_timesteps_are_one_call_each_to_the_bit(variant, embedding):
    net = network(variant, embedding=embedding)
    d = net.label_embedding.shape[1]
    times = every_timestep(net)
    t = times[torch.randint(len(times), (16,), generator=random_of())]
    z, features = states(16, d), net.encode(pictures(16))
    features = features[torch.arange(16), net.block_of(t)]
    alone = torch.cat([net(z[k], t[k], features=features[k]).sample for k in
                       torch.arange(16).split(1)])  # fmt: skip
    assert alone.std() > 0.01
    for n in range(1, 17):
        together = net(z[:n], t[:n], features=features[:n]).sample
        assert torch.equal(together, alone[:n]), n


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_say_what_images_say(variant):
    net = network(variant)
    images, z, times = pictures(6), states(6), every_timestep(net)
    features = net.encode(images)
    assert features.shape == (6, len(net.blocks), 16)
    for t in times.tolist():
        which = int(net.block_of(torch.tensor([t])))
        by_image = net(z, torch.tensor(t), images).sample
        assert torch.equal(by_image, net(z, torch.tensor(t), features=features[:, which]).sample)
        other = net(z, torch.tensor(t), pictures(6, seed=9)).sample
        assert (other - by_image).abs().max() > 1e-3  # the image counts
    assert net(z, torch.tensor(0), images, return_dict=False)[0].shape == (6, 4)


def test_batches_of_training_are_seen_as_they_are():
    # filled up, a batch norm would count an item more than once
    net, seen = network("dt").train(), []
    net.block(0).state.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    net(states(3), torch.tensor(4), pictures(3))
    net.eval()(states(3), torch.tensor(4), pictures(3))
    assert seen == [3, 16]


# --- the network -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_the_papers(variant):
    """Its figure 6 comes to about 2 million weights a block; the built-in ones are small."""
    paper = NoPropDenoiser(variant)
    size = sum(p.numel() for p in paper.block(0).parameters())
    assert 1.9e6 <= size <= 2.1e6
    assert len(paper.blocks) == (10 if variant == "dt" else 1)
    small = NoPropDenoiser(variant, channels=(16, 32, 48), hidden=48, steps=1)
    assert sum(p.numel() for p in small.block(0).parameters()) <= 150_000


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_norm_is_of_discrete_time_alone(variant):
    norms = [m for m in network(variant).modules() if isinstance(m, nn.BatchNorm1d)]
    assert bool(norms) == (variant == "dt")


@pytest.mark.parametrize("embedding", ["one-hot", "learned", "prototype"])
def test_embeddings_are_orthogonal_to_begin_with_and_frozen(embedding):
    net = network("dt", embedding=embedding)
    w = net.label_embedding
    assert w.shape == (4, {"one-hot": 4, "learned": 6, "prototype": 64}[embedding])
    torch.testing.assert_close(w @ w.T, torch.eye(4), atol=1e-5, rtol=0)
    assert not w.requires_grad


def test_probabilities_invert_guesses_made_of_them():
    for embedding in ("one-hot", "learned", "prototype"):
        net = network("dt", embedding=embedding)
        net.label_embedding.data *= 2.5  # not orthonormal
        net.label_embedding.data[1] += 0.5 * net.label_embedding.data[0]
        logits = states(5)
        found = net.probabilities(net.guess(logits))
        torch.testing.assert_close(found, logits.softmax(-1), atol=1e-5, rtol=0)  # float32
        torch.testing.assert_close(found.sum(1), torch.ones(5))


def test_probabilities_of_any_state_are_probabilities():
    net = network("ct", embedding="learned")
    z = states(200, 6).requires_grad_()
    p = net.probabilities(z)
    assert bool((p >= 0).all())
    torch.testing.assert_close(p.sum(1), torch.ones(200))
    p[:, 0].sum().backward()
    assert bool(z.grad.isfinite().all())


def test_nearest_is_by_distance_not_by_product():
    net = network("dt", embedding="learned")
    net.label_embedding.data[0] += 5 * net.label_embedding.data[1:].sum(0)  # products are large
    z = net.label_embedding[1:] + 0.05 * states(3, 6)
    assert net.nearest(z).tolist() == [1, 2, 3]
    assert net.nearest(net.label_embedding).tolist() == [0, 1, 2, 3]


# --- the pipeline ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_networks_and_pipelines_come_back_from_a_folder(tmp_path, variant):
    net = network(variant, embedding="learned")
    if net.schedule is not None:
        net.schedule.slope.data += 1.0
    net.save_pretrained(tmp_path / "network")
    again = NoPropDenoiser.from_pretrained(tmp_path / "network", local_files_only=True)
    assert not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    names = ["north", "east", "south", "west"]
    pipe = pipeline(net, names)
    pipe.save_pretrained(tmp_path / "pipe")
    back = quiet(NoPropPipeline.from_pretrained(tmp_path / "pipe", local_files_only=True))
    assert back.names == names
    found = [p(pictures(3), generator=random_of(), eta=0.0) for p in (pipe, back)]
    assert torch.equal(found[0].states, found[1].states)
    assert found[0].labels == found[1].labels
    assert set(found[0].labels) <= set(names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_works(variant, dtype):
    images = pictures(3)
    full = pipeline(network(variant))(images, generator=random_of())
    half = pipeline(network(variant)).to(dtype)(images, generator=random_of())
    assert half.states.dtype == torch.float32
    # guesses are rounded to 11 or 8 bits; they and their slopes are of order 1
    torch.testing.assert_close(half.states, full.states, atol=64 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_is_encoded_once(variant):
    net, calls = network(variant), []
    for block in net.blocks:
        block.image.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    pipe = pipeline(net)
    pipe(pictures(3))
    assert calls == [3] * len(net.blocks)
    assert pipe.steps == (50 if net.timed else 5)


def test_every_block_reads_its_own_features():
    net, images, seen = network("dt"), pictures(3), []
    net.register_forward_pre_hook(
        lambda _, args, given: seen.append((int(args[1]), given["features"])), with_kwargs=True
    )
    pipeline(net)(images)
    assert [t for t, _ in seen] == [4, 3, 2, 1, 0]
    features = net.encode(images)
    assert all(torch.equal(found, features[:, 4 - t]) for t, found in seen)


def test_a_generator_makes_all_that_is_drawn():
    for variant, eta in (("dt", 0.0), ("ct", 1.0), ("fm", 0.0)):
        pipe = pipeline(network(variant))
        ends = [pipe(pictures(2), eta=eta, generator=random_of(s)).states for s in (1, 1, 2)]
        assert torch.equal(ends[0], ends[1])
        assert not torch.equal(ends[0], ends[2])


def test_share_of_noise_is_of_ddim():
    pipe = pipeline(network("ct"))
    still, noisy = (pipe(pictures(2), eta=eta, generator=random_of()).states for eta in (0.0, 1.0))
    assert (still - noisy).abs().max() > 1e-3


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "sde"}, "variant='sde' is unknown: give one of dt, ct, fm"),
        ({"embedding": "random"}, "embedding='random' is unknown: give one of one-hot, learned"),
        ({"output": "noise"}, "output='noise' is unknown: give one of probabilities, linear"),
        ({"variant": "ct", "output": "velocity"}, "output='velocity' is of variant 'fm', not 'ct'"),
        ({"alpha_bar_range": (0.9, 0.1)}, r"alpha_bar_range=\(0.9, 0.1\)"),
        ({"alpha_bar_range": (0.0, 0.9)}, "alpha_bar_range"),
        ({"alpha_bar_range": (0.1, 1.0)}, "alpha_bar_range"),
    ],
)
def test_networks_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        NoPropDenoiser(**{**TINY, **options})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give images, or their features: one of the two"),
        ({"images": pictures(2), "features": torch.zeros(2, 16)}, "one of the two"),
        ({"images": pictures(2)[:, 0]}, r"images have shape \[2, 8, 8\]: give \[N, 1, 8, 8\]"),
        ({"images": torch.zeros(2, 1, 9, 8)}, r"\[2, 1, 9, 8\]"),
        ({"images": torch.zeros(2, 3, 8, 8)}, r"\[2, 3, 8, 8\]"),
    ],
)
def test_calls_that_cannot_be_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        network()(states(2), torch.tensor(0), **given)


@pytest.mark.parametrize(
    ("variant", "steps", "words"),
    [
        ("dt", 4, "steps=4: this network has a block for each of 5 steps"),
        ("dt", 6, "steps=6: give an int from 1 to 5"),
        ("ct", 1001, "steps=1001: give an int from 1 to 1000"),
        ("fm", 0, "steps=0"),
        ("fm", 4.0, "steps=4.0"),
        ("fm", True, "steps=True"),
    ],
)
def test_steps_that_cannot_be_are_refused(variant, steps, words):
    with pytest.raises(ValueError, match=words):
        pipeline(network(variant))(pictures(1), steps)


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "b", "c", "c"], [*"abcde"]])
def test_names_are_one_for_each_class(names):
    with pytest.raises(ValueError, match="give 4 different ones, one for each class"):
        pipeline(network(), names)


def test_flows_have_no_alpha_bar():
    with pytest.raises(ValueError, match="'fm' has no alpha_bar"):
        network("fm").alpha_bar()
