"""Rows from wherever people keep them: files, folders, lists, the hub.

Files are read here and not by the hub's loaders, so that a broken line is named by file and number. They are
read into memory whole; for corpora beyond that pass a `datasets.Dataset`, which is memory-mapped.

Not covered: what the columns mean (`formats`); streaming datasets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, Json, List
from datasets.exceptions import DatasetsError

from etude.errors import DataError

Rows: TypeAlias = str | Path | Dataset | DatasetDict | Sequence[Any]
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected", "completions", "tools")
_TEXTS = ("text", "prompt", "completion", "chosen", "rejected")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


def load_rows(
    source: Rows, *, split: str | None = None, name: str | None = None, column: str = "text"
) -> Dataset:
    """Load a dataset.

    Args:
        source: a JSON Lines, JSON, CSV or Parquet file; a folder of such files, or one that `save_to_disk`
            wrote; the id of a dataset on the hub; a list of dicts or of strings; a `Dataset`.
        split: which split, where there are several; without it "train", or the only one. In a folder, a file
            belongs to the split that its name starts with ("test-00001.parquet"), else to "train".
        name: which configuration of a hub dataset.
        column: what to call the one column that a list of strings makes.

    Raises:
        DataError: there is no such file, dataset or split, it can't be read, or it has no rows.
    """
    where = repr(str(source)) if isinstance(source, str | Path) else f"the {type(source).__name__}"
    loaded: Any = source
    if isinstance(source, str) and _is_hub_id(source):
        loaded = _load_from_hub(source, split, name)
    elif name is not None:
        raise DataError(f"name={name!r} chooses a configuration of a hub dataset; {where} isn't one")
    elif isinstance(source, str | Path):
        loaded = _load_path(Path(source).expanduser())
    elif isinstance(source, Sequence):
        loaded = _from_list(source, column, where)

    if isinstance(loaded, DatasetDict):
        loaded = _choose(loaded, split, where)
    elif split is not None:
        raise DataError(f"split={split!r} chooses one of several splits; {where} has only one, leave it out")
    if not isinstance(loaded, Dataset):
        raise DataError(
            f"can't load rows from {where}; expected a file, a folder, a hub id, a list of dicts or strings, "
            "or a datasets.Dataset (load streaming datasets without `streaming=True`)"
        )
    if len(loaded) == 0:
        raise DataError(f"{where} has no rows")
    return _without_fillers(loaded)


def _is_hub_id(source: str) -> bool:
    path = Path(source).expanduser()
    return not path.exists() and path.suffix not in _READERS and _HUB_ID.fullmatch(source) is not None


def _load_from_hub(source: str, split: str | None, name: str | None) -> DatasetDict:
    try:
        loaded = datasets.load_dataset(source, name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"there is no file or folder {source!r}{_near(Path(source))}, and it can't be loaded as a hub "
            f"dataset either: {error}"
        ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({split: loaded})


def _choose(splits: DatasetDict, split: str | None, where: str) -> Dataset:
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        raise DataError(
            f"{where} has no split {split!r}, only {', '.join(map(repr, splits))}; choose by `split`, "
            "on the command line by train_split or eval_split; or pass one of them alone"
        )
    return splits[split]


def _near(path: Path) -> str:
    """What may have been meant, as the end of an error message."""
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder {str(folder)!r})"
    names = get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=5, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, sorted(names)))}?" if names else ""


# ---- conversations in tables ----


def _without_fillers(dataset: Dataset) -> Dataset:
    """Conversations without the keys that a table fills up.

    Where messages are structs, a tool call has each argument that any call has, as None. Keys of the messages
    themselves are seen to where they are rendered.
    """
    columns = [name for name, feature in dataset.features.items() if _is_nested(name, feature)]
    if not columns:
        return dataset
    features = Features({**dataset.features, **{name: List(Json()) for name in columns}})
    return dataset.map(
        _drop_fillers,
        fn_kwargs={"columns": columns, "features": features},
        features=features,
        desc="Reading conversations",
    )


def _is_nested(name: str, feature: Any) -> bool:
    """Are these conversations with structs in their messages?"""
    return name in _CONVERSATIONS and _depth(feature) > 1


def _depth(feature: Any) -> int:
    """How many structs lie within each other."""
    if isinstance(feature, Mapping):
        return 1 + max(map(_depth, feature.values()), default=0)
    return _depth(feature.feature) if hasattr(feature, "feature") else 0


def _drop_fillers(row: Mapping[str, Any], columns: Sequence[str], features: Features) -> dict[str, Any]:
    # The others are written anew, too.
    return as_json({name: _drop(row[name]) if name in columns else row[name] for name in row}, features)


def _drop(value: Any) -> Any:
    if isinstance(value, Mapping):  # a message without content says so
        return {key: _drop(item) for key, item in value.items() if item is not None or key == "content"}
    return [_drop(item) for item in value] if isinstance(value, list) else value


# ---- files and folders ----


def _load_path(path: Path) -> Dataset | DatasetDict:
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise DataError(f"there is no file or folder {str(path)!r}{_near(path)}")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return datasets.load_from_disk(path)
    files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
    if not files:
        raise DataError(f"the folder {str(path)!r} has no data files; expected some of {', '.join(_READERS)}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        word = re.split(r"[-_.]", file.name)[0]
        splits.setdefault(word if word in _SPLIT_NAMES else "train", []).append(file)
    return DatasetDict({split: _read_files(files) for split, files in splits.items()})


def _read_files(files: list[Path]) -> Dataset:
    parts = [_read_file(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if set(part.column_names) != set(parts[0].column_names):
            raise DataError(
                f"{str(file)!r} has the columns {part.column_names} and {files[0].name!r} beside it "
                f"{parts[0].column_names}; expected the same columns in all files of a split"
            )
    return datasets.concatenate_datasets(parts)


def _read_file(path: Path) -> Dataset:
    if path.suffix not in _READERS:
        raise DataError(f"{str(path)!r} is not a data file; expected one that ends in {', '.join(_READERS)}")
    return _READERS[path.suffix](path)


def _read_json_lines(path: Path) -> Dataset:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise _line_error(path, number, line, str(error)) from error
            if not isinstance(row, dict):
                raise _line_error(path, number, line, f"expected an object, found {type(row).__name__}")
            rows.append(row)
    return _from_list(rows, "text", repr(str(path)))


def _line_error(path: Path, number: int, line: bytes, problem: str) -> DataError:
    start = line[:60].decode(errors="replace").rstrip("\r\n")
    return DataError(f"{str(path)!r}, line {number}: {problem}. The line starts {start!r}")


def _read_json(path: Path) -> Dataset:
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line, under the wrong name
            return _read_json_lines(path)
        raise DataError(f"{str(path)!r}, line {error.lineno}: {error.msg} (column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    if not isinstance(content, list):
        raise DataError(
            f"{str(path)!r} holds one {type(content).__name__}; expected a list of objects, or one per line"
        )
    return _from_list(content, "text", repr(str(path)))


def _read_csv(path: Path) -> Dataset:
    separator = "\t" if path.suffix == ".tsv" else ","
    try:
        # "NA" and "None" are words like any other here, and an answer of "007" is a text.
        texts = dict.fromkeys(_TEXTS, str)
        frame = pandas.read_csv(path, sep=separator, keep_default_na=False, dtype=texts)
    except ValueError as error:  # pandas' parser errors are among them
        raise DataError(f"{str(path)!r} can't be read as CSV: {error}") from error
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas made the first column an index
        raise DataError(f"the rows of {str(path)!r} have more fields than its header")
    return Dataset.from_pandas(frame, preserve_index=False)


def _read_parquet(path: Path) -> Dataset:
    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{str(path)!r} can't be read as Parquet: {error}") from error


def _from_list(rows: Sequence[Any], column: str, where: str) -> Dataset:
    if rows and all(isinstance(row, str) for row in rows):
        return Dataset.from_dict({column: list(rows)})
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {index} of {where} is a {type(row).__name__}; expected dicts, or strings only"
            )
    columns = dict.fromkeys(key for row in rows for key in row)
    first = [{**dict.fromkeys(columns), **row} for row in rows[:1]]  # `from_list` takes its columns from it
    try:
        table = Dataset.from_list([*first, *rows[1:]], on_mixed_types="use_json")
        # What differs from row to row becomes JSON, whole values or messages: see `as_json`.
        mixed = {
            name: List(Json()) if all(map(_is_conversation, (row.get(name) for row in rows))) else Json()
            for name, feature in table.features.items()
            if _holds_json(feature) or _is_nested(name, feature)
        }
        if not mixed:
            return table
        features = Features({**table.features, **mixed})
        return Dataset.from_list([as_json(row, features) for row in [*first, *rows[1:]]], features=features)
    except (pyarrow.ArrowInvalid, OverflowError, UnicodeEncodeError) as error:
        raise DataError(f"{where} can't be made a table{_culprit(rows)}: {error}") from error


def as_json(row: Mapping[str, Any], features: Features) -> dict[str, Any]:
    """The row with JSON in its `Json` columns, in the way that keeps every value.

    Left to itself, datasets takes a string that happens to be JSON ("4", "true") for what it says, and keeps
    ten digits of a number.
    """
    written = dict(row)
    for name, value in row.items():
        if value is not None and features.get(name) == Json():
            written[name] = json.dumps(value)
        elif value is not None and features.get(name) == List(Json()):
            written[name] = [json.dumps(item) for item in value]
    return written


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_holds_json, feature.values()))
    return isinstance(feature, Json) or (hasattr(feature, "feature") and _holds_json(feature.feature))


def _is_conversation(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, Mapping) for item in value))


def _culprit(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which row no table can hold by itself, as a part of an error message."""
    for index, row in enumerate(rows):
        try:
            pyarrow.array([dict(row)])
        except (pyarrow.ArrowInvalid, OverflowError, UnicodeEncodeError):
            return f" (row {index})"
    return ""


_READERS: dict[str, Callable[[Path], Dataset]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
