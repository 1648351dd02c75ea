"""What tests of a peer's numbers share: having it make them again, and comparing."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers import install


def made_again(script: Path, directory: Path) -> Any:
    """The numbers that TRL 1.16 makes now, by a script that writes them to the file it is told."""
    assert install.is_installed("trl1"), "make test-peers installs TRL 1.16, which makes these numbers"
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}
    place = directory / "values.json"
    subprocess.run([install.python("trl1"), script, place], check=True, env=environment, timeout=240)
    return json.loads(place.read_text())


def require_same(made: Any, committed: Any, place: str) -> None:
    if isinstance(committed, dict):
        assert made.keys() == committed.keys(), place
        for name, value in committed.items():
            require_same(made[name], value, f"{place}.{name}")
    elif isinstance(committed, list):
        assert len(made) == len(committed), place
        for i, value in enumerate(committed):
            require_same(made[i], value, f"{place}[{i}]")
    elif isinstance(committed, float):
        assert math.isclose(made, committed, rel_tol=1e-6, abs_tol=1e-6), f"{place}: {made}, was {committed}"
    else:
        assert made == committed, place
