"""The README.md that goes with a trained model.

Says what the hub can read (front matter) and what a person wants to know: from which model, how, with which
settings and versions. No path of the machine that trained it gets in.

Not covered: uploading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PACKAGES = ("etude", "transformers", "torch", "datasets", "tokenizers", "peft")


def write_model_card(
    directory: str | PathLike[str],
    *,
    model_name: str,
    trainer: str,
    method: str,
    base_model: str | None = None,
    config_summary: Mapping[str, Any] | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    library_name: str = "transformers",
    pipeline_tag: str = "text-generation",
    made: str = "Trained",
) -> Path:
    """Write `directory`/README.md, over one that is there.

    Args:
        directory: where the model is saved.
        model_name: the card's title.
        trainer: name of what trained it.
        method: what it did, in one word; becomes a tag ("sft", "ppo").
        base_model: name or path of the model it started from; a path shows its last part only.
        config_summary: settings worth knowing, by name; the caller leaves paths out.
        datasets: ids of datasets on the hub.
        tags: more tags, beside "etude" and the method.
        license, language, library_name, pipeline_tag: for the front matter.
        made: what was done, where that isn't training.

    Returns:
        The file.
    """
    is_hub_id = base_model is not None and _HUB_ID.fullmatch(base_model) and not Path(base_model).exists()
    front_matter = {
        "base_model": base_model if is_hub_id else None,
        "datasets": list(datasets) or None,
        "language": language if language is None or isinstance(language, str) else list(language),
        "library_name": library_name,
        "license": license,
        "model_name": model_name,
        "pipeline_tag": pipeline_tag,
        "tags": list(dict.fromkeys(["etude", method, *tags])),
    }
    known = {key: value for key, value in front_matter.items() if value is not None}
    origin = ""
    if base_model:
        link = f"[{base_model}](https://huggingface.co/{base_model})"
        origin = f" from {link if is_hub_id else f'`{Path(base_model).name}`'}"
    sections = [
        f"---\n{yaml.safe_dump(known, allow_unicode=True)}---",
        f"# {model_name}",
        f"{made}{origin} with `{trainer}` of Étude.",
        "## Settings" if config_summary else "",
        _table(("setting", "value"), config_summary or {}),
        "## Versions",
        _table(("package", "version"), {package: version(package) for package in _PACKAGES}),
    ]
    path = Path(directory) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return path


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = [header, ("---", "---"), *((key, f"`{value}`") for key, value in rows.items())]
    return "\n".join(f"| {left} | {right.replace('|', chr(92) + '|')} |" for left, right in lines)
