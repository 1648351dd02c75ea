"""From a command line and its YAML file to checked values, by option name.

jsonargparse turns text and YAML values into what an option's type says. The rest is done here: it would
refuse bare boolean flags, let `--config` overrule what stands before it, and report a wrong value or a
misspelt name over several lines.
"""

from __future__ import annotations

import difflib
import os
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from etude.app.options import Option
from etude.errors import ConfigError

Values = dict[str, Any]


def parse_options(options: Mapping[str, Option], arguments: Sequence[str]) -> Values:
    """Values of the options that are given; the command line overrules the file that `--config` names.

    Args:
        options: by name.
        arguments: `--name value`, `--name=value`, `--name` (true), `--name a b` (a list) and
            `--name.key value` (an item of a mapping), in any order; the last of a name counts.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type, or the file can't be read.
    """
    given = _read_command_line(arguments)
    values: Values = {}
    for name, texts in given:
        if name == "config":
            file = _one(name, texts)
            for key, value in _read_yaml(file).items():
                _assign(values, options, str(key), value, file)
    for name, texts in given:
        if name != "config":
            _assign(values, options, name, _text_value(_find(options, name), name, texts))
    missing = [option for option in options.values() if option.required and option.name not in values]
    if missing:
        named = " and ".join(f"--{option.name} ({option.help})" for option in missing)
        raise ConfigError(f"{named} must be given")
    return values


def parse_mapping(options: Mapping[str, Option], given: Mapping[Any, Any], where: str) -> Values:
    """Values of a mapping from names of options, such as a part of a configuration.

    Args:
        where: what it is called in errors.

    Raises:
        ConfigError: an option is unknown or of the wrong type.
    """
    values: Values = {}
    for key, value in given.items():
        _assign(values, options, str(key), value, where)
    return values


def _read_command_line(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(name, texts that follow it) of each option. Only `--` begins an option: `-1` is a number."""
    given: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            given.append((name, [text] if equals else []))
        elif given:
            given[-1][1].append(argument)
        else:
            raise ConfigError(f"unexpected {argument!r}; options start with --")
    return given


def _text_value(option: Option, name: str, texts: list[str]) -> Any:
    """What follows an option: nothing is true for a flag, several texts are a list where one is expected."""
    if "." in name:
        return _load_yaml(_one(name, texts), f"--{name}")
    if not texts and option.takes("bool"):
        return True
    if len(texts) > 1 and option.takes("list"):
        return texts
    return _one(name, texts)


def _one(name: str, texts: list[str]) -> str:
    if not texts:
        raise ConfigError(f"--{name} needs a value")
    if len(texts) > 1:
        raise ConfigError(f"--{name} takes one value; it is followed by {' '.join(texts)}")
    return texts[0]


def _assign(
    values: Values, options: Mapping[str, Option], name: str, value: Any, file: str | None = None
) -> None:
    """Set an option, or an item of one that is a mapping, as a file or the command line says."""
    option = _find(options, name, file)
    shown = f"{file}: {name}" if file else f"--{name}"
    keys = name.split(".")[1:]
    if keys and not option.takes("dict"):
        raise ConfigError(f"{shown} is an item of a mapping, but {option.name} is {_expected(option)}")
    values[option.name] = _convert(option, _with_item(values.get(option.name), keys, value), shown)


def _with_item(before: Any, keys: list[str], value: Any) -> Any:
    """A copy of a mapping with an item set, however deep; no keys replace it whole."""
    if not keys:
        return value
    mapping = dict(before) if isinstance(before, dict) else {}
    return {**mapping, keys[0]: _with_item(mapping.get(keys[0]), keys[1:], value)}


def _find(options: Mapping[str, Option], name: str, file: str | None = None) -> Option:
    head = name.partition(".")[0].replace("-", "_")
    if head in options:
        return options[head]
    where, dashes = (f"{file}: ", "") if file else ("", "--")
    near = difflib.get_close_matches(head, options, n=1)
    hint = f"did you mean {dashes}{near[0]}?" if near else "--help lists them all"
    raise ConfigError(f"{where}unknown option {dashes}{name}; {hint}")


# ---- types ----


def _convert(option: Option, value: Any, shown: str) -> Any:
    """The value as the option's type has it, or an error that names key, value and type."""
    from jsonargparse import ArgumentParser  # here, so that help and misspelt names answer at once

    nothing = ("null",) if option.takes("str") else ("null", "none")
    if option.takes("None") and (value is None or str(value).lower() in nothing):
        return None
    # None is left out of the type: a text that YAML reads as nothing ("# Question") is text all the same.
    kinds = [kind for kind in option.kinds if kind != "None"]
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument(f"--{option.name}", type=eval(" | ".join(kinds), {"Any": Any, "Literal": Literal}))
    # jsonargparse would take a None for any type.
    candidates: list[Any] = [] if value is None else [value]
    if isinstance(value, str) and option.takes("list"):
        candidates.append([value])  # one text stands for a list of one
    for candidate in candidates:
        try:
            return parser.parse_object({option.name: candidate})[option.name]
        except ArgumentError:
            continue
    raise ConfigError(f"{shown} is {value!r}; expected {_expected(option)}")


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "None": "none",
    "list": "a list of texts",
    "dict": "a mapping",
}


def _expected(option: Option) -> str:
    words = [_WORDS[kind] for kind in _WORDS if option.takes(kind)]
    if option.choices:
        words.insert(0, f"one of {', '.join(option.choices)}")
    return " or ".join(words)


# ---- YAML ----


def _read_yaml(file: str) -> Mapping[Any, Any]:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(Path(file).name, _listing(Path(file).parent), n=1)
        hint = f"did you mean {Path(file).with_name(near[0])}?" if near else f"paths start at {os.getcwd()}"
        raise ConfigError(f"--config {file} can't be read ({error}); {hint}") from error
    loaded = _load_yaml(text, file)
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{file} holds a {type(loaded).__name__}; expected a mapping of option to value")
    return loaded


def _listing(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _load_yaml(text: str, source: str) -> Any:
    """YAML as jsonargparse reads it: 1e-5 is a number."""
    import yaml
    from jsonargparse import get_loader

    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
