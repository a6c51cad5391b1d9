"""Whether a text is a sentence that a reader of English accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from steering.rewards.batched import check_network
from steering.rewards.card import Card
from steering.rewards.compose import Composable
from steering.weights import check_source, frozen, loading, pinned

_MODEL = "textattack/roberta-base-CoLA"


@dataclass(frozen=True)
class Acceptability(Composable):
    """reward(x) = log p(acceptable | text of x), in nats, at most 0; a black box, since it reads
    texts. Prompts are not read: a text holds what it had to begin with.

    The default is RoBERTa trained on CoLA, 10,657 sentences from papers on linguistics, marked by
    their authors (Warstadt et al. 2018, arXiv:1805.12471), and the reward of the published text
    completion by tree search (arXiv:2506.20701). Weights are loaded from safetensors alone: where
    a commit on the hub has them as a pickle, give the `revision` of a conversion, or a folder.

    Args:
        write: items -> their texts: `pipe.write` of a `SequencePipeline`. None for items that are
            texts already.
        model: hub id or folder of a sequence classifier of transformers, with its tokenizer.
        label: its class that means acceptable.
        revision: its commit; None is the newest one.
        device: of the network, float32, loaded at the first call.
        batch: texts at a time.

    Raises:
        TypeError, ValueError: an argument cannot be; on a call, items are no texts.
        ImportError: on the first call, the weights cannot be loaded.
    """

    write: Callable[[Any], list[str]] | None = None
    model: str = _MODEL
    label: int = 1
    revision: str | None = None
    device: str | torch.device = "cpu"
    batch: int = 64
    differentiable: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.write is not None and not callable(self.write):
            raise TypeError(f"write={self.write!r}: give a function of items, as in pipe.write.")
        check_source("model", self.model)
        if type(self.label) is not int or self.label < 0:
            raise ValueError(f"label={self.label!r}: give a class number, 0 or more.")
        check_network(self.batch, self.device)

    @property
    def name(self) -> str:
        """For tables."""
        return "Acceptability" + ("" if self.model == _MODEL else f" {PurePath(self.model).name}")

    @property
    def card(self) -> Card:
        """Facts."""
        return Card(
            higher="the text is acceptable English more probably, in nats",
            range=(-math.inf, 0.0),
            differentiable=False,
            memory=0.5 if self.model == _MODEL else None,
            source=self.model,
            revision=pinned(self.model, self.revision),
            paper="arXiv:1805.12471" if self.model == _MODEL else "",
            notes="does not read the prompt; one that is cut off in mid-word may still score high",
        )

    def load(self) -> None:
        """Load the network: now, instead of at the first call."""
        _ = self.net

    @cached_property
    def net(self) -> tuple[Any, Any]:
        """The network and its tokenizer."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        revision = pinned(self.model, self.revision)
        with loading(self.name, self.model):
            net: Any = AutoModelForSequenceClassification.from_pretrained(
                self.model, revision=revision, use_safetensors=True
            )
            if net.config.num_labels <= self.label:
                raise ValueError(
                    f"label={self.label} is beyond its {net.config.num_labels} classes."
                )
            tokenizer = AutoTokenizer.from_pretrained(self.model, revision=revision)
        return frozen(net, self.device, torch.float32), tokenizer

    def __call__(self, items: Any, prompts: Sequence[Any]) -> Tensor:
        """[N] float64; nan for an item with a weight that is not finite."""
        whole = torch.ones(len(items), dtype=torch.bool)
        if isinstance(items, Tensor):
            whole = items.detach().flatten(1).isfinite().all(1).cpu()
        texts: list[Any] = list(items if self.write is None else self.write(items))
        if len(texts) != len(items) or not all(isinstance(text, str) for text in texts):
            raise TypeError(
                f"{self.name} was given items {type(items).__name__}: give texts, or write= what "
                "makes texts of them, as in pipe.write."
            )
        known = list(dict.fromkeys(texts))  # each text once: searches find the same ones again
        parts = [self._score(known[k : k + self.batch]) for k in range(0, len(known), self.batch)]
        scores = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        at = {text: k for k, text in enumerate(known)}
        return scores[[at[text] for text in texts]].where(whole, torch.nan)

    @torch.no_grad()
    def _score(self, texts: list[str]) -> Tensor:
        net, tokenizer = self.net
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(net.device)
        return net(**tokens).logits.double().log_softmax(-1)[:, self.label].cpu()
