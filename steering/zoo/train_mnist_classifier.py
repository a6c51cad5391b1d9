"""Train the built-in MNIST classifier; write its reference statistics and the small test slice.

    python -m steering.zoo.train_mnist_classifier --data DIR --out DIR

writes `mnist-classifier/` (config, weights, log, feature statistics of the training and the test
images) and `mnist_slice.safetensors` (the first 25 test images of each class) into `--out`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from steering.models.classifier import Classifier
from steering.zoo.classifier_training import fit_epochs, save_classifier
from steering.zoo.training import seeded

BATCH = 128
PEAK_LR = 3e-3


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """x [N,1,28,28] in [0,1], each image turned by up to 12 degrees, sheared by up to 0.15,
    scaled by up to 12 % and shifted by up to 2 pixels."""
    u = 2 * torch.rand(5, len(x), generator=rng) - 1
    angle, scale, shear = math.radians(12) * u[0], 1 + 0.12 * u[1], 0.15 * u[2]
    c, s = scale * angle.cos(), scale * angle.sin()
    shift = u[3:] * (2 / 14)  # the grid is 2 wide over 28 pixels
    matrix = torch.stack([c, shear - s, shift[0], s, c, shift[1]], -1).view(-1, 2, 3)
    # the grid is in [-1,1] and padded with 0 = black
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def outputs(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N,d] and predicted classes [N] of images [N,28,28] uint8."""
    features, predicted = [], []
    with torch.inference_mode():
        for chunk in images.split(1000):
            f = model.features(chunk[:, None].float() / 255)
            features.append(f)
            predicted.append(model.head(f).argmax(-1))
    return torch.cat(features), torch.cat(predicted)


def statistics(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean and covariance of features [N,d] in float64, whole and of each class.

    mean [d], cov [d,d] (unbiased), n []; class_mean [K,d], class_cov [K,d,d], class_n [K].
    """
    f = features.double()
    parts = [f[labels == k] for k in range(int(labels.max()) + 1)]
    return {
        "mean": f.mean(0),
        "cov": f.T.cov(),
        "n": torch.tensor(len(f)),
        "class_mean": torch.stack([p.mean(0) for p in parts]),
        "class_cov": torch.stack([p.T.cov() for p in parts]),
        "class_n": torch.tensor([len(p) for p in parts]),
    }


def train(data: Path, epochs: int, out: Path, seed: int) -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(seed)
    with np.load(data / "mnist.npz") as arrays:
        x, x_test = (torch.from_numpy(arrays[k]) for k in ("x_train", "x_test"))
        y, y_test = (torch.from_numpy(arrays[k]).long() for k in ("y_train", "y_test"))
    folder = out / "mnist-classifier"
    model = seeded(Classifier, seed)

    def loss_of(rows: Tensor) -> Tensor:
        clean = x[rows][:, None].float() / 255
        return F.cross_entropy(model(augment(clean, rng)), y[rows])

    def watch(epoch: int) -> dict[str, float]:
        # watched, never selected on
        correct = (outputs(model, x_test)[1] == y_test).double().mean()
        return {"test_accuracy": round(correct.item(), 4)}

    lines = fit_epochs(model, loss_of, len(x), BATCH, epochs, PEAK_LR, 1e-2, rng, watch)
    save_classifier(model, lines, folder)
    for name, images, labels in (("train", x, y), ("test", x_test, y_test)):
        stats = statistics(outputs(model, images)[0], labels)
        save_file(stats, folder / f"{name}_stats.safetensors")
    keep = torch.cat([(y_test == k).nonzero()[:25, 0] for k in range(10)]).sort().values
    small = {"images": x_test[keep].contiguous(), "labels": y_test[keep].to(torch.uint8)}
    save_file(small, out / "mnist_slice.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mnist.npz")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the zoo's folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.epochs, args.out, args.seed)


if __name__ == "__main__":
    main()
