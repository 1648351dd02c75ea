"""Prompts from tasks: a template with fields, and the texts in a task's columns that fill them.

Not covered: conversations of several messages (`data.templates`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from etude.errors import ConfigError, DataError


@dataclass(frozen=True)
class PromptTemplate:
    """A text with fields such as {source}; a brace that is meant is doubled.

    Attributes:
        text: the template.
        fields: the names that may stand in it; the first one must.
        used: those that do.

    Raises:
        ConfigError: it has other fields, or lacks the first one.
    """

    text: str
    fields: tuple[str, ...]
    used: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigError(
                f"the template {self.text!r} can't be read ({error}); braces that are no field are doubled"
            ) from error
        found = [name for _, name, *_ in parts if name is not None]
        plain = all(not spec and not conversion for _, _, spec, conversion in parts)
        if not plain or set(found) - set(self.fields) or self.fields[0] not in found:
            known = ", ".join(f"{{{name}}}" for name in self.fields)
            raise ConfigError(
                f"the template {self.text!r} needs {{{self.fields[0]}}}, and may have {known}; braces that "
                "are no field are doubled"
            )
        object.__setattr__(self, "used", tuple(dict.fromkeys(found)))

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with its fields filled; what stands in a value is only text."""
        return self.text.format_map(values)


def text_of(task: Mapping[str, Any], columns: Sequence[str], inside: str | None = None) -> str:
    """The text in the first of the columns that a task has.

    Args:
        inside: a column that may hold a mapping with these columns, as `translation` of hub data sets.

    Raises:
        DataError: there is a text in none of them.
    """
    nested = task.get(inside) if inside is not None else None
    rows = [task, nested] if isinstance(nested, Mapping) else [task]
    for column in columns:
        for row in rows:
            if isinstance(row.get(column), str):
                return str(row[column])
    where = f", in the task or in its {inside!r}" if inside is not None else ""
    raise DataError(
        f"a task needs a text in its column {' or '.join(map(repr, columns))}{where}; this one has "
        f"{_found(task)}: name its column when making the environment"
    )


def reference_of(task: Mapping[str, Any], column: str, inside: str | None = None) -> str | list[str] | None:
    """What a column holds to compare an answer with: a text, several, or None where there is none."""
    nested = task.get(inside) if inside is not None else None
    found = task.get(column, nested.get(column) if isinstance(nested, Mapping) else None)
    return found if found else None


def _found(task: Mapping[str, Any]) -> str:
    return ", ".join(f"{name!r} ({type(value).__name__})" for name, value in task.items()) or "none"
