"""NoProp's losses against the paper's formulas, and that they teach."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from steering import zoo
from steering.finetune import learn_embedding, noprop, prototypes
from steering.finetune.noprop import NoPropRule
from tests.tiny_noprop import network, pictures, pipeline

LABELS = torch.arange(24) % 4
QUICK = {"batch": 8, "progress": False}


def random_of(seed=0):
    return torch.Generator().manual_seed(seed)


def rule_of(net, loss="squared", weighting="snr", **more):
    return NoPropRule(net, pictures(24), LABELS, loss, weighting, **more)


def drawn(n, d):
    """Noise [n, d] and times [n] of a loss that draws from `random_of()`: one time in each n-th."""
    rng = random_of()
    noise = torch.randn(n, d, generator=rng)
    return noise, (torch.arange(n) + torch.rand(n, generator=rng)) / n


def losses(rule, block=0, n=12):
    """A block's loss of the first n examples, in evaluation mode."""
    return rule.loss(block, torch.arange(n), random_of())


# --- the paper's formulas ------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", ["one-hot", "learned"])
def test_discrete_time_is_the_papers_bound(embedding):
    """T/2 (SNR(t) - SNR(t-1)) |û_t(z_{t-1}, x) - u|², SNR = alpha_bar / (1 - alpha_bar)."""
    net, T, n = network("dt", embedding=embedding), 5, 12
    noise, _ = drawn(n, net.label_embedding.shape[1])
    u = net.label_embedding[LABELS[:n]]
    for t in range(1, T):  # the last block's SNR has no end, see below
        here, there = (math.sin(math.pi * s / (2 * T)) ** 2 for s in (t - 1, t))
        weight = T / 2 * (there / (1 - there) - here / (1 - here))
        z = math.sqrt(here) * u + math.sqrt(1 - here) * noise
        guess = net(z, torch.tensor(T - t), pictures(24)[:n]).sample  # asked at T - 1 first
        expected = weight * (guess - u).square().sum(1).mean()
        found = losses(rule_of(net), t - 1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # float32


def test_flow_matching_is_the_papers_square_of_velocities():
    """|v(z, x, t) - (u - noise)|², where z = t u + (1 - t) noise; by a network of velocities, and
    as 1 / sigma² of a square of guesses by one that guesses u."""
    n = 12
    for options, weighting in (({"output": "velocity"}, "uniform"), ({}, "snr")):
        net = network("fm", **options)
        noise, t = drawn(n, 4)
        u = net.label_embedding[LABELS[:n]]
        z = t[:, None] * u + (1 - t)[:, None] * noise
        v = -net(z, 1000 * (1 - t), pictures(24)[:n]).sample  # diffusers' sign is the other
        expected = (v - (u - noise)).square().sum(1).mean()
        found = losses(rule_of(net, weighting=weighting))
        # divided by sigma, down to 1/24 here, and multiplied again: some hundred ulp
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_continuous_time_is_the_papers_bound():
    """SNR'(t) / 2 · |û - u|², SNR = exp(-γ), its slope here by autograd."""
    net, n = network("ct"), 12
    noise, t = drawn(n, 4)
    u = net.label_embedding[LABELS[:n]]
    t.requires_grad_()
    snr = (-net.schedule(t)[0]).exp()
    (slope,) = torch.autograd.grad(snr.sum(), t)
    level = (snr / (1 + snr))[:, None]
    z = level.sqrt() * u + (1 - level).sqrt() * noise
    guess = net(z, 1000 * (1 - t), pictures(24)[:n]).sample
    expected = (slope / 2 * (guess - u).square().sum(1)).mean()
    torch.testing.assert_close(losses(rule_of(net)), expected, rtol=1e-4, atol=0)  # float32


@pytest.mark.parametrize("variant", ["dt", "ct", "fm"])
def test_cross_entropy_is_that_of_the_networks_probabilities(variant):
    net, n = network(variant), 12
    noise, t = drawn(n, 4)
    if variant == "dt":  # block 2 of 5, before step 3
        level, timestep = torch.full((n,), math.sin(math.pi * 2 / 10) ** 2), torch.tensor(2)
    elif variant == "ct":
        level, timestep = torch.sigmoid(-net.schedule(t)[0]), 1000 * (1 - t)
    else:
        level, timestep = t, 1000 * (1 - t)
    a, s = (level, 1 - level) if variant == "fm" else (level.sqrt(), (1 - level).sqrt())
    z = a[:, None] * net.label_embedding[LABELS[:n]] + s[:, None] * noise
    guess = net(z, timestep, pictures(24)[:n]).sample
    if variant == "fm":
        guess = z - (1 - t)[:, None] * guess
    expected = F.nll_loss(guess.clamp(min=1e-9).log(), LABELS[:n])  # one-hot: guesses are p
    found = losses(rule_of(net, "cross-entropy", "uniform"), 2 if variant == "dt" else 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)  # float32


# --- weights -------------------------------------------------------------------------------------


def test_weights_of_ten_blocks():
    """T/2 times the increments of the SNR, which is tan²(π t / 2T)."""
    net = network("dt", steps=10)
    rise = [math.tan(math.pi * t / 20) ** 2 - math.tan(math.pi * (t - 1) / 20) ** 2
            for t in range(1, 10)]  # fmt: skip
    assert [round(r, 2) for r in rise[:3]] == [0.03, 0.08, 0.15]

    def weights(**more):
        rule = rule_of(net, **more)
        each = [rule.weight(k, torch.zeros(3)) for k in range(10)]
        assert all(bool((w == w[0]).all()) for w in each)  # one time a block
        return torch.stack(each)[:, 0]

    snr = weights()
    assert snr[:9].tolist() == pytest.approx([5 * r for r in rise], rel=1e-4)  # float32 levels
    assert float(snr[9]) == 1e6  # its SNR ends at infinity
    assert float(snr[9] / snr.sum()) > 0.99
    clamped = weights(weighting="clamped", limit=3.0)
    assert clamped.tolist() == pytest.approx([min(5 * r, 3.0) for r in rise] + [3.0], rel=1e-4)
    assert weights(weighting="clamped").max() == 5
    assert weights(weighting="uniform").tolist() == [1.0] * 10


@pytest.mark.parametrize("variant", ["dt", "ct", "fm"])
def test_after_an_epoch_a_block_tells_its_weight_and_its_accuracy(variant):
    net, test = network(variant), (pictures(8, 1), LABELS[:8])
    settings = {"weighting": "clamped", "limit": 1.5, "test": test, "epochs": 1.5, **QUICK}
    histories = noprop(net, pictures(24), LABELS, **settings)
    for k, history in histories.items():
        assert ["accuracy" in line for line in history] == [False, False, True, True]
        assert history[-1]["accuracy"] * 8 == round(history[-1]["accuracy"] * 8)
        rule = rule_of(net, weighting="clamped", limit=1.5)
        largest = float(rule.weight(k, torch.linspace(0, 1, 101)).max())
        assert history[-1]["weight"] == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("variant", ["ct", "fm"])
def test_weights_over_continuous_time_are_clamped_too(variant):
    net = network(variant)
    found = {w: float(losses(rule_of(net, weighting=w, limit=0.5)).detach()) for w in
             ("snr", "clamped", "uniform")}  # fmt: skip
    assert 0 < found["clamped"] <= 0.5 * found["uniform"] * (1 + 1e-5)
    assert found["snr"] > found["clamped"]
    high = float(losses(rule_of(net, weighting="clamped", limit=1e9)).detach())
    assert high == pytest.approx(found["snr"])


# --- the schedule that is learned ----------------------------------------------------------------


def term_of(rule, n=24, seed=0):
    """The schedule's term alone and the bound [n] under it, for all examples."""
    net, u = rule.network, rule.network.label_embedding[LABELS[:n]]
    rng = random_of(seed)
    noise = torch.randn(n, u.shape[1], generator=rng)
    t = (torch.arange(n) + torch.rand(n, generator=rng)) / n
    features = net.block(0).encode(pictures(24)[:n]).detach()
    term = rule._schedule_loss(t, u, noise, features)
    gamma, slope = net.schedule(t)
    level = torch.sigmoid(-gamma)[:, None]
    z = level.sqrt() * u + (1 - level).sqrt() * noise
    guess = net.guess(net.block(0)(z, 1000 * (1 - t), features))
    bound = -slope * (-gamma).exp() / 2 * (guess - u).square().sum(1)
    return term, bound


def test_the_schedules_term_is_zero_and_moves_the_schedule_alone():
    net = network("ct")
    term, bound = term_of(rule_of(net))
    assert float(term.detach()) == 0.0
    term.backward()
    assert all(p.grad is None or not p.grad.any() for p in net.blocks.parameters())
    found = [p.grad.clone() for p in net.schedule.parameters()]
    # up to its scale it is the gradient of E[bound²] / E[bound]², the mean held: over a schedule
    # between fixed ends that is an integral over the SNR, which the schedule has no part in
    spread = bound.square().mean() / bound.detach().mean().square()
    right = torch.autograd.grad(spread, [*net.schedule.parameters()])
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a / found[0].norm(), b / right[0].norm(), rtol=1e-4, atol=1e-6)
    assert found[0].any()


