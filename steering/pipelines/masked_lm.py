"""Masked language models of the `transformers` kind: MDLM checkpoints, BERT, RoBERTa, LLaDA."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from steering.core import Model
from steering.digest import digest
from steering.discrete import SCHEDULES, MaskedProcess
from steering.pipelines.conditional import evaluating
from steering.pipelines.request import as_tuple, fingerprint
from steering.pipelines.sequences import TokenDenoiser

_LEAST = 1e-3  # share of the data that is left where a network is told the noise, as MDLM has it
_PROBE = "a"  # a text that every tokenizer knows, to see what it puts around texts


def from_masked_lm(
    network: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | None = None,
    *,
    length: int,
    steps: int,
    schedule: str = "loglinear",
    remask: float = 0.0,
    mask: int | None = None,
    items: Literal["tokens", "weights"] = "tokens",
) -> Model:
    """A masked language model as a model to steer: all masked at first, each site unmasked once.

    The network is one that guesses the token of every masked site from all the others, and was
    loaded by the caller: `BertForMaskedLM`, `RobertaForMaskedLM`, LLaDA, MDLM's checkpoints (whose
    code is not in transformers: read it, then load it yourself). One whose output at a site is a
    guess of the next one (Dream) is none. Its mask may be any id. `steering.discrete` has the
    chain.

    A prompt is the beginning of the text, kept as it is; what the tokenizer puts around texts
    ([CLS] and [SEP]) is kept too. The tokenizer's mask in a prompt is a site to be filled.

    Large vocabularies take memory: guesses are log-probabilities [N, L, K], 13 MB a sequence of 64
    tokens out of 50,257, and a call holds some seven of them: give `sample` a small `batch`.
    Samplers that score on the way keep guesses, too.

    Args:
        network: (input_ids [N, L]) -> logits [N, L, V], bare or as `.logits`. Where its call has
            such parameters it is given an `attention_mask` of ones, and `timesteps`, the total
            noise -log(1 - m) [N]. Relaxed states go in as `inputs_embeds`, mixtures of what
            `get_input_embeddings()` holds.
        tokenizer: of `transformers`.
        prompts: R texts; None is one that asks for nothing.
        length: L, tokens of a sequence, with its prompt and what is put around it.
        steps: T.
        schedule: "loglinear" or "cosine".
        remask: see `MaskedProcess`.
        mask: id of the mask; the tokenizer's when None. MDLM's is 50257, which GPT-2's tokenizer
            does not know.
        items: what rewards are given: "tokens", ids [N, L] int64, of a guess the likeliest ones; or
            "weights" [N, L, V] float32 over the vocabulary, for rewards with a gradient.
            `rewards.from_text(model)` takes either.

    Raises:
        TypeError, ValueError: an argument that is wrong, by name; a network that does not fit.

    Papers: Sahoo et al., "Simple and effective masked diffusion language models", arXiv 2406.07524;
    Nie et al., "Large language diffusion models", arXiv 2502.09992.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network is a {type(network).__name__}: give a torch module.")
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}: give one of transformers.")
    if items not in ("tokens", "weights"):
        raise ValueError(f"items={items!r} is unknown: give 'tokens' or 'weights'.")
    if type(length) is not int or length < 1:
        raise ValueError(f"length={length!r} is no number of tokens: give an int from 1 on.")
    mask = tokenizer.mask_token_id if mask is None else mask
    if type(mask) is not int or mask < 0:
        raise ValueError(
            f"mask={mask!r}: the tokenizer names no mask token, give the id that the network "
            "takes for one."
        )
    asked = as_tuple("prompts", prompts)
    kept = _templates(tokenizer, asked or ("",), length, mask)
    MaskedProcess.of(length, 1, steps, schedule, remask=remask)  # refuses what is wrong in it
    caller = _Caller(network, schedule)
    size = _vocabulary(caller, length, mask)
    words = Vocabulary(size, mask)
    process = MaskedProcess.of(length, size - 1, steps, schedule, remask=remask)
    device = caller.device
    process, fixed = process.to(device), words.state(kept).to(device)
    settings = f"{schedule=}, {remask=}, {mask=}, {items=}, kept=#{digest(kept)}"

    def calling(x: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
        return words.guess(caller(words.ids(x), t))

    return Model(
        TokenDenoiser(calling, process, fixed, torch.ones(len(kept))),
        process,
        _Codec(words, items == "weights"),
        write=_Writer(tokenizer),
        prompts=asked or (None,),
        device=device,
        name=f"{type(network).__name__}({settings})#{fingerprint({'network': network})}",
        about="native (masked_lm)",
    )


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a vocabulary against the tokens of a chain, whose mask is the last.

    Args:
        size: V, ids with the mask's.
        mask: its id.
    """

    size: int
    mask: int

    @cached_property
    def order(self) -> Tensor:
        """[V] the id of every token of the chain."""
        ids = torch.arange(self.size)
        return torch.cat([ids[ids != self.mask], ids[[self.mask]]])

    @cached_property
    def token(self) -> Tensor:
        """[V] the token of every id."""
        return self.order.argsort()

    def ids(self, x: Tensor) -> Tensor:
        """States [N, L], or relaxed ones [N, L, V], in the vocabulary's own order."""
        if not x.is_floating_point():
            return self.order.to(x.device)[x]
        return x if self._same else x[..., self.token.to(x.device)]

    def state(self, ids: Tensor) -> Tensor:
        """Tokens [N, L] of ids; -1, which is no token at all, where they are the mask's."""
        return torch.where(ids == self.mask, -1, self.token.to(ids.device)[ids])

    def guess(self, logits: Tensor) -> Tensor:
        """[N, L, K] float32 of the chain's ordinary tokens, from logits [N, L, V]."""
        if self._same:
            return logits[..., :-1].float()
        return logits[..., self.order[:-1].to(logits.device)].float()

    @property
    def _same(self) -> bool:
        return self.mask == self.size - 1


@dataclass(frozen=True)
class _Codec:
    """Clean states -> ids [N, L], or weights over the vocabulary [N, L, V]."""

    words: Vocabulary
    weighs: bool

    def __call__(self, x: Tensor) -> Tensor:
        if not self.weighs:
            return self.words.ids(x.argmax(-1) if x.is_floating_point() else x)
        if not x.is_floating_point():
            return one_hot(self.words.ids(x), self.words.size).float()
        return self.words.ids(torch.cat([x.exp(), torch.zeros_like(x[..., :1])], -1))


@dataclass(frozen=True)
class _Writer:
    """Items -> texts, without special tokens; masks of states on their way are left out too."""

    tokenizer: Any

    def __call__(self, items: Tensor) -> list[str]:
        ids = items.argmax(-1) if items.is_floating_point() else items
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]


