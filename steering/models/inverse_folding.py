"""A network that guesses the amino acids of a protein from its backbone and those already known.

Imports diffusers, so that it is itself imported only where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from steering.models.sequence_denoiser import TokenLogits

_RBF = 16  # radial functions of a distance
_NEAREST, _FARTHEST = 2.0, 22.0  # Å, between which they stand
_APART = 32  # residues further along the chain are all alike
_MESSAGES = 30.0  # sums over neighbours are divided by this, however many there are


@dataclass(frozen=True)
class Structure:
    """What the network makes of N backbones, the same whatever their tokens."""

    nodes: Tensor  # [N, L, H]
    edges: Tensor  # [N, L, k, H]
    neighbours: Tensor  # [N, L, k] int64 numbers of the nearest residues
    real: Tensor  # [N, L] bool: neither padding nor unresolved
    joined: Tensor  # [N, L, k] bool: both ends of the edge are real

    def __getitem__(self, rows: Tensor) -> Structure:
        """Those of these rows [M] int64."""
        parts = (self.nodes, self.edges, self.neighbours, self.real, self.joined)
        return Structure(*(part[rows] for part in parts))


class InverseFoldingDenoiser(ModelMixin, ConfigMixin):
    """Logits of the clean tokens of a protein, given its backbone and what is not masked.

    A graph of each residue's nearest ones. Its edges know the distances of all pairs of N, CA, C, O
    and an ideal CB, the direction and the turn of one residue seen from the other, and how many
    residues lie between them along the chain: nothing that moves with the protein. Layers of
    messages encode the backbone; further layers spread the known tokens, all sites at once, in no
    order. Tokens may be relaxed: a site is then shown its weights over the tokens, and the output
    is differentiable in them.

    Args:
        tokens: K, ordinary tokens, 0 .. K - 1; the mask is token K.
        width: H, channels.
        encoders: layers that do not see the tokens.
        decoders: layers that do.
        neighbours: k, edges of a residue, itself included.
        dropout: in training.

    Raises:
        ValueError: from `forward` and `encode`, inputs that do not fit.

    Papers: Dauparas et al., "Robust deep learning based protein sequence design using ProteinMPNN",
    bioRxiv 10.1101/2022.06.03.494563; Ingraham et al., "Generative models for graph-based protein
    design", NeurIPS 2019.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        tokens: int = 20,
        width: int = 128,
        encoders: int = 3,
        decoders: int = 3,
        neighbours: int = 30,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.inputs = tokens + 1
        features = 25 * _RBF + 12 + 2 * _APART + 2
        self.edge = nn.Linear(features, width)
        self.edge_norm = nn.LayerNorm(width)
        self.start = nn.Parameter(torch.zeros(width))  # a residue before any message
        self.embed = nn.Linear(self.inputs, width, bias=False)
        nn.init.normal_(self.embed.weight)  # as large as the edges that it stands beside
        self.encoder = nn.ModuleList(_Layer(width, 1, dropout, True) for _ in range(encoders))
        self.decoder = nn.ModuleList(_Layer(width, 2, dropout, False) for _ in range(decoders))
        self.out = nn.Linear(width, tokens)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        *,
        coordinates: Tensor | None = None,
        mask: Tensor | None = None,
        residue: Tensor | None = None,
        chain: Tensor | None = None,
        structure: Structure | None = None,
    ) -> TokenLogits | tuple[Tensor]:
        """Logits [N, L, K] of the clean tokens; 0 at padding.

        Args:
            sample: [N, L] int64 tokens, or [N, L, K + 1] weights of relaxed ones.
            timestep: not used: what is masked shows the time.
            class_labels: there are none.
            return_dict: False gives a tuple of one.
            coordinates, mask, residue, chain: of the backbones, see `encode`.
            structure: what `encode` made of them, instead of all four.
        """
        if class_labels is not None:
            raise ValueError("class_labels: this network takes no class labels.")
        if (structure is None) == (coordinates is None):
            raise ValueError("coordinates: give the backbones, or their structure, one of the two.")
        if structure is None:
            assert coordinates is not None
            structure = self.encode(coordinates, mask, residue, chain)
        if not sample.is_floating_point():
            sample = one_hot(sample, self.inputs).to(self.dtype)
        if sample.shape != (*structure.real.shape, self.inputs):
            raise ValueError(
                f"sample has shape {list(sample.shape)} for backbones {list(structure.real.shape)}:"
                f" give tokens [N, L], or weights [N, L, {self.inputs}]."
            )
        known = _beside(self.embed(sample.to(self.dtype)), structure.neighbours)
        edges = torch.cat([structure.edges, known], -1)  # [N, L, k, 2H]
        nodes = structure.nodes
        for layer in self.decoder:
            nodes = layer(nodes, edges, structure)[0]
        logits = self.out(nodes) * structure.real[..., None]
        return TokenLogits(logits=logits) if return_dict else (logits,)

    def encode(
        self,
        coordinates: Tensor,
        mask: Tensor | None = None,
        residue: Tensor | None = None,
        chain: Tensor | None = None,
    ) -> Structure:
        """What the network makes of backbones, before it sees a token.

        Args:
            coordinates: [N, L, 4, 3] of N, CA, C and O, in Å; anything finite at padding.
            mask: [N, L] bool, False at padding and at residues without coordinates; None is none.
            residue: [N, L] int64 numbers along the chain; None is 0, 1, 2 ...
            chain: [N, L] int64 number of the chain of each; None is one chain.
        """
        if coordinates.ndim != 4 or coordinates.shape[2:] != (4, 3):
            raise ValueError(
                f"coordinates has shape {list(coordinates.shape)}: give [N, L, 4, 3], the atoms "
                "N, CA, C and O of every residue in Å."
            )
        if not coordinates.isfinite().all():
            raise ValueError("coordinates has nan or inf: give 0 there, and False in the mask.")
        N, L = coordinates.shape[:2]
        device = coordinates.device
        real = torch.ones(N, L, dtype=torch.bool, device=device) if mask is None else mask
        along = torch.arange(L, device=device).expand(N, L) if residue is None else residue
        of = torch.zeros(N, L, dtype=torch.int64, device=device) if chain is None else chain
        for name, given in (("mask", real), ("residue", along), ("chain", of)):
            if given.shape != (N, L):
                raise ValueError(f"{name} has shape {list(given.shape)}: give {[N, L]}.")
        x = torch.where(real[..., None, None], coordinates.to(self.dtype), 0)
        middle = x[:, :, 1].sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        x = x - middle[:, None, None]  # small numbers have small errors
        far = torch.cdist(x[:, :, 1], x[:, :, 1], compute_mode="donot_use_mm_for_euclid_dist")
        far = far.masked_fill(~real[:, None], torch.inf)
        nearest = far.topk(min(self.config["neighbours"], L), largest=False).indices
        joined = real[..., None] & _beside(real[..., None], nearest)[..., 0]
        edges = self.edge_norm(self.edge(self._features(x, nearest, along, of)))
        structure = Structure(self.start.expand(N, L, -1), edges, nearest, real, joined)
        for layer in self.encoder:
            nodes, edges = layer(structure.nodes, structure.edges, structure)
            structure = Structure(nodes, edges, nearest, real, joined)
        return structure

    def _features(self, x: Tensor, nearest: Tensor, along: Tensor, of: Tensor) -> Tensor:
        """[N, L, k, F] what is to be said of each edge."""
        n, ca, c = x[:, :, 0], x[:, :, 1], x[:, :, 2]
        b, d = ca - n, c - ca
        # where CB stands in an ideal residue, in the basis of its two bonds and their normal
        cb = ca - 0.58273431 * torch.linalg.cross(b, d) + 0.56802827 * b - 0.54067466 * d
        atoms = torch.cat([x, cb[:, :, None]], 2)  # [N, L, 5, 3]
        there = _beside(atoms.flatten(2), nearest).unflatten(-1, (5, 3))  # [N, L, k, 5, 3]
        gap = atoms[:, :, None, :, None] - there[:, :, :, None]  # [N, L, k, 5, 5, 3]
        distance = (gap.square().sum(-1) + 1e-6).sqrt()
        centre = torch.linspace(_NEAREST, _FARTHEST, _RBF, dtype=x.dtype, device=x.device)
        width = (_FARTHEST - _NEAREST) / _RBF
        near = torch.exp(-(((distance[..., None] - centre) / width) ** 2)).flatten(3)
        # every residue's own axes, in which its neighbours are seen
        first = normalize(b, dim=-1, eps=1e-6)
        third = normalize(torch.linalg.cross(b, d), dim=-1, eps=1e-6)
        axes = torch.stack([first, torch.linalg.cross(third, first), third], -2)  # [N, L, 3, 3]
        theirs = _beside(axes.flatten(2), nearest).unflatten(-1, (3, 3))
        towards = normalize(there[:, :, :, 1] - ca[:, :, None], dim=-1, eps=1e-2)
        direction = torch.einsum("nlax,nlkx->nlka", axes, towards)
        turn = torch.einsum("nlax,nlkbx->nlkab", axes, theirs).flatten(3)
        step = (_beside(along[..., None], nearest)[..., 0] - along[..., None]).clamp(
            -_APART, _APART
        )
        same = _beside(of[..., None], nearest)[..., 0] == of[..., None]
        place = one_hot(torch.where(same, step + _APART, 2 * _APART + 1), 2 * _APART + 2)
        return torch.cat([near, direction, turn, place.to(x.dtype)], -1)


