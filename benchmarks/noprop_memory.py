"""How much memory and time does training block by block take, against backprop and the adjoint?

    python -m benchmarks.noprop_memory [--quick] [--device cuda]

The paper's network (arXiv:2503.24322, about 2 M weights a block, T = 10 blocks) on random images of
MNIST's shape, and in full runs of CIFAR's with 10 and 100 classes; batches of 128 (64 with
--quick), float32, all trained by the same loop (AdamW, `train_blocks`), in one run:

    backprop      the chain of T blocks end to end, one update of all weights
    checkpointed  the same; activations of image towers are computed again in the backward pass
    DT            NoProp-DT, one block at a time
    CT, FM        NoProp-CT and NoProp-FM, which have one block
    adjoint       the network of CT as a neural ODE (arXiv:1806.07366): Euler steps that keep no
                  graph, then state and adjoint integrated back; 1000 steps as in the paper, 50 with
                  --quick. An image's features are computed once, not in every step.

Memory is bytes of tensors, without what the framework and the driver take. "peak" is the most that
is held in training, by the second update, when optimiser states exist:

    weights and buffers of the network  +  Adam's two moments of what is trained
    +  gradients, activations and the rest of an update, at their worst moment

Of DT the weights of all T blocks are held, as `noprop` does, and Adam's moments of the one block
that is trained. "block alone" leaves the other blocks out: a machine for each block. "all moments"
keeps those of all blocks: one update of each block in turn. "resident" is weights, gradients and
moments, the rest of the peak "extra". The adjoint's peak does not depend on the number of steps; it
is taken at 50, its time at all.

Time of DT is told for a pass over all T blocks, one update of each, which is what one update of
backprop is set against; and for an update of one block. Ratios of time are medians over rounds, in
which every method has its turn, with their range. Time on a busy machine says little; bytes do not
change.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_bytes
from benchmarks.noprop_chain import EndToEnd
from benchmarks.report import finish, header
from steering.finetune.blocks import LocalRule, train_blocks
from steering.finetune.noprop import NoPropRule, unit
from steering.models.noprop import TIMES, NoPropDenoiser

BLOCKS, FEW = 10, 50
SHAPES: dict[str, dict[str, int]] = {
    "MNIST": {"image_size": 28, "in_channels": 1, "classes": 10},
    "CIFAR-10": {"image_size": 32, "in_channels": 3, "classes": 10},
    "CIFAR-100": {"image_size": 32, "in_channels": 3, "classes": 100},
}
PAPER = {  # GB on a GPU, one-hot embeddings (arXiv:2503.24322)
    "MNIST": {"backprop": 0.87, "DT": 0.49, "CT": 1.05, "FM": 1.06, "adjoint": 2.32},
    "CIFAR-10": {"backprop": 1.17, "DT": 0.64, "CT": 0.45, "FM": 0.44, "adjoint": 6.23},
    "CIFAR-100": {"backprop": 1.73, "DT": 1.23, "CT": 0.50, "FM": 0.49, "adjoint": 6.45},
}
Velocity = Callable[[Tensor, float, Tensor], Tensor]


class Adjoint(torch.autograd.Function):
    """End z(1) of dz/dt = v(z, t, features) by Euler steps, none of which is kept for the gradient.

    The backward pass integrates from t = 1 to 0, with h = 1 / steps and all v at (z, t),

        z <- z - h v,     a <- a + h aᵀ dv/dz,     g <- g + h aᵀ dv/dw

    from a = dL/dz(1) and g = 0: then a is dL/dz(0), and g is dL/dw of features and weights, each to
    O(h) the gradient of the chain of steps (arXiv:1806.07366).

    Args of `apply`:
        velocity: z [N, d], time, features -> [N, d].
        steps: of Euler.
        z: [N, d] at t = 0.
        features: [N, hidden], which v depends on; then all its weights.
    """

    @staticmethod
    def forward(ctx: Any, velocity: Velocity, steps: int, z: Tensor, *given: Tensor) -> Tensor:
        for k in range(steps):
            z = z + velocity(z, k / steps, given[0]) / steps
        ctx.velocity, ctx.steps = velocity, steps
        ctx.save_for_backward(z, *given)
        return z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (a,), (z, features, *weights) = grad_outputs, ctx.saved_tensors
        gradients = [torch.zeros_like(w) for w in (features, *weights)]
        for k in range(ctx.steps, 0, -1):
            at, seen = z.detach().requires_grad_(), features.detach().requires_grad_()
            with torch.enable_grad():
                v = ctx.velocity(at, k / ctx.steps, seen)
            by_z, *rest = torch.autograd.grad(v, [at, seen, *weights], a)
            for g, more in zip(gradients, rest, strict=True):
                g.add_(more, alpha=1 / ctx.steps)
            z, a = z - v / ctx.steps, a + by_z / ctx.steps
        return None, None, a, *gradients


class NeuralODE:
    """One block, that of a "ct" network with output="linear": its output is the velocity of the
    state, its loss the cross-entropy of where the state ends, the gradient by the adjoint."""

    def __init__(self, network: NoPropDenoiser, images: Tensor, labels: Tensor, steps: int) -> None:
        self.network, self.images, self.labels, self.steps = network, images, labels, steps
        self.blocks: Sequence[nn.Module] = [network.block(0)]
        self.rows = len(images)

    def told(self) -> dict[str, Any]:
        return {"rule": "adjoint", "steps": self.steps}

    def velocity(self, z: Tensor, t: float, features: Tensor) -> Tensor:
        """dz/dt [N, d] at time t, which runs towards clean."""
        timestep = z.new_full((len(z),), TIMES * (1 - t))
        return self.network.guess(self.network.block(0)(z, timestep, features))

    def loss(self, block: int, numbers: Tensor, rng: torch.Generator) -> Tensor:
        part, embedding = self.network.block(0), self.network.label_embedding
        # dropout is of the image tower alone: every step sees the same features
        features = part.encode(unit(self.images[numbers]).to(embedding.device))
        z = torch.randn(len(numbers), embedding.shape[1], generator=rng).to(embedding)
        after = [p for name, p in part.named_parameters() if not name.startswith("image.")]
        end: Any = Adjoint.apply(self.velocity, self.steps, z, features, *after)
        return F.cross_entropy(end @ embedding.T, self.labels[numbers].to(embedding.device))

    def watch(self, block: int) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Cost:
    """Bytes that one way of training holds."""

    weights: int  # of the whole network, buffers among them
    trained: int  # weights of what is trained at a time; so many are gradients, Adam's the double
    peak: int  # all that is held at a time

    @property
    def resident(self) -> int:
        """Weights, gradients and Adam's moments."""
        return self.weights + 3 * self.trained


