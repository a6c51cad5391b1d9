"""Train the built-in unconditional MNIST model: a small UNet, v-prediction, cosine betas.

    python -m steering.zoo.train_mnist --data DIR --minutes 65 --threads 2 --out DIR

The length is wall time, because the learning rate decays to zero over it. A snapshot of the
averaged weights (a plain pipeline folder) and the full state are written 80 times on the way;
started again with the same `--out`, it goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BATCH = 64
PEAK_LR = 2e-3
WARMUP_STEPS = 300
EMA_DECAY = 0.999
SNAPSHOTS = 80


def build_unet() -> UNet2DModel:
    """The network: 28, 14 and 7 pixels with 16, 16 and 48 channels, attention at 7 pixels."""
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


def learning_rate(step: int, fraction: float) -> float:
    """Linear warm-up in steps, then a cosine to 0 over the fraction of the time used."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * fraction))


def save_pipeline(weights: dict[str, Tensor], out: Path) -> None:
    """Write a pipeline folder with these weights."""
    unet = build_unet()
    unet.load_state_dict(weights)
    DDIMPipeline(unet=unet, scheduler=build_scheduler()).save_pretrained(out)


def save_state(
    path: Path,
    unet: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
    progress: dict,
) -> None:
    """Everything that `load_state` needs to go on, in one safetensors file."""
    tensors = {"rng": rng.get_state()}
    for name, p in unet.named_parameters():
        tensors[f"unet/{name}"] = p.detach().clone()
        tensors[f"ema/{name}"] = ema[name].clone()
        for key, value in optimizer.state[p].items():
            tensors[f"adam/{key}/{name}"] = value.clone()
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"progress": json.dumps(progress)})
    part.replace(path)  # never a half-written state under the name that is resumed from


def load_state(
    path: Path,
    unet: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
) -> dict:
    """Restore what `save_state` wrote, in place; returns the progress."""
    tensors = load_file(path)
    rng.set_state(tensors["rng"])
    for name, p in unet.named_parameters():
        p.data.copy_(tensors[f"unet/{name}"])
        ema[name].copy_(tensors[f"ema/{name}"])
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[p] = {key: tensors[f"adam/{key}/{name}"] for key in keys}
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["progress"])


def train(data: Path, minutes: float, threads: int, out: Path, seed: int) -> None:
    """Train for so many minutes of wall time, this and earlier starts together."""
    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    with np.load(data / "mnist.npz") as arrays:
        images = torch.from_numpy(arrays["x_train"])[:, None]
    # weights are initialised by the global generator: seed it here, and leave it as it was
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet = build_unet()
    params = dict(unet.named_parameters())
    ema = {name: p.detach().clone() for name, p in params.items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0, weight_decay=1e-3, fused=True)
    alpha_bar = build_scheduler().alphas_cumprod

    state, log = out / "state.safetensors", out / "train.jsonl"
    progress = {"step": 0, "wall": 0.0, "cpu": 0.0, "logged": 0}
    if state.exists():
        progress = load_state(state, unet, ema, optimizer, rng)
    else:
        log.unlink(missing_ok=True)
    step = progress["step"]
    wall, cpu = time.monotonic() - progress["wall"], time.process_time() - progress["cpu"]
    order, losses, fraction = torch.empty(0, dtype=torch.long), [], 0.0
    while fraction < 1:
        fraction = min(1.0, (time.monotonic() - wall) / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, fraction)
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=rng)
        batch, order = order[:BATCH], order[BATCH:]
        loss = velocity_loss(unet, images[batch].float() / 127.5 - 1, alpha_bar, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        # a young average forgets faster, so that early snapshots are of use
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, average in ema.items():
                average.lerp_(params[name], 1 - decay)
        if fraction * SNAPSHOTS >= progress["logged"] + 1 or fraction == 1:
            progress = {
                "step": step,
                "wall": time.monotonic() - wall,
                "cpu": time.process_time() - cpu,
                "logged": math.floor(fraction * SNAPSHOTS),
            }
            line = {
                "step": step,
                "images": step * BATCH,
                "loss": round(sum(losses) / len(losses), 5),
                "lr": optimizer.param_groups[0]["lr"],
                "cpu_seconds": round(progress["cpu"], 1),
                "wall_seconds": round(progress["wall"], 1),
            }
            losses = []
            with log.open("a") as f:
                f.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            save_pipeline(ema, out)
            save_state(state, unet, ema, optimizer, rng, progress)
    state.unlink()


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
