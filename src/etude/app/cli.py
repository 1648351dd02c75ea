"""The command line: `etude sft …`, `etude ppo …`, `python -m etude …`, `accelerate launch -m etude …`.

    etude ppo --config run.yaml --learning_rate 1e-5

Arguments are checked, and help is given, before anything heavy is imported. A user's mistake is one line
and exit code 2; `--traceback` or ETUDE_TRACEBACK=1 shows where it came from. A warning is one line, too.
"""

from __future__ import annotations

import difflib
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

from etude import __version__
from etude.app.options import COMMANDS, Option, read_options
from etude.app.parsing import Values, parse_options
from etude.app.references import load_object
from etude.errors import ConfigError, EtudeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in arguments or os.environ.get("ETUDE_TRACEBACK", "") not in ("", "0")
    rest = [argument for argument in arguments if argument != "--traceback"]
    try:
        with nullcontext() if show_traceback else _warnings_in_a_line():
            _run(rest)
    except EtudeError as error:
        if show_traceback:
            raise
        print("etude: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("etude: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Without the place in the code that they came from."""

    def formatted(message: Warning | str, *_: Any, **__: Any) -> str:
        return f"etude: warning: {' '.join(str(message).split())}\n"

    with_place: Any = warnings.formatwarning
    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = with_place


def run_command(command: str, **options: object) -> None:
    """A command from a script, printed as one would type it; where it fails, the script ends with its code.

    Args:
        options: as `--name=value`, or of a list as `--name value value`.
    """
    words = [command]
    for name, value in options.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    print("\n$ etude", *words, flush=True)
    if code := main(words):
        sys.exit(code)


def _run(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(f"etude {__version__}")
    elif command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {command!r}; {hint}")
    elif "-h" in rest or "--help" in rest:
        print(_help(command))
    else:
        built = build_arguments(command, parse_options(read_options(command), rest))
        _hide_file_bars()
        import_module(f"etude.app.{COMMANDS[command].module}").run(*built)


def build_arguments(command: str, values: Values) -> list[Any]:
    """One instance of each of the command's dataclasses, from the values that were given.

    They are built in order, the cheap ones to import first, and check themselves.

    Raises:
        ConfigError: a value is out of range, or contradicts another.
    """
    options = read_options(command)
    built = []
    for title, reference in COMMANDS[command].classes.items():
        own = {name: value for name, value in values.items() if options[name].title == title}
        try:
            built.append(load_object(reference)(**own))
        except EtudeError:
            raise
        except (ValueError, ImportError) as error:  # what transformers' own settings raise
            raise ConfigError(str(error)) from error
    by_title = dict(zip(COMMANDS[command].classes, built, strict=True))
    if hasattr(by_title.get("Environment"), "check_beside"):
        by_title["Environment"].check_beside(by_title["Tasks"])
    return built


def _hide_file_bars() -> None:
    """Bars for reading and writing a few files would break into the display of the training itself."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


# ---- help ----


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: etude COMMAND [--config FILE.yaml] [--OPTION VALUE …]",
            "",
            *(f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()),
            "",
            "etude COMMAND --help lists the command's options; etude --version says which version this is.",
        ]
    )


def _help(command: str) -> str:
    options = read_options(command).values()
    lines = [
        f"usage: etude {command} [--config FILE.yaml] [--OPTION VALUE …]",
        "",
        COMMANDS[command].summary,
        "",
        *_wrapped(
            "Options can stand in the YAML file by the same names; the command line overrules it. A flag is "
            "set by --flag or --flag false, a list by --name a b, an item of a mapping by --name.key value.",
            indent="",
        ),
    ]
    for title in COMMANDS[command].classes:
        lines += ["", f"{title}:"]
        for option in options:
            if option.title == title:
                lines.append(f"  --{option.name} {_shown_type(option)}")
                lines += _wrapped(_described(option), indent=" " * 8)
    lines += ["", "Also: --traceback shows where an error came from."]
    return "\n".join(lines)


def _shown_type(option: Option) -> str:
    names = [part.partition("[")[0] for part in option.type.split(" | ") if part != "None"]
    return "|".join("choice" if name == "Literal" else name for name in names)


def _described(option: Option) -> str:
    notes = []
    if option.required:
        notes.append("required")
    if option.default not in (None, "", [], {}):
        shown = str(option.default).lower() if isinstance(option.default, bool) else option.default
        notes.append(f"default: {shown}")
    if option.choices:
        notes.append(f"one of {', '.join(option.choices)}")
    return f"{option.help} ({'; '.join(notes)})" if notes else option.help


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 110)
    return textwrap.wrap(text, max(width, 40), initial_indent=indent, subsequent_indent=indent)
