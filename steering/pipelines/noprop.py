"""NoProp classifiers as models to steer: what is drawn is a label, one condition is one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from steering.core import Model
from steering.digest import digest
from steering.gaussian import ToClean
from steering.pipelines.conditional import evaluating
from steering.pipelines.request import fingerprint
from steering.pipelines.schedulers import read_scheduler

ABSTAIN = "abstain"


def from_noprop(
    pipe: Any,
    images: Tensor,
    *,
    steps: int | None = None,
    eta: float | None = None,
    abstain: float = 0.0,
) -> Model:
    """The labels of images as a model to steer; condition r is the r-th image.

        model = from_noprop(zoo.load("noprop-dt"), images)
        prior = torch.tensor([...])                     # [10], of the classes where it is used
        result = sample(model, rewards.Table((10 * prior).log()), TreeSampling(), nfe=1000)
        result.texts, result.weights

    Images are encoded once. Items are labels, sequences of one letter: [N, 1, m] float32, one-hot,
    and of a guess on the way the probabilities of the classes. Rewards of sequences are rewards of
    labels: `rewards.Table(values)` with a value for each, `rewards.from_text` with a function of
    their names. There are only m outcomes, so the law that is drawn from is a table, too:
    p(y | image) exp(λ r(y)) / Z.

    Args:
        pipe: a `NoPropPipeline`.
        images: [R, C, H, W] in [0, 1].
        steps: T; None: of "dt" its blocks, else 50.
        eta: share of new noise in each step; 0 is the ODE. None: the posterior's for "dt", which is
            the paper's chain, else 1, because a chain without noise has nothing to branch on.
        abstain: where no class has a probability of so much at the end of the chain, the outcome is
            one more, "abstain", class m.

    Raises:
        TypeError: no `NoPropPipeline`.
        ValueError: images that are not the network's; steps, eta or abstain that cannot be.
    """
    from steering.models.noprop_pipeline import NoPropPipeline, check_images, check_steps

    if not isinstance(pipe, NoPropPipeline):
        raise TypeError(
            f"pipe is a {type(pipe).__name__}, no NoPropPipeline: of a network, "
            "NoPropPipeline(network, scheduler(network)) makes one; from_pipeline takes others."
        )
    network, device = pipe.network, pipe._execution_device
    steps = check_steps(network, pipe.steps if steps is None else steps)
    if not isinstance(abstain, (int, float)) or not 0 <= abstain < 1:
        raise ValueError(f"abstain={abstain!r} is no probability: give one from 0 to below 1.")
    check_images(images)
    shape = (network.label_embedding.shape[1],)
    chain, prediction = read_scheduler(pipe.scheduler, shape, steps=steps, eta=eta, even=True)
    process = chain.to(device)
    with evaluating(network), torch.no_grad():
        features = network.encode(images.to(device, network.dtype))
    names = pipe.names + [ABSTAIN] * (abstain > 0)
    told = f"eta={eta}, abstain={abstain}, images=#{digest(images)}"
    return Model(
        LabelDenoiser(network, ToClean(process, prediction), features),
        process,
        LabelCodec(network, abstain),
        preview=LabelCodec(network, abstain, soft=True),
        write=lambda items: [names[k] for k in items[:, 0].argmax(-1).tolist()],
        prompts=tuple(f"image {r}" for r in range(len(images))),
        device=device,
        name=f"NoPropPipeline({told})#{fingerprint({'pipe': pipe, **pipe.components})}",
    )


@dataclass(frozen=True, eq=False)
class LabelDenoiser:
    """Guesses the embedding of the label of image `row`.

    Args:
        network: a `NoPropDenoiser`.
        to_clean: turns an output into a clean guess.
        features: [R, B, hidden] of the images, on the network's device.
    """

    network: Any
    to_clean: ToClean
    features: Tensor

    @property
    def fills(self) -> bool:
        """False where a call is one of each block it is for."""
        return self.network.timed

    def rows(self, t: Tensor, row: Tensor) -> Tensor:
        return torch.ones_like(row)

    def __call__(self, x: Tensor, t: Tensor, row: Tensor) -> Tensor:
        features = self.features[row.to(x.device), self.network.block_of(t)]
        with evaluating(self.network):
            output = self.network(x, t, features=features, return_dict=False)[0]
        return self.to_clean(output.float(), x, t)


@dataclass(frozen=True, eq=False)
class LabelCodec:
    """Items of clean states: the nearest class, one-hot, or how much of each there is.

    Args:
        network: a `NoPropDenoiser`.
        abstain: least probability of the likeliest class; below it the outcome is class m.
        soft: probabilities instead, differentiable; all zero where the outcome is class m.
    """

    network: Any
    abstain: float
    soft: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """[N, 1, m] of states [N, d]; [N, 1, m + 1] where it may abstain."""
        p = self.network.probabilities(x)
        items = p if self.soft else one_hot(self.network.nearest(x), p.shape[1]).to(x)
        if self.abstain:
            unsure = (p.amax(1, keepdim=True) < self.abstain).to(p)
            items = torch.cat([items * (1 - unsure), unsure], 1)
        return items[:, None]
