"""What the `steer` command is told in words: samplers and rewards."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import samplers
from search.widen import Widening
from steering import rewards, zoo
from steering.metrics.extractors import own_function

_SAMPLERS = {
    "ancestral": samplers.Ancestral,
    "best-of-n": samplers.BestOfN,
    "importance": samplers.Importance,
    "smc": samplers.SMC,
    "tds": samplers.TDS,
    "das": samplers.DAS,
    "dts": samplers.TreeSampling,
    "dts-star": samplers.TreeSearch,
    "svdd": samplers.SVDD,
    "beam": samplers.Beam,
    "zero-order": samplers.ZeroOrder,
}
_LEARNED: dict[str, Any] = {  # each may be followed by :MODEL, a hub id or folder
    "clip": rewards.ClipScore,
    "pickscore": rewards.PickScore,
    "aesthetic": rewards.Aesthetic,
    "imagereward": partial(rewards.Imscore, "imagereward"),
    "hpsv2": partial(rewards.Imscore, "hpsv2.1"),
    "cyclereward": partial(rewards.Imscore, "cyclereward"),
}


def parse_sampler(words: Sequence[str]) -> Any:
    """`dts law=published parallel=8` -> TreeSampling(law="published", parallel=8)."""
    name, *options = words
    if name not in _SAMPLERS:
        raise ValueError(f"--sampler {name}: no such sampler; there are {', '.join(_SAMPLERS)}.")
    kind = _SAMPLERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"--sampler {name} {option}: give KEY=VALUE, KEY of {', '.join(known)}."
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if key == "widening":
            if not isinstance(value, tuple) or len(value) != 2:
                raise ValueError(f"--sampler {name} {option}: give C,ALPHA, as in widening=1,.3.")
            value = Widening(*value)
        values[key] = value
    return kind(**values)


def sampler_words(sampler: Any) -> list[str]:
    """The words that `parse_sampler` makes this sampler of."""
    (name,) = [name for name, kind in _SAMPLERS.items() if type(sampler) is kind]
    fields = [f for f in dataclasses.fields(sampler) if getattr(sampler, f.name) != f.default]
    return [name, *(f"{f.name}={_shown(getattr(sampler, f.name))}" for f in fields)]


def parse_reward(text: str, device: str, offload: bool = False) -> Any:
    """`classifier:4,9`, `pair:4,9`, `jpeg`, `tfbind8`, `dna:1`, `bible`, a learned reward by its
    name, `judge:module:function`, `module:function`, or a sum `0.7*A + 0.3*B` of them."""
    terms = []
    for part in text.split("+"):
        weight, star, name = part.strip().rpartition("*")
        try:
            terms.append(
                (float(weight) if star else 1.0, _one_reward(name.strip(), device, offload))
            )
        except ValueError as error:
            raise ValueError(f"--reward {text}: {error}") from error
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else rewards.Sum(tuple(terms))


def _one_reward(text: str, device: str, offload: bool) -> Any:
    name, _, rest = text.partition(":")
    if name in ("classifier", "pair"):
        classes = [int(c) for c in rest.split(",") if c.strip()]
        if name == "pair" and len(classes) < 2:
            raise ValueError("pair needs at least two classes, as in pair:4,9.")
        if not classes or max(classes) > 9 or min(classes) < 0:
            raise ValueError(f"classes {rest!r}: give digits 0 to 9, as in {name}:4,9.")
        net = zoo.load("mnist-classifier", device=device)
        if name == "classifier":
            return rewards.Classifier(net, classes)
        return len(classes) * rewards.Minimum(tuple(rewards.Classifier(net, [c]) for c in classes))
    if text == "tfbind8":
        return rewards.Table(zoo.tfbind8_scores().to(device))
    if name == "dna" and rest:
        if not rest.isdecimal():
            raise ValueError(f"class {rest!r}: give 0 to 3, as in dna:1.")
        return rewards.LogOdds(zoo.load("dna-reward", device=device), int(rest))
    if text == "bible":
        return rewards.LogOdds(zoo.load("text-judge", device=device), 1)
    if name == "jpeg":
        return rewards.Jpeg(int(rest)) if rest else rewards.Jpeg()
    if name in _LEARNED:
        return _LEARNED[name](**{"model": rest} if rest else {}, device=device, offload=offload)
    if name == "judge" and rest:
        module, _, function = rest.partition(":")
        return rewards.Judge(own_function(module, function), name=f"judge {function}")
    if not rest:
        raise ValueError(
            f"no reward {text!r}: give classifier:CLASSES, pair:CLASSES, jpeg[:QUALITY], tfbind8, "
            "dna:CLASS, bible, "
            f"{', '.join(_LEARNED)}, judge:MODULE:FUNCTION or MODULE:FUNCTION of your own."
        )
    try:
        return own_function(name, rest)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ValueError(
            f"there is no module {name!r} here, and no reward of this name: there are classifier, "
            f"pair, jpeg, tfbind8, dna, bible, {', '.join(_LEARNED)} and judge."
        ) from error


def sampler_help() -> str:
    """Names, options and defaults of all samplers."""
    lines = ["samplers, with their options and defaults:"]
    for name, kind in _SAMPLERS.items():
        lines.append(f"  {name:<11} {(kind.__doc__ or '').strip().splitlines()[0]}")
        options = [f"{f.name}={_shown(f.default)}" for f in dataclasses.fields(kind)]
        lines.append(f"  {'':<11} {' '.join(options)}")
    lines += [
        "",
        "example:",
        "  steer sample --model zoo:mnist --reward classifier:0,2,4,6,8 --also jpeg \\",
        "      --sampler dts branch=even --nfe 5000 --draws 64 --out runs/even",
    ]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if isinstance(default, Widening):
        return f"{default.c:g},{default.alpha:g}"
    return str(default).replace(" ", "")
