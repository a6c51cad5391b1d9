"""The `steer` command: `steer demo` shows what the toolkit does, `steer sample` does it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch

import samplers
from samplers.words import parse_reward, parse_sampler, sampler_help
from steering import from_pipeline, zoo

# what a user's input, files or network can cause; anything else is a bug, and shows where
_MISTAKES = (ValueError, TypeError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 is success, 2 a mistake in the arguments, told in one line."""
    # read by the libraries when they are imported, which is when a pipeline is loaded
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    given = _parser().parse_args(arguments)
    try:
        return given.run(given)
    except _MISTAKES as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"steer: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("steer: stopped", file=sys.stderr)
        return 130


def _demo(given: argparse.Namespace) -> int:
    from samplers.demo import run

    run(given.out, seed=given.seed, nfe=given.nfe)
    return 0


def _sample(given: argparse.Namespace) -> int:
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {given.device} cannot be used: {reason}") from error
    sampler = parse_sampler(given.sampler)
    reward = parse_reward(given.reward, given.device)
    also = [parse_reward(text, given.device) for text in given.also]
    if given.nfe is None and given.reward_calls is None and given.seconds is None:
        raise ValueError("no budget: give --nfe, --reward-calls or --seconds.")
    pipe = _pipeline(given.model, given.device, given.dtype, given.quiet)
    asked = {
        "prompts": _prompts("--prompt", given.prompt, pipe),
        "negative_prompts": _prompts("--negative-prompt", given.negative_prompt, pipe),
        "guidance_scale": given.guidance_scale,
        "height": given.height,
        "width": given.width,
        "eta": given.eta,
    }
    model = from_pipeline(
        pipe, steps=given.steps, **{k: v for k, v in asked.items() if v is not None}
    )
    result = samplers.sample(
        model,
        reward,
        sampler,
        nfe=given.nfe,
        reward_calls=given.reward_calls,
        seconds=given.seconds,
        draws=given.draws,
        lam=given.lam,
        kl=given.kl,
        ess=given.ess,
        seed=given.seed,
        also=also,
        batch=given.batch,
        progress=not given.quiet,
        record=given.out / "record",
    )
    from samplers.view.files import write_files

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    settings = {k: v for k, v in settings.items() if k not in ("run", "command")}
    settings |= {"sampler": str(sampler), "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    written = write_files(result, given.out, settings)
    if not given.quiet:
        print(result)
        print("wrote " + ", ".join(map(str, [*written, given.out / "record"])))
    return 0


def _pipeline(name: str, device: str, dtype: str | None, quiet: bool) -> Any:
    kind = None if dtype is None else getattr(torch, dtype)
    if name.startswith("zoo:"):
        torch.set_num_threads(1)  # small networks: threads would only wait for each other
        return zoo.load(name.removeprefix("zoo:"), dtype=kind, device=device)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.utils import logging

    if quiet:
        logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(name, use_safetensors=True, torch_dtype=kind)
    return pipe.to(device)


def _prompts(flag: str, given: list[str], pipe: Any) -> list[Any] | None:
    """Texts; class labels for a pipeline that reads no text."""
    if not given:
        return None
    if hasattr(pipe, "tokenizer"):
        return given
    if not all(text.isdecimal() for text in given):
        raise ValueError(f"{flag}: this pipeline reads no text, give class labels, as in {flag} 3.")
    return [int(text) for text in given]


class _Parser(argparse.ArgumentParser):
    """Mistakes get one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"steer: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    try:
        number = version("diffusion-steering")
    except PackageNotFoundError:
        number = "not installed"
    parser = _Parser(
        prog="steer",
        description="Draw reward-aligned samples from a pretrained diffusion model, or search for "
        "the best ones, without training it.",
        epilog="New here? `steer demo` needs no GPU, no download and about a minute.",
    )
    parser.add_argument("--version", action="version", version=f"steer {number}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="steer the built-in MNIST model to even digits")
    demo.description = (
        "Draws from the built-in MNIST model with and without steering to even digits, prints a "
        "table of what each sampler found and spent, and writes pictures."
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    demo.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    demo.add_argument(
        "--nfe", type=int, default=2000, help="network rows per sampler (default: 2000)"
    )
    demo.set_defaults(run=_demo)

    own = commands.add_parser(
        "sample",
        help="steer a model of yours",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draws from p(image) * exp(lam * reward(image)), p being the model, and writes "
        "a grid\nof the draws, each draw, the search tree, result.json and the record of the run.\n"
        "Asked again with the same arguments, an interrupted run goes on where it stopped.",
        epilog=sampler_help(),
    )
    what = own.add_argument_group("what to steer, and by what")
    what.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="folder of a diffusers pipeline, its id on the Hugging Face hub, or "
        + " or ".join(f"zoo:{n}" for n in zoo.names() if not n.endswith("classifier")),
    )
    what.add_argument(
        "--reward",
        required=True,
        metavar="REWARD",
        help="classifier:0,2,4 (log-probability of these digits), pair:4,9 (both at once), "
        "jpeg[:QUALITY] (minus kilobytes), MODULE:FUNCTION (your own Python, run as it is), "
        "or a sum such as '0.7*classifier:8+0.3*jpeg'",
    )
    what.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="REWARD",
        help="held out: measured, not steered by; repeatable",
    )
    what.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text, or class label; repeatable: each gets the whole budget",
    )
    what.add_argument(
        "--negative-prompt", action="append", default=[], metavar="TEXT", help="one per prompt"
    )
    what.add_argument(
        "--steps", type=int, default=50, help="steps from noise to image (default: 50)"
    )
    what.add_argument(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="of classifier-free guidance (default: the pipeline's)",
    )
    what.add_argument(
        "--eta",
        type=float,
        help="share of new noise in each step, 0 to 1 (default: the scheduler's, or 1)",
    )
    what.add_argument("--height", type=int, help="in pixels (default: the pipeline's)")
    what.add_argument("--width", type=int, help="in pixels (default: the pipeline's)")

    how = own.add_argument_group("how")
    how.add_argument(
        "--sampler",
        nargs="+",
        default=["dts"],
        metavar=("NAME", "KEY=VALUE"),
        help="see below (default: dts)",
    )
    how.add_argument(
        "--lam", type=float, help="inverse temperature: how much the reward counts (default: 1)"
    )
    how.add_argument(
        "--kl",
        type=float,
        metavar="NATS",
        help="instead of --lam: distance from the model to aim at",
    )
    how.add_argument(
        "--ess",
        type=float,
        metavar="SHARE",
        help="instead of --lam: effective sample size per walk to aim at",
    )
    how.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")

    limit = own.add_argument_group("hard limits, per prompt (at least one)")
    limit.add_argument(
        "--nfe",
        type=int,
        metavar="ROWS",
        help="network rows; with classifier-free guidance a step takes two",
    )
    limit.add_argument("--reward-calls", type=int, metavar="N", help="images scored")
    limit.add_argument("--seconds", type=float, help="of wall clock, for the whole run")

    where = own.add_argument_group("where, and how much of it")
    where.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="images per prompt (default: all found, with weights)",
    )
    where.add_argument(
        "--out",
        type=Path,
        default=Path("runs/steer"),
        metavar="DIR",
        help="folder (default: runs/steer)",
    )
    where.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    where.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the networks (default: as stored)",
    )
    where.add_argument(
        "--batch", type=int, default=64, help="walks that share a network call (default: 64)"
    )
    where.add_argument("--quiet", action="store_true", help="no bar, no summary")
    own.set_defaults(run=_sample)
    return parser


if __name__ == "__main__":
    sys.exit(main())
