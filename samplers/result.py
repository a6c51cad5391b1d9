"""What a run gives back: items, their weights, and an honest account of what was spent."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from samplers.core import Draws
from samplers.engine import Engine
from samplers.ledger import History, Ledger
from samplers.scoring import call_reward, reward_name
from search.resample import ess, stratified
from search.tree import Tree
from steering.noise import child_key, root_key, uniform

if TYPE_CHECKING:
    from samplers.spec import Spec

_DRAW = -2  # child number of the uniforms that draws are made with; no walk has it


@dataclass(frozen=True, eq=False)
class Result:
    """Draws of a run. K distinct items, R conditions.

    `counts` says how often each item was drawn: items are not repeated. Without `draws` every item
    that was found is here once, with its weight.
    """

    ids: Tensor  # [K] int64 handles
    rows: Tensor  # [K] int64 condition of each item
    rewards: Tensor  # [K] float64
    counts: Tensor  # [K] int64 multiplicity
    weights: Tensor  # [K] float64, normalised per condition over all that was found
    finished: Tensor  # [K] bool; False: read off the clean guess of a state on its way
    ess: Tensor  # [R] float64 effective sample size over the items found
    root_ess: Tensor  # [R] float64 the same over distinct x_T: items of one x_T are not independent
    log_z: Tensor  # [R] float64 estimate of log E_p[exp(λ reward)]; nan where there is none
    found: Tensor  # [R] int64 items found, of which `distinct` were drawn
    failed: int  # walks whose reward failed
    also: dict[str, Tensor]  # held-out rewards [K] float64, which nothing was steered by
    tree: Tree | None
    history: History
    spent: Ledger
    lam: float
    ranked: bool  # best first: a search, whose draws follow no law
    biased: str  # why the draws are not of the target, however large the budget; "" if they are
    status: str  # "done", "interrupted" or "seconds"
    _engine: Engine = field(repr=False)
    _spec: Spec = field(repr=False)
    _draws: int | None = field(repr=False)
    _also: tuple[Any, ...] = field(repr=False)

    @property
    def nfe(self) -> int:
        """Network rows spent, over all conditions; `spent.rows` has them apart."""
        return int(self.spent.rows.sum())

    @property
    def distinct(self) -> int:
        """Distinct items among the draws."""
        return len(self.ids)

    @property
    def prompts(self) -> list[Any]:
        """[K] what each item was asked for."""
        return [self._engine.model.prompts[r] for r in self.rows.tolist()]

    @cached_property
    def items(self) -> Tensor:
        """[K, ...] decoded items, on the CPU (images: [K, C, H, W] float32 in [0, 1])."""
        return decode(self._engine, self.ids, self.finished)

    @property
    def images(self) -> list[Image.Image]:
        """K PIL images, in the order of `rewards`; of a clip its middle frame.

        Raises:
            TypeError: items that are neither images nor clips: use `items`.
        """
        self.check_pictures()
        return _pictures(middle_frame(self.items))

    @property
    def clips(self) -> list[list[Image.Image]]:
        """K clips, each a list of PIL images.

        Raises:
            TypeError: items are no clips [K, F, C, H, W].
        """
        if self.items.ndim != 5:
            raise TypeError(f"items of shape {tuple(self.items.shape)} are no clips: use .images.")
        return [_pictures(frames) for frames in self.items]

    @property
    def texts(self) -> list[str]:
        """K sequences as texts, in the order of `rewards`.

        Raises:
            TypeError: items that are no sequences.
        """
        write = self._engine.model.write
        if write is None:
            raise TypeError("items of this model are no sequences: use .items.")
        return write(self.items)

    def check_pictures(self) -> None:
        """TypeError if items are sequences, of which there are no pictures."""
        if self.written:
            raise TypeError("items of this model are sequences, no images: use .texts.")

    @property
    def written(self) -> bool:
        """Are items sequences, which `texts` has?"""
        return self._engine.model.write is not None

    @property
    def best(self) -> int:
        """Index of the item with the highest reward."""
        if not self.distinct:
            raise ValueError("nothing was found, so nothing is best: see .spent.first_error.")
        return int(self.rewards.argmax())

    def states(self, ids: Tensor) -> Tensor:
        """Kept states [N, *D] of handles, for instance of a tree's nodes."""
        return self._engine.states(ids.tolist())

    def thumbnails(self, ids: Tensor) -> Tensor | list[str]:
        """[N, ...] decoded items of handles [N], inner nodes as they are, on the CPU; of clips the
        middle frames, of sequences their N texts."""
        items = decode(self._engine, ids, torch.ones(len(ids), dtype=torch.bool))
        write = self._engine.model.write
        return middle_frame(items) if write is None else write(items)

    def save(self, folder: str | Path) -> None:
        """Write the record of the run: a journal and its states; `samplers.load` reads it, and what
        `more` adds from now on is added there.

        Raises:
            FileExistsError: the folder holds another record.
        """
        from samplers.run import save

        save(self, folder)

    def more(
        self,
        *,
        nfe: int | None = None,
        reward_calls: int | None = None,
        seconds: float | None = None,
        progress: bool = True,
    ) -> Result:
        """Go on with a larger budget; every walk already made is used again.

        What the sampler took from its first budget stays as it was (leaves in flight, a pilot's
        length, a population's size), so that it is the same tree that grows: a run whose budget
        was too small for a pilot stays flat. To choose anew, start a new run.

        Args:
            nfe, reward_calls: what to add to the limits so far, per condition.
            seconds: of wall clock for what is added.
            progress: show a bar.

        Warns:
            UserWarning: nothing was added, because another limit ended the run.
        """
        from samplers.run import more

        return more(self, nfe=nfe, reward_calls=reward_calls, seconds=seconds, progress=progress)

    def __str__(self) -> str:
        ess_, roots = self.ess.mean().item(), self.root_ess.mean().item()
        lines = [
            f"{int(self.counts.sum())} draws, {self.distinct} distinct, of "
            f"{int(self.found.sum())} found ({self.failed} failed); "
            f"ESS {ess_:.1f}, over distinct starting noises {roots:.1f}"
            + (f", BIASED: {self.biased}" if self.biased else "")
        ]
        if self.tree is not None and self.tree.flat:
            lines.append(
                "the tree is flat: its walks share no beginning, as in importance sampling"
            )
        if self.distinct:
            by_weight = self._draws is None and not self.ranked
            share = self.weights if by_weight else self.counts.double()
            share = share / share.sum()
            log_z = ", ".join(f"{z:.3f}" for z in self.log_z.tolist()[:4])
            log_z += ", ..." if len(self.log_z) > 4 else ""
            told = f"; log Z {log_z} at lam={self.lam:.4g}" if self.log_z.isfinite().any() else ""
            lines.append(
                f"reward: mean {float((share * self.rewards).sum()):.4f}, "
                f"best {float(self.rewards.max()):.4f}{told}"
            )
            for name, value in self.also.items():
                lines.append(f"held out, {name}: mean {float((share * value).sum()):.4f}")
        spent = self.spent
        guided = f" and {spent.guided} for guidance" if spent.guided else ""
        lines.append(
            f"{self.nfe} network rows in {spent.calls} calls ({spent.padded} rows of padding, "
            f"{spent.replayed} rows from the record), "
            f"{int(spent.reward_calls.sum())} reward calls{guided}, {spent.decodes} decodes, "
            f"{spent.seconds:.1f} s; {self.status}"
        )
        if self.failed and spent.first_error:
            lines.append(f"first failure of the reward: {spent.first_error}")
        return "\n".join(lines)


