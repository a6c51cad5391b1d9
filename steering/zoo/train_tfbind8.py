"""Train the built-in model of weak binding sites: a masked network of DNA of eight bases.

    python -m steering.zoo.train_tfbind8 --data DIR --minutes 6 --out DIR

The transcription factor SIX6 binds every 8-mer with a measured E-score, r once scaled to [0, 1].
The network learns 8-mers drawn in proportion to exp(3 r) from those of the lower half of scores, so
that what is wanted of it afterwards, strong binding, is rare but not absent. The scores are written
beside the weights. The length is wall time, because the learning rate decays to zero over it;
started again with the same `--out`, it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from steering.models.sequence_denoiser import SequenceDenoiser
from steering.zoo.sequence_training import fit_masked

ALPHABET, LENGTH = "ACGT", 8
PEAK_LR = 2e-3
SLOPE = 3.0  # of the log-density of the training data in r
DRAWS = 2**18
MASKS = 4  # of each sequence in a batch


def build_denoiser() -> SequenceDenoiser:
    """The network: four blocks of 64 channels, 92,388 parameters."""
    return SequenceDenoiser(
        tokens=len(ALPHABET), width=64, depth=4, kernel=9, dilations=(1,), fine=32
    )


def scaled(e_score: Tensor) -> Tensor:
    """Scores on [0, 1]."""
    low, high = e_score.aminmax()
    return (e_score - low) / (high - low)


def training_law(r: Tensor) -> Tensor:
    """Probabilities of sequences with scaled scores r: exp(3 r) up to their median, 0 above."""
    log_p = torch.where(r <= r.median(), SLOPE * r.double(), -torch.inf)
    return log_p.flatten().softmax(0).view_as(r)


def train(data: Path, minutes: float, out: Path, seed: int) -> None:
    """Train for so many minutes of wall time, this and earlier starts together."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(seed)
    with np.load(data / "tfbind8_six6.npz") as arrays:
        e_score = torch.from_numpy(arrays["e_score"])  # in the order of the letters, last fastest
    out.mkdir(parents=True, exist_ok=True)
    save_file({"e_score": e_score}, out / "scores.safetensors")
    law = training_law(scaled(e_score))
    drawn = torch.multinomial(law, DRAWS, replacement=True, generator=rng)
    place = len(ALPHABET) ** torch.arange(LENGTH - 1, -1, -1)
    sequences = (drawn[:, None] // place % len(ALPHABET)).to(torch.int8)

    def batch_of(rows: Tensor) -> tuple[Tensor, None]:
        return sequences[rows].long().repeat(MASKS, 1), None

    fit_masked(build_denoiser, batch_of, DRAWS, ALPHABET, LENGTH, out, minutes, PEAK_LR, rng, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of tfbind8_six6.npz")
    parser.add_argument("--minutes", type=float, default=6.0, help="wall time, resumes included")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.minutes, args.out, args.seed)


if __name__ == "__main__":
    main()
