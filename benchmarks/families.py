"""Which pipelines can be steered: tiny ones of many classes, each driven unmodified.

    python -m benchmarks.families [--only NAME ...] [--write docs/pipelines.md] [--quick]

For each pipeline, with random weights: it runs by itself from noise to image while its scheduler's
`step` is listened to; then the driven model is asked for the same states, at every step, and must
say the same, bit for bit, and decode the last state to the same image. Our chain with eta = 0,
from the same start, must end in the image of its own run, too (with the first-order scheduler of
its kind in place of one that draws noise or remembers), to 1e-4. Then what it found out at opening
(may steps and conditions share a call?), a gradient to the state, and a DTS* search of 200 network
rows (or 5 leaves, where those are more), whose best must beat its first sample (once more, with
another seed, where the first happened to be the best).

`steered` counts pipelines for which all of that holds; `refused` those that are refused by name;
`wrong` those that are accepted and differ.
"""

from __future__ import annotations

import argparse
import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from benchmarks.report import finish, header
from samplers import TreeSearch, sample
from steering import Model, from_pipeline, noise
from steering.pipelines import FAMILIES
from steering.pipelines.driven import DrivenDecoder, DrivenDenoiser, items_of
from tests.tiny import Tiny, families

PROMPTS = {"text": ["a red fox", "two blue jays"], "class": [1, 2], None: None}
STEPS = 4
TOLERANCE = 1e-4  # of images in 0..1: that of the native adapters, float32 over whole chains
# schedulers of first order without noise, on the same grid, for those that are not
FIRST_ORDER: dict[str, tuple[str, dict[str, Any]]] = {
    "PNDMScheduler": ("DDIMScheduler", {}),
    "DDPMScheduler": ("DDIMScheduler", {}),
    "CogVideoXDPMScheduler": ("CogVideoXDDIMScheduler", {}),
    "EulerAncestralDiscreteScheduler": ("EulerDiscreteScheduler", {}),
    "DPMSolverMultistepScheduler": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "UniPCMultistepScheduler": ("FlowMatchEulerDiscreteScheduler", {}),
}
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


@dataclass(frozen=True)
class Found:
    """What became of one pipeline."""

    name: str
    refused: str = ""  # the reason
    differ: tuple[str, ...] = ()  # what is not as in the pipeline's own run
    chain: float | None = None  # our chain's image less its own, at most
    route: str = ""  # the routes there are
    injected: bool = False
    batches: bool = False
    conditions: bool = False
    steps: bool = False
    gradient: bool = False
    rows: int = 0
    first: float = 0.0
    best: float = 0.0
    seconds: float = 0.0

    @property
    def steered(self) -> bool:
        """Does all that is asked for hold?"""
        return not self.refused and not self.wrong and self.best > self.first

    @property
    def wrong(self) -> bool:
        """Is it accepted, and not what it is by itself?"""
        return bool(self.differ) or not (self.chain is None or self.chain <= TOLERANCE)

    @property
    def chain_error(self) -> str:
        """`chain` in a table."""
        return "-" if self.chain is None else f"{self.chain:.0e}"


def redness(items: Tensor, prompts: Any) -> Tensor:
    """Red over blue, mean over pixels (and frames)."""
    channels = items.movedim(-3, 0)
    return (channels[0] - channels[-1]).flatten(1).mean(1) + 0.1 * channels[0].flatten(1).mean(1)


