"""`import etude`: public names resolve, are the documented ones, and cost nothing until used."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import etude

SOURCE = Path(etude.__file__)

# The names that people know, from the design's public face; each is public once it is written.
DOCUMENTED = {
    *("SFTTrainer", "RewardTrainer", "PPOTrainer", "GRPOTrainer", "RLOOTrainer", "DPOTrainer", "DDPOTrainer"),
    *("SFTConfig", "RewardConfig", "PPOConfig", "GRPOConfig", "RLOOConfig", "DPOConfig", "DDPOConfig"),
    *("AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead", "create_reference_model"),
    *("TextEnvironment", "TextHistory", "BestOfNSampler", "LengthSampler", "set_seed"),
}


@pytest.mark.parametrize("name", sorted(etude._EXPORTS))
def test_a_public_name_resolves_to_what_its_module_defines(name: str) -> None:
    module = etude._EXPORTS[name]
    assert getattr(etude, name) is getattr(import_module(module), name)
    assert getattr(getattr(etude, name), "__module__", module) == module


def test_all_is_the_table() -> None:
    assert etude.__all__ == ["__version__", *sorted(etude._EXPORTS)]
    assert dir(etude) == sorted(etude.__all__)  # dir() sorts


def test_type_checkers_see_the_same_table() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen: dict[str, str | None] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # re-exported, as type checkers understand it
            seen[alias.name] = node.module
    assert seen == etude._EXPORTS


def test_documented_names_are_public_once_they_exist() -> None:
    exported = set(etude._EXPORTS.items())
    found = {
        (node.name, ".".join(["etude", *file.relative_to(SOURCE.parent).with_suffix("").parts]))
        for file in SOURCE.parent.rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in DOCUMENTED
    }
    assert len(found) >= 2  # the search finds what is there
    assert found - exported == set()


def test_importing_etude_loads_nothing_slow() -> None:
    code = "import sys, etude; print({'torch', 'transformers', 'numpy'} & set(sys.modules) or 'nothing')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "nothing\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'PPPTrainer'"):
        etude.PPPTrainer  # noqa: B018
