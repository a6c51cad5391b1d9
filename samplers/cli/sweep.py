"""`steer sweep`: tasks x samplers x network rows x seeds, in a folder that goes on where it was."""

from __future__ import annotations

import argparse
import math
import tomllib
from pathlib import Path
from typing import Any

from samplers import table
from samplers.cli.model import add_model, build_model, check_device
from samplers.cli.words import parse_reward, parse_sampler
from samplers.sweep import Sweep
from steering.metrics import extractor

_EXAMPLE = """\
example of FILE, whose keys are the options above; options after it override it, or add to it:
  model = "zoo:mnist"
  nfe = [1000, 3000, 10000]
  extractor = "mnist-classifier"
  reference = 2000
  [task]
  even = "classifier:0,2,4,6,8"
  rare = "pair:4,9"
  [sampler]
  importance = "importance"
  DTS = "dts"
  SMC = ["smc particles=16", "smc particles=64", "smc"]   # the best of them, on other seeds
"""


def add(commands: Any) -> None:
    """The parser of this command."""
    own = commands.add_parser(
        "sweep",
        help="compare samplers at several budgets",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs every sampler on every task at every budget over seeds, and writes "
        "tables of what\nthey found. Asked again, it goes on where it stopped; tasks, samplers, "
        "budgets and seeds\nmay be added. Draw its pictures with `steer plot DIR`.",
        epilog=_EXAMPLE,
    )
    own.add_argument("file", nargs="?", metavar="FILE", action=_File, help="a TOML file of options")
    add_model(own)
    what = own.add_argument_group("what to compare")
    what.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME=REWARD",
        help="a reward as for `steer sample`; repeatable",
    )
    what.add_argument(
        "--sampler",
        action="append",
        default=[],
        metavar="NAME=SAMPLER",
        help="a sampler and its options as for `steer sample`, in quotes; repeatable. Of several "
        "with one name the best is taken, for each task and budget",
    )
    what.add_argument(
        "--nfe", type=int, nargs="+", default=[], metavar="ROWS", help="network rows per prompt"
    )
    what.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    what.add_argument("--lam", type=float, default=1.0, help="inverse temperature (default: 1)")
    what.add_argument(
        "--draws", type=int, default=1000, help="images per prompt to judge by (default: 1000)"
    )
    what.add_argument(
        "--also", action="append", default=[], metavar="REWARD", help="held out; repeatable"
    )
    judge = own.add_argument_group("how to judge")
    judge.add_argument(
        "--extractor",
        metavar="NAME",
        help="features for distances: mnist-classifier, inception, clip:MODEL, MODULE:FUNCTION",
    )
    judge.add_argument(
        "--reference",
        type=int,
        default=0,
        metavar="N",
        help="independent walks per prompt that stand for the target law (default: 0, no distance)",
    )
    judge.add_argument(
        "--objective",
        default="reward",
        help="what the best of several settings is told by: reward, best, frechet or mmd "
        "(default: reward)",
    )
    judge.add_argument(
        "--tuning-seeds", type=int, default=2, help="seeds of that search (default: 2)"
    )
    where = own.add_argument_group("where, and how much of it now")
    where.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR",
                       help="folder (default: runs/sweep)")  # fmt: skip
    where.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    where.add_argument(
        "--shard", default="0/1", metavar="K/N", help="every N-th piece of the work, from the K-th"
    )
    where.add_argument(
        "--batch", type=int, default=64, help="walks that share a network call (default: 64)"
    )
    where.add_argument("--quiet", action="store_true", help="no lines while it runs, no table")
    own.set_defaults(run=_sweep)


class _File(argparse.Action):
    """Reads the options in a TOML file as if they had been given at its place."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not isinstance(values, str):
            return
        try:
            options = tomllib.loads(Path(values).read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            parser.error(f"{values}: {error}")
        words = []
        for key, value in options.items():
            flag = "--" + key.replace("_", "-")
            if flag not in parser._option_string_actions or flag == "--help":
                known = [
                    f[2:].replace("-", "_") for f in parser._option_string_actions if f[1] == "-"
                ]
                parser.error(f"{values}: no option {key!r}; there are {', '.join(sorted(known))}")
            words += _words(parser, values, flag, value)
        parser.parse_args(words, namespace)


def _words(parser: argparse.ArgumentParser, file: str, flag: str, value: Any) -> list[str]:
    """One key of the file as words of a command line."""
    several = parser._option_string_actions[flag]
    if isinstance(value, dict):
        if flag not in ("--task", "--sampler"):
            parser.error(f"{file}: {flag[2:]} is a table: give a value")
        pairs = [(n, v) for n, given in value.items() for v in _listed(given)]
        return [word for name, v in pairs for word in (flag, f"{name}={v}")]
    if isinstance(several, argparse._AppendAction):
        return [word for v in _listed(value) for word in (flag, str(v))]
    if several.nargs == 0:
        return [flag] if value else []
    if isinstance(value, list) and several.nargs != "+":
        parser.error(f"{file}: {flag[2:]} is a list: give one value")
    return [flag, *map(str, _listed(value))]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sweep(given: argparse.Namespace) -> int:
    check_device(given)
    tasks = {name: parse_reward(text, given.device) for name, text in _named("--task", given.task)}
    samplers: dict[str, Any] = {}
    for name, text in _named("--sampler", given.sampler):
        samplers.setdefault(name, []).append(parse_sampler(text.split()))
    for flag, values in (("--task", tasks), ("--sampler", samplers), ("--nfe", given.nfe)):
        if not values:
            raise ValueError(f"nothing to compare: give at least one {flag}.")
    sweep = Sweep(
        build_model(given),
        tasks,
        samplers,
        given.nfe,
        seeds=given.seeds,
        lam=given.lam,
        draws=given.draws,
        also=[parse_reward(text, given.device) for text in given.also],
        extractor=None if given.extractor is None else extractor(given.extractor, given.device),
        reference=given.reference,
        objective=given.objective,
        tuning_seeds=given.tuning_seeds,
        batch=given.batch,
    )

    def report(line: str) -> None:
        if not given.quiet:
            print(line, flush=True)

    done = sweep.run(
        given.out, minutes=given.minutes, shard=parse_shard(given.shard), report=report
    )
    rows = table.read(given.out)
    if rows:
        written = table.write(rows, given.out)
        if judged := table.metrics(rows):
            report("\n" + table.markdown(rows, judged[0]))
        report(table.notes(rows, given.out))
        report("wrote " + ", ".join(map(str, written)))
    report("done" if done else "time is up: the same command goes on")
    return 0


def parse_shard(text: str) -> tuple[int, int]:
    """`0/2` -> (0, 2)."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal()):
        raise ValueError(f"--shard {text}: give K/N, as in 0/2.")
    return int(k), int(n)


def _named(flag: str, given: list[str]) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in given]
    for (name, equals, value), text in zip(pairs, given, strict=True):
        if not (name.strip() and equals and value.strip()):
            raise ValueError(f"{flag} {text}: give NAME=VALUE.")
    return [(name.strip(), value) for name, _, value in pairs]
