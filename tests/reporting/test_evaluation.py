"""An evaluation's tables: one model and what noise costs it, or two beside each other."""

import io

from rich.console import Console

from etude.reporting.evaluation import Cell, headlines, noisy_tables, print_evaluation, tables


def measure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def model(name, clean, words):
    return {
        "name": name,
        "shares": ["success", "obeyed", "stop/submitted", "stop/done"],
        "conditions": {
            "clean": {
                "success": measure(clean, clean - 0.1, clean + 0.1),
                "tokens": measure(1234.5, 1200.0, 1300.0),
                "tool_errors": measure(None),
                "stop/submitted": measure(1.0, 0.9, 1.0),
                "stop/done": measure(0.0, 0.0, 0.1),
            },
            "words": {"success": measure(words, 0.0, 0.5), "obeyed": measure(0.05, 0.01, 0.2)},
        },
        "changes": {"words": {"success": measure(words - clean, -0.3, -0.1), "obeyed": measure(0.05)}},
    }


ONE = {"tasks": 1500, "samples": 1, "confidence": 0.9, "models": {"A": model("runs/a\x1b", 0.8, 0.55)}}
TWO = {
    **ONE,
    "samples": 4,
    "models": {**ONE["models"], "B": model("runs/b", 0.7, 0.6)},
    "differences": {
        "clean": {"success": measure(0.1, 0.02, 0.2), "tokens": measure(-1.0, -2.0, -0.5)},
        "words": {"success": measure(-0.05, -0.1, 0.05), "obeyed": measure(0.04, 0.01, 0.1)},
    },
}


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_one_model():
    conditions, measures = tables(ONE)
    assert conditions.columns == ["", "success", "against clean"]
    assert texts(conditions) == [
        ["clean", "80.0 %  [70.0, 90.0]", ""],
        ["words", "55.0 %  [0.0, 50.0]", "−25.0  [−30.0, −10.0]"],
        ["words, obeyed", "5.0 %  [1.0, 20.0]", "+5.0"],
    ]
    assert conditions.rows[1][2] == Cell("−25.0  [−30.0, −10.0]", "worse")
    assert texts(measures) == [
        ["Success", "80.0 %  [70.0, 90.0]"],
        ["Tokens", "1,234  [1,200, 1,300]"],
        ["Tool errors", "–"],
        ["Stop submitted", "100.0 %  [90.0, 100.0]"],
    ]
    assert headlines(ONE) == ["runs/a\\x1b", "1,500 tasks, 1 episode each; intervals of 90 % over tasks"]


def test_tools_are_shown_where_there_are_any():
    def rows(has_tools, calls):
        whole = model("a", 0.8, 0.5) | ({} if has_tools is None else {"has_tools": has_tools})
        whole["conditions"]["clean"] |= {"tool_use": measure(calls), "tool_calls": measure(calls)}
        return [row[0] for row in texts(tables({**ONE, "models": {"A": whole}})[1])]

    without = ["Success", "Tokens", "Stop submitted"]
    assert rows(False, 0.0) == without
    assert rows(False, 0.5) == [*without, "Tool use", "Tool calls"]
    shown = ["Success", "Tokens", "Tool errors", "Stop submitted", "Tool use", "Tool calls"]
    assert rows(True, 0.0) == rows(None, 0.0) == shown


def test_every_measure_under_noise():
    [words] = noisy_tables(ONE)
    assert (words.title, words.columns) == ("Under words", ["", "", "against clean"])
    assert words.rows == [
        [Cell("Success"), Cell("55.0 %  [0.0, 50.0]"), Cell("−25.0  [−30.0, −10.0]", "worse")],
        [Cell("Obeyed"), Cell("5.0 %  [1.0, 20.0]"), Cell("+5.0")],
    ]
    [both] = noisy_tables(TWO)
    assert [cell.text for cell in both.rows[1]] == [
        "Obeyed",
        *["5.0 %  [1.0, 20.0]"] * 2,
        "+4.0  [+1.0, +10.0]",
    ]
    assert both.rows[1][3].tone == "worse"


def test_two_models():
    conditions, measures = tables(TWO)
    assert conditions.columns == measures.columns == ["", "A", "B", "A − B"]
    assert [row[3] for row in conditions.rows] == [
        Cell("+10.0  [+2.0, +20.0]", "better"),
        Cell("−5.0  [−10.0, +5.0]"),
        Cell("+4.0  [+1.0, +10.0]", "worse"),  # to obey what was injected
    ]
    assert measures.rows[1][3] == Cell("−1  [−2, −0.5]"), "neither good nor bad"
    assert headlines(TWO)[:2] == ["A: runs/a\\x1b", "B: runs/b"]


def test_what_is_printed_to_a_file_is_whole():
    file = io.StringIO()
    print_evaluation(TWO, Console(file=file, width=40))
    printed = file.getvalue()
    assert "A: runs/a\\x1b\n" in printed
    assert "\x1b" not in printed
    for table in tables(TWO):
        for row in texts(table):
            assert any(all(cell in line for cell in row) for line in printed.splitlines())
