"""Plots: which there are, and numbers worked by hand for what they draw."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from etude.reporting.curves import Chart, groups, in_words


def rows_of(**series: list[float | None]) -> list[dict[str, float | None]]:
    """Steps 1, 2, …; a metric's name may hold a slash, written "__"."""
    length = max(len(values) for values in series.values())
    names = {name: name.replace("__", "/") for name in series}
    return [
        {"step": step + 1, "time": 0.0}
        | {names[name]: values[step] for name, values in series.items() if step < len(values)}
        for step in range(length)
    ]


def test_a_path_is_the_data_in_percent_of_the_plot() -> None:
    chart = Chart("x", {"training": [(0, 0.0), (10, 100.0), (20, 50.0)]}, (0, 20))
    assert chart.bounds == (-6.0, 106.0)  # six per cent of room on either side
    # 0 lies 106/112 down, 100 lies 6/112 down, 50 in the middle
    assert chart.lines == [("training", "M0.00 94.64h0L50.00 5.36L100.00 50.00")]


def test_a_path_breaks_where_there_is_no_value() -> None:
    chart = Chart("x", {"training": [(0, 0.0), (1, None), (2, 1.0), (3, 0.0), (4, None)]}, (0, 4))
    assert [kind for kind, _ in chart.lines] == ["training"]
    assert chart.lines[0][1] == "M0.00 94.64h0M50.00 5.36h0L75.00 94.64"
    assert chart.latest == [("training", "0")]


def test_ticks_are_round_and_inside() -> None:
    chart = Chart("x", {"training": [(0, 0.03), (1, 0.97)]}, (0, 1))
    assert [label for _, label in chart.ticks] == ["0", "0.5", "1"]
    low, high = chart.bounds
    assert [y for y, _ in chart.ticks] == pytest.approx(
        [100 * (high - v) / (high - low) for v in (0, 0.5, 1)]
    )


@example([1e30], 1)
@given(
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=60),
    st.integers(0, 5),
)
def test_any_series_stays_within_its_plot(values: list[float], missing: int) -> None:
    points = [
        (step, None if missing and step % 7 == missing else value)
        for step, value in enumerate([*values, 0.0])
    ]
    chart = Chart("x", {"training": points}, (0, len(values)))
    for _, path in chart.lines:
        for pair in path.replace("h0", "").replace("M", "L").split("L")[1:]:
            x, y = map(float, pair.split())
            assert 0 <= x <= 100
            assert 0 <= y <= 100
    assert all(0 <= y <= 100 for y, _ in chart.ticks)
    assert len(chart.ticks) <= 5


def heights(path: str) -> list[float]:
    return [float(pair.split()[1]) for pair in path.replace("h0", "").replace("M", "L").split("L")[1:]]


def test_a_long_series_also_gets_its_trend() -> None:
    values = [float(step % 2) for step in range(40)]
    (raw_kind, _), (kind, path) = Chart("x", {"training": list(enumerate(values))}, (0, 39)).lines
    assert (raw_kind, kind) == ("training raw", "training")
    # Five points, range -.06 to 1.06. Around an even step two of them are 1, around an odd one three.
    inside = [100 * (1.06 - share) / 1.12 for share in (0.4, 0.6)]
    assert heights(path)[2:-2] == pytest.approx(inside * 18, abs=0.01)
    # 0, 1, 0, 1, 0 has no slope, so the first two steps lie on its mean; at the end 1, 0, 1, 0, 1
    assert heights(path)[:2] == pytest.approx([inside[0]] * 2, abs=0.01)
    assert heights(path)[-2:] == pytest.approx([inside[1]] * 2, abs=0.01)


def test_the_trend_of_a_line_is_that_line() -> None:
    (_, raw), (_, trend) = Chart("x", {"training": [(s, 3.0 * s) for s in range(0, 400, 10)]}, (0, 390)).lines
    assert heights(trend) == pytest.approx(heights(raw), abs=0.02)


