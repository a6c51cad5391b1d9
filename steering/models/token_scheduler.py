"""A scheduler of masked and uniform token chains in diffusers form, without hidden state.

Imports diffusers, so that it is itself imported only where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from steering.discrete import SCHEDULES, MaskedProcess, TokenProcess, UniformProcess, subs


@dataclass
class TokenStep(BaseOutput):
    """One step of a chain of tokens."""

    prev_sample: Tensor  # [N, L] int64 the next states
    pred_original_sample: Tensor  # [N, L] int64 likeliest clean tokens
    log_probs: Tensor  # [N, L, V] of the tokens that sites which move go to


class TokenScheduler(SchedulerMixin, ConfigMixin):
    """Times fall in (0, 1]; a step is a pure function of its arguments and its generator.

    `steering.discrete` has the chains.

    Args:
        tokens: K, ordinary tokens; the mask, where there is one, is token K.
        kind: "masked" or "uniform".
        schedule: "loglinear" or "cosine".
        remask: of a masked chain, see `MaskedProcess`.

    Raises:
        ValueError: an unknown kind or schedule; remasking of a uniform chain.
    """

    order = 1
    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(
        self,
        tokens: int,
        kind: str = "masked",
        schedule: str = "loglinear",
        remask: float = 0.0,
    ) -> None:
        if kind not in ("masked", "uniform"):
            raise ValueError(f"kind={kind!r} is unknown: give 'masked' or 'uniform'.")
        if kind == "uniform" and remask:
            raise ValueError(f"remask={remask}: a uniform chain has no mask, leave it out.")
        self.process(1, 1)
        self.set_timesteps(64)

    def process(self, length: int, steps: int) -> TokenProcess:
        """The chain of sequences of `length` tokens in `steps` steps."""
        config = self.config
        shape = (length, config["tokens"], steps, config["schedule"])
        if config["kind"] == "uniform":
            return UniformProcess.of(*shape)
        return MaskedProcess.of(*shape, remask=config["remask"])

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device = "cpu") -> None:
        """Choose the grid: T equal steps in time, from 1 downwards."""
        self.num_inference_steps = num_inference_steps
        self.timesteps = self.process(1, num_inference_steps).times.to(device)

    def step(
        self,
        logits: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> TokenStep | tuple[Tensor]:
        """Draw the states one step on.

        Args:
            logits: [N, L, K] of the clean tokens.
            timestep: one of `timesteps`, or [N] of them.
            sample: [N, L] int64 states.
            generator: of the tokens drawn.
            return_dict: False gives a tuple of the next states.

        Raises:
            ValueError: a time that is not on the grid.
        """
        process = self.process(sample.shape[1], self.num_inference_steps).to(sample.device)
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        far = (t.expand(len(sample))[:, None] - process.times).abs()
        if far.min(1).values.max() > 1e-6:
            raise ValueError(
                f"timestep={timestep!r} is not one of {self.num_inference_steps} steps: give an "
                "entry of `timesteps`."
            )
        log_p = logits.float().log_softmax(-1)
        clean = subs(sample, log_p) if isinstance(process, MaskedProcess) else log_p
        law = process.transition(sample, far.argmin(1), clean)
        z = torch.multinomial(law.log_probs.exp().flatten(0, 1), 1, generator=generator)
        moved = z.view_as(sample)
        if law.kept is not None:
            moved = torch.where(law.kept.any(-1), sample, moved)
        if not return_dict:
            return (moved,)
        return TokenStep(
            prev_sample=moved, pred_original_sample=clean.argmax(-1), log_probs=law.log_probs
        )

    def add_noise(
        self, original_samples: Tensor, timesteps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """States [N, L] at times [N] in (0, 1] of clean tokens [N, L]."""
        shape, device = original_samples.shape, original_samples.device
        lost = SCHEDULES[self.config["schedule"]](timesteps.to(device))[:, None]
        drawn = torch.rand(shape, generator=generator, device=device) < lost
        if self.config["kind"] == "masked":
            return torch.where(drawn, self.config["tokens"], original_samples)
        other = torch.randint(self.config["tokens"], shape, generator=generator, device=device)
        return torch.where(drawn, other, original_samples)