def test_the_block_is_not_told_of_the_schedules_wish():
    net = network("ct")
    grads = []
    for wish in (True, False):
        rule = rule_of(net)
        if not wish:
            object.__setattr__(rule, "_schedule_loss", lambda *_: torch.zeros(()))
        losses(rule).backward()
        grads.append([p.grad.clone() for p in net.blocks.parameters()])
        has = [p.grad is not None for p in net.schedule.parameters()]
        assert all(has) if wish else not any(has)
        net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_followed_it_makes_the_bound_vary_less_over_time():
    net = network("ct")
    rule = rule_of(net)

    def spread():
        bound = torch.cat([term_of(rule, seed=s)[1].detach() for s in range(100, 140)])
        return float(bound.square().mean() / bound.mean().square() - 1)

    before = spread()
    adam = torch.optim.Adam(net.schedule.parameters(), 0.05)
    for step in range(80):
        adam.zero_grad()
        term_of(rule, seed=step)[0].backward()
        adam.step()
    assert spread() < 0.7 * before


# --- embeddings ----------------------------------------------------------------------------------


def digits():
    """250 real images [250, 1, 14, 14] in [0, 1], half their size, and their labels, int64."""
    images, labels = zoo.mnist_slice()
    return F.avg_pool2d(images[:, None].float() / 255, 2), labels.long()


