"""What the commands that steer have in common: which model, on what, asked for what."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from steering import from_pipeline, zoo
from steering.core import Model


def add_model(parser: argparse.ArgumentParser) -> None:
    """Arguments that `build_model` reads."""
    group = parser.add_argument_group("what to steer")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="folder of a diffusers pipeline, its id on the Hugging Face hub, or "
        + " or ".join(f"zoo:{n}" for n in zoo.names() if not n.endswith("classifier")),
    )
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text, or class label; repeatable: each gets the whole budget",
    )
    group.add_argument(
        "--negative-prompt", action="append", default=[], metavar="TEXT", help="one per prompt"
    )
    group.add_argument(
        "--steps", type=int, default=50, help="steps from noise to image (default: 50)"
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="of classifier-free guidance (default: the pipeline's)",
    )
    group.add_argument(
        "--eta",
        type=float,
        help="share of new noise in each step, 0 to 1 (default: the scheduler's, or 1)",
    )
    group.add_argument("--height", type=int, help="in pixels (default: the pipeline's)")
    group.add_argument("--width", type=int, help="in pixels (default: the pipeline's)")
    group.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the networks (default: as stored)",
    )


def check_device(given: argparse.Namespace) -> None:
    """ValueError if there is no such device here; before anything is loaded onto it."""
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {given.device} cannot be used: {reason}") from error


def build_model(given: argparse.Namespace) -> Model:
    """The model that the arguments name.

    Raises:
        ValueError: what `from_pipeline` refuses.
    """
    if given.model is None:
        raise ValueError("no model: give --model NAME.")
    pipe = _pipeline(given.model, given.device, given.dtype, given.quiet)
    asked = {
        "prompts": _prompts("--prompt", given.prompt, pipe),
        "negative_prompts": _prompts("--negative-prompt", given.negative_prompt, pipe),
        "guidance_scale": given.guidance_scale,
        "height": given.height,
        "width": given.width,
        "eta": given.eta,
    }
    return from_pipeline(
        pipe, steps=given.steps, **{k: v for k, v in asked.items() if v is not None}
    )


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
