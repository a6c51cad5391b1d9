"""A NoProp chain as a model to steer: what it computes, and that the law drawn from is a table."""

import pytest
import torch

from samplers import SMC, Ancestral, BestOfN, Importance, TreeSampling, sample
from steering import FlowChef, from_noprop, noise, rewards
from steering.guidance import ClassifierGuidance
from tests.exact.estimates import average, ratio
from tests.tiny_noprop import exact, network, pictures, pipeline, told

VARIANTS = ("dt", "ct", "fm")
P = torch.tensor([[0.6, 0.3, 0.1]])  # p(y | image)
REWARD = torch.tensor([-1.0, 0.0, 1.5])
SPREAD = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])  # embeddings in fewer dimensions


def exact_pipeline(variant, steps):
    """With the exact posterior, 3 classes."""
    return pipeline(exact(variant, classes=3, **({"steps": steps} if variant == "dt" else {})))


def frequencies(result):
    """How much weight each label has in each condition: [R, m] float64."""
    labels = result.items[:, 0].argmax(1)
    total = torch.zeros(len(result.log_z), result.items.shape[2], dtype=torch.float64)
    return total.index_put_((result.rows, labels), result.weights, accumulate=True)


def unsteered(model, n, seed=0):
    """How often each label comes out of n draws of the first image: [m] float64."""
    key, row = noise.root_key(seed, torch.arange(n)), torch.zeros(n, dtype=torch.int64)
    x = model.process.prior(key)
    for k in range(model.process.steps):
        i = torch.full((n,), k)
        clean = model.denoiser(x, model.process.time(i), row)
        x = model.process.transition(x, i, clean).sample(noise.child_key(key, k))
    items = model.decode(x)
    return items[:, 0].argmax(1).bincount(minlength=items.shape[2]).double() / n


# --- our chain is the pipeline's -----------------------------------------------------------------


@torch.no_grad()
def ends(model, seed):
    """States where our chain ends, from the noise that a generator gives the pipeline."""
    rng, n = torch.Generator().manual_seed(seed), len(model.prompts)
    row, process = torch.arange(n), model.process
    x = torch.randn(n, *process.shape, generator=rng)
    for k in range(process.steps):
        i = torch.full((n,), k)
        step = process.transition(x, i, model.denoiser(x, process.time(i), row))
        x = step.mean
        if step.std.any():
            x = x + step.std[:, None] * torch.randn(x.shape, generator=rng)
    return x


@pytest.mark.parametrize("embedding", ["one-hot", "learned"])
@pytest.mark.parametrize(("variant", "steps"), [("dt", None), ("ct", None), ("ct", 7), ("fm", 7)])
def test_our_chain_reproduces_the_pipelines_states(variant, steps, embedding):
    pipe, images = pipeline(network(variant, embedding=embedding)), pictures(4)
    eta = None if variant == "dt" else 0.0  # the paper's chain of "dt" draws noise
    model = from_noprop(pipe, images, steps=steps, eta=eta)
    found = pipe(images, steps, generator=torch.Generator().manual_seed(1))
    x = ends(model, 1)
    torch.testing.assert_close(x, found.states, atol=1e-4, rtol=0)  # the house's bound for adapters
    items = model.decode(x)
    assert torch.equal(items[:, 0].argmax(1), found.classes)
    assert items.shape == (4, 1, 4)
    assert model.write(items) == found.labels
    other = from_noprop(pipe, pictures(4, seed=5), steps=steps, eta=eta)
    assert (ends(other, 1) - x).abs().amax(1).min() >= 100 * 1e-4


def test_it_is_called_with_what_it_was_trained_on():
    pipe = pipeline(network("dt").train())
    model = from_noprop(pipe, pictures(2))
    assert pipe.network.training  # dropout and batch norm are back as they were
    x, row = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    again = [model.denoiser(x, torch.tensor([3.0, 1.0]), row) for _ in range(2)]
    assert torch.equal(*again)
    evaluated = from_noprop(pipeline(network("dt")), pictures(2))
    assert torch.equal(again[0], evaluated.denoiser(x, torch.tensor([3.0, 1.0]), row))
    assert model.denoiser.rows(torch.zeros(2), row).tolist() == [1, 1]
    assert not model.denoiser.fills
    assert from_noprop(pipeline(network("fm")), pictures(1)).denoiser.fills


