"""What sets of DNA sequences are made of: short words, motifs of transcription factors, variety.

Sequences are tokens [N, L] of ACGT, 0 to 3. A set is compared with a reference set, say of real
sites: none of this looks at a reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv1d, one_hot

PSEUDOCOUNT = 1.0  # of a column of a motif, a quarter for each base


@dataclass(frozen=True, eq=False)
class Motif:
    """A position weight matrix.

    Raises:
        ValueError: a matrix of another shape.
    """

    id: str  # "MA0114.5"
    name: str  # "HNF4A"
    log_odds: Tensor  # [W, 4] float32, nats against bases that are equally likely

    def __post_init__(self) -> None:
        if self.log_odds.ndim != 2 or self.log_odds.shape[1] != 4 or not len(self.log_odds):
            raise ValueError(
                f"log_odds of motif {self.id} has shape {list(self.log_odds.shape)}: give [W, 4]."
            )

    @classmethod
    def of(cls, id: str, name: str, counts: Tensor) -> Motif:
        """log((count + 1/4) / (total + 1) / (1/4)) of counts [W, 4] of bases seen at each place."""
        counts = counts.double()
        p = (counts + PSEUDOCOUNT / 4) / (counts.sum(1, keepdim=True) + PSEUDOCOUNT)
        return cls(id, name, (4 * p).log().float())


def read_jaspar(path: Path, taxon: int = 9606, ids: Sequence[str] = ()) -> list[Motif]:
    """The newest version of each motif of one species in JASPAR's CORE collection, by id.

    JASPAR's SQLite files come with the `pyjaspar` wheel (4.0.0): unpack it and give one of its
    `JASPAR*.sqlite`.

    Args:
        path: the file.
        taxon: the NCBI number of the species, 9606 for human.
        ids: of some motifs with their versions, "MA0114.5": only they, whatever their species.

    Raises:
        ValueError: no such file, or an id it does not have.
    """
    import sqlite3

    if not Path(path).is_file():
        raise ValueError(f"path={path} is no file: give a JASPAR*.sqlite of the pyjaspar wheel.")
    found: dict[str, tuple[int, int, str]] = {}
    base = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)
    try:
        rows = base.execute(
            "select ID, BASE_ID, VERSION, NAME from MATRIX where COLLECTION = 'CORE' and "
            "(? or ID in (select ID from MATRIX_SPECIES where TAX_ID = ?))",
            (bool(ids), str(taxon)),
        )
        for key, stem, version, name in rows:
            label = f"{stem}.{version}" if ids else stem
            if label not in found or int(version) > found[label][1]:
                found[label] = (key, int(version), name)
        if missing := [label for label in ids if label not in found]:
            raise ValueError(f"ids has {missing[0]!r}, which {path} does not have.")
        motifs = []
        for label in ids or sorted(found):
            key, version, name = found[label]
            cells = base.execute("select row, col, val from MATRIX_DATA where ID = ?", (key,))
            counts: dict[int, list[float]] = {}
            for letter, place, value in cells:
                counts.setdefault(place, [0.0] * 4)["ACGT".index(letter)] = value
            table = torch.tensor([counts[place] for place in sorted(counts)])
            motifs.append(Motif.of(label if ids else f"{label}.{version}", name, table))
    finally:
        base.close()
    return motifs


def kmer_counts(tokens: Tensor, k: int = 3) -> Tensor:
    """[4^k] int64: how often each word of k bases occurs in tokens [N, L], overlaps counted.

    Raises:
        ValueError: other tokens, or sequences shorter than k.
    """
    x = _checked("tokens", tokens)
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"k={k}: give 1 to {x.shape[1]}, the length of the sequences.")
    place = 4 ** torch.arange(k - 1, -1, -1)
    words = (x.unfold(1, k, 1) * place).sum(-1)
    return torch.bincount(words.flatten(), minlength=4**k)


def kmer_correlation(counts: Tensor, reference: Tensor) -> float:
    """Pearson correlation over words of their counts in two sets, both [4^k]."""
    return float(torch.stack([counts, reference]).double().corrcoef()[0, 1])


def motif_hits(tokens: Tensor, motifs: Sequence[Motif], share: float = 0.8) -> Tensor:
    """[N, M] int64: where each motif scores at least `share` of its highest score, either strand.

    A place at which both strands do counts once.

    Args:
        tokens: [N, L].
        motifs: M of them; one longer than L has no hit.
        share: of the largest sum of log-odds that a motif can reach.

    Raises:
        ValueError: other tokens.
    """
    x = _checked("tokens", tokens)
    hits = torch.zeros(len(x), len(motifs), dtype=torch.int64)
    by_width: dict[int, list[int]] = {}
    for m, motif in enumerate(motifs):
        by_width.setdefault(len(motif.log_odds), []).append(m)
    for start in range(0, len(x), 64):
        seen = one_hot(x[start : start + 64], 4).float().mT
        for width, which in by_width.items():
            if width > x.shape[1]:
                continue
            tables = torch.stack([motifs[m].log_odds for m in which])  # [m, W, 4]
            least = share * tables.amax(2).sum(1)
            # A, C, G, T complement to T, G, C, A: flipping both axes turns the strand
            both = torch.cat([tables, tables.flip(1, 2)]).mT
            high = conv1d(seen, both) >= least.repeat(2)[:, None]
            hits[start : start + 64, which] = (high[:, : len(which)] | high[:, len(which) :]).sum(2)
    return hits


def motif_correlation(hits: Tensor, reference: Tensor) -> float:
    """Spearman correlation over motifs of the mean hits of two sets, [N, M] and [K, M]."""
    from scipy.stats import rankdata

    # motifs without any hit are alike: tied ranks are averaged
    ranks = [torch.from_numpy(rankdata(h.double().mean(0).numpy())) for h in (hits, reference)]
    return float(torch.stack(ranks).corrcoef()[0, 1])


def hamming_diversity(tokens: Tensor) -> float:
    """Mean share of sites at which two of the sequences [N, L] differ, over all pairs.

    Raises:
        ValueError: other tokens, or fewer than two sequences.
    """
    x = _checked("tokens", tokens)
    n = len(x)
    if n < 2:
        raise ValueError(f"tokens has {n} sequences: give two or more.")
    same = one_hot(x, 4).sum(0).double()  # [L, 4] of one base at one site
    return 1 - float((same * (same - 1)).sum(1).mean()) / (n * (n - 1))


def _checked(name: str, tokens: Tensor) -> Tensor:
    if tokens.ndim != 2 or tokens.is_floating_point() or not math.prod(tokens.shape):
        raise ValueError(f"{name} has shape {list(tokens.shape)} and {tokens.dtype}: give whole "
                         "numbers [N, L].")  # fmt: skip
    x = tokens.long().cpu()
    if int(x.min()) < 0 or int(x.max()) > 3:
        raise ValueError(f"{name} has values from {int(x.min())} to {int(x.max())}: A, C, G, T "
                         "are 0 to 3.")  # fmt: skip
    return x