def digit_network(variant, **options):
    small = {"classes": 10, "image_size": 14, "channels": (8, 8, 16), "hidden": 32, "steps": 3}
    return network(variant, loud=False, **{**small, **options})


def test_prototypes_are_the_medoids_of_their_classes():
    images, labels = digits()
    net = digit_network("fm", embedding="prototype")
    prototypes(net, images, labels)
    flat = 2 * images.flatten(1) - 1
    for k in range(10):
        members = flat[labels == k]
        medians = []
        for i, x in enumerate(members):
            others = torch.cat([members[:i], members[i + 1 :]])
            distance = (others.double() - x.double()).norm(dim=1).sort().values
            medians.append(float(distance[(len(others) - 1) // 2]))
        best = min(range(len(medians)), key=medians.__getitem__)
        assert torch.equal(net.label_embedding[k], members[best])
    assert not net.label_embedding.requires_grad


@pytest.mark.parametrize("variant", ["dt", "ct", "fm"])
def test_a_phase_of_embeddings_moves_them_and_nothing_else(variant):
    ends = []
    for start in (0, 1):
        net = network(variant, embedding="learned")
        was = {k: v.clone() for k, v in net.state_dict().items()}
        torch.rand(start)  # the global generator has no part in it
        before = torch.get_rng_state()
        learn_embedding(net, pictures(24), LABELS, epochs=3, lr=1e-2, **QUICK)
        assert torch.equal(torch.get_rng_state(), before)
        moved = [k for k, v in net.state_dict().items() if not torch.equal(v, was[k])]
        assert moved == ["label_embedding"]
        assert not net.label_embedding.requires_grad
        assert net.label_embedding.grad is None
        ends.append(net.label_embedding)
    assert torch.equal(*ends)
    assert (ends[0] - was["label_embedding"]).abs().max() > 1e-3


def test_labels_that_look_alike_are_drawn_together():
    # classes 0 and 1 have the same images; all others are bright in a place of their own
    labels = torch.arange(400) % 4
    images = 0.1 * pictures(400)
    place = labels.clamp(min=1)
    for k in range(1, 4):
        images[place == k, :, 2 * k - 2 : 2 * k] += 0.9
    net = network("fm", loud=False, embedding="learned")
    learn_embedding(net, images.clamp(max=1), labels, epochs=12, lr=1e-2, batch=50, progress=False)
    apart = torch.cdist(net.label_embedding, net.label_embedding)
    alike = float(apart[0, 1])
    # they stay apart by two standard deviations of the noise at which they are told apart
    assert (
        2 * (0.1 / 0.9) ** 0.5 < alike < 0.9 * float(apart[[0, 0, 1, 1, 2], [2, 3, 2, 3, 3]].min())
    )


def test_embeddings_that_are_fixed_have_no_phase():
    with pytest.raises(ValueError, match="network has one-hot embeddings, which are fixed"):
        learn_embedding(network("dt"), pictures(24), LABELS)
    with pytest.raises(ValueError, match="network has no prototypes: make one with"):
        prototypes(network("dt", embedding="learned"), pictures(24), LABELS)
    with pytest.raises(ValueError, match="labels has no example of class 2"):
        prototypes(network("dt", embedding="prototype"), pictures(24), LABELS % 2)


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "options", "loss", "weighting", "epochs"),
    [
        ("dt", {}, "cross-entropy", "uniform", 15),
        ("dt", {"embedding": "prototype", "output": "linear"}, "squared", "clamped", 15),
        ("ct", {"embedding": "learned"}, "cross-entropy", "clamped", 30),
        ("ct", {}, "squared", "uniform", 30),
        ("fm", {}, "cross-entropy", "uniform", 30),
        ("fm", {"output": "velocity"}, "squared", "uniform", 90),  # has the noise to learn, too
    ],
)
def test_every_variant_learns_digits(variant, options, loss, weighting, epochs):
    images, labels = digits()
    images, labels = images[labels < 5], labels[labels < 5]
    net = digit_network(variant, classes=5, dropout=0.0, **options)
    if options.get("embedding") == "prototype":
        prototypes(net, images, labels)
    histories = noprop(
        net, images, labels, epochs=epochs, loss=loss, weighting=weighting, batch=25, lr=5e-3,
        progress=False,
    )  # fmt: skip
    for history in histories.values():
        told = [line["loss"] for line in history]
        assert sum(told[-20:]) < 0.8 * sum(told[:20])
        assert not any(line["skipped"] for line in history)
    found = pipeline(net)(images, generator=random_of()).classes
    # chance is .2; a share of 125 spreads by .045 at most
    assert float((found == labels).double().mean()) > 0.5


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"loss": "hinge"}, "loss='hinge': give 'cross-entropy' or 'squared'"),
        ({"weighting": "min-snr"}, "weighting='min-snr': give 'uniform', 'snr' or 'clamped'"),
        ({"limit": 0.0}, "limit=0.0"),
        ({"images": pictures(24)[:, 0]}, r"images has shape \[24, 8, 8\]: give \[N, 1, 8, 8\]"),
        ({"images": "mnist"}, "images has shape str"),
        ({"images": 2 * pictures(24)}, r"images has values outside \[0, 1\]"),
        ({"images": torch.full((24, 1, 8, 8), torch.nan)}, r"images has values outside \[0, 1\]"),
        ({"images": pictures(24).long()}, "images is torch.int64: give uint8"),
        ({"labels": LABELS.float()}, "labels: give a tensor of int64"),
        ({"labels": LABELS[:5]}, r"labels has shape \[5\]: give \[24\]"),
        ({"labels": LABELS + 1}, "labels: give classes from 0 to 3"),
        ({"test": (pictures(2), LABELS)}, r"test\[1\] has shape \[24\]: give \[2\]"),
        ({"test": (pictures(2)[:, 0], LABELS[:2])}, r"test\[0\] has shape"),
        ({"epochs": 0}, "epochs=0"),
        ({"blocks": [5]}, "blocks has 5: give numbers from 0 to 4"),
    ],
)
def test_a_mistake_is_one_clear_error(wrong, words):
    net = network("dt")
    was = {k: v.clone() for k, v in net.state_dict().items()}
    given = {"images": pictures(24), "labels": LABELS, "epochs": 1, **QUICK, **wrong}
    with pytest.raises(ValueError, match=words):
        noprop(net, given.pop("images"), given.pop("labels"), **given)
    assert all(torch.equal(v, was[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("variant", "output"), [("dt", "linear"), ("fm", "velocity")])
def test_cross_entropy_needs_probabilities(variant, output):
    with pytest.raises(ValueError, match=f"'cross-entropy' of a network with output='{output}'"):
        noprop(network(variant, output=output), pictures(24), LABELS, epochs=1)
