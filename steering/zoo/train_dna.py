"""Train the built-in DNA model: a masked network of 200 bp sites that are open in a cell type.

    pip download --no-deps --dest DIR dnadiffusion==0.0.0.dev0
    python -m steering.zoo.train_dna --data DIR --minutes 27 --out DIR

Labels are the cell types of `dna_sites.CELLS`, dropped at random so that the network also knows
sites of any. Each sequence is read from either strand. Chromosomes 1 and 2 are held out. The length
is wall time, because the learning rate decays to zero over it; started again with the same `--out`,
it goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from steering.metrics.sequences import kmer_counts
from steering.models.sequence_denoiser import SequenceDenoiser
from steering.zoo.dna_sites import (
    ALPHABET,
    CELLS,
    LENGTH,
    Sites,
    held_out_halves,
    read_sites,
    reverse_complement,
)
from steering.zoo.sequence_training import fit_masked

PEAK_LR = 3e-3
UNLABELLED = 0.15


def build_denoiser() -> SequenceDenoiser:
    """The network: eight blocks of 128 channels at every fourth base, 0.58 million parameters."""
    return SequenceDenoiser(
        tokens=len(ALPHABET), width=128, depth=8, kernel=5, stride=4, fine=32, classes=len(CELLS)
    )


def words(sites: Sites) -> dict[str, Tensor]:
    """Counts [64] of words of three bases: of the training sites of all cell types, "train", and of
    the half of the held-out HepG2 sites that has the higher signal, "HepG2"."""
    high, _ = held_out_halves(sites)
    return {"train": kmer_counts(sites.of("train").tokens), "HepG2": kmer_counts(high.tokens)}


def train(data: Path, minutes: float, out: Path, seed: int) -> None:
    """Train for so many minutes of wall time, this and earlier starts together."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(seed)
    every = read_sites(data)
    sites = every.of("train")
    out.mkdir(parents=True, exist_ok=True)
    save_file(words(every), out / "words.safetensors")

    def batch_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        x, label = sites.tokens[rows].long(), sites.cell[rows]
        turned = torch.rand(len(x), generator=rng) < 0.5
        x = torch.where(turned[:, None], reverse_complement(x), x)
        dropped = torch.rand(len(x), generator=rng) < UNLABELLED
        return x, label.masked_fill(dropped, len(CELLS))

    fit_masked(
        build_denoiser, batch_of, len(sites), ALPHABET, LENGTH, out, minutes, PEAK_LR, rng, seed
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the wheel, or its folder")
    parser.add_argument("--minutes", type=float, default=27.0, help="wall time, resumes included")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.minutes, args.out, args.seed)


if __name__ == "__main__":
    main()
