"""LLaDA2: text written block after block, each of them unmasked in a chain of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import Model
from steering.discrete import NEVER, CategoricalTransition, MaskedProcess, certain
from steering.noise import child_key, uniform
from steering.pipelines.conditional import evaluating
from steering.pipelines.masked_lm import Vocabulary
from steering.pipelines.request import Request
from steering.pipelines.sequences import TokenDenoiser

_CALL = ("gen_length", "block_length", "use_chat_template", "add_generation_prompt")


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model of masked tokens; `request.steps` are those of one block.

    Prompts must have one number of tokens: what is written behind longer ones has fewer blocks.
    Items are ids [N, L] int64, the prompt among them; texts are what is written behind it, up to
    the end-of-text token. A guess says of later blocks that the text ends.

    Warns:
        UserWarning: always: the kernel is another than the scheduler's, which has no density.
    """
    absent = ("eta", "height", "width", "cfg", "preview", "negative_prompts", "guidance_scale")
    request.refuse(*absent, because="this pipeline takes none")
    call = dict(request.call or {})
    strange = sorted(set(call) - set(_CALL))
    if strange:
        raise ValueError(
            f"call has {strange[0]!r}, which the chain of masked blocks has no use for: it takes "
            f"{', '.join(_CALL)}."
        )
    words, ending = _read(pipe)
    prompt = _prompts(pipe, request.texts()[0], call)
    written = call.get("gen_length", 2048)  # the pipeline's own default
    block = call.get("block_length") or pipe.scheduler.config.block_length
    for name, value in (("gen_length", written), ("block_length", block)):
        if type(value) is not int or value < 1:
            raise ValueError(f"call has {name}={value!r}: give a whole number >= 1.")
    start, end = prompt.shape[1], prompt.shape[1] + written
    blocks = -(-end // block)
    device = pipe._execution_device
    process = BlockProcess.blocks(blocks, block, start // block, words.size - 1, request.steps)
    # what is beyond the end of the last block is not looked at: any token will do
    kept = torch.full((len(prompt), process.length), words.mask)
    kept[:, :start], kept[:, end:] = prompt, ending
    warnings.warn(
        "LLaDA2Pipeline: its BlockRefinementScheduler commits the tokens of a block that it is "
        "most confident of and edits them, a kernel without a density; each block is run with "
        "MaskedProcess of steering.discrete instead, which unmasks sites at random.",
        stacklevel=4,
    )
    process = process.to(device)
    return Model(
        TokenDenoiser(
            _Network(pipe.model, words, process, end, ending),
            process,
            words.state(kept).to(device),
            torch.ones(len(prompt)),
        ),
        process,
        _Codec(words),
        write=_Writer(pipe.tokenizer, start, end, ending),
        prompts=request.prompts or (None,),
        device=device,
        name=request.describe(pipe),
    )


def _read(pipe: Any) -> tuple[Vocabulary, int]:
    """The vocabulary, and the token that ends a text."""
    if pipe.tokenizer is None:
        raise ValueError("pipe has no tokenizer, which prompts and texts need.")
    if pipe.mask_token_id is None or pipe.eos_token_id is None:
        raise ValueError("tokenizer of pipe must name a mask_token and an eos_token.")
    size = getattr(pipe.model.config, "vocab_size", 0)
    if max(pipe.mask_token_id, pipe.eos_token_id) >= size:
        raise ValueError(f"model.config.vocab_size={size} has no room for the mask of pipe.")
    return Vocabulary(size, pipe.mask_token_id), pipe.eos_token_id


def _prompts(pipe: Any, texts: list[str], call: Mapping[str, Any]) -> Tensor:
    """[R, P] ids, as the pipeline itself reads them."""
    rows = [
        pipe._prepare_input_ids(
            prompt=text,
            messages=None,
            input_ids=None,
            use_chat_template=call.get("use_chat_template", True),
            add_generation_prompt=call.get("add_generation_prompt", True),
            chat_template_kwargs=None,
        )[0][0]
        for text in texts
    ]
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"prompts have {lengths} tokens, and this pipeline writes behind prompts of one "
            "length: make a model for each."
        )
    return torch.stack(rows).cpu()


@dataclass(frozen=True, eq=False)
class BlockProcess(MaskedProcess):
    """A masked chain of blocks: those of the prompt at once, then one after the other.

    In the steps of a block its sites follow `MaskedProcess` on even steps, and all later ones stay
    masked (block diffusion, arXiv 2503.09573).

    Args:
        length, tokens, times, level: as in `MaskedProcess`; level is the mean over all sites that
            are written.
        block: sites in a block.
        first: the block that is written first.
    """

    block: int = 1
    first: int = 0

    @classmethod
    def blocks(cls, count: int, block: int, first: int, tokens: int, steps: int) -> BlockProcess:
        """Of `count` blocks, those from `first` on in `steps` steps each."""
        total = steps * (count - first)
        return cls.of(count * block, tokens, total, block=block, first=first)

    def active(self, i: Tensor) -> Tensor:
        """[N] the block that is written in steps i [N]."""
        return self.first + i // self._inner

    def transition(self, x: Tensor, i: Tensor, clean: Tensor) -> CategoricalTransition:
        inner = MaskedProcess.of(self.length, self.tokens, self._inner).to(x.device)
        law = inner.transition(x, i % self._inner, clean)
        later = self._of_site(x.device) > self.active(i)[:, None]
        mask = torch.where(self.mask_weights.to(x.device) > 0, 0.0, NEVER)
        return CategoricalTransition(
            torch.where(later[..., None], mask.to(law.log_probs), law.log_probs), law.kept
        )

    def noised(self, clean: Tensor, i: Tensor, key: Tensor) -> Tensor:
        lost = uniform(child_key(key, 0), (self.length,))
        level = (1 - (i % self._inner) / self._inner)[:, None]
        block, active = self._of_site(clean.device), self.active(i)[:, None]
        masked = (block > active) | ((block == active) & (lost < level))
        return torch.where(masked, self.tokens, clean)

    @property
    def _inner(self) -> int:
        """Steps of a block."""
        return self.steps // (self.length // self.block - self.first)

    def _of_site(self, device: torch.device) -> Tensor:
        """[L] which block each site is in."""
        return torch.arange(self.length, device=device) // self.block


@dataclass(frozen=True, eq=False)
class _Network:
    """Logits of the tokens, from what is written up to the block that each state is in.

    Args:
        model: (ids [N, S], attention_mask [N, S], position_ids [N, S]) -> .logits [N, S, V].
        words: its vocabulary.
        process: the chain.
        end: sites with a text; those beyond it are not looked at.
        ending: id that ends a text, which is what a guess has in later blocks.
    """

    model: Any
    words: Vocabulary
    process: BlockProcess
    end: int
    ending: int

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
        if x.is_floating_point():
            raise ValueError("LLaDA2Pipeline takes no relaxed tokens: its model reads ids alone.")
        block = self.process.active(((1 - t) * self.process.steps).round().long())
        window = (block + 1) * self.process.block  # [N] sites that are looked at
        shown = int(window.max())
        site = torch.arange(shown, device=x.device).expand(len(x), -1)
        seen = (site < window[:, None]) & (site < self.end)
        with evaluating(self.model):
            logits = self.model(
                self.words.ids(x[:, :shown]), attention_mask=seen.long(), position_ids=site
            ).logits
        said = self.words.guess(logits)
        ended = certain(self.words.state(torch.tensor(self.ending)), said.shape[-1]).to(said)
        later = torch.arange(x.shape[1], device=x.device) >= window[:, None]
        whole = ended.expand(len(x), x.shape[1] - shown, -1)
        return torch.where(later[..., None], ended, torch.cat([said, whole], 1))


@dataclass(frozen=True)
class _Codec:
    """Clean states, or the likeliest tokens of guesses, as ids [N, L]."""

    words: Vocabulary

    def __call__(self, x: Tensor) -> Tensor:
        return self.words.ids(x.argmax(-1) if x.is_floating_point() else x)


@dataclass(frozen=True)
class _Writer:
    """Ids -> what is written behind the prompt, up to where the text ends."""

    tokenizer: Any
    start: int
    end: int
    ending: int

    def __call__(self, items: Tensor) -> list[str]:
        texts = []
        for row in items[:, self.start : self.end].tolist():
            stop = row.index(self.ending) if self.ending in row else len(row)
            texts.append(self.tokenizer.decode(row[:stop], skip_special_tokens=True))
        return texts