def rules(shape: dict[str, int], device: str, batch: int, steps: int) -> dict[str, LocalRule]:
    """Every way of training, each with a network of its own, on one batch of random images."""
    rng = torch.Generator().manual_seed(0)
    channels, size, classes = shape["in_channels"], shape["image_size"], shape["classes"]
    images = torch.randint(256, (batch, channels, size, size), generator=rng, dtype=torch.uint8)
    data = images, torch.randint(classes, (batch,), generator=rng)

    def network(**given: Any) -> NoPropDenoiser:
        net: Any = NoPropDenoiser(**shape, **given)
        return net.to(device)

    thrifty = network(variant="dt", steps=BLOCKS)
    for k in range(BLOCKS):
        part = thrifty.block(k)
        part.encode = partial(checkpoint, part.encode, use_reentrant=False)
    return {
        "backprop": EndToEnd(network(variant="dt", steps=BLOCKS), *data),
        "checkpointed": EndToEnd(thrifty, *data),
        "DT": NoPropRule(network(variant="dt", steps=BLOCKS), *data),
        "CT": NoPropRule(network(variant="ct"), *data),
        "FM": NoPropRule(network(variant="fm"), *data),
        "adjoint": NeuralODE(network(variant="ct", output="linear"), *data, steps),
    }


def seconds(rule: LocalRule, updates: int) -> float:
    """Of one update of every block; the first update of each, which makes Adam's moments, is left
    out."""
    histories = train_blocks(rule, epochs=1 + updates, batch=rule.rows, progress=False).values()
    return sum(statistics.median(line["seconds"] for line in h[1:]) for h in histories)