@torch.no_grad()
def own_run(pipe: Any, tiny: Tiny, x: Tensor | None) -> tuple[list[tuple], Tensor]:
    """What the pipeline's scheduler is shown at each step of its own run, and the items.

    Each step is (state, network's output, state that it became).
    """
    shown: list[tuple] = []
    step = pipe.scheduler.step
    signature = inspect.signature(step)

    def listening(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        state, output = given["sample"].clone(), given["model_output"].clone()
        stepped = step(*args, **kwargs)
        became = stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample
        shown.append((state, output, became.clone()))
        return stepped

    listening.__signature__ = signature  # type: ignore[attr-defined]
    pipe.scheduler.step = listening
    call: dict[str, Any] = {**tiny.call, "num_inference_steps": STEPS, "output_type": "pt"}
    prompts = PROMPTS[tiny.prompt]
    if prompts is not None:
        call["prompt" if tiny.prompt == "text" else "class_labels"] = prompts[:1]
    takes = inspect.signature(type(pipe).__call__).parameters
    if "generator" in takes:
        call["generator"] = torch.Generator().manual_seed(0)
    if x is not None:
        call["latents"] = x
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some draw the code of an image from global numbers
            items = items_of(pipe(**call, return_dict=False)[0])
    finally:
        del pipe.scheduler.step
    return shown, items


def against_itself(model: Model, tiny: Tiny, pipe: Any) -> tuple[str, ...]:
    """What of a driven model is not, to the bit, as in the pipeline's own run."""
    denoiser, decoder = model.denoiser, model.decode
    assert isinstance(denoiser, DrivenDenoiser)
    assert isinstance(decoder, DrivenDecoder)
    x = None
    if not denoiser.oracle.injected:  # after a start of its own, an image's code is another draw
        shape = model.process.prior(torch.zeros(1, dtype=torch.int64)).shape[1:]
        x = noise.normal(noise.root_key(1, torch.arange(1)), shape).to(denoiser.dtype)
    shown, items = own_run(pipe, tiny, x)
    differ = []
    for i, index in enumerate(denoiser.grid.index):
        state, output = shown[index][0][:1], shown[index][1][:1]  # some step copies along
        said = denoiser.oracle.query(state, [0], denoiser.grid.at([i])).output
        if not torch.equal(said, output):
            differ.append(f"step {i}")
    last = shown[-1][2][:1]
    if not torch.equal(items_of(denoiser.oracle.decode(last, 0, turns=decoder.turns)), items):
        differ.append("decoding")
    return tuple(differ)


@torch.no_grad()
def own_chain(tiny: Tiny, build: Callable[[Any], Model], pipe: Any) -> float | None:
    """How far our chain with eta = 0 ends from the pipeline's own image, at most; None where the
    pipeline takes no scheduler without noise.

    Args:
        build: a pipeline -> its driven model with eta = 0, of one prompt.
    """
    kept, name = pipe.scheduler, type(pipe.scheduler).__name__
    if name == "LCMScheduler":
        return None
    kind, changes = FIRST_ORDER.get(name, (name, {}))
    # a configuration's list of defaults would undo the change
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "_use_default_values"}
    pipe.scheduler = getattr(diffusers, kind).from_config({**config, **changes})
    try:
        model = build(pipe)
        denoiser, process = model.denoiser, model.process
        assert isinstance(denoiser, DrivenDenoiser)
        x = None
        if not denoiser.oracle.injected:
            shape = process.prior(torch.zeros(1, dtype=torch.int64)).shape[1:]
            x = noise.normal(noise.root_key(1, torch.arange(1)), shape).to(denoiser.dtype)
        shown, items = own_run(pipe, tiny, x)
        state = shown[0][0][:1].float() / denoiser.grid.scale[0]
        for i in range(process.steps):
            at = torch.tensor([i])
            clean = denoiser(state, process.time(at), torch.tensor([0]))
            state = process.transition(state, at, clean).sample(torch.tensor([0]))
        return float((model.decode(state) - items).abs().max())
    finally:
        pipe.scheduler = kept


