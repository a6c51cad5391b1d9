"""Token pipelines: our `SequencePipeline`, by class label or around what a prompt keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.core import Model
from steering.discrete import MaskedProcess, TokenProcess, certain, subs
from steering.pipelines.conditional import evaluating
from steering.pipelines.request import Request

# (states [N, L] or relaxed ones [N, L, V], times [N], rows [N], which of them without their class
# [N] bool) -> logits [N, L, K] float32, on the states' device
TokenNetwork = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def build(pipe: Any, request: Request) -> Model:
    """The pipeline as a model. Prompts are texts to keep, class labels, or None."""
    because = "tokens have none"
    request.refuse("eta", "height", "width", "cfg", "preview", "negative_prompts", because=because)
    device = pipe._execution_device
    fixed, labels = pipe.conditions(request.prompts)
    scale = request.scales(default=1.0)
    if labels is None and (scale > 1).any():
        raise ValueError("guidance_scale is above 1, but this model takes no class labels.")
    if labels is not None and bool(((scale > 1) & (labels == pipe.classes)).any()):
        raise ValueError(
            "guidance_scale is above 1 for a prompt without a class label: give prompts=[label]."
        )
    process = pipe.scheduler.process(pipe.length, request.steps).to(device)
    denoiser = TokenDenoiser(_calling(pipe, labels), process, fixed.to(device), scale)
    return Model(
        denoiser,
        process,
        TokenCodec(process.tokens),
        prompts=request.prompts or (None,),
        device=device,
        name=request.describe(pipe),
        write=pipe.write,
    )


def _calling(pipe: Any, labels: Tensor | None) -> TokenNetwork:
    """The network that calls the pipeline's denoiser in its own precision."""
    module = pipe.denoiser
    table = None if labels is None else labels.to(module.device)

    def network(x: Tensor, t: Tensor, row: Tensor, without: Tensor) -> Tensor:
        asked = None
        if table is not None:
            asked = torch.where(without.to(x.device), pipe.classes, table[row.to(x.device)])
        with evaluating(module):
            return module(x, t, asked, return_dict=False)[0].float()

    return network


@dataclass(frozen=True)
class TokenCodec:
    """Items of token models: weights over the ordinary tokens, [N, L, K] float32.

    One-hot for tokens, and zero where there is the mask; of a guess its probabilities.

    Args:
        tokens: K.
    """

    tokens: int

    def __call__(self, x: Tensor) -> Tensor:
        return (x if x.is_floating_point() else certain(x, self.tokens)).exp()


@dataclass(frozen=True, eq=False)
class TokenDenoiser:
    """Guesses the clean tokens under row `row` of a table of conditions.

    Kept tokens are shown to the network instead of what the state has there, and the guess is sure
    of them: the chain then draws the other sites given these. Rows with a scale s above 1 are
    guided, log p = none + s · (labelled - none), normalised: two network rows.

    Args:
        network: see `TokenNetwork`.
        process: the chain.
        fixed: [R, L] int64 tokens to keep, -1 at free sites.
        scale: [R] float32 on the CPU, guidance scale of each row.
    """

    network: TokenNetwork
    process: TokenProcess
    fixed: Tensor
    scale: Tensor

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return 1 + (self.scale[row] > 1).long()

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """Log-probabilities [N, L, K] of states x [N, L], or of relaxed ones [N, L, V]."""
        log_p = self.log_probs(x, t, row)
        if not isinstance(self.process, MaskedProcess):
            return log_p
        fixed = self.fixed[row.to(x.device)]
        return torch.where((fixed >= 0)[..., None], log_p, subs(x, log_p))

    def log_probs(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """What the network says of every site, [N, L, K], whether the state has a token there or
        not; it is sure of those that are kept."""
        fixed = self.fixed[row.to(x.device)]
        keeps = fixed >= 0
        shown = torch.where(keeps, fixed, 0)
        if x.is_floating_point():
            x = torch.where(keeps[..., None], self.process.weights(shown), x)
        else:
            x = torch.where(keeps, shown, x)
        guided = (self.scale[row] > 1).nonzero().flatten()
        pick = guided.to(x.device)
        without = torch.cat([torch.zeros_like(row), torch.ones_like(guided)]).bool()
        both = torch.cat([x, x[pick]]), torch.cat([t, t[pick]]), torch.cat([row, row[guided]])
        log_p = self.network(*both, without).log_softmax(-1)
        log_p, none = log_p.split([len(x), len(guided)])
        if len(guided):
            s = self.scale[row[guided]].to(x.device)[:, None, None]
            log_p = log_p.index_copy(0, pick, (none + s * (log_p[pick] - none)).log_softmax(-1))
        return torch.where(keeps[..., None], certain(shown, self.process.tokens), log_p)
