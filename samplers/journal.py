"""The record of a run: every walk that was answered, in memory and as an append-only journal.

On disk a record is a folder: `journal.jsonl`, one checksummed JSON line per batch of answers after
a header line, and the states those walks ended in as safetensors. States are on disk before the
line that names them, so a line that can be read is whole. A torn last line is cut at opening.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from samplers.store import Store

VERSION = 1
_JOURNAL = "journal.jsonl"
_LINE = b'{"crc":"'  # every line begins so


class CorruptRecordError(ValueError):
    """A record that cannot be trusted: a line or a file of it is missing, changed or malformed."""


@dataclass(frozen=True, slots=True)
class Walk:
    """One answered walk. Two requests are the same walk when their `question` agrees."""

    entry: int  # number of the walk in its run; its end state is kept under it
    src: int  # entry of the walk whose end it started from; -1 = the prior
    row: int
    key: int
    start: int
    stop: int
    score: bool
    angle: float  # nan = not turned
    rows: int  # network rows it cost
    reward: float  # nan where not asked for or failed
    log_ratio: float
    failed: bool

    @property
    def question(self) -> tuple:
        """What was asked: with keyed noise it determines the answer."""
        return question(self.src, self.row, self.key, self.start, self.stop, self.score, self.angle)


_COLUMNS = tuple(f.name for f in fields(Walk))
_FLOATS = ("angle", "reward", "log_ratio")  # nan is written as null


def question(src, row, key, start, stop, score, angle) -> tuple:
    """Identity of a request; nan (no angle) is made comparable."""
    return (src, row, key, start, stop, score, None if math.isnan(angle) else angle)


class Record:
    """All answered walks of a run, found by what was asked."""

    def __init__(self, walks: list[Walk] | None = None) -> None:
        self.walks: list[Walk] = walks or []
        self.next_entry = 1 + max((w.entry for w in self.walks), default=-1)

    def index(self) -> dict[tuple, Walk]:
        """Walks by question."""
        return {w.question: w for w in self.walks}


class Journal:
    """Appends a run to a folder, durably."""

    def __init__(self, folder: str | Path, header: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / _JOURNAL
        self._blobs = len(list(self.folder.glob("latents-*.safetensors")))
        self._whole = not exists(folder)  # is the end of the file known to be a line's?
        if self._whole:
            self._path.unlink(missing_ok=True)
            self._append({"kind": "run", "version": VERSION, **header})

    def walks(self, walks: list[Walk], states: Store, cleans: Store) -> None:
        """Append walks, with the states they ended in and their clean guesses where kept."""
        name, tensors = None, {}
        for kind, store in (("state", states), ("clean", cleans)):
            entries = [w.entry for w in walks if w.entry in store]
            if entries:
                tensors[f"{kind}.entry"] = torch.tensor(entries)
                tensors[kind] = store.get(entries).cpu().contiguous()
        if tensors:
            name = f"latents-{self._blobs:06d}.safetensors"
            part = self.folder / (name + ".part")
            save_file(tensors, part)
            _sync(part)
            os.replace(part, self.folder / name)
            self._blobs += 1
        columns = {c: [_plain(getattr(w, c)) for w in walks] for c in _COLUMNS}
        self._append({"kind": "walks", "latents": name, **columns})

    def note(self, data: dict[str, Any]) -> None:
        """Append what is no walk: how the run ended, a larger budget."""
        self._append({"kind": "note", **data})

    def _append(self, data: dict[str, Any]) -> None:
        body = json.dumps(data, allow_nan=False, separators=(",", ":"))
        if not self._whole:
            _cut_torn_line(self._path)
            self._whole = True
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f'{{"crc":"{zlib.crc32(body.encode()):08x}","data":{body}}}\n')
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Saved:
    """A record as read from disk."""

    header: dict[str, Any]
    record: Record
    states: Store  # end states by entry
    cleans: Store  # clean guesses of those that were scored on their way
    notes: list[dict[str, Any]]


def exists(folder: str | Path) -> bool:
    """Is there a record in this folder? One that was killed within its first line holds nothing."""
    path = Path(folder) / _JOURNAL
    if not path.exists():
        return False
    with open(path, "rb") as file:
        first = file.readline()
    return first.endswith(b"\n") or not _LINE.startswith(first[: len(_LINE)])


def read(folder: str | Path) -> Saved:
    """Read a record; CorruptRecordError if it is not whole (a torn last line is passed over)."""
    folder = Path(folder)
    if not exists(folder):
        raise FileNotFoundError(f"{folder} holds no {_JOURNAL}: give the folder of a saved run.")
    lines = list(_lines(folder / _JOURNAL))
    if not lines or lines[0].get("kind") != "run":
        raise CorruptRecordError(f"{folder / _JOURNAL} does not begin with a run's header.")
    if lines[0].get("version") != VERSION:
        found = lines[0].get("version")
        raise CorruptRecordError(f"{folder} is of version {found!r}; this release reads {VERSION}.")
    walks: list[Walk] = []
    stores = {"state": Store(), "clean": Store()}
    notes: list[dict[str, Any]] = []
    for line in lines[1:]:
        if line.get("kind") == "walks":
            walks += _walks(line, folder)
            if line.get("latents"):
                _restore(folder, line["latents"], stores)
        else:
            notes.append(line)
    return Saved(lines[0], Record(walks), stores["state"], stores["clean"], notes)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    raw = path.read_bytes().split(b"\n")
    whole, torn = raw[:-1], raw[-1]  # a whole line ends in a newline
    for number, line in enumerate(whole, 1):
        # {"crc":"12345678","data":...}: the checksum covers the bytes of the data as written
        body = line[25:-1]
        if line[:8] != _LINE or line[8:16] != f"{zlib.crc32(body):08x}".encode():
            raise CorruptRecordError(f"{path}, line {number}: the checksum does not match.")
        data = json.loads(body)
        if not isinstance(data, dict):
            raise CorruptRecordError(f"{path}, line {number}: not an object.")
        yield data
    del torn  # written but never acknowledged


def _cut_torn_line(path: Path) -> None:
    raw = path.read_bytes()
    if not raw.endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(raw.rfind(b"\n") + 1)


def _walks(line: dict[str, Any], folder: Path) -> list[Walk]:
    try:
        columns = [line[c] for c in _COLUMNS]
    except KeyError as error:
        raise CorruptRecordError(f"{folder}: a line of walks lacks the column {error}.") from error
    for k, name in enumerate(_COLUMNS):
        if name in _FLOATS:
            columns[k] = [math.nan if v is None else v for v in columns[k]]
    return [Walk(*values) for values in zip(*columns, strict=True)]


def _restore(folder: Path, name: str, stores: dict[str, Store]) -> None:
    path = folder / name
    if Path(name).name != name or not path.exists():
        raise CorruptRecordError(f"{folder}: the states {name!r} are missing.")
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own type for every kind of damage
        raise CorruptRecordError(f"{path} cannot be read: {error}") from error
    for kind, store in stores.items():
        if kind not in tensors:
            continue
        entries = tensors.get(f"{kind}.entry", torch.empty(0)).tolist()
        if len(entries) != len(tensors[kind]):
            raise CorruptRecordError(
                f"{path}: {len(entries)} entries, {len(tensors[kind])} states."
            )
        store.put(entries, tensors[kind])


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
