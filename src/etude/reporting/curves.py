"""A run's metrics as small plots: which there are, how they scale, and their lines as SVG paths.

Every plot of a page has the same horizontal axis, so that one glance down a column compares one step.
Coordinates are percentages of the plot, from its upper left corner. Not covered: the page (`report`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etude.reporting.terminal import number

Point = tuple[int, float | None]  # step and value; None where the run computed NaN or infinity

# What a reader looks for first; other curves follow in the order in which the run wrote them.
_FIRST = (
    "reward", "success", "accuracy", "tool_use", "kl", "length", "loss", "entropy", "ratio",
    "tokens_per_second",
)  # fmt: skip
OF_TOOLS = ("tool_use", "tool_errors", "tool_calls")  # shown where there are tools, or calls all the same
_WORDS = {"kl": "KL", "lr": "learning rate", "grad": "gradient", "std": "std. dev.", "frac": "fraction"}
_WORDS |= {"ppo": "PPO", "chrf": "chrF", "bleu": "BLEU", "ter": "TER", "rouge": "ROUGE"}
_WORDS |= {f"rouge{kind}": f"ROUGE-{kind}" for kind in ("1", "2", "L")}
_OPEN = 12  # groups are open until this many curves are shown
_POINTS = 400  # per series; longer ones are averaged


@dataclass(frozen=True)
class Chart:
    """One plot: a metric and, where there is one, its validation twin.

    Attributes:
        name: the metric's.
        series: points by kind, "training" or "validation"; at least one value is finite.
        domain: first and last step of the page's plots.
    """

    name: str
    series: Mapping[str, Sequence[Point]]
    domain: tuple[int, int]

    @property
    def title(self) -> str:
        return in_words(self.name.partition("/")[2] or self.name)

    @property
    def latest(self) -> list[tuple[str, str]]:
        """(kind, last value) of each series."""
        return [
            (kind, number(next((value for _, value in reversed(points) if value is not None), math.nan)))
            for kind, points in self.series.items()
        ]

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Values at the plot's lower and upper edge."""
        values = [value for points in self.series.values() for _, value in points if value is not None]
        margin = 0.06 * (max(values) - min(values)) or 0.5 * abs(max(values)) or 1.0
        return min(values) - margin, max(values) + margin

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(y, label) of two or three round values within the range."""
        low, high = self.bounds
        power = 10.0 ** math.floor(math.log10(high - low))
        step = next(part * power for part in (0.5, 1, 2, 5) if (high - low) / (part * power) < 4)
        multiples = range(math.ceil(low / step), math.floor(high / step) + 1)
        # A tick on the very edge may come to lie beyond it by rounding.
        values = [multiple * step for multiple in multiples]
        return [(min(max(self._y(value), 0.0), 100.0), number(value)) for value in values]

    @property
    def lines(self) -> list[tuple[str, str]]:
        """(class, SVG path) of each line; a long series also gets its trend, for the eye to follow."""
        lines = []
        for kind, points in self.series.items():
            if len(points) < 24:
                lines.append((kind if len(points) > 1 else f"{kind} lone", self._path(points)))
            else:
                lines.append((f"{kind} raw", self._path(points)))
                lines.append((kind, self._path(_trend(points, len(points) // 8))))
        return lines

    @property
    def data(self) -> dict[str, Any]:
        """What the page needs to read a value off the plot."""
        return {"bounds": self.bounds, "domain": self.domain, "series": self.series}

    def _path(self, points: Sequence[Point]) -> str:
        """Broken where there is no value; a lone point is a line of no length, which round caps show."""
        parts, drawing = [], False
        for step, value in points:
            if value is not None:
                parts.append(f"{'L' if drawing else 'M'}{self._x(step):.2f} {self._y(value):.2f}")
                parts.append("" if drawing else "h0")
            drawing = value is not None
        return "".join(parts)

    def _x(self, step: int) -> float:
        first, last = self.domain
        return 100 * (step - first) / max(last - first, 1)

    def _y(self, value: float) -> float:
        low, high = self.bounds
        return 100 * (high - value) / (high - low)


@dataclass(frozen=True)
class Group:
    """Curves whose names share what stands before the slash: `name`."""

    name: str
    charts: list[Chart]
    open: bool

    @property
    def title(self) -> str:
        return in_words(self.name)


def groups(metrics: Sequence[Mapping[str, Any]]) -> list[Group]:
    """The plots of a run, from its rows of {"step", name: number, …}; what isn't a number is left out.

    The environments of a mixed run come after what is of the whole run, and are open.
    """
    members: dict[str, list[Chart]] = {"": []}
    for chart in _charts(metrics):
        prefix, slash, _ = chart.name.partition("/")
        members.setdefault(prefix if slash else "", []).append(chart)
    members[""] = [c for c in members[""] if c.name not in OF_TOOLS or _happens(c)]
    members[""].sort(key=lambda chart: _rank(chart.name))
    mixed = _environments([chart.name for charts in members.values() for chart in charts])
    environments = {name: _telling(members[name]) for name in mixed}
    found: list[Group] = []
    for name, charts in ({"": members[""]} | environments | members).items():
        charts = environments.get(name, charts)
        shown = sum(len(group.charts) for group in found if group.name not in environments)
        is_open = not found or name in environments or shown + len(charts) <= _OPEN
        if charts:
            found.append(Group(name, charts, is_open))
    return found


def _environments(names: Collection[str]) -> list[str]:
    """Those of a mixed run: each has a reward and a success."""
    prefixes = dict.fromkeys(name.partition("/")[0] for name in names)
    return [p for p in prefixes if p != "validation" and {f"{p}/reward", f"{p}/success"} <= set(names)]


def _telling(charts: Sequence[Chart]) -> list[Chart]:
    """An environment's curves, without those of what never happens in it, such as calls of tools.

    Nor is a single reward drawn twice, under its name and as the reward.
    """
    prefix = charts[0].name.partition("/")[0]
    rewards = next(chart.series for chart in charts if chart.name == f"{prefix}/reward")

    def rank(chart: Chart) -> int:
        name = chart.name.partition("/")[2]
        return _rank("reward" if name.startswith("rewards/") else name)

    def tells(chart: Chart) -> bool:
        if chart.name.startswith(f"{prefix}/rewards/"):
            return chart.series != rewards
        return _happens(chart) or rank(chart) <= _rank("success")

    return sorted(filter(tells, charts), key=rank)


def _happens(chart: Chart) -> bool:
    return any(value for points in chart.series.values() for _, value in points)


def in_words(name: str) -> str:
    """ "kl_mean" as a person writes it: "KL mean"."""
    words = " ".join(_WORDS.get(word, word) for word in re.split(r"[\s_/.]+", name) if word)
    return words[:1].upper() + words[1:]


def _rank(name: str) -> int:
    """Names that are in the list, then those with a word that is."""
    if name in _FIRST:
        return _FIRST.index(name)
    place = next((n for n, word in enumerate(_FIRST) if word in name.split("_")), len(_FIRST))
    return len(_FIRST) + place


def _charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    names = dict.fromkeys(name for row in metrics for name in row if name not in ("step", "time"))
    series = {name: _series(metrics, name) for name in names}
    drawn = {name: points for name, points in series.items() if any(value is not None for _, value in points)}
    if not drawn:
        return []
    domain = (metrics[0]["step"], metrics[-1]["step"])
    charts, environments = [], _environments(drawn)
    for name, points in drawn.items():
        twinned = name.removeprefix("validation/")
        if name != twinned and twinned in drawn:
            continue  # drawn with its twin
        if name != twinned and twinned.partition("/")[0] in environments:
            charts.append(Chart(twinned, {"validation": points}, domain))  # with its environment's others
            continue
        twin = drawn.get(f"validation/{name}")
        charts.append(Chart(name, {"training": points} | ({"validation": twin} if twin else {}), domain))
    return charts


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    points = [(row["step"], row[name] if _is_number(row[name]) else None) for row in metrics if name in row]
    size = -(-len(points) // _POINTS)
    if size <= 1:
        return points
    return [_average(points[start : start + size]) for start in range(0, len(points), size)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _average(points: Sequence[Point]) -> Point:
    """The mean of the values, at the last step."""
    values = [value for _, value in points if value is not None]
    return points[-1][0], math.fsum(values) / len(values) if values else None


def _trend(points: Sequence[Point], width: int) -> list[Point]:
    """Each value replaced by that of the line fitted to the `width` points around it.

    Within the series that is the running mean; at its ends, unlike a mean, it follows a slope.
    """
    smooth: list[Point] = []
    for place, (step, value) in enumerate(points):
        start = min(max(place - width // 2, 0), len(points) - width)
        near = [(at, nearby) for at, nearby in points[start : start + width] if nearby is not None]
        smooth.append((step, None if value is None else _on_fitted_line(near, step)))
    return smooth


def _on_fitted_line(points: Sequence[tuple[int, float]], step: int) -> float:
    """Least squares, kept within the points' own range."""
    values = [value for _, value in points]
    mean_step, mean = sum(at for at, _ in points) / len(points), sum(values) / len(points)
    spread = sum((at - mean_step) ** 2 for at, _ in points)
    slope = sum((at - mean_step) * (value - mean) for at, value in points) / spread if spread else 0.0
    return min(max(mean + slope * (step - mean_step), min(values)), max(values))