def cost(rule: Any, device: str) -> Cost:
    """What training one block of a rule holds, all of its network there."""
    run = partial(train_blocks, rule, epochs=2, batch=rule.rows, blocks=[0], progress=False)
    weights = held_by(rule.network.parameters()) + held_by(rule.network.buffers())
    trained = held_by(p for p in rule.blocks[0].parameters() if p.requires_grad)
    return Cost(weights, trained, weights + peak_bytes(run, device))


def held_by(tensors: Any) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(
    name: str, device: str, batch: int, rounds: int, updates: int, steps: int
) -> dict[str, float]:
    """Print one shape's table; its ratios to backprop."""
    shape = SHAPES[name]
    ways = rules(shape, device, batch, steps)
    times = {way: list[float]() for way in ways}
    for _ in range(rounds):
        for way, rule in ways.items():
            times[way].append(seconds(rule, updates))
    few = rules(shape, device, batch, FEW)
    costs = {way: cost(rule, device) for way, rule in few.items()}
    dt, base = costs["DT"], costs["backprop"].peak
    each = dt.weights / BLOCKS
    peaks: dict[str, float] = {way: c.peak for way, c in costs.items()}
    peaks["DT, block alone"] = dt.peak - dt.weights + each
    peaks["DT, all moments"] = dt.peak + (BLOCKS - 1) * 2 * dt.trained

    size, channels = shape["image_size"], shape["in_channels"]
    print(f"\n{name}: images of {size}x{size}x{channels}, {shape['classes']} classes")
    heads = ("weights", "gradients", "moments", "extra", "resident", "peak")
    print("MB              ", *(f"{head:>9}" for head in heads), "  / backprop", sep=" ")
    for way, c in costs.items():
        extra = c.peak - c.resident
        parts = (c.weights, c.trained, 2 * c.trained, extra, c.resident, c.peak)
        row = "".join(f"{n / 1e6:10.1f}" for n in parts)
        print(f"{way:16}{row} {c.peak / base:11.3f}")
    for way in ("DT, block alone", "DT, all moments"):
        print(f"{way:16}{'':50}{peaks[way] / 1e6:10.1f} {peaks[way] / base:11.3f}")

    print("\nmethod              s / update   / backprop (range over rounds)")
    times["DT, one block"] = [t / BLOCKS for t in times["DT"]]
    times["DT, all blocks"] = times.pop("DT")
    ratios = {}
    for way, taken in times.items():
        found = [mine / other for mine, other in zip(taken, times["backprop"], strict=True)]
        ratios[way] = statistics.median(found)
        spread = f"({min(found):.3f} to {max(found):.3f})"
        print(f"{way:16} {statistics.median(taken):13.4f} {ratios[way]:12.3f} {spread}")

    print("\npeak / backprop        here   paper (GB on a GPU)")
    for way, gigabytes in PAPER[name].items():
        theirs = f"{gigabytes / PAPER[name]['backprop']:7.2f} ({gigabytes})"
        print(f"{way:16} {peaks[way] / base:10.2f} {theirs}")
    met = "met" if peaks["DT"] <= 0.6 * base else "MISSED"
    print(f"goal, DT at most 0.6 of backprop: {met} ({peaks['DT'] / base:.3f})", flush=True)
    return {
        **{f"{way.lower()}_over_backprop": peaks[way] / base for way in costs if way != "backprop"},
        "dt_block_alone_over_backprop": peaks["DT, block alone"] / base,
        "dt_all_moments_over_backprop": peaks["DT, all moments"] / base,
        "dt_time_over_backprop": ratios["DT, all blocks"],
        "dt_update_time_over_backprop": ratios["DT, one block"],
        **{f"{w.lower()}_time_over_backprop": ratios[w] for w in ("CT", "FM", "adjoint")},
        "checkpointed_time_over_backprop": ratios["checkpointed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="MNIST's shape, under a minute")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header()
    batch, rounds, updates, steps = (64, 1, 1, FEW) if args.quick else (128, 2, 1, 1000)
    print(
        f"batch {batch}, T = {BLOCKS}, float32, one-hot embeddings; {rounds} rounds of {updates} "
        f"timed updates; adjoint of {steps} steps"
    )
    names = ["MNIST"] if args.quick else [*SHAPES]
    found = {name: measure(name, args.device, batch, rounds, updates, steps) for name in names}
    finish({**found["MNIST"], "adjoint_steps": steps, "shapes": found})


if __name__ == "__main__":
    main()
