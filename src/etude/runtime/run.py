"""The run directory: everything a run writes down, as plain files.

    runs/calculator/
        run.yaml            the resolved configuration
        metrics.jsonl       one row per update: {"step", "time", name: number, …}
        episodes.jsonl      one row per episode: {"step", "split", …the episode}
        evaluation.json     for an evaluation: every measure by model and condition
        summary.json        what the run came to: before, after, seed, seconds, …
        best.json           the checkpoint that is kept whatever its age
        checkpoint-<step>/

Built to be killed at any instant. A row of the append-only files counts once its newline is written: a
half-written one is ignored when read and cut off by the next append. Everything else is written under a
temporary name and renamed.

One process writes. Not covered: what a checkpoint holds, and the report.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol, get_args

import yaml

from etude.errors import CheckpointError, ConfigError
from etude.types import Episode

Split = Literal["train", "validation", "before", "after"]

METRICS, EPISODES = "metrics.jsonl", "episodes.jsonl"


class TokenSpeller(Protocol):
    """A tokenizer, as far as this file needs one."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Any: ...


class RunDirectory:
    """A run's files. Making one touches nothing; the directory is created by the first write.

    Raises:
        CheckpointError: a file can't be read, or the path is not a directory. Names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    # Configuration and summary

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration; infinities stay, other values become plain YAML."""
        text = yaml.safe_dump(_plain(config, finite=False), sort_keys=False, allow_unicode=True)
        self._write("run.yaml", text)

    def read_config(self) -> dict[str, Any]:
        file = self.path / "run.yaml"
        try:
            return yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"{file} can't be read ({error}); expected the configuration of a run. "
                "Check the path, or restore the file"
            ) from error

    def changed_settings(self, config: Mapping[str, Any]) -> list[str]:
        """Names of settings that `config` has otherwise than the configuration that is stored."""
        before, now = self.read_config(), _plain(config, finite=False)
        return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))

    def update_summary(self, values: Mapping[str, Any]) -> None:
        """Merge `values` into the summary: `before` is known long before `after`."""
        self._write("summary.json", _json({**self.read_summary(), **values}, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        return self._read_json("summary.json")

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Write what an evaluation came to, as `evaluation.evaluate.record_of` makes it."""
        self._write("evaluation.json", _json(record, indent=2) + "\n")

    def read_evaluation(self) -> dict[str, Any]:
        return self._read_json("evaluation.json")

    # Metrics and episodes

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row; NaN and infinities are written as null, so the name stays."""
        if taken := {"step", "time"} & metrics.keys():
            raise CheckpointError(
                f"{self.path / METRICS}: a metric is named {min(taken)!r}, which is each row's own; rename it"
            )
        self._append(METRICS, [{"step": step, "time": time.time(), **metrics}])

    def read_metrics(self) -> list[dict[str, Any]]:
        return [row for _, row in _rows(self.path / METRICS)]

    def append_episodes(
        self,
        step: int,
        split: Split | str,
        episodes: Sequence[Episode],
        tokenizer: TokenSpeller | None = None,
    ) -> None:
        """Append one row per episode; with a tokenizer, each segment also keeps its tokens' spelling.

        Args:
            split: of a training run; or of an evaluation, as "model/condition".
        """
        if split not in get_args(Split) and "/" not in split:
            raise ConfigError(
                f"split is {split!r}; expected one of {', '.join(get_args(Split))}, or model/condition"
            )
        rows = [{"step": step, "split": split, **episode.to_json()} for episode in episodes]
        if tokenizer is not None:
            for segment in (segment for row in rows for segment in row["segments"]):
                segment["tokens"] = tokenizer.convert_ids_to_tokens(segment["token_ids"])
        self._append(EPISODES, rows)

    def read_episodes(
        self, step: int | None = None, split: Split | str | None = None, limit: int | None = None
    ) -> list[Episode]:
        """The first `limit` episodes of a step, of a split, or of both, in the order they were written."""
        episodes: list[Episode] = []
        for _, row in _rows(self.path / EPISODES):
            if limit is not None and len(episodes) >= limit:
                break
            if step in (None, row["step"]) and split in (None, row["split"]):
                episodes.append(_episode(row))
        return episodes

    def read_groups(self) -> dict[int, list[Episode]]:
        """All episodes by step, each step's in the order they were written."""
        groups: dict[int, list[Episode]] = {}
        for _, row in _rows(self.path / EPISODES):
            groups.setdefault(row["step"], []).append(_episode(row))
        return groups

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write a file of JSON Lines, whole; the one of that name that was here stays until then."""
        self._write(name, "".join(_json(row) + "\n" for row in rows))
        return self.path / name

    # Checkpoints

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """A directory to fill; on leaving the block it becomes `checkpoint-<step>`, or nothing if it raised.

        A checkpoint of the same step is replaced.
        """
        final = self.path / f"checkpoint-{step}"
        writing, replaced = _hidden("writing", final), _hidden("replaced", final)
        self._create()
        _remove(writing)
        writing.mkdir()
        try:
            yield writing
            _sync(writing)
            if final.exists():
                _remove(replaced)
                final.rename(replaced)  # killed here, `checkpoints` still finds it
            writing.rename(final)
            _sync_entry(self.path)
            _remove(replaced)
        finally:
            _remove(writing)

    def checkpoints(self) -> dict[int, Path]:
        """Directories of the complete checkpoints by step, oldest first."""
        found: dict[int, Path] = {}
        names = os.listdir(self.path) if self.path.is_dir() else []
        for name in sorted(names):  # one set aside sorts before the one that replaced it, and yields to it
            if match := re.fullmatch(r"(?:\.replaced-)?checkpoint-(\d+)", name):
                found[int(match[1])] = self.path / name
        return dict(sorted(found.items()))

    def latest_checkpoint(self) -> Path | None:
        found = self.checkpoints()
        return found[max(found)] if found else None

    def mark_best(self, step: int) -> None:
        """Protect the checkpoint of `step` from pruning, in place of the one protected so far."""
        if step not in self.checkpoints():
            raise CheckpointError(
                f"{self.path} has no checkpoint-{step} to protect; expected one of "
                f"{list(self.checkpoints())}. Save the checkpoint before marking it as the best"
            )
        self._write("best.json", _json({"step": step}) + "\n")

    def best_checkpoint(self) -> Path | None:
        return self.checkpoints().get(self._read_json("best.json").get("step", -1))

    def prune(self, keep: int) -> None:
        """Delete all checkpoints but the `keep` newest and the best one."""
        if keep < 1:
            raise ConfigError(f"keep is {keep}; expected at least 1 checkpoint")
        found = self.checkpoints()
        kept = [*list(found.values())[-keep:], self.best_checkpoint()]
        for leftover in [*self.path.glob(".writing-checkpoint-*"), *self.path.glob(".deleted-*")]:
            _remove(leftover)  # of a process that was killed
        for directory in found.values():
            if directory not in kept:
                _delete(directory)

    def truncate_after(self, step: int) -> None:
        """Forget what came after `step`, to go on from its checkpoint: rows and later checkpoints.

        A run directory tells one history: what is dropped here is about to be written anew.
        """
        for directory in [directory for later, directory in self.checkpoints().items() if later > step]:
            _delete(directory)
        self.truncate_rows(step)

    def truncate_rows(self, step: int) -> None:
        """The same for rows only; checkpoints stay."""
        for file in (self.path / METRICS, self.path / EPISODES):
            if file.exists():
                with _replacing(file) as kept:
                    kept.writelines(line for line, row in _rows(file) if row["step"] <= step)

    def is_taken(self, overwrite: bool) -> bool:
        """Whether an earlier run is here, which starting anew has to `reset`.

        Raises:
            ConfigError: there is one, and it isn't to be overwritten.
        """
        taken = bool(self.read_metrics())
        if taken and not overwrite:
            raise ConfigError(
                f"{self.path} holds an earlier run; resume it with resume_from_checkpoint, choose another "
                "output_dir, or start anew in it with overwrite_output_dir"
            )
        return taken

    def reset(self) -> None:
        """Forget the run that is here, to start anew: rows, summary, and all checkpoints."""
        self.truncate_after(-1)
        for name in ("summary.json", "best.json", "evaluation.json"):
            (self.path / name).unlink(missing_ok=True)

    # Files

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise CheckpointError(
                f"{self.path} can't be a run directory: a file is in the way. Choose another output_dir"
            ) from error

    def _write(self, name: str, text: str) -> None:
        self._create()
        with _replacing(self.path / name) as stream:
            stream.write(text.encode())

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.exists():
            return {}
        try:
            return json.loads(file.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON ({error}); restore it or delete it") from error

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = "".join(_json(row) + "\n" for row in rows)
        self._create()
        with (self.path / name).open("a+b") as stream:
            _cut_unfinished_row(stream)
            stream.write(lines.encode())


def _episode(row: dict[str, Any]) -> Episode:
    for segment in row["segments"]:
        segment.pop("tokens", None)
    return Episode.from_json(row)


def _rows(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each finished row, as written and as read."""
    if not file.exists():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                return  # its process was killed while writing it
            try:
                row = json.loads(line)
                row["step"]
            except (ValueError, TypeError, KeyError) as error:
                raise CheckpointError(
                    f"{file}, line {number} can't be read ({error!r}); expected a JSON object with a 'step'. "
                    "Restore the file or delete the line"
                ) from error
            yield line, row


def _cut_unfinished_row(stream: IO[bytes]) -> None:
    if end := stream.seek(0, os.SEEK_END):
        stream.seek(end - 1)
        if stream.read(1) != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)


@contextmanager
def _replacing(file: Path) -> Iterator[IO[bytes]]:
    """A stream whose content takes the file's place in one instant, when the block ends without error."""
    writing = _hidden("writing", file)
    with writing.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    writing.replace(file)


def _hidden(state: str, path: Path) -> Path:
    return path.with_name(f".{state}-{path.name}")


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _delete(checkpoint: Path) -> None:
    """Rename, then remove: a checkpoint is whole or it isn't there."""
    deleted = _hidden("deleted", checkpoint)
    _remove(deleted)
    checkpoint.rename(deleted)
    shutil.rmtree(deleted)


def _sync(directory: Path) -> None:
    """Have the disk hold every file below `directory` before its name promises that it is complete."""
    for parent, _, names in os.walk(directory):
        for name in names:
            _sync_entry(Path(parent, name))
        _sync_entry(Path(parent))


def _sync_entry(path: Path) -> None:
    if os.name == "nt":  # Windows can't open a directory, or sync what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any, finite: bool = True) -> Any:
    """`value` in JSON's types, and text for what has no place there.

    Tensors and arrays become lists, their scalars numbers, functions and classes "module:name". With
    `finite`, NaN and infinities (which JSON lacks) become None.
    """
    match value:
        case None | bool():
            return value
        case str():
            return str(value)
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) or not finite else None
        case Mapping():
            return {str(_plain(key, finite)): _plain(item, finite) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item, finite) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name), finite) for field in fields(value)}
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), finite)
    return str(value)
