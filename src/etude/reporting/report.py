"""The run report: one HTML page with the curves, the configuration and the episodes of a run.

Self-contained (no request leaves the page, it opens from a file) and rewritten whole each time, so it can be
asked for while the run goes on. What models and tools wrote is hostile data: the template escapes
everything, the script sets text only, and the page's own policy forbids any other script.

Reads a run directory's plain files and `etude.types`. Not covered: writing them (`runtime.run`), and what
the curves look like (`curves`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from etude.errors import CheckpointError, ConfigError
from etude.reporting.curves import groups, in_words
from etude.reporting.episodes import rewards_within, token_texts, visible
from etude.reporting.evaluation import headlines, noisy_tables, tables
from etude.reporting.terminal import number
from etude.types import Episode, NamedReward, Segment

_FILES = ("run.yaml", "metrics.jsonl", "episodes.jsonl", "summary.json", "evaluation.json")
_SECRET = re.compile(r"(^|[._])(hub_token|api_token|access_token|auth_token|api_key|password|secret)$")
_SHARE = re.compile(r"(^|_)(success|accuracy|exact|rate|share|fraction|tool_use)($|_)")


def write_report(
    run_dir: str | os.PathLike[str], *, title: str | None = None, max_episodes: int = 200
) -> Path:
    """Write `report.html` into a run directory and return its path.

    Args:
        run_dir: the run's directory.
        title: of the page; the directory's name by default.
        max_episodes: at most this many are shown, shared out among the splits and spread over each.

    Raises:
        CheckpointError: this is not a run directory, or a file of it can't be read.
        ConfigError: `max_episodes` is negative.
    """
    run = Path(run_dir)
    if not any((run / name).exists() for name in _FILES):
        raise CheckpointError(
            f"{run} is not a run directory; expected one of {', '.join(_FILES)}. Check the path"
        )
    if max_episodes < 0:
        raise ConfigError(f"max_episodes is {max_episodes}; expected 0 or more")
    metrics = [row for _, row in _rows(run / "metrics.jsonl")]
    splits = [(row["split"], _environment(row)) for _, row in _rows(run / "episodes.jsonl")]
    picked = _pick(splits, max_episodes)
    rows = [row for place, row in _rows(run / "episodes.jsonl") if place in picked]
    summary = _read(run / "summary.json", json.loads)
    evaluation = _read(run / "evaluation.json", json.loads)
    curves = groups(metrics)
    episodes = _episodes(rows)
    page = _template().render(
        title=title or run.resolve().name,
        nonce=secrets.token_urlsafe(16),
        progress=_progress(summary),
        environments=_environments(summary),
        facts=_facts(summary, metrics, len(splits)),
        curves=curves,
        evaluation=[f(evaluation) for f in (headlines, tables, noisy_tables)] if evaluation else None,
        config=[(name, _text(value)) for name, value in _leaves(_read(run / "run.yaml", yaml.safe_load))],
        n_episodes=len(splits),
        data={"charts": [chart.data for group in curves for chart in group.charts], "episodes": episodes},
    )
    writing = run / ".writing-report.html"
    writing.write_text(page, encoding="utf-8")
    return writing.replace(run / "report.html")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: visible(value) if isinstance(value, str) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = files("etude.reporting").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


# Reading


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(place, row) of each finished line."""
    if not file.exists():
        return
    with file.open("rb") as lines:
        for place, line in enumerate(lines):
            if not line.endswith(b"\n"):
                return  # the run is writing it, or was killed while it did
            try:
                yield place, json.loads(line, parse_constant=lambda _: None)
            except ValueError as error:
                raise CheckpointError(
                    f"{file}, line {place + 1} is not JSON ({error}); restore the file or delete the line"
                ) from error


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return parse(file.read_text(encoding="utf-8")) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} can't be read ({error}); restore it or delete it") from error


def _environment(row: Mapping[str, Any]) -> str:
    return Episode(row["task"]).environment