def middle_frame(items: Tensor) -> Tensor:
    """[N, C, H, W] of clips [N, F, C, H, W]; anything else as it is."""
    return items[:, items.shape[1] // 2] if items.ndim == 5 else items


def _pictures(items: Tensor) -> list[Image.Image]:
    if items.ndim != 4 or items.shape[1] not in (1, 3):
        shape = tuple(items.shape)
        raise TypeError(f"items of shape {shape} are no images [K, 1 or 3, H, W]: use .items.")
    pixels = (items * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def decode(engine: Engine, ids: Tensor, finished: Tensor) -> Tensor:
    """Decode kept states [K, *D], in chunks of the batch size; an unfinished one by its guess."""
    if not len(ids):
        return torch.empty(0)
    parts = []
    for chunk in torch.arange(len(ids)).split(engine.settings.batch):
        x = engine.states(ids[chunk].tolist())
        with torch.no_grad():
            items = torch.as_tensor(engine.model.decode(x))
            for k, c in enumerate(chunk.tolist()):
                entry = engine.entry[int(ids[c])]
                if not finished[c] and entry in engine.clean:
                    # of its own: a guess of tokens is another kind of tensor than a state
                    guess = engine.clean.get([entry]).to(x.device)
                    items[k] = torch.as_tensor(engine.model.decode(guess))[0]
            parts.append(items.cpu())
        engine.ledger.decodes += len(chunk)
    return torch.cat(parts)


def assemble(
    engine: Engine,
    spec: Spec,
    found: Draws,
    rewards: dict[int, float],
    draws: int | None,
    also: tuple[Any, ...],
    status: str,
) -> Result:
    """Turn what a sampler found into draws: all of it, the best n, or n by weight."""
    conditions = len(engine.model.prompts)
    weights = torch.zeros(len(found.id), dtype=torch.float64)
    size, root_size = (torch.zeros(conditions, dtype=torch.float64) for _ in range(2))
    chosen, counts = [], []
    for r in range(conditions):
        here = (found.row == r).nonzero().flatten()
        if not len(here):
            continue
        log_w = found.log_weight[here]
        log_w = log_w.nan_to_num(posinf=torch.finfo(torch.float64).max, neginf=-torch.inf)
        if not (log_w > -torch.inf).any():  # nothing has weight: every item counts the same
            log_w = torch.zeros_like(log_w)
        log_w = torch.log_softmax(log_w, 0)
        weights[here] = log_w.exp()
        size[r] = ess(log_w)
        _, group = found.root[here].unique(return_inverse=True)
        by_root = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
        root_size[r] = ess(by_root.index_add(0, group, weights[here]).log())
        if draws is None:
            picked, times = here, torch.ones(len(here), dtype=torch.int64)
        elif found.ranked:
            picked = _unlike(engine, found.id, here)[:draws]
            times = torch.ones(len(picked), dtype=torch.int64)
        else:
            key = child_key(root_key(spec.seed, torch.tensor([r])), _DRAW)
            index, times = stratified(log_w, uniform(key, (draws,))[0]).unique(return_counts=True)
            picked = here[index]
        if not found.ranked:
            order = weights[picked].argsort(descending=True, stable=True)
            picked, times = picked[order], times[order]
        chosen.append(picked)
        counts.append(times)
    none = torch.empty(0, dtype=torch.int64)
    pick, count = (torch.cat(c) if c else none for c in (chosen, counts))
    ids = found.id[pick]
    finished = found.finished[pick]
    held_out = {}
    if also:
        prompts = [engine.model.prompts[r] for r in found.row[pick].tolist()]
        for reward in also:
            name = _unused(reward_name(reward), held_out)
            held_out[name] = _held_out(engine, reward, ids, finished, prompts)
    return Result(
        ids=ids,
        rows=found.row[pick],
        rewards=torch.tensor([rewards[h] for h in ids.tolist()], dtype=torch.float64),
        counts=count,
        weights=weights[pick],
        finished=finished,
        ess=size,
        root_ess=root_size,
        log_z=found.log_z,
        found=torch.bincount(found.row, minlength=conditions),
        failed=sum(w.failed for w in engine.record.walks),
        also=held_out,
        tree=found.tree,
        history=engine.history,
        spent=dataclasses.replace(engine.ledger),
        lam=spec.lam,
        ranked=found.ranked,
        biased="guided without weights"
        if engine.guidance is not None and spec.weights == "none"
        else found.biased,
        status=status,
        _engine=engine,
        _spec=spec,
        _draws=draws,
        _also=also,
    )


def _unlike(engine: Engine, id: Tensor, ranked: Tensor) -> Tensor:
    """Of ranked items [K], those whose sequence none before has; of images, which differ, all."""
    states = engine.states(id[ranked].tolist())
    if states.is_floating_point():
        return ranked
    first: dict[tuple[int, ...], int] = {}
    for k, state in enumerate(states.tolist()):
        first.setdefault(tuple(state), k)
    return ranked[list(first.values())]


def _held_out(
    engine: Engine, reward: Any, ids: Tensor, finished: Tensor, prompts: list[Any]
) -> Tensor:
    """[K] float64 of items that are paid for already: whatever happens here, they are not lost."""
    parts = [torch.empty(0, dtype=torch.float64)]
    try:
        for start in range(0, len(ids), engine.settings.batch):
            c = torch.arange(start, min(start + engine.settings.batch, len(ids)))
            items = decode(engine, ids[c], finished[c])
            parts.append(
                call_reward(reward, items, [prompts[k] for k in c.tolist()], "fail").reward
            )
    except (Exception, KeyboardInterrupt) as error:
        warnings.warn(
            f"also: {reward_name(reward)} ended with {type(error).__name__}: {error}; its figures "
            "are nan from there on.",
            stacklevel=6,
        )
    known = torch.cat(parts)
    return torch.cat([known, known.new_full((len(ids) - len(known),), torch.nan)])


def _unused(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else _unused(name + "'", taken)
