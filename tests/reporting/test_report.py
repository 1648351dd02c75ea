"""The report holds a whole run in one file, and nothing that a model wrote gets out of its text."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import CheckpointError, ConfigError
from etude.reporting.report import _pick, write_report
from etude.runtime.run import RunDirectory
from etude.types import Episode, NamedReward, Segment, Source, StopReason, ToolCall

# A run as the calculator example leaves it: a character-level vocabulary, one tool, a policy that learns.

VOCABULARY = [
    *"0123456789*+-?",
    "What is ",
    "<request>",
    "<calculator>",
    "<call>",
    "<response>",
    "Result=",
    "<submit>",
]
SPELLER = SimpleNamespace(convert_ids_to_tokens=lambda ids: [VOCABULARY[id] for id in ids])


def segment_of(source: Source, text: str, sure: float = 0.0, version: int | None = None) -> Segment:
    pattern = "|".join(re.escape(token) for token in sorted(VOCABULARY, key=len, reverse=True))
    ids = [VOCABULARY.index(token) for token in re.findall(pattern, text)]
    if source != "model":
        return Segment(source, text, ids)
    logprobs = [math.log(sure) / (1 + place % 3) for place in range(len(ids))]
    return Segment(source, text, ids, logprobs, logprobs, version)


def play_calculator(chance: random.Random, skill: float, version: int, seed: int) -> Episode:
    a, b, c = chance.randint(1, 999), chance.randint(2, 99), chance.randint(1, 999)
    question, answer = f"{a}*{b}+{c}", str(a * b + c)
    episode = Episode(
        task={"prompt": f"What is {question}?", "answer": answer}, seed=seed, timings={"total": 0.1}
    )
    episode.append(segment_of("prompt", f"What is {question}?"))
    if chance.random() > skill:
        guess = int(answer) + chance.choice([0, -10, 7])
        episode.append(segment_of("model", f"Result={guess}<submit>", 0.5, version))
    else:
        episode.append(segment_of("model", f"<request><calculator>{question}<call>", 0.9, version))
        episode.append(segment_of("tool", f"{answer}<response>"))
        episode.append(segment_of("model", f"Result={answer}<submit>", 0.95, version))
        episode.tool_calls.append(ToolCall("calculator", question, answer, seconds=0.0004))
    exact = episode.last_model_text == f"Result={answer}<submit>"
    episode.rewards.append(NamedReward("exact_answer", float(exact)))
    episode.stop = StopReason.SUBMITTED
    return episode


def calculator_run(path: Path) -> RunDirectory:
    chance, run = random.Random(0), RunDirectory(path)
    run.write_config(
        {"algorithm": "grpo", "learning_rate": 2e-4, "model": {"hidden_size": 128}, "max_turns": 4}
    )
    run.append_episodes(0, "before", [play_calculator(chance, 0.2, 0, n) for n in range(8)], SPELLER)
    for step in range(1, 61):
        skill = 0.22 + 0.72 / (1 + math.exp((14 - step) / 5))
        metrics = {
            "reward": skill + chance.gauss(0, 0.03),
            "success": skill + chance.gauss(0, 0.03),
            "tool_use": 0.6 + 0.4 * skill,
            "kl": 1e-3 * step**0.7,
            "response_length": 18 + 6 * skill,
            "loss": chance.gauss(-0.004, 0.004) if step != 23 else math.nan,
            "entropy": 0.55 - 0.4 * skill,
            "tokens_per_second": chance.gauss(14_200, 400),
            "policy/ratio_max": 1.3 + abs(chance.gauss(0, 0.15)),
            "policy/clip_fraction": 0.06 - 0.03 * skill,
            "time/update": chance.gauss(1.3, 0.04),
        }
        run.append_metrics(step, metrics | ({"validation/success": skill} if step % 10 == 0 else {}))
        if step % 3 == 0:
            run.append_episodes(
                step, "train", [play_calculator(chance, skill, step - 1, 100 + step)], SPELLER
            )
    run.append_episodes(
        60, "validation", [play_calculator(chance, 0.95, 60, 200 + n) for n in range(4)], SPELLER
    )
    run.append_episodes(60, "after", [play_calculator(chance, 0.95, 60, n) for n in range(8)], SPELLER)
    run.update_summary(
        {"before": 0.22, "after": {"success": 0.94}, "seed": 0, "seconds": 131.4, "parameters": 640128}
    )
    return run


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, the text outside scripts, and the data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._text_of: dict[str, list[str]] = {"script": [], "style": [], "": []}
        self._within = ""
        self.feed(self.html)
        self.text = " ".join(self.words)
        self.data: dict[str, Any] = json.loads(self._text_of["script"][0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        self._text_of[self._within].append(data)
        if not self._within and data.strip():
            self.words.append(data.strip())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def calculator_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = calculator_run(tmp_path_factory.mktemp("runs") / "calculator")
    return Page(write_report(run.path))


def test_the_page_asks_for_nothing_from_outside(calculator_page: Page) -> None:
    policy = next(
        attributes["content"] for _, attributes in calculator_page.tags if "http-equiv" in attributes
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not [tag for tag, attributes in calculator_page.tags if {"src", "href"} & attributes.keys()]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|import\(", calculator_page.html)


def test_only_the_pages_own_script_may_run(calculator_page: Page) -> None:
    policy = next(
        attributes["content"] for _, attributes in calculator_page.tags if "http-equiv" in attributes
    )
    data, script = [attributes for tag, attributes in calculator_page.tags if tag == "script"]
    assert data["type"] == "application/json"
    assert f"script-src 'nonce-{script['nonce']}'" in str(policy)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", calculator_page.html
    )


def test_header(calculator_page: Page) -> None:
    text = calculator_page.text
    assert "calculator · Étude" in text
    assert "Success, before and after 22 % → 94 %" in text
    assert "Steps 60 Episodes 40 Time 2 min 11 s Started" in text
    assert "Seed 0 Parameters 640,128" in text


def test_curves(calculator_page: Page) -> None:
    titles = [str(a["title"]) for tag, a in calculator_page.tags if tag == "span" and "title" in a]
    assert titles[:4] == ["reward", "success", "tool_use", "kl"]
    assert titles[-3:] == ["policy/ratio_max", "policy/clip_fraction", "time/update"]
    assert calculator_page.count("svg") == len(calculator_page.data["charts"]) == 11
    loss = calculator_page.data["charts"][titles.index("loss")]["series"]["training"]
    assert loss[22] == [23, None]
    assert list(calculator_page.data["charts"][1]["series"]) == ["training", "validation"]
    assert "Policy · 2 curves" in calculator_page.text


def test_configuration(calculator_page: Page) -> None:
    assert (
        "4 settings algorithm grpo learning_rate 0.0002 model.hidden_size 128 max_turns 4"
        in calculator_page.text
    )


def test_episodes(calculator_page: Page) -> None:
    episodes = calculator_page.data["episodes"]
    assert len(episodes) == 40
    assert {episode["split"] for episode in episodes} == {"before", "train", "validation", "after"}
    last = episodes[-1]
    prompt, model, tool, answer = last["segments"]
    assert last["name"] == prompt["text"]
    assert last["task"] == [["answer", tool["text"].removesuffix("<response>")]]
    assert last["reward"] == last["rewards"][0]["value"] == 1
    assert last["stop"] == "submitted"
    assert last["calls"][0]["name"] == "calculator"
    assert "".join(model["tokens"]) == model["text"]
    assert model["spelled"]
    assert len(model["ids"]) == len(model["logprobs"]) == len(model["tokens"])
    assert model["version"] == answer["version"] == 60
    assert prompt["logprobs"] is None


def step_rewards(run: RunDirectory) -> None:
    episode = Episode(
        segments=[
            Segment("prompt", "1?", [VOCABULARY.index("1"), VOCABULARY.index("?")]),
            segment_of("model", "<request>2", 0.5, 3),
            segment_of("tool", "4"),
            segment_of("model", "4<submit>", 0.5, 3),
        ],
        rewards=[
            NamedReward("exact", 1.0),
            NamedReward("steps", -1.0, 0.1, position=3),
            NamedReward("steps", 0.0, 0.1, position=6),
            NamedReward("digits", 2.0, position=3),
            NamedReward("digits", 0.5, position=5),
        ],
        stop=StopReason.SUBMITTED,
    )
    run.append_episodes(1, "train", [episode], SPELLER)


def test_rewards_of_turns_and_tokens_are_at_their_segments(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    step_rewards(run)
    (episode,) = Page(write_report(run.path)).data["episodes"]
    assert episode["reward"] == pytest.approx(3.4)
    assert episode["rewards"] == [
        {"name": "exact", "value": 1.0, "weight": 1.0},
        {"name": "steps", "value": -1.0, "weight": 0.1},
        {"name": "digits", "value": 2.5, "weight": 1.0},
    ]
    assert [segment["rewards"] for segment in episode["segments"]] == [
        [],
        [[1, "steps", -1.0], [1, "digits", 2.0]],
        [],
        [[1, "steps", 0.0], [0, "digits", 0.5]],
    ]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_shows_rewards_at_the_turns_that_earned_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    step_rewards(run)
    dom = in_the_browser(write_report(run.path), tmp_path)
    shown = re.findall(r'<div class="earned ?(\w*)">([^<]*)</div>', dom.html)
    assert shown == [("lost", "steps -1"), ("won", "digits 2"), ("", "steps 0"), ("won", "digits 0.5")]
    marked = re.findall(r'<span class="token paid ?(\w*)">([^<]*)</span>', dom.html)
    assert marked == [("won", "2"), ("won", "4"), ("", "&lt;submit&gt;")]
    assert "steps -1 × 0.1 digits 2.5" in dom.text


# Hostile text

ATTACK = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{7*7}}"
)
SPOOF = "\u202egnp\u202c \x1b[2J \ud800 \u2028 <!--"


def hostile_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    episode = Episode(
        task={"prompt": ATTACK, ATTACK: {ATTACK: SPOOF}},
        segments=[
            Segment("prompt", ATTACK, [1]),
            Segment("model", ATTACK + SPOOF, [2], [-0.5], [-0.5], 1),
            Segment("tool", SPOOF + ATTACK, [3]),
        ],
        rewards=[NamedReward(ATTACK, 1.0)],
        tool_calls=[ToolCall(ATTACK, ATTACK, SPOOF + ATTACK, error="exception")],
        error=ATTACK + SPOOF,
        stop=StopReason.INFRASTRUCTURE,
    )
    speller = SimpleNamespace(convert_ids_to_tokens=lambda ids: [ATTACK + SPOOF for _ in ids])
    run.append_episodes(1, "train", [episode], speller)
    run.append_metrics(1, {ATTACK + SPOOF: 1.0, f"a/{ATTACK}": 2.0})
    run.write_config({ATTACK: ATTACK + "\u202e"})
    run.update_summary({ATTACK: SPOOF, "before": {ATTACK: 1}, "after": {ATTACK: 2}})
    return run


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = Page(write_report(hostile_run(tmp_path).path, title=ATTACK + SPOOF))
    assert page.count("script") == 2
    assert page.count("img") == 0
    assert page.html.count("<!--") == 0
    (episode,) = page.data["episodes"]
    shown = ATTACK + "\\u202egnp\\u202c \\x1b[2J \\ud800 \\u2028 <!--"
    assert episode["segments"][1]["text"] == shown
    assert episode["segments"][1]["tokens"] == [shown]
    assert f"{shown} · Étude" in page.text
    assert not [character for character in page.html if character in "\u202e\u202c\x1b\u2028"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_script_runs_and_the_attack_does_not(tmp_path: Path) -> None:
    dom = in_the_browser(write_report(hostile_run(tmp_path / "run").path, title="calm"), tmp_path)
    assert "<title>calm · Étude</title>" in dom.html
    assert dom.count("img") == 0
    assert "1 shown" in dom.text
    said = [attributes for tag, attributes in dom.tags if tag == "div" and attributes.get("class") == "said"]
    assert len(said) == 3


def in_the_browser(report: Path, tmp_path: Path) -> Page:
    """The page once its script has run."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", report.as_uri()]
    done = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=60, check=True)
    (tmp_path / "dom.html").write_text(done.stdout, encoding="utf-8")
    return Page(tmp_path / "dom.html")


