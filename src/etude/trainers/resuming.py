"""Which checkpoint training goes on from, and whether it can.

transformers writes a checkpoint's `trainer_state.json` last: what was killed on the way has none.

Not covered: weights and optimizers in files of FSDP's and DeepSpeed's own.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open

from etude.errors import CheckpointError

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_EARLIER = "name an earlier checkpoint of the run, by its path"


def checkpoint_to_resume(resume: bool | str | None, output_dir: str) -> str | None:
    """The directory to go on from: the newest of the run (True), or the one that is named; None for neither.

    Raises:
        CheckpointError: there is none.
    """
    if not resume:
        return None
    if isinstance(resume, str):
        check_state(resume)
        return resume
    newest = newest_checkpoint(output_dir)
    if newest is None:
        raise CheckpointError(f"{output_dir} holds no checkpoint; leave resume_from_checkpoint out")
    return newest


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that was written to its end; None if it has none."""
    folder = Path(output_dir)
    found = {
        int(match[1]): place
        for place in (folder.iterdir() if folder.is_dir() else ())
        if place.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", place.name))
    }
    for _, place in sorted(found.items(), reverse=True):
        if _has_state(place):
            return str(place)
        logger.warning("%s was not written to its end and is passed over", place)
    return None


def check_state(directory: str) -> None:
    if not _has_state(Path(directory)):
        raise CheckpointError(
            f"{directory} is no checkpoint, or not a whole one (its {_STATE} is missing or broken); expected "
            "a checkpoint-<step> directory of a run"
        )


def check_weights(directory: str, model: Any) -> None:
    """Whether this model can go on from a checkpoint.

    Raises:
        CheckpointError: it holds no weights, can't be read, or is another model's.
    """
    place = Path(directory)
    if any(place.glob("pytorch_model*")) or any(place.glob("global_step*")):
        return  # FSDP's, DeepSpeed's
    adapter, whole = (sorted(place.glob(f"{kind}*.safetensors")) for kind in ("adapter_model", "model"))
    if not adapter and not whole:
        raise CheckpointError(f"{place} holds no weights; {_EARLIER}")
    trains_adapter = isinstance(model, PeftModel)
    if trains_adapter != bool(adapter):
        kinds = ("an adapter", "a whole model") if adapter else ("a whole model", "an adapter")
        raise CheckpointError(
            f"{place} is of a run that trained {kinds[0]}, and this one trains {kinds[1]}; set the options "
            "of the model as they were (use_peft)"
        )
    names = {name for file in adapter or whole for name in _names(file)}
    known = set(model.state_dict())
    if not trains_adapter and 2 * len(names & known) < len(names):
        raise CheckpointError(
            f"{place} holds another model's weights, such as {min(names - known)!r}; name the model that the "
            "run was started from"
        )
    if not any(place.glob("optimizer*")):
        logger.warning(
            "%s has no state of the optimizer, which starts anew: the curve won't be the uninterrupted run's",
            place,
        )


def _has_state(place: Path) -> bool:
    try:
        return isinstance(json.loads((place / _STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as weights:
            return list(weights.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} can't be read ({error}); {_EARLIER}") from error
