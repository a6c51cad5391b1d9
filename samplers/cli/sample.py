"""`steer sample`: steer one model by one reward."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import samplers
from samplers.cli.model import add_model, build_model, check_device
from samplers.cli.words import parse_reward, parse_sampler, sampler_help
from steering.rewards.compose import Composable


def add(commands: Any) -> None:
    """The parser of this command."""
    own = commands.add_parser(
        "sample",
        help="steer a model of yours",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draws from p(image) * exp(lam * reward(image)), p being the model, and writes "
        "a grid\nof the draws, each draw, the search tree (open tree.html in a browser),\n"
        "result.json and the record of the run; of sequences draws.txt instead of images.\n"
        "Asked again with the same arguments, an interrupted run goes on where it stopped;\n"
        "with a larger --nfe or --reward-calls, a finished one does.",
        epilog=sampler_help(),
    )
    add_model(own)
    what = own.add_argument_group("by what")
    what.add_argument(
        "--reward",
        required=True,
        metavar="REWARD",
        help="classifier:0,2,4 (log-probability of these digits), pair:4,9 (both at once), "
        "jpeg[:QUALITY] (minus kilobytes), tfbind8, dna:CLASS or bible (sequences, of the built-in "
        "models), clip, pickscore, aesthetic, imagereward, hpsv2 or "
        "cyclereward (learned; [:MODEL], a hub id or folder), judge:MODULE:FUNCTION (yours, images "
        "and prompts -> texts, each a number 0 to 10), MODULE:FUNCTION (your own Python, run as it "
        "is), or a sum such as '0.7*classifier:8+0.3*jpeg'",
    )
    what.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="REWARD",
        help="held out: measured, not steered by; repeatable",
    )
    how = own.add_argument_group("how")
    how.add_argument(
        "--sampler",
        nargs="+",
        default=["dts"],
        metavar=("NAME", "KEY=VALUE"),
        help="see below (default: dts)",
    )
    how.add_argument(
        "--lam", type=float, help="inverse temperature: how much the reward counts (default: 1)"
    )
    how.add_argument(
        "--kl",
        type=float,
        metavar="NATS",
        help="instead of --lam: distance from the model to aim at",
    )
    how.add_argument(
        "--ess",
        type=float,
        metavar="SHARE",
        help="instead of --lam: effective sample size per walk to aim at",
    )
    how.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")

    limit = own.add_argument_group("hard limits, per prompt (at least one)")
    limit.add_argument(
        "--nfe",
        type=int,
        metavar="ROWS",
        help="network rows; with classifier-free guidance a step takes two",
    )
    limit.add_argument("--reward-calls", type=int, metavar="N", help="images scored")
    limit.add_argument("--seconds", type=float, help="of wall clock, for the whole run")

    where = own.add_argument_group("where, and how much of it")
    where.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="images per prompt (default: all found, with weights)",
    )
    where.add_argument(
        "--out",
        type=Path,
        default=Path("runs/steer"),
        metavar="DIR",
        help="folder (default: runs/steer)",
    )
    where.add_argument(
        "--batch", type=int, default=64, help="walks that share a network call (default: 64)"
    )
    where.add_argument("--quiet", action="store_true", help="no bar, no summary")
    own.set_defaults(run=_sample)


def _sample(given: argparse.Namespace) -> int:
    check_device(given)
    sampler = parse_sampler(given.sampler)
    reward = parse_reward(given.reward, given.device, given.offload)
    also = [parse_reward(text, given.device, given.offload) for text in given.also]
    if given.nfe is None and given.reward_calls is None and given.seconds is None:
        raise ValueError("no budget: give --nfe, --reward-calls or --seconds.")
    for each in (reward, *also):
        if isinstance(each, Composable):
            each.load()  # before the pipeline, which takes longer
    model = build_model(given)
    if not given.quiet:
        print(model)
    result = samplers.sample(
        model,
        reward,
        sampler,
        nfe=given.nfe,
        reward_calls=given.reward_calls,
        seconds=given.seconds,
        draws=given.draws,
        lam=given.lam,
        kl=given.kl,
        ess=given.ess,
        seed=given.seed,
        also=also,
        batch=given.batch,
        progress=not given.quiet,
        record=given.out / "record",
    )
    from samplers.view.files import write_files

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    settings = {k: v for k, v in settings.items() if k not in ("run", "traceback")}
    settings |= {"sampler": str(sampler), "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    written = write_files(result, given.out, settings)
    if not given.quiet:
        print(result)
        print("wrote " + ", ".join(map(str, [*written, given.out / "record"])))
    return 0
