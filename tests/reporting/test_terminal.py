"""The terminal display: redrawn in place on a terminal, plain lines elsewhere, nothing in other processes."""

from __future__ import annotations

import io
import math
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from etude.reporting.terminal import TrainingDisplay, number, sparkline


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console_of(terminal: bool, clock: Clock) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=120,
        get_time=clock,
        color_system=None,
        force_interactive=terminal,
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def play(console: Console, clock: Clock, total: int = 60, until: int = 60, **options: bool) -> None:
    with TrainingDisplay(total, "calculator", console=console, **options) as display:
        for step in range(1, until + 1):
            clock.now += 2.0
            metrics = {"reward": step / total, "kl": 0.001, "unknown": 5.0, "tokens_per_second": 14233.4}
            display.update(step, metrics)


def test_a_pipe_gets_plain_lines_now_and_then() -> None:
    clock = Clock()
    console = console_of(False, clock)
    play(console, clock)
    lines = written(console).splitlines()
    assert len(lines) == 20
    assert lines[0] == "calculator  3/60  1:54 left  reward 0.05 ▁▄█  KL 0.001  tokens/s 14,233"
    assert lines[-1] == "calculator  60/60  2:00  reward 1 ▁▁▂▂▃▃▄▄▅▅▆▆▇▇██  KL 0.001  tokens/s 14,233"
    assert "\x1b" not in written(console)
    assert "unknown" not in written(console)


def test_an_early_end_still_gets_a_final_line() -> None:
    clock = Clock()
    console = console_of(False, clock)
    play(console, clock, until=4)
    assert [line.split("  ")[1] for line in written(console).splitlines()] == ["3/60", "4/60"]


def test_no_line_is_printed_twice() -> None:
    clock = Clock()
    console = console_of(False, clock)
    play(console, clock, until=6)
    assert [line.split("  ")[1] for line in written(console).splitlines()] == ["3/60", "6/60"]


def test_other_processes_write_nothing() -> None:
    for terminal in (False, True):
        clock = Clock()
        console = console_of(terminal, clock)
        play(console, clock, enabled=False)
        with TrainingDisplay(1, "t", console=console, enabled=False) as display:
            display.message("hello")
        assert written(console) == ""


def test_a_terminal_is_redrawn_and_its_cursor_comes_back() -> None:
    clock = Clock()
    console = console_of(True, clock)
    play(console, clock)
    output = written(console)
    assert output.index("\x1b[?25l") < output.rindex("\x1b[?25h")
    last = output.split("\x1b[2K")[-1].replace("\N{NO-BREAK SPACE}", " ")
    assert "60/60  2:00" in last
    assert "KL 0.001  tokens/s 14,233" in last


def test_time_left_follows_the_recent_pace() -> None:
    clock = Clock()
    console = console_of(False, clock)
    with TrainingDisplay(100, "resumed", console=console) as display:
        display.update(40, {})  # a resumed run starts in the middle
        for step in range(41, 61):
            clock.now += 3.0
            display.update(step, {})
    assert "60/100  2:00 left" in written(console)
    clock.now += 4000.0
    assert display._seconds_left() == 0


def test_messages_stay_and_cannot_move_the_cursor() -> None:
    for terminal in (False, True):
        console = console_of(terminal, Clock())
        with TrainingDisplay(1, "t", console=console) as display:
            display.message("saved [bold]checkpoint-1[/bold] \x1b[2Jé")
        assert "saved [bold]checkpoint-1[/bold] \\x1b[2Jé\n" in written(console)


def test_an_output_that_only_knows_ascii() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), width=120)
    with TrainingDisplay(4, "étude", console=console) as display:
        display.update(1, {"reward": 0.0})
        display.update(2, {"reward": 1.0})
        display.message("→ best")
    assert b"\\xe9tude  2/4" in raw.getvalue()
    assert b"\\u2192 best" in raw.getvalue()


def test_missing_fields_keep_their_last_value_and_nan_is_shown() -> None:
    console = console_of(False, Clock())
    with TrainingDisplay(3, "t", console=console, fields={"score": "score", "kl": "KL"}) as display:
        display.update(1, {"score": 0.5, "kl": 0.25})
        display.update(2, {"kl": math.nan})
        display.update(3, {"score": math.nan})
    assert written(console).splitlines()[1:] == [
        "t  2/3  0:00 left  score 0.5  KL nan",
        "t  3/3  0:00  score nan ▁·  KL nan",
    ]


PROGRAM = """
import time
from etude.reporting.terminal import TrainingDisplay
with TrainingDisplay(10, "t") as display:
    display.update(1, {"reward": 0.5})
    display.message("ready")
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_ctrl_c_ends_the_loop_and_gives_the_cursor_back() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=theirs, stderr=subprocess.PIPE, env=environment
    )
    os.close(theirs)
    output = b""
    while b"ready" not in output:
        output += os.read(ours, 4096)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    output += os.read(ours, 65536)
    os.close(ours)
    assert b"KeyboardInterrupt" in errors
    assert process.returncode == -signal.SIGINT
    assert output.count(b"\x1b[?25h") == 1


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.floats(-1, 1)), st.integers(1, 40))
def test_a_sparkline_is_never_wider_than_asked(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= set("▁▂▃▄▅▆▇█·")


def test_sparkline_shows_means_of_equal_shares() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7, 0, 0, 7, math.nan], 4) == "▁█▁█"
    assert sparkline([math.nan, 1.0]) == "·▁"
    assert sparkline([2, 2, 2]) == "▁▁▁"
    assert sparkline([]) == ""
    assert sparkline([-1.7e308, 1.7e308, 1.7e308, 1.7e308], 2) == "▁█"
    assert sparkline([0, 5e-324]) == "▁▁"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-1234.5, "-1,234"),
        (1e9, "1e9"),
        (2.5e-6, "2.5e-6"),
        (1e-12, "1e-12"),
        (0.0, "0"),
        (999.6, "1,000"),
        (math.inf, "inf"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text
