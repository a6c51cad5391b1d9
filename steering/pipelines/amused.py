"""aMUSEd: images as tokens of a codebook, unmasked by a transformer that reads a text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steering.core import Model
from steering.discrete import MaskedProcess
from steering.pipelines.conditional import Conditions, evaluating
from steering.pipelines.request import Request, default_scale
from steering.pipelines.sequences import TokenDenoiser

_AESTHETIC = 6.0  # the pipeline's own micro-conditioning, as are crop coordinates of 0


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model of masked tokens, on the schedule of its scheduler.

    Warns:
        UserWarning: always: the kernel is another than the scheduler's, which has no density.
    """
    request.refuse("eta", "cfg", "preview", because="this chain of tokens has none")
    if pipe.vqvae.dtype == torch.float16 and pipe.vqvae.config.force_upcast:
        raise ValueError("vqvae overflows in float16: pipe.vqvae.to(torch.float32) first.")
    texts, negative = request.texts()
    factor, side = pipe.vae_scale_factor, pipe.transformer.config.sample_size
    height, width = request.size(side * factor, side * factor, factor)
    shape = (height // factor, width // factor)
    scale = request.scales(default_scale(pipe))
    scheduler = pipe.scheduler.config
    schedule = {"cosine": "cosine", "linear": "loglinear"}[scheduler.masking_schedule]
    tokens = pipe.transformer.config.codebook_size
    device = pipe._execution_device
    process = MaskedProcess.of(shape[0] * shape[1], tokens, request.steps, schedule).to(device)
    warnings.warn(
        "AmusedPipeline: its AmusedScheduler keeps the tokens that it is most confident of, a "
        "kernel without a density; it is run with MaskedProcess of steering.discrete instead, on "
        f"the same {scheduler.masking_schedule} schedule, which unmasks sites at random.",
        stacklevel=4,
    )
    micro = torch.tensor([width, height, 0.0, 0.0, _AESTHETIC], device=device)
    guided = bool((scale > 1).any())
    network = _Network(
        pipe.transformer,
        scheduler.mask_token_id,
        shape,
        _encoded(pipe, texts, micro),
        _encoded(pipe, negative, micro) if guided else None,
    )
    free = torch.full((len(texts), process.length), -1, device=device)
    return Model(
        TokenDenoiser(network, process, free, scale),
        process,
        _Codec(pipe.vqvae, tokens, shape),
        prompts=request.prompts or (None,),
        device=device,
        name=request.describe(pipe),
    )


@torch.no_grad()
def _encoded(pipe: Any, texts: Sequence[str], micro: Tensor) -> Conditions:
    """What the transformer is told of R texts, by the names of its arguments."""
    ids = pipe.tokenizer(
        list(texts),
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
    ).input_ids
    with evaluating(pipe.text_encoder):
        out = pipe.text_encoder(ids.to(micro.device), return_dict=True, output_hidden_states=True)
    hidden = out.hidden_states[-2]
    return {
        "micro_conds": micro.to(hidden.dtype).expand(len(texts), -1),
        "pooled_text_emb": out.text_embeds,
        "encoder_hidden_states": hidden,
    }


@dataclass(frozen=True, eq=False)
class _Network:
    """Logits of the codebook at every site; see `TokenNetwork`.

    Args:
        transformer: (ids [N, h, w], conditions) -> logits [N, K, h, w].
        mask: id of the mask, which need not follow the codebook's.
        shape: h and w.
        positive: what each row asks for; `negative` what it is guided away from.
    """

    transformer: Any
    mask: int
    shape: tuple[int, int]
    positive: Conditions
    negative: Conditions | None

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
        pick, off = row.to(x.device), without.to(x.device)
        told = {name: table[pick] for name, table in self.positive.items()}
        if self.negative is not None:
            for name, table in self.negative.items():
                here = off.view(-1, *[1] * (table.ndim - 1))
                told[name] = torch.where(here, table[pick], told[name])
        tokens = self.transformer.config.codebook_size
        hard = x.argmax(-1) if x.is_floating_point() else x
        ids = torch.where(hard == tokens, self.mask, hard).unflatten(1, self.shape)
        with evaluating(self.transformer), self._relaxed(x):
            logits = self.transformer(ids, **told)
        return logits.flatten(2).mT.float()

    @contextmanager
    def _relaxed(self, x: Tensor) -> Iterator[None]:
        """Inside, the embedding of ids is the mixture of embeddings of relaxed states x."""
        if not x.is_floating_point():
            yield
            return

        def mixture(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            table: Tensor = self.transformer.embed.embeddings.weight
            some = x.unflatten(1, self.shape).to(table.dtype)
            return some[..., :-1] @ table[: some.shape[-1] - 1] + some[..., -1:] * table[self.mask]

        hook = self.transformer.embed.embeddings.register_forward_hook(mixture)
        try:
            yield
        finally:
            hook.remove()


@dataclass(frozen=True)
class _Codec:
    """Tokens [N, L] -> images; of a guess [N, L, K] the image of its mean code.

    A site without a token has the code 0.
    """

    vqvae: Any
    tokens: int
    shape: tuple[int, int]

    def __call__(self, x: Tensor) -> Tensor:
        book: Tensor = self.vqvae.quantize.embedding.weight
        if x.is_floating_point():
            code = x.exp().to(book.dtype) @ book
        else:
            code = book[x.clamp(max=self.tokens - 1)] * (x < self.tokens)[..., None]
        code = code.mT.unflatten(2, self.shape)  # [N, C, h, w]
        with evaluating(self.vqvae):
            by = code if self.vqvae.config.norm_type == "spatial" else None
            images = self.vqvae.decoder(self.vqvae.post_quant_conv(code), by)
        return images.float().clamp(0, 1)
