"""A recipe: the best image for a text, Stable Diffusion 1.5 with ImageReward on DrawBench.

    python -m benchmarks.drawbench --prompts FILE [--first N] [--model ID] [--reward REWARD]
                                   [--also REWARD ...] [--nfe N ...] [--seeds S] [--out DIR]
                                   [--minutes M] [--shard K/N] [--device cuda]
    python -m benchmarks.drawbench --quick      # random weights, no download

The setting of Diffusion Tree Search (arXiv 2506.20701): 512 x 512 pixels, 50 steps of DDIM with
eta = 1, the best ImageReward found, mean over prompts; guidance scale 7.5. A row of the network is
a row: the pair of classifier-free guidance is two, so 10,000 rows are 100 images. Whether the paper
counts so is not published. FILE holds one prompt a line, for instance the 200 of DrawBench;
`--first 40` takes forty of them.

ImageReward comes from `pip install "diffusion-steering[imscore]"` and two downloads. Look at a
held-out reward too, with `--also`: a search finds what a reward overlooks. FK steering gets its
published search setting, the max potential at lam = 10; its particles, and the settings of DTS*,
are searched on a seed apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ladder
from benchmarks.report import finish, header
from samplers import SMC, BestOfN, Sweep, TreeSearch, table
from samplers.cli.words import parse_reward
from samplers.scoring import reward_name
from steering import from_pipeline, rewards

METRICS = ("best", "also: -jpeg kB", "root_ess", "seconds")
SAMPLERS: dict[str, Any] = {
    "best-of-N": BestOfN(),
    "DTS*": [TreeSearch(), TreeSearch(branch="even"), TreeSearch(value="clean")],
    "FK steering, max": [SMC(4, "max"), SMC(16, "max"), SMC(potential="max")],
}


def parts(args: Any) -> tuple[Any, list[str], Any]:
    """The pipeline, the prompts and the reward."""
    if args.quick:
        from tests.tiny_pipelines import stable_diffusion

        def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return 20 * (images[:, 0] - images[:, 2]).mean((1, 2))

        return stable_diffusion(), ["a red cube", "two dogs", "a sign that says hello"], redness
    if args.prompts is None:
        raise SystemExit("--prompts is missing: a file of one prompt a line.")
    lines = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line][: args.first]
    reward = parse_reward(args.reward, args.device)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    kind = torch.float32 if args.device == "cpu" else torch.bfloat16
    pipe: Any = DiffusionPipeline.from_pretrained(
        args.model, use_safetensors=True, torch_dtype=kind, safety_checker=None
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe.to(args.device), prompts, reward


def main() -> None:
    parser = ladder.arguments(__doc__, "drawbench", [2500, 5000, 10_000], seeds=1)
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--first", type=int, help="only so many of them")
    parser.add_argument("--reward", default="imagereward", help="as for `steer sample`")
    parser.add_argument("--also", action="append", default=[], help="held out; likewise")
    args = ladder.parse(parser)
    if args.quick:
        args.nfe, args.seeds = [240], 2
    header()
    pipe, prompts, reward = parts(args)
    held_out = [parse_reward(text, args.device) for text in args.also]
    sweep = Sweep(
        from_pipeline(pipe, prompts, steps=5 if args.quick else 50, eta=1.0, guidance_scale=7.5),
        {reward_name(reward): reward},
        SAMPLERS,
        args.nfe,
        seeds=args.seeds,
        lam=10.0,
        draws=16,
        also=[rewards.Jpeg(), *held_out],
        objective="best",
        tuning_seeds=1,
        batch=64 if args.device == "cpu" else 16,
    )
    rows = ladder.climb(sweep, args, METRICS, drawn="best")
    found = {f"{p.sampler}/{p.nfe}": [p.mean, p.low, p.high] for p in table.points(rows, "best")}
    finish({"best": found, "prompts": len(prompts)})


if __name__ == "__main__":
    main()
