"""A training run in the terminal: how far, how long, and how well.

On a terminal a bar and two lines that are redrawn in place; elsewhere (CI, pipes, notebooks) a plain line
now and then. Shows what it is given; not covered: where metrics come from and where they are kept.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from etude.reporting.episodes import COLORS, visible

# Metric -> its name on screen. The first one also gets the sparkline.
FIELDS = {
    "reward": "reward",
    "success": "success",
    "kl": "KL",
    "tool_use": "tool use",
    "tokens_per_second": "tokens/s",
    "loss": "loss",
}


def fields_with(more: Mapping[str, str], has_tools: bool = True) -> dict[str, str]:
    """`FIELDS` with others after the first; without tools, none about them."""
    first, *rest = FIELDS.items()
    return dict([first, *more.items(), *(each for each in rest if has_tools or each[0] != "tool_use")])


_PLAIN_LINES = 20  # in a whole run, where nothing can be redrawn
_RECENT = 20  # updates from which the time left is estimated


class TrainingDisplay:
    """Live progress of a training loop.

        with TrainingDisplay(60, "calculator") as display:
            for step in range(1, 61):
                display.update(step, {"reward": 0.4, "kl": 0.01})

    Args:
        total_steps: the step at which the bar is full.
        title: what is being trained.
        console: where to draw; standard output by default.
        fields: metrics to show, as metric -> name on screen; those that never come are left out.
        enabled: False on all processes but the main one: then nothing is written.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        console: Console | None = None,
        fields: Mapping[str, str] = FIELDS,
        enabled: bool = True,
    ) -> None:
        self.total_steps = total_steps
        self._console = console or Console()
        self.title = self._writable(title)
        self.fields = fields
        self.enabled = enabled
        self._started = self._console.get_time()
        self._latest: dict[str, float] = {}
        self._headline = next(iter(fields), "")
        self._history: list[float] = []
        self._step = 0
        self._printed_step = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        redraws = enabled and self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, get_renderable=self._frame) if redraws else None

    def __enter__(self) -> TrainingDisplay:
        self._started = self._console.get_time()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()  # leaves the last frame, and the cursor as it was
        elif self._step > self._printed_step:
            self._print(self._line())

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` is done. Fields that `metrics` leaves out keep their last value."""
        self._step = step
        self._recent.append((self._console.get_time(), step))
        self._latest.update({name: float(metrics[name]) for name in self.fields if name in metrics})
        if self._headline in metrics:
            self._history.append(float(metrics[self._headline]))
        every = max(1, self.total_steps // _PLAIN_LINES)
        if self._live is None and (step >= self._printed_step + every or step == self.total_steps):
            self._print(self._line())
            self._printed_step = step

    def message(self, text: str) -> None:
        """A line that stays, above the progress."""
        self._print(Text(self._writable(text)))

    def _print(self, text: Text) -> None:
        if self.enabled:
            self._console.print(text, soft_wrap=True)

    def _writable(self, text: str) -> str:
        """Without what could move the cursor, and without what the output's encoding lacks."""
        return visible(text).encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)

    def _frame(self) -> RenderableType:
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(
            total=max(self.total_steps, 1),
            completed=self._step,
            style=COLORS["prompt"],
            complete_style=COLORS["model"],
            finished_style=COLORS["reward"],
        )
        top.add_row(Text(self.title, style="bold"), bar, self._position())
        return Group(top, self._metrics(glue="\N{NO-BREAK SPACE}"))

    def _line(self) -> Text:
        return Text("  ").join([Text(self.title), self._position(), self._metrics()])

    def _position(self) -> Text:
        text = Text(f"{self._step}/{self.total_steps}")
        if self._step >= self.total_steps:
            text.append(f"  {_duration(self._console.get_time() - self._started)}", COLORS["prompt"])
        elif (left := self._seconds_left()) is not None:
            text.append(f"  {_duration(left)} left", COLORS["prompt"])
        return text

    def _seconds_left(self) -> float | None:
        """From the pace of recent updates, less the time since the last one."""
        if len(self._recent) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        pace = (last_time - first_time) / max(last_step - first_step, 1)
        since = self._console.get_time() - last_time
        return max(pace * (self.total_steps - last_step) - since, 0.0)

    def _metrics(self, glue: str = " ") -> Text:
        shown = []
        for name, label in self.fields.items():
            if name in self._latest:
                text = Text.assemble((f"{label}{glue}", COLORS["prompt"]), number(self._latest[name]))
                drawable = not self._console.options.ascii_only
                if name == self._headline and len(self._history) > 1 and drawable:
                    text.append(f"{glue}{sparkline(self._history)}", COLORS["reward"])
                shown.append(text)
        return Text("  ").join(shown)


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """The whole series in at most `width` characters, each the mean of its share; "·" for no finite value."""
    width = min(width, len(values))
    means = []
    for cell in range(width):
        share = values[len(values) * cell // width : len(values) * (cell + 1) // width]
        finite = [value for value in share if math.isfinite(value)]
        means.append(sum(value / len(finite) for value in finite) if finite else math.nan)
    drawn = [mean / 2 for mean in means if math.isfinite(mean)]  # halves: a difference can't overflow
    low, span = (min(drawn), max(drawn) - min(drawn)) if drawn else (0.0, 0.0)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(
        bars[round(7 * ((mean / 2 - low) / (span or 1)))] if math.isfinite(mean) else "·" for mean in means
    )


def number(value: float) -> str:
    """Three digits, and as many more as an integer part has: 0.123, 14,233, 2.5e-6."""
    if 999.5 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0?", lambda exponent: "e" + exponent[1].strip("+"), f"{value:.3g}")


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
