"""Inverse folding: sequences for backbones, one condition for each, as a model to steer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from steering.core import Model
from steering.digest import digest
from steering.discrete import MaskedProcess
from steering.pipelines.conditional import evaluating
from steering.pipelines.sequences import TokenCodec, TokenDenoiser

RESIDUES = {
    "ALA": "A", "CYS": "C", "ASP": "D", "GLU": "E", "PHE": "F", "GLY": "G", "HIS": "H",
    "ILE": "I", "LYS": "K", "LEU": "L", "MET": "M", "ASN": "N", "PRO": "P", "GLN": "Q",
    "ARG": "R", "SER": "S", "THR": "T", "VAL": "V", "TRP": "W", "TYR": "Y", "MSE": "M",
}  # fmt: skip
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
_ATOMS = ("N", "CA", "C", "O")
_LOOKED_AT = 16  # numbers of each weight that a fingerprint rests on


@dataclass(frozen=True, eq=False)
class Backbone:
    """One protein of L residues."""

    name: str
    sequence: str  # of L letters, "X" for another than the twenty
    coordinates: Tensor  # [L, 4, 3] float32 of N, CA, C, O in Å
    residue: Tensor  # [L] int64 numbers along the chain, gaps and insertions counted
    chain: Tensor  # [L] int64 number of the chain

    def __len__(self) -> int:
        return len(self.sequence)


def read_pdb(text: str, name: str = "backbone", chains: str | None = None) -> Backbone:
    """The backbone in the first model of a PDB file, as far as N, CA, C and O are resolved.

    Reads ATOM records, and HETATM ones of selenomethionine; of alternative places the first.

    Args:
        text: content of the file.
        name: of the backbone.
        chains: letters of the chains that are wanted; None is all.

    Raises:
        ValueError: no such residue, or a record without coordinates.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("ENDMDL"):
            break
        kind, residue, atom, chain = line[:6], line[17:20].strip(), line[12:16].strip(), line[21:22]
        if kind != "ATOM  " and not (kind == "HETATM" and residue == "MSE"):
            continue
        if atom not in _ATOMS or (chains is not None and chain not in chains):
            continue
        try:
            place = [float(line[at : at + 8]) for at in (30, 38, 46)]
            int(line[22:26])
        except ValueError:
            raise ValueError(f"{name}, line {number}: no PDB record, {line!r}.") from None
        entry = found.setdefault((chain, line[22:27]), {"letter": RESIDUES.get(residue, "X")})
        entry.setdefault(atom, place)
    whole = {at: entry for at, entry in found.items() if all(atom in entry for atom in _ATOMS)}
    if not whole:
        asked = "" if chains is None else f" in chains {chains!r}"
        raise ValueError(f"{name}: no residue with N, CA, C and O{asked}.")
    letters = list(dict.fromkeys(chain for chain, _ in whole))
    residue, inserted, before = [], 0, ""
    for chain, at in whole:
        inserted = inserted * (chain == before) + (at[4] != " ")  # 52A comes after 52
        residue.append(int(at[:4]) + inserted)
        before = chain
    return Backbone(
        name,
        "".join(entry["letter"] for entry in whole.values()),
        torch.tensor([[entry[atom] for atom in _ATOMS] for entry in whole.values()]),
        torch.tensor(residue),
        torch.tensor([letters.index(chain) for chain, _ in whole]),
    )