class _Layer(nn.Module):
    """Messages along edges to each residue, a perceptron of each, and then new edges.

    Args:
        width: H, channels of a residue.
        wide: channels of an edge, in units of H.
        dropout: in training.
        renews: does it change the edges, too?
    """

    def __init__(self, width: int, wide: int, dropout: float, renews: bool) -> None:
        super().__init__()
        self.message = _perceptron((2 + wide) * width, width)
        self.change = _perceptron((2 + wide) * width, width) if renews else None
        self.each = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                  nn.Linear(4 * width, width))  # fmt: skip
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if renews else 2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor, edges: Tensor, on: Structure) -> tuple[Tensor, Tensor]:
        said = self.message(_ends(nodes, edges, on)) * on.joined[..., None]
        nodes = self.norms[0](nodes + self.dropout(said.sum(2) / _MESSAGES))
        nodes = self.norms[1](nodes + self.dropout(self.each(nodes)))
        if self.change is None:
            return nodes, edges
        changed = self.change(_ends(nodes, edges, on))
        return nodes, self.norms[2](edges + self.dropout(changed))


def _perceptron(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                         nn.Linear(width, width))  # fmt: skip


def _ends(nodes: Tensor, edges: Tensor, on: Structure) -> Tensor:
    """[N, L, k, 2H + F] both ends of each edge, and the edge."""
    k = on.neighbours.shape[2]
    return torch.cat(
        [nodes[:, :, None].expand(-1, -1, k, -1), _beside(nodes, on.neighbours), edges], -1
    )


def _beside(values: Tensor, neighbours: Tensor) -> Tensor:
    """[N, L, k, F] values [N, L, F] of the neighbours [N, L, k] of each residue."""
    n = torch.arange(len(values), device=values.device)[:, None, None]
    return values[n, neighbours]
