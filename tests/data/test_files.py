import json
import shutil

import datasets
import pytest
from datasets import Dataset, DatasetDict

from etude.data.files import load_rows
from etude.errors import DataError

ROWS = [{"prompt": "2+2?", "answer": 4}, {"prompt": "NA", "answer": 6}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, rows=ROWS):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_each_file_format_gives_the_same_rows(folder, suffix):
    path = write(folder / f"tasks.{suffix}")
    for source in (path, str(path), f"tasks.{suffix}"):
        assert load_rows(source).to_list() == ROWS


def test_json_lines_under_the_name_of_json(folder):
    assert load_rows(write(folder / "x.jsonl").rename(folder / "x.json")).to_list() == ROWS


def test_lists_datasets_and_strings():
    assert load_rows(ROWS).to_list() == ROWS
    assert load_rows(["a", "b"]).to_list() == [{"text": "a"}, {"text": "b"}]
    assert load_rows(("a",), column="prompt").to_list() == [{"prompt": "a"}]
    dataset = Dataset.from_list(ROWS)
    assert load_rows(dataset) is dataset


def test_no_column_is_lost_and_mixed_arguments_keep_their_keys():
    rows = [{"a": 1}, {"a": 2, "b": "x"}]
    assert load_rows(rows).to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    calls = [{"calls": [{"arguments": {"x": 1}}]}, {"calls": [{"arguments": {"y": "s"}}]}]
    assert load_rows(calls).to_list() == calls
    assert rows == [{"a": 1}, {"a": 2, "b": "x"}], "what was passed is left as it was"


def test_splits(folder):
    both = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])})
    assert len(load_rows(both)) == 2
    assert len(load_rows(both, split="test")) == 1
    both.save_to_disk(folder / "saved")
    assert len(load_rows(folder / "saved", split="test")) == 1
    both["train"].save_to_disk(folder / "one")
    assert load_rows(folder / "one").to_list() == ROWS
    with pytest.raises(DataError, match="no split 'dev', only 'train', 'test'"):
        load_rows(both, split="dev")
    with pytest.raises(DataError, match="no split 'train', only 'test', 'dev'"):
        load_rows(DatasetDict({"test": both["test"], "dev": both["test"]}))


def test_a_folder_of_files(folder):
    write(folder / "many" / "part-0.jsonl")
    write(folder / "many" / "part-1.parquet", ROWS[:1])
    write(folder / "many" / "test.csv", ROWS[1:])
    (folder / "many" / "README.md").write_text("about")
    assert load_rows("many").to_list() == [*ROWS, ROWS[0]]
    assert load_rows("many", split="test").to_list() == ROWS[1:]
    write(folder / "many" / "train.json", [{"other": 1}])
    with pytest.raises(DataError, match=r"train.json' has the columns \['other'\].*expected the same"):
        load_rows("many")


def test_a_missing_file_is_told_with_names_near_it(folder):
    write(folder / "tasks.jsonl")
    write(folder / "tasks_small.jsonl")
    with pytest.raises(DataError, match=r"no file or folder 'task.jsonl'; did you mean 'tasks.jsonl'"):
        load_rows("task.jsonl")
    with pytest.raises(DataError, match=r"no file or folder 'nowhere/task.jsonl' .nor a folder 'nowhere'"):
        load_rows("nowhere/task.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.jsonl", b'{"a": 1}\n\n{"a": 2,\n', r"x.jsonl', line 3: .*The line starts '{\"a\": 2,'"),
        ("x.jsonl", b'{"a": 1}\n[1, 2]\n', r"line 2: expected an object, found list.*'\[1, 2\]'"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"line 2: .*utf-8"),
        ("x.json", b'[{"a": 1},\n{"a" 2}]', r"x.json', line 2: Expecting ':' delimiter"),
        ("x.json", b'{"a": 1}', "holds one dict; expected a list"),
        ("x.json", b'[{"a": 1}, 2]', "row 1 of .* is a int"),
        ("x.csv", b"a,b\n1,2,3\n", "more fields than its header"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", "can't be read as CSV: .*line 3"),
        ("x.parquet", b"PAR0", "can't be read as Parquet"),
        ("x.txt", b"a", r"not a data file; expected one that ends in .jsonl"),
    ],
)
def test_a_broken_file_is_told_by_name_and_line(folder, name, content, match):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        load_rows(folder / name)


@pytest.mark.parametrize(("name", "content"), [("x.jsonl", "\n"), ("x.json", "[]"), ("x.csv", "a,b\n")])
def test_nothing_is_an_error(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        load_rows(name)
    with pytest.raises(DataError, match="the list has no rows"):
        load_rows([])
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        load_rows("empty")


def test_options_that_do_not_apply_are_refused(folder):
    with pytest.raises(DataError, match="has only one"):
        load_rows(ROWS, split="train")
    with pytest.raises(DataError, match="isn't one"):
        load_rows(ROWS, name="main")
    with pytest.raises(DataError, match="can't load rows from the int"):
        load_rows(3)
    with pytest.raises(DataError, match="without `streaming=True`"):
        load_rows(Dataset.from_list(ROWS).to_iterable_dataset())


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_name_that_is_neither_file_nor_dataset(folder, offline):
    write(folder / "tasks.jsonl")
    with pytest.raises(DataError, match=r"no file or folder 'tasks'; did you mean 'tasks.jsonl'\?, and"):
        load_rows("tasks")


def test_a_hub_dataset_from_the_offline_cache(folder, offline, monkeypatch):
    """The hub's own loader, fed from a cache as a download would have left it."""
    built = datasets.load_dataset(
        "json", data_files=str(write(folder / "t.jsonl")), cache_dir=folder / "built"
    )
    [arrow] = (folder / "built").rglob("json-train.arrow")
    cached = folder / "cache" / "someone___sums" / "default" / "0.0.0" / arrow.parent.name
    cached.mkdir(parents=True)
    shutil.copy(arrow, cached / "sums-train.arrow")
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    info |= {"builder_name": "sums", "dataset_name": "sums", "config_name": "default"}
    (cached / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    assert load_rows("someone/sums").to_list() == built["train"].to_list() == ROWS
    assert load_rows("someone/sums", split="train").to_list() == ROWS
    with pytest.raises(DataError, match="nowhere"):
        load_rows("someone/sums", split="nowhere")