def inverse_folding(
    denoiser: Any,
    backbones: Sequence[Backbone | str | Path],
    *,
    steps: int = 50,
    schedule: str = "loglinear",
    keep: Sequence[str] | None = None,
) -> Model:
    """A model that writes sequences for backbones; condition r is the r-th of them.

        net = InverseFoldingDenoiser.from_pretrained(folder)
        model = inverse_folding(net, ["1abc.pdb"], steps=50)
        result = sample(model, reward, TreeSampling(), nfe=5000, draws=8)
        designs = [t[: lengths[name]] for t, name in zip(result.texts, result.prompts)]

    Backbones are encoded once. All sequences are as long as the longest backbone: sites beyond the
    end of a shorter one hold alanine and mean nothing. Rewards are given the backbone's name as the
    prompt, and items [N, L, 20] over "ACDEFGHIKLMNPQRSTVWY".

    Args:
        denoiser: `InverseFoldingDenoiser`, or another with its `encode` and its call.
        backbones: R of them, or PDB files, named without their folder and ending.
        steps: T.
        schedule: of the chain, see `steering.discrete`.
        keep: R templates, as long as their backbone; letters are kept, "_" is designed.

    Raises:
        ValueError: no backbone, two of one name, a template that does not fit, a file that is none.
    """
    whole = [b if isinstance(b, Backbone) else _opened(Path(b)) for b in backbones]
    names = tuple(b.name for b in whole)
    if not whole or len(set(names)) < len(names):
        raise ValueError(f"backbones={list(names)}: give at least one, each of another name.")
    length = max(map(len, whole))
    short = [length - len(b) for b in whole]
    kept = _kept(whole, keep)
    fixed = torch.stack([pad(k, (0, n)) for k, n in zip(kept, short, strict=True)])
    device = denoiser.device

    def padded(name: str) -> Tensor:
        parts = [getattr(b, name) for b in whole]
        filled = [p.new_zeros(length, *p.shape[1:]) for p in parts]
        for whole_length, part in zip(filled, parts, strict=True):
            whole_length[: len(part)] = part
        return torch.stack(filled).to(device)

    mask = torch.tensor([[k < len(b) for k in range(length)] for b in whole], device=device)
    with evaluating(denoiser), torch.no_grad():
        structure = denoiser.encode(padded("coordinates"), mask, padded("residue"), padded("chain"))

    def network(x: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
        with evaluating(denoiser):
            here = structure[row.to(device)]
            return denoiser(x, t, return_dict=False, structure=here)[0].float()

    # records of other weights, backbones or templates are of another model
    seen = [p.detach().flatten()[:_LOOKED_AT].double().cpu() for p in denoiser.parameters()]
    seen += [b.coordinates.flatten().double() for b in whole] + [fixed.flatten().double()]
    process = MaskedProcess.of(length, len(AMINO_ACIDS), steps, schedule).to(device)
    scale = torch.ones(len(whole))
    return Model(
        TokenDenoiser(network, process, fixed.to(device), scale),
        process,
        TokenCodec(len(AMINO_ACIDS)),
        write=lambda items: [
            "".join(AMINO_ACIDS[k] for k in row) for row in items.argmax(-1).tolist()
        ],
        prompts=names,
        device=device,
        name=f"{type(denoiser).__name__}({schedule})#{digest(torch.cat(seen))}",
    )


def _opened(path: Path) -> Backbone:
    if not path.is_file():
        raise ValueError(f"backbones has {str(path)!r}, which is no file: give PDB files.")
    return read_pdb(path.read_text(), path.stem)


def _kept(backbones: list[Backbone], keep: Sequence[str] | None) -> list[Tensor]:
    """[L] int64 tokens to keep of each backbone, -1 at sites that are designed."""
    if keep is None:
        return [torch.full((len(b),), -1) for b in backbones]
    if isinstance(keep, str) or len(keep) != len(backbones):
        raise ValueError(f"keep={keep!r}: give a list of one template for each backbone.")
    kept = []
    for b, template in zip(backbones, keep, strict=True):
        if len(template) != len(b) or set(template) - set(AMINO_ACIDS + "_"):
            raise ValueError(
                f"keep has {template[:40]!r} for {b.name}: give {len(b)} letters of {AMINO_ACIDS}, "
                "or '_' for a site to be designed."
            )
        kept.append(torch.tensor([AMINO_ACIDS.find(c) for c in template]))
    return kept
