"""The learning comparison as a drawing: a panel per pair, reward over seconds, a line per side.

Thin lines are single seeds, thick ones their mean. One SVG file, readable on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean

from benchmarks.common import Json

WIDTH, HEIGHT, MARGIN = 300, 200, 46  # of a panel's plot, and the room around it
COLOURS = ("#2563eb", "#d97706")  # ours, the peer's
NAMES = {
    "etude": "Étude",
    "trl074": "TRL 0.7.4",
    "trl1": "TRL 1.16",
    "ppo": "SFT, then PPO",
    "sft": "SFT only",
}
GREY = "#7f7f7f"

Points = Sequence[tuple[float, float]]


def write_curves(path: Path, results: Mapping[str, Sequence[Json]]) -> None:
    """Draw each pair's results, one per seed: {side: {"marks": {seconds: {"reward": …}}}}."""
    step = WIDTH + 2 * MARGIN
    panels = [panel(name, seeds, number * step) for number, (name, seeds) in enumerate(results.items())]
    width, height = step * len(panels), HEIGHT + 2 * MARGIN + 14
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="{GREY}">\n'
        + "\n".join(panels)
        + "\n</svg>\n",
        encoding="utf-8",
    )


def panel(name: str, seeds: Sequence[Json], left: float) -> str:
    curves = {side: [points(result[side]) for result in seeds] for side in seeds[0]}
    every = [point for lines in curves.values() for line in lines for point in line]
    end = max(seconds for seconds, _ in every)
    low = 0.2 * int(5 * min(reward for _, reward in every))

    def place(point: tuple[float, float]) -> str:
        seconds, reward = point
        return f"{WIDTH * seconds / end:.1f},{HEIGHT * (1 - reward) / (1 - low):.1f}"

    parts = [f'<g transform="translate({left + MARGIN},{MARGIN})">']
    parts.append(f'<text y="-24" font-size="13" font-weight="600">{escape(name.replace("_", ", "))}</text>')
    for tick in range(round(10 * low), 11, 2):
        y = HEIGHT * (1 - tick / 10) / (1 - low)
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="{GREY}" stroke-opacity=".25"/>')
        parts.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{tick / 10:.1f}</text>')
    for share in (0, 0.5, 1):
        label = f"{share * end:g}" + (" s" if share == 1 else "")
        parts.append(f'<text x="{WIDTH * share}" y="{HEIGHT + 18}" text-anchor="middle">{label}</text>')
    x = 0  # of the next name
    for (side, lines), colour in zip(curves.items(), COLOURS, strict=True):
        for line in lines:
            parts.append(polyline(map(place, line), colour, "1", ".35"))
        parts.append(polyline(map(place, averaged(lines)), colour, "2.5", "1"))
        parts.append(f'<path d="M{x} -10h16" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(f'<text x="{x + 21}" y="-6">{NAMES[side]}</text>')
        x += max(90, 36 + 7 * len(NAMES[side]))
    return "\n".join([*parts, "</g>"])


def points(run: Json) -> list[tuple[float, float]]:
    return [(float(seconds), measured["reward"]) for seconds, measured in run["marks"].items()]


def averaged(lines: Sequence[Points]) -> list[tuple[float, float]]:
    return [(at[0][0], mean(reward for _, reward in at)) for at in zip(*lines, strict=True)]


def polyline(places: Iterable[str], colour: str, width: str, opacity: str) -> str:
    return (
        f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}" stroke-linejoin="round"/>'
    )
