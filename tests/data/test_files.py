import json
import math
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


def test_texts_that_are_json_stay_texts_beside_other_kinds():
    """Contents of strings and of parts, rows of texts and of messages: nothing is read into a string."""
    told = [{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "tool", "content": "true"}]
    rows = [
        {"messages": told, "answer": "4", "info": {"a": "1.50"}},
        {"messages": [{"role": "user", "content": '{"a": 1}'}], "answer": [4], "info": {"a": 1}},
        {"messages": None, "answer": None, "info": None},
    ]
    assert load_rows(rows).to_list() == rows
    rows = [{"prompt": "4", "completion": "null"}, {"prompt": told, "completion": told}]
    assert load_rows(rows).to_list() == rows
    answers = [{"answer": "4"}, {"answer": [4]}]
    calls = [{"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"x": 1}}]}]}] * 2
    beside = datasets.concatenate_datasets([load_rows(answers), Dataset.from_list(calls)], axis=1)
    assert load_rows(beside).to_list() == [answer | call for answer, call in zip(answers, calls, strict=True)]


def test_numbers_in_calls_keep_their_digits(folder):
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"x": math.pi, "y": None}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"x": 0.1 + 0.2, "y": None}}]}]},
    ]
    assert load_rows(rows).to_list() == rows
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    for row, loaded in zip(rows, load_rows(folder / "rows.parquet"), strict=True):
        [expected], [call] = row["messages"][0]["tool_calls"], loaded["messages"][0]["tool_calls"]
        assert call["arguments"] == {"x": expected["arguments"]["x"]}, "a table's null may be a filler"


def test_texts_of_csv_are_texts(folder):
    (folder / "sums.csv").write_text("prompt,completion,answer\n2+2=,04,4\n9-9=,,0\n")
    assert load_rows("sums.csv").to_list() == [
        {"prompt": "2+2=", "completion": "04", "answer": 4},
        {"prompt": "9-9=", "completion": "", "answer": 0},
    ]


def test_what_no_table_holds_is_told_by_its_row(folder):
    (folder / "half.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"'half.jsonl' can't be made a table \(row 1\): .*surrogates"):
        load_rows("half.jsonl")
    with pytest.raises(DataError, match=r"the list can't be made a table \(row 0\): .*too large"):
        load_rows([{"text": "a", "id": 2**70}])


def conversations(*, same_types):
    """Rows whose messages, tool calls and tools have different keys."""

    def call(name, **arguments):
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    def tool(**properties):
        return {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}

    ask = {"role": "user", "content": "?"}
    return [
        {
            "messages": [
                ask,
                {"role": "assistant", "content": None, "tool_calls": [call("f", a=1)]},
                {"role": "tool", "content": "3", "name": "f"},
            ],
            "tools": [tool(a={"type": "integer"})],
            "id": 1,
        },
        {
            "messages": [
                ask,
                {"role": "assistant", "content": "x", "tool_calls": [call("g", b=2 if same_types else "2")]},
            ],
            "tools": [tool(b={"type": "string", "enum": ["2"]})],
            "id": 2,
        },
    ]


def without_none(value):
    """Keys without a value gone, but for a message's content."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None or k == "content"}
    return [without_none(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("same_types", [True, False])
@pytest.mark.parametrize("kind", ["list", "jsonl", "json", "parquet", "saved", "again"])
def test_conversations_survive_every_format(folder, kind, same_types):
    rows = conversations(same_types=same_types)
    rows[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["n"] = None  # it says null
    dataset = load_rows(rows)
    match kind:
        case "jsonl" | "json":
            write(folder / f"rows.{kind}", rows)
        case "parquet":
            dataset.to_parquet(folder / "rows.parquet")
        case "saved":
            dataset.save_to_disk(folder / "rows.saved")
        case "again":
            dataset.to_json(folder / "rows.again.jsonl")
    loaded = list(load_rows(next(folder.glob("rows.*"), rows)))
    assert loaded == rows


@pytest.mark.parametrize("same_types", [True, False])
def test_what_tables_fill_up_is_taken_out(folder, same_types):
    """A table of structs, as others write it: each call has every argument that any call has."""
    rows = conversations(same_types=same_types)
    table = Dataset.from_list(rows)
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    table.to_parquet(folder / "rows.parquet")
    for source in (table, folder / "rows.parquet"):
        loaded = load_rows(source)
        assert [without_none(row) for row in loaded] == rows
        assert [row["messages"][1]["tool_calls"] for row in loaded] == [
            row["messages"][1]["tool_calls"] for row in rows
        ]
        assert list(loaded["tools"]) == [row["tools"] for row in rows]


def test_calls_without_an_id_have_none(folder):
    """Arguments as JSON, so that calls differ in their own keys only."""
    calls = [{"name": "f", "arguments": "{}"}, {"name": "f", "arguments": "{}", "id": "1"}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}]} for call in calls]
    assert load_rows(Dataset.from_list(rows)).to_list() == rows


def test_other_columns_stay_as_they_are():
    """Structs elsewhere, and messages that have nothing to fill up: nothing is converted."""
    rows = [{"messages": [{"role": "user", "content": "a"}], "info": [{"a": {"b": None, "c": 1}}]}]
    table = Dataset.from_list(rows)
    assert load_rows(table) is table


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
