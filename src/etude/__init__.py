"""Étude trains language models by reinforcement learning, tools included.

Public names load when first used, so `import etude` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that defines it. tests/test_exports.py holds this table against the modules.
_EXPORTS = {
    "AutoModelForCausalLMWithValueHead": "etude.models.value_head",
    "create_reference_model": "etude.models.reference",
    "Episode": "etude.types",
    "EtudeError": "etude.errors",
    "SamplingParams": "etude.types",
    "Segment": "etude.types",
    "StopReason": "etude.types",
}

__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from etude.errors import EtudeError as EtudeError
    from etude.models.reference import create_reference_model as create_reference_model
    from etude.models.value_head import AutoModelForCausalLMWithValueHead as AutoModelForCausalLMWithValueHead
    from etude.types import Episode as Episode
    from etude.types import SamplingParams as SamplingParams
    from etude.types import Segment as Segment
    from etude.types import StopReason as StopReason


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'etude' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
