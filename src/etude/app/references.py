"""Code by name: `path/file.py:name`, `package.module:name`, or a short name of what ships with the library.

With arguments, `etude:OverlongPenalty(max_length=512, cache_length=128)`, it is what the call gives. Paths
and packages start at the current directory. A short name follows a convention instead of a list:
`calculator` is the object of that name in the module of that name, `etude.tools.calculator:calculator`.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from etude.errors import ConfigError


def load_object(reference: str, home: str | None = None) -> Any:
    """The object that a reference names, or what calling it gives.

    Args:
        reference: `file.py:name`, `package.module:name` or a short name; the name may be dotted. It is called
            if arguments follow in parentheses, which are Python literals.
        home: the package that short names are looked up in, such as `etude.tools`.

    Raises:
        ConfigError: there is no such file, module or name, importing it failed, or it doesn't take the
            arguments.
    """
    if call := _CALL.fullmatch(reference):
        return _called(load_object(call["name"], home), **call.groupdict())
    place, colon, name = reference.rpartition(":")
    if not colon:
        return _shipped(reference, home)
    if not place or not name:
        raise ConfigError(f"{reference!r} is no code reference; {_EXPECTED}")
    found: Any = _module_of_file(place) if place.endswith(".py") or os.sep in place else _module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"there is no {part!r} in {place}{_near(part, _public(found))}")
        found = getattr(found, part)
    return found


_EXPECTED = "expected file.py:name or package.module:name"
_CALL = re.compile(r"(?P<name>.*?:[\w.]+|\w+)\((?P<arguments>.*)\)", re.DOTALL)


def _called(found: Any, name: str, arguments: str) -> Any:
    try:
        given, named = _literals(arguments)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"the arguments of {name}({arguments}) can't be read; expected numbers, quoted texts, lists "
            "and the like, such as (512, key='text')"
        ) from error
    if not callable(found):
        raise ConfigError(f"{name} is {found!r}, which takes no arguments; leave out ({arguments})")
    try:
        inspect.signature(found).bind(*given, **named)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} can't be called with ({arguments}): {error}") from error
    return found(*given, **named)


def _literals(arguments: str) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by position and by name; ValueError or SyntaxError for what is no literal."""
    call = ast.parse(f"_({arguments})", mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("more than one call")
    given = [ast.literal_eval(argument) for argument in call.args]
    named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    if "None" in named:
        raise ValueError("a mapping in place of arguments")
    return given, named


def _shipped(name: str, home: str | None) -> Any:
    if home is None:
        raise ConfigError(f"{name!r} is no code reference; {_EXPECTED}")
    package = import_module(home)
    own = list(getattr(package, "__all__", ()))  # what the package itself names
    if name in own:
        return getattr(package, name)
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    if name in modules and hasattr(module := import_module(f"{home}.{name}"), name):
        return getattr(module, name)
    near = difflib.get_close_matches(name, modules, n=3)
    shipped = [other for other in near if hasattr(import_module(f"{home}.{other}"), other)]
    hint = _near(name, [*shipped, *own]) or f"; for your own code {_EXPECTED}"
    raise ConfigError(f"{home} ships nothing named {name!r}{hint}")


def _module_of_file(place: str) -> ModuleType:
    file = Path(place).expanduser().resolve()
    if not file.is_file():
        folder = file.parent
        others = [path.name for path in folder.glob("*.py")] if folder.is_dir() else []
        raise ConfigError(f"there is no file {place} (in {os.getcwd()}){_near(file.name, others)}")
    # Under its whole path: two files of one name are two modules, and two references to one file are one.
    name = f"etude_reference{file.with_suffix('').as_posix().replace('/', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{place} is not a Python file; {_EXPECTED}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the boundary: the file is the user's, and anything can go wrong in it
        del sys.modules[name]
        raise _import_failed(place, error) from error
    return module


def _module(place: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does; the `etude` script is started without it
    try:
        return import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise _import_failed(place, error) from error  # the module is there; what it imports is not
        raise ConfigError(
            f"there is no module {error.name!r} for {place!r}; a path to a file ends in .py, "
            "and packages start at the current directory"
        ) from error
    except Exception as error:  # the boundary: see above
        raise _import_failed(place, error) from error


def _import_failed(place: str, error: Exception) -> ConfigError:
    return ConfigError(f"importing {place} failed: {type(error).__name__}: {error}")


def _public(found: Any) -> list[str]:
    return [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
