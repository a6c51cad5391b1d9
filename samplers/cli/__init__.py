"""The `steer` command: `demo` shows what the toolkit does, the others do it; one file each."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from samplers.cli import advise, demo, plot, sample, sweep

__all__ = ["main"]

# what a user's input, files or network can cause; anything else is a bug, and shows where
_MISTAKES = (ValueError, TypeError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 is success, 2 a mistake in the arguments, told in one line."""
    # read by the libraries when they are imported, which is when a pipeline is loaded
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    given = _parser().parse_args(arguments)
    try:
        return given.run(given)
    except _MISTAKES as error:
        if given.traceback:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"steer: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("steer: stopped", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Mistakes get one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"steer: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    try:
        number = version("diffusion-steering")
    except PackageNotFoundError:
        number = "not installed"
    parser = _Parser(
        prog="steer",
        description="Draw reward-aligned samples from a pretrained diffusion model, or search for "
        "the best ones, without training it.",
        epilog="New here? `steer demo` needs no GPU, no download and about a minute.",
    )
    parser.add_argument("--version", action="version", version=f"steer {number}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where a mistake was made (before COMMAND)"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, advise, sample, sweep, plot):
        command.add(commands)
    return parser