def test_secrets_stay_out(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_config(
        {"hub_token": "hf_abc", "judge": {"api_key": "sk-abc"}, "eos_token": "<s>", "password": None}
    )
    text = Page(write_report(run.path)).text
    assert "abc" not in text
    assert "hub_token (hidden) judge.api_key (hidden) eos_token <s> password null" in text


# What is there and what is not


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.update_summary({"seed": 3})
    page = Page(write_report(run.path))
    assert "No metrics yet." in page.text
    assert "No episodes yet." in page.text
    assert page.data == {"charts": [], "episodes": []}


def test_a_run_that_plays_nothing_has_no_place_for_episodes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append_metrics(1, {"loss": 2.0})
    run.append_metrics(2, {"loss": 1.0})
    page = Page(write_report(run.path))
    assert "Loss" in page.text
    assert "pisodes" not in page.text
    assert page.data["episodes"] == []


def test_a_run_that_is_still_writing(tmp_path: Path) -> None:
    run = calculator_run(tmp_path)
    for name in ("metrics.jsonl", "episodes.jsonl"):
        with (run.path / name).open("ab") as stream:
            stream.write(b'{"step": 61, "spl')
    report = write_report(run.path)
    assert len(Page(report).data["episodes"]) == 40
    assert write_report(run.path) == report
    assert not list(run.path.glob(".*"))


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is not a run directory; expected one of run\.yaml.*Check the path"
    ):
        write_report(tmp_path / "typo")
    with pytest.raises(CheckpointError, match="is not a run directory"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.jsonl", "{\n"), ("episodes.jsonl", "{\n"), ("run.yaml", "a: [1"), ("summary.json", "{")],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        write_report(tmp_path)


def test_fewer_episodes_can_be_shown(tmp_path: Path) -> None:
    run = calculator_run(tmp_path)
    page = Page(write_report(run.path, max_episodes=12))
    assert len(page.data["episodes"]) == 12
    assert "12 of 40, spread over the run" in page.text
    assert len(Page(write_report(run.path, max_episodes=0)).data["episodes"]) == 0
    with pytest.raises(ConfigError, match="max_episodes is -1"):
        write_report(run.path, max_episodes=-1)


@given(st.lists(st.sampled_from(["before", "train", "after"]), max_size=60), st.integers(0, 70))
def test_episodes_are_picked_from_every_split_and_its_whole_length(splits: list[str], limit: int) -> None:
    picked = _pick(splits, limit)
    assert len(picked) == min(limit, len(splits))
    for split in set(splits):
        members = [place for place, name in enumerate(splits) if name == split]
        chosen = picked.intersection(members)
        if limit >= 2 * len(set(splits)):
            assert {members[0], members[-1]} <= chosen


def test_episodes_are_named_by_what_their_prompts_do_not_share(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    prompts = [
        f"Example: 1+1\nAnswer: 2\n\nQuestion: {question}" for question in ("3*4?", "3*5?\nThink.", "7")
    ]
    episodes = [Episode(segments=[Segment("prompt", prompt, [1])]) for prompt in prompts]
    run.append_episodes(1, "train", episodes)
    names = [episode["name"] for episode in Page(write_report(run.path)).data["episodes"]]
    assert names == ["Question: 3*4?", "Question: 3*5? Think.", "Question: 7"]


def mixed_run(path: Path) -> RunDirectory:
    run, chance = RunDirectory(path), random.Random(1)
    for step in (1, 2):
        metrics = {"reward": 0.5, "success": 0.5}
        for name in ("calculator", "translation"):
            metrics |= {f"{name}/reward": 0.5, f"{name}/success": 0.25 * step, f"{name}/rewards/chrf": 0.1}
        run.append_metrics(step, metrics)
    episodes = [play_calculator(chance, 0.5, 0, n) for n in range(3)]
    for episode in episodes:
        episode.task = {**episode.task, "environment": "calculator"}
    prompts = [
        f"Words to digits.\n{word}" for word in ("one", "two", "three", "four", "five", "six", "seven")
    ]
    episodes += [
        Episode({"environment": "translation"}, segments=[Segment("prompt", prompt, [1])])
        for prompt in prompts
    ]
    run.append_episodes(2, "train", episodes)
    both = {"before": {"reward": 0.1, "success": 0.2}, "after": {"reward": 0.3, "success": 0.9}}
    translated = {side: {**numbers, "chrf": 40.0} for side, numbers in both.items()}
    environments = {"calculator": both, "translation": translated}
    run.update_summary({"before": 0.3, "after": 0.8, "environments": environments})
    return run


def test_a_mixed_run_has_a_block_for_each_environment(tmp_path: Path) -> None:
    page = Page(write_report(mixed_run(tmp_path).path))
    assert "Success, before and after 30 % → 80 % Calculator, before and after 20 % → 90 %" in page.text
    assert "Calculator · 3 curves · Reward 0.1 → 0.3 · Success 20 % → 90 % Reward" in page.text
    assert "Translation · 3 curves · Reward 0.1 → 0.3 · Success 20 % → 90 % · ChrF 40 → 40" in page.text
    assert [attributes for tag, attributes in page.tags if tag == "details"][:2] == [
        {"class": "group", "open": None}
    ] * 2
    assert "Environments" not in page.text, "they are no fact of the header"
    assert [e["environment"] for e in page.data["episodes"]] == ["calculator"] * 3 + ["translation"] * 7
    assert page.data["episodes"][3]["name"] == "one", "less what its own environment's prompts share"


def test_episodes_are_shared_out_among_environments(tmp_path: Path) -> None:
    page = Page(write_report(mixed_run(tmp_path).path, max_episodes=4))
    assert [e["environment"] for e in page.data["episodes"]] == ["calculator"] * 2 + ["translation"] * 2


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_episodes_are_filtered_by_environment_where_there_are_several(tmp_path: Path) -> None:
    for name, run in (("mixed", mixed_run(tmp_path / "a")), ("single", hostile_run(tmp_path / "b"))):
        dom = in_the_browser(write_report(run.path), tmp_path)
        (select,) = [a for tag, a in dom.tags if tag == "select" and a["name"] == "environment"]
        assert ("hidden" in select) == (name == "single")


def test_episodes_of_one_task_and_of_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    same = Episode(segments=[Segment("prompt", "First line\nsecond", [1])])
    run.append_episodes(1, "train", [same, same])
    assert {e["name"] for e in Page(write_report(run.path)).data["episodes"]} == {"First line second"}
    run.append_episodes(2, "train", [Episode()])
    assert Page(write_report(run.path)).data["episodes"][2]["name"] == "(empty prompt)"


def test_tokens_that_do_not_spell_the_text_are_shown_as_they_are(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    pieces = {1: "play", 2: "##ing", 3: None}
    speller = SimpleNamespace(convert_ids_to_tokens=lambda ids: [pieces[id] for id in ids])
    run.append_episodes(1, "train", [Episode(segments=[Segment("prompt", "playing", [1, 2, 3])])], speller)
    run.append_episodes(1, "train", [Episode(segments=[Segment("prompt", "playing", [1, 2, 3])])])
    spelled, bare = (e["segments"][0] for e in Page(write_report(run.path)).data["episodes"])
    assert (spelled["tokens"], spelled["spelled"]) == (["play", "##ing", "<3>"], False)
    assert (bare["tokens"], bare["spelled"]) == ([], False)