def try_family(tiny: Tiny, nfe: int) -> Found:
    """Everything about one pipeline."""
    began = time.perf_counter()
    pipe, call = tiny.build(), dict(tiny.call)
    own = {name: call.pop(name) for name in ("height", "width", "guidance_scale") if name in call}
    prompts = PROMPTS[tiny.prompt]

    def model(rows: int, **route: Any) -> Model:
        """Of so many prompts."""
        negative = {}
        if "negative_prompt" in tiny.call:
            negative["negative_prompts"] = [tiny.call["negative_prompt"]] * rows
        extra = {name: value for name, value in call.items() if name != "negative_prompt"}
        asked = None if prompts is None else prompts[:rows]
        return from_pipeline(
            pipe, asked, steps=STEPS, call=extra or None, **own, **negative, **route
        )

    try:
        both, one = model(2, route="driven"), model(1, route="driven")
    except ValueError as error:
        return Found(tiny.name, refused=str(error), seconds=time.perf_counter() - began)
    denoiser = both.denoiser
    assert isinstance(denoiser, DrivenDenoiser)
    way = int(denoiser.cost[0].sum())
    for seed in (0, 1):  # the first of all leaves may happen to be the best, once
        nfe = max(nfe, 5 * way)
        search = sample(one, redness, TreeSearch(branch="even"), nfe=nfe, seed=seed, progress=False)
        first, best = search.history.reward[0], max(search.history.reward)
        if best > first:
            break
    return Found(
        tiny.name,
        "",
        against_itself(both, tiny, pipe),
        own_chain(tiny, lambda pipe: model(1, route="driven", eta=0.0), pipe),
        "native or driven" if tiny.name.split()[0] in FAMILIES else "driven",
        denoiser.oracle.injected,
        denoiser.batches,
        len(set(denoiser.kind)) == 1,
        denoiser.mixes,
        has_gradient(both),
        int(denoiser.cost[0, 0]),
        first,
        best,
        time.perf_counter() - began,
    )


def has_gradient(model: Model) -> bool:
    """Does a clean guess have one to its state?"""
    x = model.process.prior(noise.root_key(0, torch.arange(1))).requires_grad_(True)
    try:
        clean = model.denoiser(x, model.process.time(torch.tensor([1])), torch.tensor([0]))
        return bool(torch.autograd.grad(clean.square().sum(), x)[0].abs().sum() > 0)
    except RuntimeError:  # something on the way is not differentiable
        return False


def as_table(found: list[Found]) -> str:
    """Markdown, a line for each pipeline."""
    mark = {True: "yes", False: "no"}
    lines = [
        "| pipeline | route | states go in as | bit-equal | our chain "
        "| conditions share a call | steps do | gradient | rows a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        if one.refused:
            reason = one.refused.partition(": use one of")[0]
            lines.append(f"| {one.name} | refused | {reason} | | | | | | |")
            continue
        where = "noise" if one.injected else "`latents=`"
        equal = "all steps, decoding" if not one.differ else f"not {', '.join(one.differ)}"
        cells = [one.name, one.route, where, equal, one.chain_error,
                 mark[one.conditions and one.batches],
                 mark[one.steps], mark[one.gradient], str(one.rows)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(table: str, path: Path) -> None:
    """Put the table between its marks in a document."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every third pipeline, 60 rows")
    parser.add_argument("--only", nargs="*", help="pipelines of these names")
    parser.add_argument("--write", type=Path, metavar="FILE", help="document with the table in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    found = []
    for k, tiny in enumerate(families()):
        if (args.only and tiny.name not in args.only) or (args.quick and k % 3):
            continue
        one = try_family(tiny, 60 if args.quick else 200)
        found.append(one)
        verdict = f"refused: {one.refused}" if one.refused else (
            f"{'steered' if one.steered else 'WRONG' if one.wrong else 'not better'}: "
            f"{one.route}, injected={one.injected}, batches={one.batches}, "
            f"conditions={one.conditions}, steps={one.steps}, gradient={one.gradient}, "
            f"chain {one.chain_error}, rows={one.rows}, first {one.first:.3f} best {one.best:.3f}"
        )  # fmt: skip
        differ = f", differs in {', '.join(one.differ)}" if one.differ else ""
        print(f"{one.name:<44} {one.seconds:5.1f} s  {verdict}{differ}", flush=True)
    if args.write:
        write(as_table(found), args.write)
    finish(
        {
            "steered": sum(one.steered for one in found),
            "refused": sum(bool(one.refused) for one in found),
            "wrong": sum(one.wrong for one in found),
            "not_better": [o.name for o in found if not (o.refused or o.wrong or o.steered)],
            "largest_chain_error": max(one.chain or 0.0 for one in found),
            "one_call_for_all_steps": sum(one.steps for one in found),
            "with_gradient": sum(one.gradient for one in found),
            "pipelines": len(found),
        }
    )


if __name__ == "__main__":
    main()
