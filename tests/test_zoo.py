"""The built-in checkpoints are small, load offline and quietly, and do what their cards say."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from steering import zoo
from steering.metrics import Moments, frechet
from steering.models.sequence_classifier import log_odds
from steering.zoo import evaluate, evaluate_flow
from steering.zoo.dna_sites import CELLS, encode

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "steering" / "zoo"


@pytest.fixture(scope="module")
def classifier():
    return zoo.load("mnist-classifier")


@pytest.fixture(scope="module")
def slice_features(classifier):
    images, _ = zoo.mnist_slice()
    with torch.inference_mode():
        return classifier.features(images[:, None].float() / 255)


def test_checkpoints_are_small():
    for name in zoo.names():
        size = sum(path.stat().st_size for path in (FOLDER / name).rglob("*") if path.is_file())
        assert size <= 4e6, name
    for name in ("mnist", "mnist-flow", "mnist-flow-base"):
        assert sum(p.numel() for p in zoo.load(name).unet.parameters()) <= 400_000


def test_no_pickled_weights():
    ends = {path.suffix for name in zoo.names() for path in (FOLDER / name).rglob("*.*")}
    assert ends <= {".safetensors", ".json", ".jsonl", ".md", ".txt"}


def test_logs_are_thin_and_their_learning_rate_ends_at_zero():
    for name in zoo.names():
        lines = (FOLDER / name / "train.jsonl").read_text().splitlines()
        assert 1 < len(lines) < 100
        first, last = json.loads(lines[0]), json.loads(lines[-1])
        assert last["loss"] < first["loss"]
        assert last.get("lr", 0.0) == 0.0


def test_import_does_not_pull_in_diffusers():
    code = "import sys, steering.zoo; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_loading_is_quiet_and_ready_for_use(capfd, recwarn):
    pipes = [zoo.load(n, dtype=torch.float64) for n in ("mnist", "mnist-flow", "mnist-flow-base")]
    model = zoo.load("mnist-classifier", dtype=torch.float64)
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
    for module in (*(pipe.unet for pipe in pipes), model):
        assert not module.training
        for p in module.parameters():
            assert p.dtype == torch.float64
            assert not p.requires_grad


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"'cifar'.*mnist, mnist-blockwise, mnist-flow, "):
        zoo.load("cifar")
    with pytest.raises(ValueError, match=r"'mnist'.*mnist-test, mnist-train"):
        zoo.reference("mnist")


def test_classifier_reads_the_slice(classifier):
    images, labels = zoo.mnist_slice()
    assert images.dtype == labels.dtype == torch.uint8
    assert labels.bincount().tolist() == [25] * 10
    logits = classifier(images[:, None].float() / 255)
    # 99.2 % of all test images: 2 of 250 wrong, and 7 has probability 0.005
    assert (logits.argmax(-1) == labels).sum() >= 244


def test_classifier_has_a_gradient_and_items_are_apart(classifier):
    images, _ = zoo.mnist_slice()
    x = (images[:8, None].float() / 255).requires_grad_()
    (grad,) = torch.autograd.grad(classifier(x)[0].logsumexp(0), x)
    assert grad[0].norm() > 0
    assert grad[1:].norm() == 0


@pytest.mark.parametrize(("name", "n"), [("mnist-test", 10_000), ("mnist-train", 60_000)])
def test_statistics_are_those_of_their_classes(name, n):
    """The laws of total expectation and covariance tie the whole to its classes."""
    stats = zoo.reference(name)
    counts = stats["class_n"].double()
    assert int(stats["n"]) == n == int(counts.sum())
    mean = (counts / n) @ stats["class_mean"]
    torch.testing.assert_close(stats["mean"], mean, rtol=1e-10, atol=1e-12)
    away = stats["class_mean"] - mean
    scatter = ((counts - 1)[:, None, None] * stats["class_cov"]).sum(0)
    scatter += (counts[:, None] * away).T @ away
    torch.testing.assert_close(stats["cov"], scatter / (n - 1), rtol=1e-9, atol=1e-12)


def test_statistics_belong_to_the_classifier(slice_features):
    """A mean of 25 images has the error that the shipped covariance of its class says it has."""
    _, labels = zoo.mnist_slice()
    stats = zoo.reference("mnist-test")
    for k in range(10):
        mean = slice_features[labels == k].double().mean(0)
        error = (stats["class_cov"][k].diagonal() / 25).sqrt()
        z = (mean - stats["class_mean"][k]) / error
        # z² has mean 1 in each of 64 correlated coordinates; another extractor is far outside
        assert 0.1 < z.square().mean() < 4


def test_train_is_near_test():
    train, test = (evaluate.moments(f"mnist-{part}") for part in ("train", "test"))
    near = frechet(train, test, extractor="mnist-classifier").value
    assert 0 < near < 0.02 * float(test.covariance.trace())


@pytest.mark.filterwarnings("ignore:Fréchet distance from")  # 32 and 250 items, on purpose
def test_samples_are_digits(classifier, slice_features):
    images = evaluate.draw(zoo.load("mnist"), 32, seed=1, steps=20)
    assert images.shape == (32, 1, 28, 28)
    assert 0 <= images.min()
    assert images.max() <= 1
    with torch.inference_mode():
        features = classifier.features(images)
        sure = classifier.head(features).softmax(-1).amax(-1) > 0.9
    # 84 % of 1,000 samples of 50 steps are: 27 of 32, with a standard error of 2; four below that
    # leave room for fewer steps and another machine's rounding
    assert sure.sum() >= 18
    # and nearer to digits than digits upside down are
    flipped = classifier.features(zoo.mnist_slice()[0].flip(1)[:, None].float() / 255)
    real = Moments.of(slice_features)
    ours = frechet(features, real, extractor="mnist-classifier").value
    assert ours < frechet(flipped, real, extractor="mnist-classifier").value


# --- the flows -------------------------------------------------------------------------------

FLOWS = ("mnist-flow", "mnist-flow-base")


def seen(classifier, images):
    with torch.inference_mode():
        return classifier(images).argmax(-1)


@pytest.mark.parametrize("name", FLOWS)
def test_flows_draw_the_digit_that_is_asked_for(name, classifier):
    x, labels = evaluate_flow.start(40, seed=2)
    images = evaluate_flow.draw(zoo.load(name), x, labels, steps=8, scale=2.0)
    assert 0 <= images.min() <= images.max() <= 1
    # the classifier sees the label in 98.9 % of 1,000 such samples: below 36 of 40 has
    # probability 0.0001
    assert (seen(classifier, images) == labels).sum() >= 36


@pytest.mark.parametrize("name", FLOWS)
def test_the_last_class_of_the_flows_is_any_digit(name, classifier):
    pipe = zoo.load(name)
    assert pipe.null_class == 10
    x, _ = evaluate_flow.start(40, seed=3)
    found = seen(classifier, evaluate_flow.draw(pipe, x, torch.full((40,), 10), 8, 1.0))
    # of 40 fair draws of ten digits, fewer than 7 different ones have probability 1e-5
    assert len(found.unique()) >= 7
    assert found.bincount().max() <= 20


def test_reflow_made_the_flow_straighter():
    x, labels = evaluate_flow.start(20, seed=4)
    after, before = (evaluate_flow.straightness(zoo.load(n), x, labels, steps=10) for n in FLOWS)
    assert after < 0.2 * before  # 0.06 of it over 200 paths


@pytest.mark.parametrize(("rate", "steps"), [(0.5, 4), (1.3, 7)])
def test_straightness_of_a_linear_flow_is_its_closed_form(rate, steps):
    """v = rate · x: x_k = q^k · x_0 by Euler's rule with q = 1 - rate / T."""

    class Linear:
        def unet(self, x, t, class_labels):
            return SimpleNamespace(sample=rate * x)

    x, labels = evaluate_flow.start(3, seed=0)
    q = 1 - rate / steps
    whole = 1 - q**steps
    off = sum((whole - rate * q**k) ** 2 for k in range(steps)) / steps
    found = evaluate_flow.straightness(Linear(), x, labels, steps)
    assert found == pytest.approx(off / whole**2, rel=1e-5)  # float32 rounding


