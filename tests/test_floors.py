"""The floors hold: imports point down only, and two folders of one floor don't import each other.

Every import counts: inside functions, under TYPE_CHECKING, relative, and `import_module("etude.…")`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import etude

ROOT = Path(etude.__file__).parent

FLOORS = {
    "types": 0,
    "protocols": 0,
    "errors": 0,
    "math": 1,
    "data": 2,
    "models": 2,
    "runtime": 2,
    "reporting": 2,
    "sampling": 3,
    "tools": 3,
    "rewards": 3,
    "environments": 4,
    "evaluation": 5,
    "trainers": 5,
    "app": 6,
}


def unit_of(module: str) -> str:
    """The folder or file of the table that a module belongs to. The package's own face is part of `app`."""
    parts = module.split(".")
    return "app" if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def imported_modules(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Modules of the library that a module's source imports, wherever in it."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from etude import models` names a folder, `from etude import __version__` doesn't.
            names = [
                f"{start}.{alias.name}" if start == "etude" and alias.name in FLOORS else start
                for alias in node.names
            ]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        yield from (name for name in names if name.split(".")[0] == "etude")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    found = []
    own = unit_of(module)
    for imported in imported_modules(source, module, is_package):
        other = unit_of(imported)
        below = FLOORS[other] < FLOORS[own]
        words = FLOORS[other] == FLOORS[own] == 0  # floor 0 is files, not folders: the vocabulary of all
        if other != own and not below and not words:
            found.append(f"{module} (floor {FLOORS[own]}) imports {imported} (floor {FLOORS[other]})")
    return found


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_point_down() -> None:
    found: list[str] = []
    for file in modules():
        found += violations(file.read_text(encoding="utf-8"), name_of(file), file.name == "__init__.py")
    assert found == []


def test_every_module_has_a_floor_and_every_floor_a_module() -> None:
    assert {unit_of(name_of(file)) for file in modules()} == set(FLOORS)


def test_the_walk_sees_the_imports_there_are() -> None:
    """Else the first test could pass by seeing nothing."""
    protocols = (ROOT / "protocols.py").read_text(encoding="utf-8")
    assert set(imported_modules(protocols, "etude.protocols")) == {"etude.types"}
    seen = [name for file in modules() for name in imported_modules(file.read_text("utf-8"), name_of(file))]
    assert len(seen) > 100
    assert {unit_of(name) for name in seen} >= set(FLOORS) - {"app"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("etude.data.rows", "import etude.sampling.local"),
        ("etude.data.rows", "from etude.models.loading import trunk_of"),  # a folder of the same floor
        ("etude.data.rows", "from etude import models"),
        ("etude.data.rows", "from etude import PPOTrainer"),  # through the package's face
        ("etude.data.rows", "def f():\n    from etude.trainers.ppo import PPOTrainer"),
        ("etude.data.rows", "if TYPE_CHECKING:\n    from etude.app.cli import main"),
        ("etude.data.rows", "from ..models import loading"),
        ("etude.data.rows", "from .. import models"),
        ("etude.data.rows", "import importlib\nimportlib.import_module('etude.rewards.function')"),
        ("etude.tools.function", "from etude.rewards import function"),
        ("etude.math.kl", "import os, etude.data.encoding as encoding"),
        ("etude.types", "from etude.math.kl import k1"),
        ("etude.trainers.ppo", "from etude import __version__"),
    ],
)
def test_what_points_up_or_sideways_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("etude.sampling.local", "from etude.models.loading import trunk_of\nfrom etude.runtime import loop"),
        ("etude.sampling.local", "from .draw import mix\nfrom etude.sampling import stop"),
        ("etude.app.cli", "from etude import __version__"),
        ("etude.protocols", "from etude.types import Episode"),
        ("etude.data.rows", "import torch\nfrom datasets import Dataset\nimport etudes"),
    ],
)
def test_what_points_down_or_stays_is_not(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_a_package_resolves_its_own_relative_imports() -> None:
    assert violations("from .loading import trunk_of", "etude.models", is_package=True) == []
    assert len(violations("from ..data import rows", "etude.models", is_package=True)) == 1