def test_names_tell_what_decides_a_run():
    pipe = pipeline(network("ct"))
    names = {
        from_noprop(pipe, images, eta=eta, abstain=abstain).name
        for images, eta, abstain in (
            (pictures(2), None, 0.0),
            (pictures(2, seed=1), None, 0.0),
            (pictures(2), 0.5, 0.0),
            (pictures(2), None, 0.3),
        )
    }
    names.add(from_noprop(pipeline(network("ct", seed=1)), pictures(2)).name)
    assert len(names) == 5
    assert from_noprop(pipe, pictures(2)).name in names


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "embedding"), [("dt", None), ("ct", None), ("ct", SPREAD), ("fm", SPREAD)]
)
def test_with_the_exact_posterior_labels_follow_it(variant, embedding):
    steps, n = 100, 5000
    options = {"steps": steps} if variant == "dt" else {}
    net = exact(variant, embedding, **({"classes": 3} if embedding is None else {}), **options)
    found = unsteered(from_noprop(pipeline(net), told(P), steps=steps, eta=1.0), n)
    error = (P[0] * (1 - P[0]) / n).sqrt()
    # every step is a normal one where the posterior is a mixture: first order in 1 / steps. It was
    # .05 off with 10 steps, .013 with 40
    assert bool(((found - P[0]).abs() < 4 * error + 1 / steps).all()), found


