"""A pipeline that diffusers lacks: DNA, protein or text from a masked or uniform token model.

Imports diffusers, so that it is itself imported only where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from steering.models.token_scheduler import TokenScheduler

FREE = "_"  # in a prompt: a site to be filled


@dataclass
class SequenceOutput(BaseOutput):
    """What the pipeline draws."""

    sequences: list[str] | Tensor  # N texts, or tokens [N, L] int64


class SequencePipeline(DiffusionPipeline):
    """Sequences of one length over an alphabet of single characters.

    A prompt is None; a class label, where the network takes them; or a text whose characters are
    kept where they are, "_" and all sites beyond its end being free.

    Args:
        denoiser: (tokens, timestep, class_labels) -> logits: `SequenceDenoiser`, or another with
            its call.
        scheduler: the chain.
        alphabet: K different characters; token k is the k-th.
        length: L.

    Raises:
        ValueError: an alphabet that does not fit the scheduler, or holds "_" or a character twice.
    """

    model_cpu_offload_seq = "denoiser"
    denoiser: Any
    scheduler: TokenScheduler

    def __init__(
        self, denoiser: Any, scheduler: Any, alphabet: str = "ACGT", length: int = 64
    ) -> None:
        super().__init__()
        if len(set(alphabet)) != len(alphabet) or FREE in alphabet:
            raise ValueError(
                f"alphabet={alphabet!r}: give different characters, of which none is {FREE!r}."
            )
        if scheduler.config["tokens"] != len(alphabet):
            raise ValueError(
                f"alphabet has {len(alphabet)} characters for {scheduler.config['tokens']} tokens "
                "of the scheduler: give one for each."
            )
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(alphabet=alphabet, length=length)

    @property
    def alphabet(self) -> str:
        """Token k is its k-th character."""
        return self.config["alphabet"]

    @property
    def length(self) -> int:
        """L, sites of a sequence."""
        return self.config["length"]

    @property
    def classes(self) -> int | None:
        """How many class labels there are; None if the network takes none."""
        return self.denoiser.config.get("classes")

    def read(self, texts: Sequence[str], name: str = "texts") -> Tensor:
        """Tokens [N, L] int64 of texts; -1 at free sites, "_" and what is missing at the end.

        Raises:
            ValueError: a text that is too long, or has another character; `name` is its argument.
        """
        rows = []
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{name} has {text!r}: give texts.")
            strange = sorted(set(text) - set(self.alphabet) - {FREE})
            if strange:
                raise ValueError(
                    f"{name} has {text[:40]!r} with {strange[0]!r}: this model writes "
                    f"{self.alphabet!r}, and {FREE!r} is a site to be filled."
                )
            if len(text) > self.length:
                raise ValueError(
                    f"{name} has {text[:40]!r} of {len(text)} characters: this model's sequences "
                    f"have {self.length}."
                )
            rows.append([self.alphabet.find(c) for c in text.ljust(self.length, FREE)])
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.length)

    def write(self, items: Tensor) -> list[str]:
        """Texts of tokens [N, L] int64, or the likeliest of weights [N, L, K]; "_" where there is
        no token."""
        tokens = items
        if items.is_floating_point():
            tokens = torch.where(items.amax(-1) > 0, items.argmax(-1), len(self.alphabet))
        letters = self.alphabet + FREE
        return ["".join(letters[k] for k in row) for row in tokens.tolist()]

    def conditions(self, prompts: Sequence[Any] | None) -> tuple[Tensor, Tensor | None]:
        """What R prompts ask for: tokens [R, L] int64, -1 at free sites; and class labels [R], the
        last of which is none, where the network takes them.

        Raises:
            ValueError: a prompt that is no text, no label of this model, and not None.
        """
        fixed, labels = [], []
        null = self.classes
        for prompt in prompts if prompts is not None else (None,):
            label, text = null, ""
            if isinstance(prompt, str):
                text = prompt
            elif isinstance(prompt, int) and not isinstance(prompt, bool):
                if null is None or not 0 <= prompt <= null:
                    has = "takes no class labels" if null is None else f"has labels 0 to {null - 1}"
                    raise ValueError(f"prompts has {prompt!r}: this model {has}.")
                label = prompt
            elif prompt is not None:
                raise ValueError(f"prompts has {prompt!r}: give a text, a class label or None.")
            labels.append(label)
            fixed.append(self.read([text], "prompts")[0])
        return torch.stack(fixed), None if null is None else torch.tensor(labels)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        num_inference_steps: int = 64,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "text",
        return_dict: bool = True,
    ) -> SequenceOutput | tuple[Any]:
        """One sequence for each prompt.

        With a guidance scale s above 1 log-probabilities are none + s · (labelled - none), of both
        in one batch, normalised anew (arXiv 2207.12598).

        Args:
            prompts: N of them; None is one that asks for nothing.
            num_inference_steps: T.
            guidance_scale: s.
            generator: of all that is drawn.
            output_type: "text", or "pt", tokens [N, L].
            return_dict: False gives a tuple of one.

        Raises:
            ValueError: an argument that is wrong, by name.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r} is one text: give a list, [{prompts!r}].")
        if output_type not in ("text", "pt"):
            raise ValueError(f"output_type={output_type!r} is unknown: give 'text' or 'pt'.")
        if not isinstance(guidance_scale, (int, float)) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale!r}: give a finite number.")
        device = self._execution_device
        fixed, labels = self.conditions(prompts)
        fixed = fixed.to(device)
        labels = None if labels is None else labels.to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        process = self.scheduler.process(self.length, num_inference_steps)
        start = torch.full(fixed.shape, process.tokens, device=device)
        if self.scheduler.config["kind"] == "uniform":
            start = torch.randint(process.tokens, fixed.shape, generator=generator, device=device)
        x = torch.where(fixed >= 0, fixed, start)
        progress_bar: Any = self.progress_bar
        for t in progress_bar(self.scheduler.timesteps):
            logits = self._logits(x, t, labels, guidance_scale)
            x = self.scheduler.step(logits, t, x, generator, return_dict=False)[0]
            x = torch.where(fixed >= 0, fixed, x)
        sequences: Any = x if output_type == "pt" else self.write(x)
        self.maybe_free_model_hooks()
        return SequenceOutput(sequences=sequences) if return_dict else (sequences,)

    def _logits(self, x: Tensor, t: Tensor, labels: Tensor | None, scale: float) -> Tensor:
        time = t.expand(len(x))
        null = self.classes
        if labels is None or null is None or scale <= 1:
            return self.denoiser(x, time, labels, return_dict=False)[0]
        none = torch.full_like(labels, null)
        both = self.denoiser(
            torch.cat([x, x]), time.repeat(2), torch.cat([labels, none]), return_dict=False
        )[0]
        labelled, unlabelled = both.log_softmax(-1).chunk(2)
        return unlabelled + scale * (labelled - unlabelled)
