"""The built-in checkpoints are small, load offline and quietly, and do what their cards say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steering import zoo
from steering.metrics import Moments, frechet
from steering.zoo import evaluate

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
    assert sum(p.numel() for p in zoo.load("mnist").unet.parameters()) <= 400_000


def test_no_pickled_weights():
    ends = {path.suffix for name in zoo.names() for path in (FOLDER / name).rglob("*.*")}
    assert ends <= {".safetensors", ".json", ".jsonl", ".md"}


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
    pipe = zoo.load("mnist", dtype=torch.float64)
    model = zoo.load("mnist-classifier", dtype=torch.float64)
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
    for module in (pipe.unet, model):
        assert not module.training
        for p in module.parameters():
            assert p.dtype == torch.float64
            assert not p.requires_grad


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"'cifar'.*mnist, mnist-classifier"):
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
    images = evaluate.draw(32, seed=1, steps=20)
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
