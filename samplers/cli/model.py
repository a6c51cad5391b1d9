"""What the commands that steer have in common: which model, on what, asked for what."""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

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
        help="text, or class label; for sequences a text to keep, _ where it is free; repeatable: "
        "each gets the whole budget",
    )
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts, one a line, besides any --prompt"
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
    group.add_argument(
        "--offload",
        action="store_true",
        help="networks, also those of rewards, wait in host memory and move to the device in turn",
    )
    group.add_argument("--lora", metavar="NAME", help="folder, file or hub id of a LoRA to load")
    group.add_argument(
        "--preview",
        metavar="NAME",
        help="folder or hub id of a small autoencoder, such as madebyollin/taesdxl, for guesses "
        "on the way",
    )
    group.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the pipeline's own call, as in true_cfg_scale=4 or image=@sketch.png; "
        "repeatable",
    )
    group.add_argument(
        "--route",
        choices=("native", "driven"),
        help="call the network, or drive the pipeline (default: the first that serves)",
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
    call = dict(_argument(text) for text in given.call)
    prompts = given.prompt + ([] if given.prompts is None else _lines(given.prompts))
    pipe = _pipeline(given)
    asked = {
        "prompts": _prompts("--prompt", prompts, pipe),
        "negative_prompts": _prompts("--negative-prompt", given.negative_prompt, pipe),
        "guidance_scale": given.guidance_scale,
        "height": given.height,
        "width": given.width,
        "eta": given.eta,
        "call": call or None,
        "preview": _preview(given, pipe),
        "route": given.route,
    }
    return from_pipeline(
        pipe, steps=given.steps, **{k: v for k, v in asked.items() if v is not None}
    )


def _pipeline(given: argparse.Namespace) -> Any:
    kind = None if given.dtype is None else getattr(torch, given.dtype)
    if given.model.startswith("zoo:"):
        for flag in ("offload", "lora"):
            if getattr(given, flag):
                raise ValueError(f"--{flag}: built-in models have no use for it, leave it out.")
        torch.set_num_threads(1)  # small networks: threads would only wait for each other
        return zoo.load(given.model.removeprefix("zoo:"), dtype=kind, device=given.device)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as of_transformers

    if given.quiet:
        logging.disable_progress_bar()
        of_transformers.disable_progress_bar()
    loader: Any = _ours(Path(given.model)) or DiffusionPipeline
    pipe: Any = loader.from_pretrained(given.model, use_safetensors=True, torch_dtype=kind)
    if given.lora is not None:
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"--lora: a {type(pipe).__name__} takes no LoRA.")
        pipe.load_lora_weights(given.lora, use_safetensors=True)
    if given.offload:
        pipe.enable_model_cpu_offload(device=given.device)
        return pipe
    return pipe.to(given.device)


def _ours(folder: Path) -> Any:
    """The class of a folder's pipeline where it is one that diffusers does not know."""
    index = folder / "model_index.json"
    name = json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index.is_file() else None
    if name == "SequencePipeline":
        from steering.models.sequence_pipeline import SequencePipeline

        return SequencePipeline
    if name == "LabelPipeline":
        from steering.models.label_pipeline import LabelPipeline

        return LabelPipeline
    return None


def _preview(given: argparse.Namespace, pipe: Any) -> Any:
    if given.preview is None:
        return None
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    small: Any = AutoencoderTiny.from_pretrained(
        given.preview, use_safetensors=True, torch_dtype=pipe.dtype
    )
    return small.to(given.device).eval()


def _argument(text: str) -> tuple[str, Any]:
    """`scale=4` -> ("scale", 4), `image=@a.png` -> ("image", the picture); else a text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--call {text}: give KEY=VALUE.")
    if value.startswith("@"):
        path = Path(value[1:])
        if not path.is_file():
            raise ValueError(f"--call {text}: there is no file {path}.")
        with Image.open(path) as picture:
            return key, picture.convert("RGB")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"--prompts {path}: there is no such file.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def _prompts(flag: str, given: list[str], pipe: Any) -> list[Any] | None:
    """Texts; class labels for a pipeline that reads no text, or whose numbers are labels."""
    if not given:
        return None
    if hasattr(pipe, "alphabet"):
        labelled = pipe.classes is not None
        return [int(text) if labelled and text.isdecimal() else text for text in given]
    if hasattr(pipe, "tokenizer"):
        return given
    if not all(text.isdecimal() for text in given):
        raise ValueError(f"{flag}: this pipeline reads no text, give class labels, as in {flag} 3.")
    return [int(text) for text in given]
