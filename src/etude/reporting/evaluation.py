"""An evaluation as tables of text, for a terminal and for the report.

Reads what `evaluation.json` holds and nothing else. Not covered: making it (`etude.evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from rich.console import Console
from rich.table import Table
from rich.text import Text

from etude.reporting.curves import OF_TOOLS, in_words
from etude.reporting.episodes import COLORS, visible
from etude.reporting.terminal import number

Record = Mapping[str, Any]
CLEAN = "clean"
_RARE = ("stop/", "tool_errors/")  # shown where they occur
_BETTER = ("success", "pass@", "reward")  # of all episodes, and of each environment's


@dataclass(frozen=True)
class Cell:
    """A text, and for a difference whether it is one: "better", "worse" or, as for all else, nothing."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class TextTable:
    """A table of texts; every row begins with its name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def print_evaluation(record: Record, console: Console | None = None) -> None:
    """Whose numbers they are, and the tables."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, 120))  # nobody can widen a file
    for line in headlines(record):
        console.print(Text(line), soft_wrap=True)
    for table in tables(record):
        shown = Table(title=table.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for place, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if place else "left")
        for row in table.rows:
            shown.add_row(*(Text(cell.text, _STYLES.get(cell.tone, "")) for cell in row))
        console.print()
        console.print(shown)


_STYLES = {"better": COLORS["reward"], "worse": "#c93a2f"}


def headlines(record: Record) -> list[str]:
    """The models, and what the intervals are of."""
    names = [f"{label}: {visible(model['name'])}" for label, model in record["models"].items()]
    samples = record["samples"]
    return [
        *(names if len(names) > 1 else [name.partition(": ")[2] for name in names]),
        f"{record['tasks']:,} tasks, {samples} episode{'s' if samples > 1 else ''} each; "
        f"intervals of {100 * record['confidence']:g} % over tasks",
    ]


def tables(record: Record) -> list[TextTable]:
    """Success by condition, and all measures of the clean tasks."""
    return [_by_condition(record), _by_measure(record, CLEAN)]


def noisy_tables(record: Record) -> list[TextTable]:
    """All measures under each noise."""
    return [_by_measure(record, name) for name in record["models"]["A"]["conditions"] if name != CLEAN]


def _by_condition(record: Record) -> TextTable:
    """Success, clean and under each noise, and how often an injected instruction was obeyed."""
    models = record["models"]
    compared = "B" in models
    changes = record["differences"] if compared else models["A"]["changes"]
    rows = []
    for name in ("success", "obeyed"):
        for condition, measures in models["A"]["conditions"].items():
            if name not in measures:
                continue
            title = visible(condition) if name == "success" else f"{visible(condition)}, obeyed"
            found = [_estimate(model["conditions"][condition].get(name), True) for model in models.values()]
            change = _difference(changes.get(condition, {}).get(name), True, _goodness(name))
            rows.append([Cell(title), *map(Cell, found), change])
    columns = ["", "A", "B", "A − B"] if compared else ["", "success", "against clean"]
    return TextTable("Success by condition", columns, rows)


def _by_measure(record: Record, condition: str) -> TextTable:
    """Everything that was measured under a condition; what is rare only where it occurs.

    Of one model under noise also what the noise changes.
    """
    models = record["models"]
    measured = [model["conditions"][condition] for model in models.values()]
    has_tools = any(model.get("has_tools", True) for model in models.values())
    rare = _RARE if has_tools else (*_RARE, *OF_TOOLS)
    columns, changes = ["", ""], None
    if len(models) > 1:
        columns, changes = ["", "A", "B", "A − B"], record["differences"].get(condition, {})
    elif condition != CLEAN:
        columns, changes = ["", "", "against clean"], models["A"]["changes"].get(condition, {})
    rows = []
    for name in dict.fromkeys(name for measures in measured for name in measures):
        if name.startswith(rare) and not any(m[name]["value"] for m in measured if name in m):
            continue
        share = any(name in model["shares"] for model in models.values())
        row = [Cell(in_words(visible(name))), *(Cell(_estimate(m.get(name), share)) for m in measured)]
        if changes is not None:
            row.append(_difference(changes.get(name), share, _goodness(name)))
        rows.append(row)
    title = "On the clean tasks" if condition == CLEAN else f"Under {visible(condition)}"
    return TextTable(title, columns, rows)


def _goodness(name: str) -> int:
    """1 of a measure where more is better, −1 where less is, 0 where neither."""
    if name == "obeyed":
        return -1
    return int(name.startswith(_BETTER) or name.partition("/")[2].startswith(_BETTER))


# Numbers. In a file what isn't known is null, in memory it is NaN.

Found = Mapping[str, float | None]


def _estimate(found: Found | None, share: bool) -> str:
    if found is None or not _known(found["value"]):
        return "–"
    return _number(found["value"], share) + (" %" if share else "") + _bounds(found, share)


def _difference(found: Found | None, share: bool, good: int) -> Cell:
    """A signed number, toned where its interval leaves out 0. Good: 1 where more is better, −1 where less."""
    if found is None:
        return Cell("")
    if not _known(found["value"]):
        return Cell("–")
    low, high = found["low"], found["high"]
    side = (low > 0) - (high < 0) if _known(low) and _known(high) else 0
    text = _number(found["value"], share, signed=True) + _bounds(found, share, signed=True)
    return Cell(text, {1: "better", -1: "worse"}.get(side * good, ""))


def _bounds(found: Found, share: bool, signed: bool = False) -> str:
    low, high = found["low"], found["high"]
    if not (_known(low) and _known(high)):
        return ""
    return f"  [{_number(low, share, signed)}, {_number(high, share, signed)}]"


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and not math.isnan(value)


def _number(value: float, share: bool, signed: bool = False) -> str:
    text = f"{100 * value:.1f}" if share else number(value)
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")