def _pick(splits: Sequence[Hashable], limit: int) -> set[int]:
    """Places of at most `limit` episodes: an equal share for each split, and what it leaves for the next."""
    places: dict[Hashable, list[int]] = {}
    for place, split in enumerate(splits):
        places.setdefault(split, []).append(place)
    picked: set[int] = set()
    for done, members in enumerate(sorted(places.values(), key=len)):
        share = min(len(members), (limit - len(picked)) // (len(places) - done))
        picked.update(members[index * (len(members) - 1) // max(share - 1, 1)] for index in range(share))
    return picked


# Header and configuration


def _progress(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, before, after) of each number that has both; of a mixed run also the success in each part."""
    before, after = (
        value if isinstance(value, Mapping) else {"success": value}
        for value in (summary.get("before"), summary.get("after"))
    )
    parts = [(name, pair) for name, pairs in _environments(summary).items() for pair in pairs]
    return _pairs(before, after) + [
        (in_words(name), first, last) for name, (what, first, last) in parts if what == "Success"
    ]


def _environments(summary: Mapping[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    """The same by environment of a mixed run, every number."""
    known = summary.get("environments", {})
    return {name: _pairs(each.get("before", {}), each.get("after", {})) for name, each in known.items()}


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    shown = []
    for name, first in before.items():
        last = after.get(name)
        if isinstance(first, int | float) and isinstance(last, int | float):
            share = _SHARE.search(name) and min(first, last) >= 0 and max(first, last) <= 1
            texts = [f"{100 * value:.0f} %" if share else number(value) for value in (first, last)]
            shown.append((in_words(name), texts[0], texts[1]))
    return shown


def _facts(
    summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], n_episodes: int
) -> list[tuple[str, str]]:
    facts = []
    if metrics:
        facts.append(("Steps", f"{metrics[-1]['step']:,}"))
    if n_episodes:
        facts.append(("Episodes", f"{n_episodes:,}"))
    if isinstance(seconds := summary.get("seconds"), int | float):
        facts.append(("Time", _duration(seconds)))
    if metrics:
        started = datetime.fromtimestamp(metrics[0]["time"], UTC)
        facts.append(("Started", f"{started.day} {started:%B %Y, %H:%M} UTC"))
    shown = ("before", "after", "environments", "seconds")
    rest = {name: value for name, value in summary.items() if name not in shown}
    for name, value in _leaves(rest):
        facts.append((in_words(name), number(value) if isinstance(value, float) else _text(value)))
    return facts


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of what is not itself a mapping; secrets stay out: pages are passed around."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, "(hidden)" if value and _SECRET.search(name) else value


def _text(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    parts = ((hours, "h"), (minute, "min"), (second, "s"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or f"{seconds:.2g} s"


# Episodes


def _episodes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each as the page's script reads it, named by its prompt less the lines that all prompts open with."""
    prompts = ["".join(s["text"] for s in row["segments"] if s["source"] == "prompt") for row in rows]
    together: dict[str, list[str]] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        together.setdefault(_environment(row), []).append(prompt)
    openings = {environment: _shared_lines(alike) for environment, alike in together.items()}
    return [
        _episode(row, prompt[openings[_environment(row)] :])
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def _shared_lines(texts: Sequence[str]) -> int:
    """Length of the whole lines that different texts have in common at their start (few-shot examples)."""
    first, last = min(texts, default=""), max(texts, default="")  # what these two share, all share
    same = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)
    return first.rfind("\n", 0, same) + 1


def _episode(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    tokens = [segment.pop("tokens", None) or () for segment in row["segments"]]
    episode = Episode.from_json(row)
    segments = zip(episode.segments, tokens, rewards_within(episode), strict=True)
    return {
        "step": row["step"],
        "split": row["split"],
        "environment": visible(episode.environment),
        "name": _shortened(name) or "(empty prompt)",
        "stop": "unfinished" if episode.stop is None else episode.stop.replace("_", " "),
        "error": visible(episode.error or ""),
        "seed": str(episode.seed),  # JavaScript numbers hold 53 bits
        "seconds": episode.timings.get("total"),
        "task": [
            (visible(key), _shortened(_text(value)))
            for key, value in _leaves(episode.task)
            if key != "prompt"
        ],
        "reward": episode.reward,
        "rewards": [
            {"name": visible(total.name), "value": total.value, "weight": total.weight}
            for total in episode.reward_totals.values()
        ],
        "calls": [
            {**asdict(call), "name": visible(call.name or "(no name)"), "response": visible(call.response)}
            for call in episode.tool_calls
        ],
        "segments": [_segment(*parts) for parts in segments],
    }


def _segment(
    segment: Segment, tokens: Sequence[str | None], rewards: Mapping[int, Sequence[NamedReward]]
) -> dict[str, Any]:
    """With `tokens`, what each token reads as: cut from the text where they spell it, else as they are."""
    spelling = [
        f"<{id}>" if token is None else token for id, token in zip(segment.token_ids, tokens, strict=False)
    ]
    texts = token_texts(segment.text, spelling) if spelling else None
    return {
        "source": segment.source,
        "text": visible(segment.text),
        "ids": segment.token_ids,
        "tokens": [visible(token) for token in texts or spelling],
        "spelled": texts is not None,
        "logprobs": segment.logprobs and [p if p is None else round(p, 4) for p in segment.logprobs],
        "version": segment.policy_version,
        "rewards": [(place, visible(r.name), r.value) for place, here in rewards.items() for r in here],
    }


def _shortened(text: str, width: int = 160) -> str:
    words = visible(" ".join(text.split()))
    return words if len(words) <= width else f"{words[: width // 2]} … {words[-width // 2 :]}"
