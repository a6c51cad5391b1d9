"""DNA sites that are accessible in one of four human cell types, read from where the user has them.

The data are not part of this package: their authors allow academic and non-profit use only.
Fetch the wheel that carries them, and give it, or a folder with its files, to the scripts here:

    pip download --no-deps --dest DIR dnadiffusion==0.0.0.dev0

47,872 DNase I hypersensitive sites of 200 bp, 11,968 for each cell type, no sequence twice.
"""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ALPHABET = "ACGT"
CELLS = ("GM12878", "HepG2", "K562", "hESCT0")
LENGTH = 200
TABLE = "K562_hESCT0_HepG2_GM12878_12k_sequences_per_group.txt"
SHA256 = "ba1063a9a3d0054020ae2e9f8add974550ae91fe2d21989e790e5d6cb2cb4d58"
_SPLITS = {"training": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Sites:
    """N sites and what is known of each."""

    tokens: Tensor  # [N, 200] uint8, number of the base in ALPHABET
    cell: Tensor  # [N] int64, number in CELLS of the one cell type of the four it is open in
    signal: Tensor  # [N] float64, summed over all the samples of the index of sites
    chromosome: tuple[str, ...]  # N names, "chr1" .. "chrY"
    split: tuple[str, ...]  # N of "train", "val" (chromosome 2), "test" (chromosome 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, keep: Tensor) -> Sites:
        """The sites that keep [N] bool says."""
        rows = keep.nonzero()[:, 0].tolist()
        return Sites(
            self.tokens[keep],
            self.cell[keep],
            self.signal[keep],
            tuple(self.chromosome[k] for k in rows),
            tuple(self.split[k] for k in rows),
        )

    def of(self, *splits: str) -> Sites:
        """The sites of these splits."""
        return self.where(torch.tensor([name in splits for name in self.split]))


def read_sites(data: Path) -> Sites:
    """All sites, in the order of the table.

    Args:
        data: the wheel, or a folder that holds the wheel, its files or the table itself.

    Raises:
        ValueError: nothing of the kind is there, or the table is not the one that is known.
    """
    raw = _table(Path(data))
    if (found := hashlib.sha256(raw).hexdigest()) != SHA256:
        raise ValueError(f"data={data}: its {TABLE} has sha256 {found}, expected {SHA256}: "
                         "take dnadiffusion==0.0.0.dev0.")  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(raw.decode()), delimiter="\t"))
    return Sites(
        encode([row["sequence"] for row in rows]),
        torch.tensor([CELLS.index(row["TAG"].split("_")[0]) for row in rows]),
        torch.tensor([float(row["total_signal"]) for row in rows], dtype=torch.float64),
        tuple(row["chr"] for row in rows),
        tuple(_SPLITS[row["data_label"]] for row in rows),
    )


def held_out_halves(sites: Sites, cell: str = "HepG2") -> tuple[Sites, Sites]:
    """The sites of one cell type on chromosomes 1 and 2: the half of higher signal, and the rest.

    The signal is summed over all samples of the index: sites high up are open in many of them.
    """
    own = sites.of("val", "test")
    own = own.where(own.cell == CELLS.index(cell))
    high = torch.zeros(len(own), dtype=torch.bool)
    high[own.signal.argsort(descending=True, stable=True)[: len(own) // 2]] = True
    return own.where(high), own.where(~high)


def encode(sequences: list[str]) -> Tensor:
    """[N, L] uint8 numbers of the bases of N sequences of one length over ACGT.

    Raises:
        ValueError: another letter, or lengths that differ.
    """
    if len({len(s) for s in sequences}) != 1:
        raise ValueError("sequences differ in length, or there are none: give some of one length.")
    letters = np.frombuffer("".join(sequences).encode("ascii", "replace"), dtype=np.uint8)
    table = np.full(256, 255, dtype=np.uint8)
    table[list(ALPHABET.encode())] = range(4)
    tokens = table[letters].reshape(len(sequences), -1)
    if (tokens == 255).any():
        bad = int((tokens == 255).any(1).nonzero()[0][0])
        raise ValueError(f"sequences[{bad}]={sequences[bad]!r} has other letters than {ALPHABET}.")
    return torch.from_numpy(tokens)


def reverse_complement(tokens: Tensor) -> Tensor:
    """The other strand of [..., L] tokens, in its own reading direction: A-T and C-G swapped."""
    return (3 - tokens).flip(-1)


def _table(data: Path) -> bytes:
    if data.is_dir():
        if found := sorted(data.rglob(TABLE)):
            return found[0].read_bytes()
        if found := sorted(data.rglob("dnadiffusion-*.whl")):
            return _table(found[0])
    elif data.name == TABLE:
        return data.read_bytes()
    elif zipfile.is_zipfile(data):
        with zipfile.ZipFile(data) as wheel:
            for name in wheel.namelist():
                if name.endswith(TABLE):
                    return wheel.read(name)
    raise ValueError(f"data={data} holds no {TABLE}: fetch it by pip download --no-deps "
                     "dnadiffusion==0.0.0.dev0 and give the wheel or its folder.")  # fmt: skip
