"""How the scripts here write a peer's numbers down. Runs in the peer's environment, beside them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write(values: Callable[[str], dict[str, Any]]) -> None:
    """What `values` makes, given a folder for its own use, into the file that the command line names."""
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(_shortened(values(folder)))
    Path(sys.argv[1]).write_text(text.replace('], "', '],\n"').replace('}, "', '},\n"') + "\n")


def _shortened(value: Any) -> Any:
    """Nine digits of every number: as many as tell one float32 from the next."""
    if isinstance(value, dict):
        return {name: _shortened(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