def test_a_straight_flow_has_straightness_zero():
    class Straight:
        def unet(self, x, t, class_labels):
            return SimpleNamespace(sample=torch.full_like(x, 0.7))

    found = evaluate_flow.straightness(Straight(), *evaluate_flow.start(3, seed=0))
    assert found == pytest.approx(0, abs=1e-10)  # float32 rounding, squared


# --- DNA --------------------------------------------------------------------------------------

# what is bound in liver cells, by HNF4A and HNF1A, and in cells of blood, by GATA1
LIVER = ("CAAAGTCCA", "GTTAATGATTAAC", "TGGACTTTG")
BLOOD = ("AGATAAG", "CTTATCT", "TGATAAGA")


def planted(words, n, seed):
    """[n, 200] tokens: random bases with the words at random places."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(4, (n, 200), generator=rng)
    for row in x:
        for k, word in enumerate(words):
            at = int(torch.randint(20, (), generator=rng)) + 40 + 40 * k
            row[at : at + len(word)] = encode([word])[0].long()
    return x


@pytest.mark.parametrize("name", ["dna-reward", "dna-judge"])
def test_dna_classifiers_tell_liver_from_blood(name):
    net = zoo.load(name)
    with torch.inference_mode():
        liver, blood = (net(planted(w, 64, k)) for k, w in enumerate((LIVER, BLOOD)))
    hepg2, k562 = (CELLS.index(c) for c in ("HepG2", "K562"))
    assert (liver[:, hepg2] - liver[:, k562]).mean() > (blood[:, hepg2] - blood[:, k562]).mean() + 1
    # bases as weights are read as tokens are
    x = planted(LIVER, 2, 5)
    torch.testing.assert_close(net(one_hot(x, 4).float()), net(x))


def test_dna_model_writes_bases_by_cell_type():
    pipe = zoo.load("dna")
    assert (pipe.alphabet, pipe.length, pipe.classes) == ("ACGT", 200, len(CELLS))
    rng = torch.Generator().manual_seed(0)
    drawn = [
        pipe([label] * 24, 12, guidance_scale=6.0, generator=rng, output_type="pt").sequences
        for label in (CELLS.index("HepG2"), CELLS.index("K562"))
    ]
    with torch.inference_mode():
        odds = [log_odds(zoo.load("dna-judge")(x), CELLS.index("HepG2")).mean() for x in drawn]
    assert odds[0] > odds[1] + 0.5


def test_dna_words_are_of_real_sites():
    words = zoo.dna_words()
    # 198 words to a site: 39,254 sites were trained on; 2,135 HepG2 sites are held out, one half
    assert words["train"].sum() == 39_254 * 198
    assert words["HepG2"].sum() == 1_067 * 198
    # CpG is rare in genomes: ACG, CCG, GCG and TCG are fewer than AGC, CGC, GGC and TGC
    assert words["train"][6::16].sum() < words["train"][9::16].sum()


@pytest.mark.parametrize("name", ["noprop-dt", "noprop-ct", "noprop-fm"])
def test_noprop_labels_the_slice(name):
    # of all 10,000 test images 99.0 % or more are right, with a standard deviation of .6 of 250
    images, labels = zoo.mnist_slice()
    pipe = zoo.load(name)
    found = pipe(images[:, None] / 255, generator=torch.Generator().manual_seed(0)).classes
    assert (found == labels).double().mean() > 0.97
    sizes = [sum(p.numel() for p in block.parameters()) for block in pipe.network.blocks]
    assert max(sizes) <= 150_000
    assert len(sizes) == (10 if name == "noprop-dt" else 1)


def test_the_blockwise_generator_draws_digits(classifier):
    pipe = zoo.load("mnist-blockwise")
    whole = sum(p.numel() for p in zoo.load("mnist").unet.parameters())
    assert 0.9 * whole < sum(p.numel() for p in pipe.unet.parameters()) < whole
    images = evaluate.draw(pipe, 32, seed=1, steps=20)
    with torch.inference_mode():
        sure = classifier(images).softmax(-1).amax(-1) > 0.9
    # 82 % of 1,000 at 50 steps; of 32, four standard deviations below it
    assert sure.double().mean() > 0.82 - 4 * (0.82 * 0.18 / 32) ** 0.5