@pytest.mark.parametrize("sampler", [TreeSampling(branch=(0, 3, 6)), SMC(64), Importance(), "best"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steered_labels_follow_the_table(variant, sampler):
    """p(y) exp(λ r(y)) / Z, p the law of the unsteered chain of these few steps itself."""
    steps, conditions, n, lam = 8, 30, 10000, 0.8
    pipe = exact_pipeline(variant, steps)
    p = unsteered(from_noprop(pipe, told(P), steps=steps), n, seed=3)
    model = from_noprop(pipe, told(P.expand(conditions, 3)), steps=steps)
    if sampler == "best":
        best = sample(model, rewards.Table(REWARD), BestOfN(16), nfe=200, progress=False, batch=256)
        first = torch.stack([best.rewards[best.rows == r].max() for r in range(conditions)])
        # of 16 the best has label 2 unless none has: that has a probability of (1 - p)^16
        share, error = average((first > 1).double())
        assert share == pytest.approx(1 - (1 - float(p[2])) ** 16, abs=4 * error + 0.02)
        return
    found = sample(
        model, rewards.Table(REWARD), sampler, nfe=520, lam=lam, progress=False, batch=256
    )
    target = p * (lam * REWARD.double()).exp()
    z, target = float(target.sum()), target / target.sum()
    share, own = frequencies(found), found.log_z.exp()
    mean, error = average(own)
    # the table's own error beside that of the conditions, which are independent
    assert mean == pytest.approx(z, abs=4 * (error + 2 / n**0.5))
    for y in range(3):
        value, error = ratio(own * share[:, y], own)
        spread = float((p[y] * (1 - p[y]) / n).sqrt()) * float(target[y] / p[y])
        assert value == pytest.approx(float(target[y]), abs=4 * (error + spread)), y
        assert error < 0.03  # small beside how far the reward moves the law
    assert float((target - p).abs().max()) > 0.2


def test_the_tree_is_no_flat_one():
    model = from_noprop(exact_pipeline("ct", 8), told(P), steps=8)
    found = sample(model, rewards.Table(REWARD), TreeSampling(branch=(0, 3, 6)), nfe=600,
                   progress=False)  # fmt: skip
    assert found.tree is not None
    assert not found.tree.flat


def test_another_prior_of_the_classes():
    # where classes are as frequent as `prior` says, and were equally so in training
    prior = torch.tensor([0.1, 0.1, 0.8])
    model = from_noprop(exact_pipeline("fm", 20), told(P.expand(30, 3)), steps=20)
    shift = rewards.Table((3 * prior).log())
    found = sample(model, shift, Importance(60), progress=False, batch=512)
    right = P[0] * prior / (P[0] * prior).sum()
    own = found.log_z.exp()
    value, error = ratio(own * frequencies(found)[:, 2], own)
    assert value == pytest.approx(float(right[2]), abs=4 * error + 1 / 20)  # and the steps, above


def test_a_set_of_labels():
    pipe = exact_pipeline("ct", 8)
    model = from_noprop(pipe, told(P), steps=8)
    allowed = rewards.from_text(model)(lambda texts: [5.0 * (t in {"1", "2"}) for t in texts])
    found = sample(model, allowed, BestOfN(20), progress=False)
    assert found.texts[found.best] in {"1", "2"}
    assert found.rewards.max() == 5
    weighed = sample(model, allowed, Importance(200), lam=4.0, progress=False)
    inside = sum(
        w for w, t in zip(weighed.weights.tolist(), weighed.texts, strict=True) if t != "0"
    )
    assert inside > 0.99  # odds are raised by e^20


def test_abstaining_is_an_outcome():
    # a guess of one step is the mean of u, and its largest probability is that of the image
    sure, unsure = torch.tensor([[0.9, 0.05, 0.05]]), torch.tensor([[0.4, 0.3, 0.3]])
    pipe = exact_pipeline("dt", 1)
    model = from_noprop(pipe, told(torch.cat([sure, unsure])), abstain=0.6)
    found = sample(model, rewards.Table(torch.zeros(4)), Ancestral(2), progress=False)
    assert found.items.shape[1:] == (1, 4)
    assert [t for _, t in sorted(zip(found.rows.tolist(), found.texts, strict=True))] == [
        "0", "0", "abstain", "abstain",
    ]  # fmt: skip
    soft = model.preview(torch.eye(3) * 0.5 + torch.tensor([0.5, 0.0, 0.0]))
    assert soft.argmax(2).flatten().tolist() == [0, 3, 3]  # 1, and two of a half each
    torch.testing.assert_close(soft.sum(2), torch.ones(3, 1))
    worth = rewards.Table(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert sample(model, worth, Ancestral(1), progress=False).rewards.tolist() == [0.0, 1.0]


def test_labels_have_their_names():
    pipe = pipeline(exact("fm", classes=3), ["cat", "dog", "owl"])
    sure = torch.tensor([[1e-9, 1.0, 1e-9], [1e-9, 1e-9, 1.0]])
    model = from_noprop(pipe, told(sure), steps=4)
    found = sample(model, rewards.Table(torch.zeros(3)), Ancestral(1), progress=False)
    assert found.texts == ["dog", "owl"]
    assert found.prompts == ["image 0", "image 1"]


# --- guidance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_guidance_bends_the_chain_towards_a_label(variant):
    model = from_noprop(exact_pipeline(variant, 10), told(P), steps=10)
    reward = rewards.Table(REWARD)

    def classifier(x, t, row):  # of the label 2, by how near the state is to it
        return 2 * x[:, 2]

    plain = sample(model, reward, Ancestral(200), progress=False)
    for guidance in (FlowChef(reward, step=0.3), ClassifierGuidance(classifier)):
        bent = sample(model, reward, Ancestral(200), guidance=guidance, weights="none",
                      progress=False)  # fmt: skip
        (a, e), (b, f) = average(plain.rewards), average(bent.rewards)
        assert b > a + 4 * (e * e + f * f) ** 0.5


def test_guided_draws_have_weights_that_correct_for_it():
    model = from_noprop(exact_pipeline("fm", 8), told(P.expand(60, 3)), steps=8)
    guidance = ClassifierGuidance(lambda x, t, row: 0.5 * x[:, 2])
    with pytest.warns(UserWarning, match="guidance is off at steps 7"):
        found = sample(model, rewards.Table(REWARD), Importance(40), guidance=guidance,
                       progress=False, batch=512)  # fmt: skip
    p = unsteered(from_noprop(exact_pipeline("fm", 8), told(P), steps=8), 20000, seed=3)
    target = p * REWARD.double().exp()
    value, error = ratio(found.log_z.exp() * frequencies(found)[:, 2], found.log_z.exp())
    # the table's own error is a third of its frequency's, .0024
    assert value == pytest.approx(float(target[2] / target.sum()), abs=4 * (error + 0.008))


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"images": torch.zeros(0, 1, 8, 8)}, "images: give a tensor"),
        ({"images": [[0.0]]}, "images: give a tensor"),
        ({"images": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, r"give floats in \[0, 1\]"),
        ({"images": 2 * pictures(1)}, r"give floats in \[0, 1\]"),
        ({"images": -pictures(1)}, r"give floats in \[0, 1\]"),
        ({"images": torch.full((1, 1, 8, 8), torch.nan)}, r"give floats in \[0, 1\]"),
        ({"images": torch.zeros(1, 3, 8, 8)}, r"images have shape \[1, 3, 8, 8\]"),
        ({"steps": 3}, "steps=3: this network has a block for each of 5 steps"),
        ({"steps": 6}, "steps=6: give an int from 1 to 5"),
        ({"steps": "5"}, "steps='5'"),
        ({"eta": 1.5}, "eta=1.5"),
        ({"abstain": 1.0}, "abstain=1.0 is no probability"),
        ({"abstain": -0.1}, "abstain=-0.1"),
        ({"abstain": "often"}, "abstain='often'"),
    ],
)
def test_a_mistake_is_one_clear_error(given, words):
    with pytest.raises(ValueError, match=words):
        from_noprop(pipeline(network("dt")), **{"images": pictures(1), **given})


def test_other_pipelines_are_refused():
    with pytest.raises(TypeError, match="is a NoPropDenoiser, no NoPropPipeline"):
        from_noprop(network("dt"), pictures(1))


def test_a_table_of_other_classes_is_refused():
    model = from_noprop(pipeline(network("ct")), pictures(1), abstain=0.5)
    with pytest.raises(TypeError, match=r"shape \[\d+, 1, 5\]"):  # 4 classes and "abstain"
        sample(model, rewards.Table(torch.zeros(4)), Ancestral(2), progress=False)


def test_chains_without_noise_do_not_branch():
    model = from_noprop(pipeline(network("ct")), pictures(1), steps=4, eta=0.0)
    assert not model.process.stochastic.any()
    assert from_noprop(pipeline(network("ct")), pictures(1), steps=4).process.stochastic[:-1].all()
    with pytest.raises(ValueError, match="noise"):
        sample(model, rewards.Table(torch.zeros(4)), SMC(8), nfe=64, progress=False)
