"""The built-in checkpoints: small, shipped with the package, each beside the script that made it.

`load` needs no network; `reference` gives feature statistics of real images without the images.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from safetensors.torch import load_file
from torch import Tensor

from steering.models.classifier import Classifier
from steering.models.sequence_classifier import SequenceClassifier

__all__ = [
    "dna_words",
    "held_out_text",
    "load",
    "mnist_slice",
    "names",
    "reference",
    "tfbind8_scores",
]

_HERE = Path(__file__).parent
_REFERENCES = ("mnist-test", "mnist-train")


def names() -> tuple[str, ...]:
    """What `load` knows."""
    return tuple(_LOADERS)


@overload
def load(
    name: Literal["mnist-classifier"],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Classifier: ...
@overload
def load(
    name: Literal["text-judge", "dna-reward", "dna-judge"],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> SequenceClassifier: ...
@overload
def load(
    name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Any: ...
def load(name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Any:
    """A built-in checkpoint, in evaluation mode and without gradients on its weights.

    Args:
        name: "mnist", an unconditional `DDIMPipeline` of images [N,1,28,28] in [-1,1];
            "mnist-flow", a `LabelPipeline` (`steering.models.label_pipeline`) of the same images by
            their digit, a rectified flow; "mnist-flow-base", the same before its reflow;
            "mnist-classifier", a `Classifier` of images [N,1,28,28] in [0,1]; "tfbind8", a
            `SequencePipeline` (`steering.models.sequence_pipeline`) of eight bases of DNA; "text",
            one of 64 characters of the King James Bible; "text-judge", a `SequenceClassifier` of
            such texts, whose class 1 is the Bible; "dna", a `SequencePipeline` of 200 bases by cell
            type (0 GM12878, 1 HepG2, 2 K562, 3 hESCT0, 4 any); "dna-reward" and "dna-judge",
            `SequenceClassifier`s of such sites by cell type; "mnist-blockwise", like "mnist" of
            three networks that were each trained alone; or "noprop-dt", "noprop-ct" and
            "noprop-fm", `NoPropPipeline`s (`steering.models.noprop_pipeline`) that classify images
            [N,1,28,28] in [0,1].
        dtype: of the weights; float32 when None.
        device: where the weights go.

    Raises:
        ValueError: no checkpoint has this name.
    """
    if name not in _LOADERS:
        raise ValueError(f"name={name!r} is no built-in checkpoint: there are {', '.join(names())}")
    return _LOADERS[name](dtype, device)


def reference(name: str) -> dict[str, Tensor]:
    """Statistics of real images in the features of "mnist-classifier", in float64.

    mean [d], cov [d,d] (unbiased), n []; class_mean [10,d], class_cov [10,d,d], class_n [10].

    Args:
        name: "mnist-test" (10,000 images) or "mnist-train" (60,000 images).

    Raises:
        ValueError: no statistics have this name.
    """
    if name not in _REFERENCES:
        raise ValueError(f"name={name!r} is no reference: there are {', '.join(_REFERENCES)}")
    part = name.removeprefix("mnist-")
    return load_file(_HERE / "mnist-classifier" / f"{part}_stats.safetensors")


def held_out_text() -> list[str]:
    """The 119 chapters of the King James Bible that "text" was not trained on, in its letters."""
    return (_HERE / "text" / "held_out.txt").read_text(encoding="ascii").splitlines()


def dna_words() -> dict[str, Tensor]:
    """How often each word of three bases occurs in real sites, [64] int64: AAA, AAC, ... TTT.

    "train", the sites of all four cell types that "dna" was trained on; "HepG2", the half of the
    HepG2 sites of chromosomes 1 and 2, which it never saw, that has the higher signal.
    """
    return load_file(_HERE / "dna" / "words.safetensors")


def mnist_slice() -> tuple[Tensor, Tensor]:
    """Images [250,28,28] uint8 and labels [250] uint8: the first 25 test images of each class."""
    arrays = load_file(_HERE / "mnist_slice.safetensors")
    return arrays["images"], arrays["labels"]


def tfbind8_scores() -> Tensor:
    """How strongly SIX6 binds every DNA sequence of eight bases: [4] * 8 float32 in [0, 1].

    Measured E-scores, of which the least is 0 here and the greatest 1; bases in the order ACGT.
    `steering.rewards.Table` makes a reward of them.
    """
    e_score = load_file(_HERE / "tfbind8" / "scores.safetensors")["e_score"]
    low, high = e_score.aminmax()
    return ((e_score - low) / (high - low)).view((4,) * 8)


def _mnist(name: str, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from steering.models.blockwise_unet import BlockwiseUNet2D

    # by parts: DDIMPipeline.from_pretrained draws a progress bar
    folder = _HERE / name
    kind: Any = BlockwiseUNet2D if name == "mnist-blockwise" else UNet2DModel
    unet = kind.from_pretrained(folder / "unet", torch_dtype=torch.float32, local_files_only=True)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    pipe = DDIMPipeline(unet=unet.requires_grad_(False), scheduler=cast(DDIMScheduler, scheduler))
    pipe.to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flow(name: str, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    from steering.models.label_pipeline import LabelPipeline

    folder = _HERE / name
    unet = UNet2DModel.from_pretrained(
        folder / "unet", torch_dtype=torch.float32, local_files_only=True
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        folder / "scheduler", local_files_only=True
    )
    pipe = LabelPipeline(unet.requires_grad_(False), scheduler)
    pipe.to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _noprop(name: str, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    from importlib import import_module

    from steering.models.noprop import NoPropDenoiser
    from steering.models.noprop_pipeline import NoPropPipeline

    folder = _HERE / name
    network = NoPropDenoiser.from_pretrained(
        folder / "network", torch_dtype=torch.float32, local_files_only=True
    )
    index = json.loads((folder / "model_index.json").read_text())
    where, kind = index["scheduler"]
    scheduler = getattr(import_module(where), kind)
    pipe = NoPropPipeline(
        network.requires_grad_(False),
        scheduler.from_pretrained(folder / "scheduler", local_files_only=True),
        index["names"],
    )
    pipe.to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sequences(name: str, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    from steering.models.sequence_denoiser import SequenceDenoiser
    from steering.models.sequence_pipeline import SequencePipeline
    from steering.models.token_scheduler import TokenScheduler

    folder = _HERE / name
    denoiser = SequenceDenoiser.from_pretrained(
        folder / "denoiser", torch_dtype=dtype or torch.float32, local_files_only=True
    )
    index = json.loads((folder / "model_index.json").read_text())
    pipe = SequencePipeline(
        denoiser.requires_grad_(False),
        TokenScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
        index["alphabet"],
        index["length"],
    )
    pipe.to(device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sequence_classifier(
    name: str, dtype: torch.dtype | None, device: str | torch.device
) -> SequenceClassifier:
    folder = _HERE / name
    model = SequenceClassifier(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _mnist_classifier(dtype: torch.dtype | None, device: str | torch.device) -> Classifier:
    folder = _HERE / "mnist-classifier"
    model = Classifier(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


_LOADERS = {
    "mnist": partial(_mnist, "mnist"),
    "mnist-blockwise": partial(_mnist, "mnist-blockwise"),
    "mnist-flow": partial(_flow, "mnist-flow"),
    "mnist-flow-base": partial(_flow, "mnist-flow-base"),
    "mnist-classifier": _mnist_classifier,
    "noprop-dt": partial(_noprop, "noprop-dt"),
    "noprop-ct": partial(_noprop, "noprop-ct"),
    "noprop-fm": partial(_noprop, "noprop-fm"),
    "tfbind8": partial(_sequences, "tfbind8"),
    "text": partial(_sequences, "text"),
    "text-judge": partial(_sequence_classifier, "text-judge"),
    "dna": partial(_sequences, "dna"),
    "dna-reward": partial(_sequence_classifier, "dna-reward"),
    "dna-judge": partial(_sequence_classifier, "dna-judge"),
}