def test_a_very_long_series_is_averaged() -> None:
    (group,) = groups(rows_of(reward=[float(step // 10) for step in range(4000)]))
    points = group.charts[0].series["training"]
    assert points[:2] == [(10, 0.0), (20, 1.0)]
    assert len(points) == 400


def test_curves_are_grouped_by_prefix_and_ordered_for_the_reader() -> None:
    names = ["zeta", "loss", "policy__clip", "iteration", "kl", "time__update", "reward", "response_length"]
    found = groups(rows_of(**{name: [1.0, 2.0] for name in names}))
    assert [(group.title, [chart.name for chart in group.charts]) for group in found] == [
        ("", ["reward", "kl", "loss", "response_length", "zeta", "iteration"]),
        ("Policy", ["policy/clip"]),
        ("Time", ["time/update"]),
    ]


def test_a_reward_models_accuracy_comes_first() -> None:
    names = ["mean_reward", "loss", "grad_norm", "learning_rate", "accuracy", "margin", "brier"]
    (found,) = groups(rows_of(**{name: [1.0, 2.0] for name in names}))
    assert [chart.name for chart in found.charts][:3] == ["accuracy", "loss", "mean_reward"]


def test_calls_of_tools_are_drawn_where_there_are_some() -> None:
    none = {"reward": [0.5, 1.0], "tool_use": [0.0, 0.0], "tool_errors": [0.0, 0.0], "turns": [0.0, 0.0]}
    (found,) = groups(rows_of(**none))
    assert [chart.name for chart in found.charts] == ["reward", "turns"]
    (found,) = groups(rows_of(**none | {"tool_use": [0.0, 0.5]}))
    assert [chart.name for chart in found.charts] == ["reward", "tool_use", "turns"]


def test_only_the_first_dozen_curves_are_open() -> None:
    series = {f"{group}__{name}": [1.0] for group in "abc" for name in range(7)}
    assert [group.open for group in groups(rows_of(**series))] == [True, False, False]


def test_environments_of_a_mixed_run_have_a_block_each_in_the_open() -> None:
    series = {
        "loss": [1.0],
        "reward": [0.5],
        "kl": [0.1],
        "ppo__a": [1.0],
        **{f"x{i}": [1.0] for i in range(9)},
    }
    for name in ("sums", "words"):
        series |= {f"{name}__turns": [1.0], f"{name}__stop__done": [0.5], f"{name}__stop__lost": [0.0]}
        series |= {f"{name}__tool_use": [0.0], f"{name}__success": [0.0], f"{name}__reward": [0.5]}
    series |= {"sums__rewards__exact": [0.5], "words__rewards__chrf": [0.2], "words__rewards__short": [0.0]}
    validation = {"validation__sums__reward": [0.6], "validation__sums__rewards__exact": [0.6]}
    found = groups(rows_of(**series, **validation))
    assert [(group.name, group.open) for group in found] == [
        ("", True),
        ("sums", True),
        ("words", True),
        ("ppo", False),
    ]
    sums, words = ([chart.name.partition("/")[2] for chart in group.charts] for group in found[1:3])
    assert sums == ["reward", "success", "turns", "stop/done"]
    assert words == ["reward", "rewards/chrf", "rewards/short", "success", "turns", "stop/done"]
    assert found[1].charts[0].latest == [("training", "0.5"), ("validation", "0.6")]
    assert found[2].charts[1].title == "Rewards chrF"
    with_corpus = groups(rows_of(**series, validation__words__bleu=[12.0]))
    assert with_corpus[2].charts[-1].series == {"validation": [(1, 12.0)]}, "what only a validation measures"
    assert with_corpus[2].charts[-1].title == "BLEU"
    (alone,) = groups(rows_of(validation__reward=[0.5], validation__success=[0.5]))
    assert alone.title == "Validation", "which is not an environment"


def test_validation_is_drawn_with_its_twin() -> None:
    rows = [
        {"step": s, "time": 0.0, "success": s / 4} | ({"validation/success": 0.5} if s == 4 else {})
        for s in range(5)
    ]
    (group,) = groups(rows)
    (chart,) = group.charts
    assert list(chart.series) == ["training", "validation"]
    assert chart.series["validation"] == [(4, 0.5)]
    assert chart.latest == [("training", "1"), ("validation", "0.5")]
    assert [kind for kind, _ in chart.lines] == ["training", "validation lone"]
    (alone,) = groups(rows_of(validation__success=[0.5]))
    assert (alone.title, alone.charts[0].title) == ("Validation", "Success")


def test_what_is_not_a_finite_number_leaves_a_gap_or_no_curve() -> None:
    rows = [
        {"step": 1, "time": 0.0, "a": math.inf, "b": None, "c": "text"},
        {"step": 2, "time": 0.0, "a": 2.0, "b": math.nan, "c": [1.0]},
    ]
    (group,) = groups(rows)
    assert [chart.name for chart in group.charts] == ["a"]
    assert group.charts[0].series["training"] == [(1, None), (2, 2.0)]
    assert groups([]) == []
    assert groups(rows[:1]) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kl_mean", "KL mean"),
        ("grad_norm", "Gradient norm"),
        ("exact/mean", "Exact mean"),
        ("ppo/loss/total", "PPO loss total"),
        ("validation/rougeL", "Validation ROUGE-L"),
        ("", ""),
        ("eval.success rate", "Eval success rate"),
    ],
)
def test_names_in_words(name: str, words: str) -> None:
    assert in_words(name) == words
