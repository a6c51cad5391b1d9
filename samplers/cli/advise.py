"""`steer advise`: which sampler for this model and this reward, as a ready command."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

import samplers
from samplers.cli.model import add_model, build_model, check_device
from samplers.cli.words import parse_reward, sampler_words

# what `steer sample` is to be told as well, because it was told here
_PASSED_ON = (
    "model", "prompt", "negative_prompt", "steps", "guidance_scale", "eta", "height", "width",
    "device", "dtype", "reward", "lam", "seed", "batch",
)  # fmt: skip


def add(commands: Any) -> None:
    """The parser of this command."""
    own = commands.add_parser("advise", help="find out which sampler a model and a reward want")
    own.description = (
        "Spends a small counted pilot on the model and the reward, tells how rare high rewards "
        "are, at which steps they are decided and whether the clean guess foretells them, and "
        "recommends a sampler, as a command to run."
    )
    add_model(own)
    what = own.add_argument_group("by what, and what for")
    what.add_argument("--reward", required=True, metavar="REWARD", help="as for `steer sample`")
    what.add_argument(
        "--goal",
        choices=("draws", "best"),
        default="draws",
        help="draws of p * exp(lam * reward), or the best items (default: draws)",
    )
    what.add_argument("--lam", type=float, default=1.0, help="inverse temperature (default: 1)")
    what.add_argument(
        "--nfe",
        type=int,
        metavar="ROWS",
        help="network rows to spend, pilot included (default: be advised on that too)",
    )
    what.add_argument(
        "--pilot", type=int, metavar="ROWS", help="of them for the pilot (default: a tenth)"
    )
    what.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    what.add_argument(
        "--batch", type=int, default=64, help="walks that share a network call (default: 64)"
    )
    what.add_argument("--json", action="store_true", help="print the figures as JSON instead")
    what.add_argument("--quiet", action="store_true", help="no bar")
    own.set_defaults(run=_advise)


def _advise(given: argparse.Namespace) -> int:
    check_device(given)
    reward = parse_reward(given.reward, given.device)
    advice = samplers.advise(
        build_model(given),
        reward,
        nfe=given.nfe,
        goal=given.goal,
        lam=given.lam,
        pilot=given.pilot,
        seed=given.seed,
        batch=given.batch,
        progress=not (given.quiet or given.json),
    )
    words = sampler_words(advice.sampler)
    command = ["steer", "sample", *_told(given), "--sampler", *words, "--nfe", str(advice.nfe)]
    if given.json:
        figures = {k: v for k, v in vars(advice).items() if k != "sampler"}
        print(json.dumps({**figures, "sampler": words, "command": command}))
    else:
        print(advice)
        print(shlex.join(command))
    return 0


def _told(given: argparse.Namespace) -> list[str]:
    words = []
    for name in _PASSED_ON:
        value = getattr(given, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += ["--" + name.replace("_", "-"), str(one)]
    return words
