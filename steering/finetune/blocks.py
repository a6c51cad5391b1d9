"""Training block by block: no gradient crosses a block.

One rule for all networks that learn locally. A `LocalRule` says what the blocks are and what each
one's own loss is; `train_blocks` trains them, each with an optimiser, a random stream and a
checkpoint of its own, in any order, alone or in several processes, to the same weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from steering.finetune.loop import Figures, accelerator_of, check_counts, check_numbers, fit

_WARMUP = 0.02  # share of the updates over which the learning rate rises


class LocalRule(Protocol):
    """How a network is learned block by block."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """B modules without a weight in common."""
        ...

    @property
    def rows(self) -> int:
        """Examples in an epoch."""
        ...

    def told(self) -> dict[str, Any]:
        """Settings and data that decide the run, as JSON has them."""
        ...

    def loss(self, block: int, numbers: Tensor, rng: torch.Generator) -> Tensor:
        """A block's own loss [], of the examples of these numbers [n], through this block alone.

        What other blocks compute for it carries no gradient. Draws from `rng` and, in dropout, from
        torch's global generator, which is set for each update.
        """
        ...

    def watch(self, block: int) -> dict[str, float]:
        """Figures of a block for its history, looked at after every epoch, in evaluation mode."""
        ...


def settings_of(network: Any) -> dict[str, Any]:
    """The arguments that a diffusers model was made with."""
    return {k: v for k, v in network.config.items() if not k.startswith("_")}


class LocalityError(RuntimeError):
    """A gradient would have crossed a block."""


@contextmanager
def alone(blocks: Sequence[nn.Module], mine: int) -> Iterator[None]:
    """Inside, block `mine` is all that learns, and no other block passes a gradient on.

    Weights of other blocks gather no gradient. One that is called with something that carries one,
    before or after, would have it cross: that raises.

    Raises:
        LocalityError: inside, by the numbers of the blocks.
    """
    for a, block in enumerate(blocks):
        shared = set(map(id, block.parameters())) & set(map(id, blocks[mine].parameters()))
        if a != mine and shared:
            raise LocalityError(f"blocks {a} and {mine} share weights: give each its own.")
    handles, free = [], []
    for k, block in enumerate(blocks):
        if k == mine:
            continue

        def guard(module: nn.Module, inputs: Any, output: Any, k: int = k) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                raise LocalityError(
                    f"a gradient of block {mine} passes block {k}: detach what blocks hand on."
                )

        handles += [m.register_forward_hook(guard) for m in block.modules()]
        free += [p for p in block.parameters() if p.requires_grad]
    for p in free:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p in free:
            p.requires_grad_(True)


def train_blocks(
    rule: LocalRule,
    *,
    epochs: float,
    batch: int = 128,
    lr: float = 1e-3,
    decay: float = 1e-3,
    average: float = 0.0,
    clip: float = 1.0,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict[int, list[dict[str, Any]]]:
    """Train blocks in place, one after the other; each is a run of its own.

    What a block becomes depends on the rule, these settings and its number, not on the other
    blocks, on what was trained before or on how many processes there are: the n-th update draws
    from a stream of (seed, block, n). AdamW (arXiv 1711.05101); its learning rate rises over 2 %
    of the updates and falls to 0 like a cosine. A last batch that is not full is left out.

    Under `accelerate launch` with P processes, process p trains every P-th block from the p-th on,
    in the precision asked for; gradients are not exchanged. Each process finds all blocks trained
    when it is done.

    Args:
        rule: what is learned; its network is on the device it is trained on.
        epochs: of every block; may be a fraction.
        batch: examples of an update.
        lr: highest learning rate.
        decay: of weights.
        average: decay of a moving average of the weights, which is what is left; 0 is none.
        clip: longest gradient; longer ones are shortened to it.
        blocks: which of them; None is all.
        seed: of the order of examples and of all that is drawn.
        out: folder with a checkpoint for each block, from which a run goes on; needed by several
            processes, which exchange blocks through it.
        progress: show a bar for each block.

    Returns:
        {block: history}, as `Tuned.history` has it; after every epoch also what the rule watches.

    Raises:
        ValueError: a wrong argument; `out` of a run with other settings; see `accelerator_of`.
        LocalityError: a gradient would have crossed a block.
        NotFiniteError: several updates of a block in a row were not finite.
    """
    check_counts(batch=batch)
    check_numbers(epochs=epochs, lr=lr, clip=clip, above=True)
    check_numbers(decay=decay, average=average)
    every, count = rule.rows // batch, len(rule.blocks)
    updates = max(1, round(epochs * every))
    if not every:
        raise ValueError(f"batch={batch} is more than there is: give {rule.rows} at most.")
    if average >= 1:
        raise ValueError(f"average={average}: give a number from 0 to below 1, such as 0.999.")
    wanted = range(count) if blocks is None else blocks
    if strange := [k for k in wanted if type(k) is not int or not 0 <= k < count]:
        raise ValueError(f"blocks has {strange[0]!r}: give numbers from 0 to {count - 1}.")
    accelerator = accelerator_of(next(rule.blocks[0].parameters()).device)
    several = accelerator.num_processes > 1
    if several and out is None:
        raise ValueError("out is missing: several processes exchange their blocks through it.")
    told = {
        "epochs": epochs, "batch": batch, "decay": decay, "average": average, "seed": seed,
        "precision": accelerator.mixed_precision, **rule.told(),
    }  # fmt: skip
    folder = None if out is None else Path(out)
    run = _Run(
        rule, every, updates, batch, lr, decay, average, clip, seed, told, folder, accelerator
    )
    histories = {
        k: run.train(k, progress and accelerator.is_main_process)
        for k in [*wanted][accelerator.process_index :: accelerator.num_processes]
    }
    if several:
        accelerator.wait_for_everyone()  # the others are done then, and only have to be read
        histories |= {k: run.train(k, False) for k in wanted if k not in histories}
    return histories


@dataclass(frozen=True)
class _Run:
    """How any block is trained: the settings of `train_blocks`."""

    rule: LocalRule
    every: int  # updates in an epoch
    updates: int
    batch: int
    lr: float
    decay: float
    average: float
    clip: float
    seed: int
    told: dict[str, Any]
    out: Path | None
    accelerator: Any

    def train(self, k: int, progress: bool) -> list[dict[str, Any]]:
        """The history of block k, which is trained in place."""
        block = self.rule.blocks[k]
        device = next(block.parameters()).device
        free = [p for p in block.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(free, self.lr, weight_decay=self.decay, fused=True)
        mean: AveragedModel | None = None
        more = {f"buffer/{name}": b for name, b in block.named_buffers()}
        if self.average:
            mean = AveragedModel(block, multi_avg_fn=get_ema_multi_avg_fn(self.average))
            more |= {f"average/{name}": t for name, t in mean.state_dict().items()}
            optimizer.register_step_post_hook(lambda *_: mean.update_parameters(block))
        order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

        def gradient(number: int) -> Figures:
            nonlocal order
            epoch, at = divmod(number, self.every)
            if order[0] != epoch:
                rng = _stream(self.seed, k, "epoch", epoch)
                order = epoch, torch.randperm(self.rule.rows, generator=rng)
            numbers = order[1][at * self.batch : (at + 1) * self.batch]
            rng = _stream(self.seed, k, "update", number)
            block.train()
            with _dropout_of(rng, device), self.accelerator.autocast():
                loss = self.rule.loss(k, numbers, rng)
            if bool(torch.isfinite(loss)):
                loss.backward()
            return Figures({"loss": float(loss.detach())}, {"images": self.batch})

        def watch() -> Figures:
            block.eval()
            with torch.no_grad(), self.accelerator.autocast():
                return Figures(self.rule.watch(k), {})

        with alone(self.rule.blocks, k):
            try:
                done = fit(
                    block,
                    block,
                    gradient,
                    watch,
                    self.told | {"block": k},
                    optimizer,
                    updates=self.updates,
                    clip=self.clip,
                    every=self.every,
                    out=None if self.out is None else self.out / f"block-{k:02d}",
                    progress=progress,
                    advice="Lower lr, or weigh the loss less steeply.",
                    rate=self._rate,
                    more=more,
                    label=f"block {k}",
                )
            finally:
                block.eval()
        if mean is not None:
            block.load_state_dict(mean.module.state_dict())
        return done.history

    def _rate(self, number: int) -> float:
        """Share of the learning rate at an update."""
        risen = (number + 1) / max(1.0, _WARMUP * self.updates)
        return min(1.0, risen) * 0.5 * (1 + math.cos(math.pi * number / self.updates))


def _stream(seed: int, block: int, what: str, number: int) -> torch.Generator:
    """A generator on the CPU that is a pure function of these."""
    told = hashlib.blake2b(f"{seed}/{block}/{what}/{number}".encode(), digest_size=4)
    return torch.Generator().manual_seed(int.from_bytes(told.digest(), "big"))


@contextmanager
def _dropout_of(rng: torch.Generator, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators, which dropout draws from, start where `rng` says; they are
    as they were afterwards."""
    start = int(torch.randint(2**31, (), generator=rng))
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(start)
        if on_gpu:
            torch.cuda.manual_seed(start)
        yield
