"""Train the built-in unconditional MNIST model: a small UNet, v-prediction, cosine betas.

    python -m steering.zoo.train_mnist --data DIR --minutes 65 --threads 2 --out DIR

The length is wall time, because the learning rate decays to zero over it. A snapshot of the
averaged weights (a plain pipeline folder) and the full state are written 80 times on the way;
started again with the same `--out`, it goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from steering.zoo.training import fit, seeded

PEAK_LR = 2e-3


def build_unet(classes: int | None = None) -> UNet2DModel:
    """The network: 28, 14 and 7 pixels with 16, 16 and 48 channels, attention at 7 pixels.

    With `classes`, an embedding of so many labels is added to that of the time.
    """
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=classes,
    )


def build_scheduler() -> DDIMScheduler:
    """The chain it is trained on, and how it is sampled by default."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
        clip_sample_range=1.0,
        rescale_betas_zero_snr=False,
    )


def velocity_loss(unet: nn.Module, x: Tensor, alpha_bar: Tensor, rng: torch.Generator) -> Tensor:
    """Mean of |v_hat - v|² with v = sqrt(ab) · z - sqrt(1 - ab) · x, for x [N,1,28,28] in [-1,1].

    t is stratified over the batch: the loss depends on t far more than on the image.
    """
    n = len(x)
    t = (torch.arange(n) + torch.rand(n, generator=rng)) * (len(alpha_bar) / n)
    t = t.long().clamp_max(len(alpha_bar) - 1)
    z = torch.randn(x.shape, generator=rng)
    a = alpha_bar[t].sqrt().view(-1, 1, 1, 1)
    s = (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
    return (unet(a * x + s * z, t).sample - (a * z - s * x)).square().mean()


def save_pipeline(weights: dict[str, Tensor], out: Path) -> None:
    """Write a pipeline folder with these weights."""
    unet = build_unet()
    unet.load_state_dict(weights)
    DDIMPipeline(unet=unet, scheduler=build_scheduler()).save_pretrained(out)


def train(data: Path, minutes: float, threads: int, out: Path, seed: int) -> None:
    """Train for so many minutes of wall time, this and earlier starts together."""
    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(seed)
    with np.load(data / "mnist.npz") as arrays:
        images = torch.from_numpy(arrays["x_train"])[:, None]
    unet = seeded(build_unet, seed)
    alpha_bar = build_scheduler().alphas_cumprod

    def loss(rows: Tensor) -> Tensor:
        return velocity_loss(unet, images[rows].float() / 127.5 - 1, alpha_bar, rng)

    fit(unet, loss, len(images), lambda w: save_pipeline(w, out), out, minutes, PEAK_LR, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds mnist.npz")
    parser.add_argument("--minutes", type=float, default=65.0, help="wall time, resumes included")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.data, args.minutes, args.threads, args.out, args.seed)


if __name__ == "__main__":
    main()