class _Caller:
    """Calls a network as its signature wants it."""

    def __init__(self, network: nn.Module, schedule: str) -> None:
        self._network, self._level = network, SCHEDULES[schedule]
        self._takes = inspect.signature(network.forward).parameters
        weight = next(network.parameters())
        self.device, self._dtype = weight.device, weight.dtype

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits [N, L, V] of ids [N, L], or of weights over them [N, L, V], at times [N]."""
        more: dict[str, Any] = {}
        if "attention_mask" in self._takes:
            more["attention_mask"] = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
        if "timesteps" in self._takes:
            more["timesteps"] = -torch.log1p(-(1 - _LEAST) * self._level(t))
        if "return_dict" in self._takes:
            more["return_dict"] = True
        with evaluating(self._network):
            if x.is_floating_point():
                out = self._network(inputs_embeds=x.to(self._dtype) @ self._table(), **more)
            else:
                out = self._network(input_ids=x, **more)
        return getattr(out, "logits", out[0] if isinstance(out, tuple) else out)

    def _table(self) -> Tensor:
        """[V, width] what the network takes for its ids."""
        find: Callable[[], Any] | None = getattr(self._network, "get_input_embeddings", None)
        try:
            table = None if find is None else find().weight
        except (NotImplementedError, AttributeError):
            table = None
        takes = "inputs_embeds" in self._takes or "kwargs" in self._takes
        if table is None or not takes:
            raise ValueError(
                f"network {type(self._network).__name__} takes no relaxed tokens, which this "
                "guidance or training needs: it has no inputs_embeds, or no "
                "get_input_embeddings()."
            )
        return table


def _vocabulary(caller: _Caller, length: int, mask: int) -> int:
    """V, from one call, which shows at once whether the network fits."""
    x = torch.full((1, length), mask, device=caller.device)
    try:
        with torch.no_grad():
            logits = caller(x, torch.ones(1, device=caller.device))
    except Exception as error:
        raise ValueError(
            f"network does not take a sequence of length={length} of mask={mask}, "
            f"{type(error).__name__}: {error}"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != (1, length):
        raise ValueError(f"network returned {shape} for ids (1, {length}): logits [N, L, V] fit.")
    if mask >= logits.shape[-1]:
        raise ValueError(
            f"mask={mask} has no logit among {logits.shape[-1]}: give the id of the mask."
        )
    return logits.shape[-1]


def _templates(tokenizer: Any, prompts: Sequence[Any], length: int, mask: int) -> Tensor:
    """[R, L] ids to keep, and the mask where a site is free."""
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    start = next((k for k in range(len(whole)) if whole[k : k + len(plain)] == plain), None)
    if start is None:
        raise ValueError(
            f"tokenizer: what it puts around texts cannot be told, {_PROBE!r} being {plain} with "
            f"nothing and {whole} with that."
        )
    head, tail = whole[:start], whole[start + len(plain) :]
    rows = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompts has {prompt!r}: give texts.")
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        around = len(head) + len(tail)
        if len(ids) + around > length:
            raise ValueError(
                f"length={length} is too short for the prompt {prompt[:40]!r}: it has {len(ids)} "
                f"tokens, and {around} are put around it."
            )
        rows.append([*head, *ids, *[mask] * (length - len(ids) - around), *tail])
    kept = torch.tensor(rows)
    if not (kept == mask).any(1).all():
        raise ValueError(f"length={length} leaves no token to be written: give more.")
    return kept
