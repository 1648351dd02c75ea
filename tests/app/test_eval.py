"""`etude eval` on tiny models, whole: what is played, printed and left behind; and mistakes in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from etude.app.cli import main
from etude.app.eval import load_noises
from etude.data.noise import SHIPPED, CharacterNoise, Paraphrase
from etude.errors import ConfigError
from etude.models.adapters import current_peft
from etude.runtime.run import RunDirectory

CODE = """
def digits(prompts, completions, goal, **columns):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]

def shout(text, seed):
    return text + "!" * (1 + seed % 3)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_llama: Any, make_gpt2: Any, tokenizer: Any) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name, model in (("llama", make_llama()), ("gpt2", make_gpt2())):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> Path:
    """A current directory with a user's code, tasks and configuration."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(CODE, encoding="utf-8")
    tasks = [{"prompt": f"how much is {n}+{n}, please?", "goal": n} for n in range(8)]
    Path("tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    settings = {
        "model_name_or_path": str(models / "llama"),
        "test_dataset": "tasks.jsonl",
        "tools": ["calculator"],
        "reward": "mine.py:digits",
        "generation": {"max_new_tokens": 8},
        "max_turns": 2,
        "success_reward": 0.2,
        "output_dir": "out",
    }
    Path("eval.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path


def evaluate(*arguments: str) -> int:
    return main(["eval", "--config=eval.yaml", *arguments])


def test_two_models_clean_and_under_noise(
    workplace: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = ["--noise", "characters(rate=0.3)", "injection", "mine.py:shout", "--tool_noise", "injection"]
    assert evaluate(f"--compare_to={models / 'gpt2'}", *noise, "--samples=2", "--episodes_to_log=6") == 0
    conditions = ["clean", "characters(rate=0.3)", "injection", "mine.py:shout", "tool_injection"]
    run = RunDirectory("out")
    record = run.read_evaluation()
    assert (record["tasks"], record["samples"]) == (8, 2)
    for label, name in (("A", "llama"), ("B", "gpt2")):
        assert record["models"][label]["name"] == str(models / name)
        assert list(record["models"][label]["conditions"]) == conditions
        for condition in conditions:
            episodes = run.read_episodes(split=f"{label}/{condition}")
            assert len(episodes) == 6
            assert all(episode.rewards[0].name == "digits" for episode in episodes)
    assert list(record["differences"]) == conditions
    out = capsys.readouterr().out
    assert f"A: {models / 'llama'}\nB: {models / 'gpt2'}\n8 tasks, 2 episodes each" in out
    for condition in conditions:
        a, b = (record["models"][label]["conditions"][condition]["success"]["value"] for label in "AB")
        row = next(line for line in out.splitlines() if line.startswith(f"{condition} "))
        assert row.split()[1] == f"{100 * a:.1f}"
        assert f"{100 * b:.1f} %" in row
        assert record["differences"][condition]["success"]["value"] == pytest.approx(a - b)
    assert out.endswith("report: out/report.html\n")
    assert run.read_config()["noise"] == ["characters(rate=0.3)", "injection", "mine.py:shout"]
    shouted = run.read_episodes(split="A/mine.py:shout")
    assert {episode.prompt.rstrip("!") for episode in shouted} == {
        f"how much is {n}+{n}, please?" for n in range(3)
    }
    assert {episode.prompt.count("!") for episode in shouted} <= {1, 2, 3}
    page = Path("out/report.html").read_text("utf-8")
    assert "<h2>Evaluation</h2>" in page
    assert '"split": "B/tool_injection"' in page


def test_the_same_settings_give_the_same_numbers(workplace: Path) -> None:
    arguments = ["--noise=words", "--paraphrases", "q: {prompt}", "{prompt} now", "--noise", "paraphrase"]
    assert evaluate(*arguments) == 0
    assert evaluate(*arguments, "--output_dir=again") == 0
    first, second = (RunDirectory(name).read_evaluation()["models"]["A"] for name in ("out", "again"))
    assert first["conditions"] == second["conditions"]
    said = [e.prompt for e in RunDirectory("out").read_episodes(split="A/paraphrase")]
    assert len(said) == 8
    assert {prompt.replace(f"how much is {n}+{n}, please?", "…") for n, prompt in enumerate(said)} == {
        "q: …",
        "… now",
    }


def test_an_adapter_is_a_model(workplace: Path, models: Path, make_llama: Any, tokenizer: Any) -> None:
    base = make_llama()
    base.config.name_or_path = base.name_or_path = str(models / "llama")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    with current_peft():
        get_peft_model(base, config).save_pretrained("adapter")
    tokenizer.save_pretrained("adapter")
    assert evaluate("--model_name_or_path=adapter", f"--compare_to={models / 'llama'}", "--max_tasks=4") == 0
    run = RunDirectory("out")
    assert run.read_evaluation()["tasks"] == 4
    texts = [[e.completion for e in run.read_episodes(split=f"{label}/clean")] for label in "AB"]
    assert texts[0] != texts[1]


def test_greedy(workplace: Path) -> None:
    assert evaluate("--greedy", "--seed=1") == 0
    assert evaluate("--generation.do_sample=false", "--seed=2", "--output_dir=other") == 0
    first, second = (RunDirectory(name).read_episodes(split="A/clean") for name in ("out", "other"))
    assert [e.token_ids for e in first] == [e.token_ids for e in second]


def test_an_earlier_evaluation_is_kept_unless_told(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--max_tasks=2") == 0
    assert evaluate("--max_tasks=3") == 2
    assert "out holds an earlier evaluation" in capsys.readouterr().err
    assert evaluate("--max_tasks=3", "--overwrite_output_dir") == 0
    assert len(RunDirectory("out").read_episodes()) == 3
    RunDirectory("trained").append_metrics(1, {"reward": 0.5})
    assert evaluate("--output_dir=trained", "--overwrite_output_dir") == 2
    assert "trained holds a training run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise", "charcters"], "there is no noise 'charcters'; expected one of characters, words"),
        (
            ["--noise", "characters(rates=1)"],
            "the noise 'characters(rates=1)': CharacterNoise can't be called with (rates=1): got an "
            "unexpected keyword argument 'rates'; its arguments are rate, edits, protect",
        ),
        (["--noise", "characters(rate=0.1"], "'characters(rate=0.1' has no closing parenthesis"),
        (["--noise", "characters(rate=2)"], "rate is 2; expected between 0 and 1"),
        (["--noise", "words", "words"], "the noise words is there twice"),
        (["--noise", "mine.py:digit"], "there is no 'digit' in mine.py; did you mean digits?"),
        (["--paraphrases", "{prompt}"], "paraphrases does nothing without the noise paraphrase"),
        (["--noise", "paraphrase", "--paraphrases", "so?"], "'so?'; expected a list of texts with {prompt}"),
        (["--noise", "words", "--noise_columns", "text"], "has no text in 'text' to put noise into"),
        (["--samples", "2", "--greedy"], "greedy decoding makes them all the same"),
        (["--pass_at", "2"], "pass_at has 2 and samples is 1"),
        (["--compare_revision", "main"], "compare_revision does nothing without compare_to"),
        (["--compare_to", "./nowhere"], "there is no directory './nowhere'"),
        (["--max_tasks", "0"], "max_tasks is 0"),
        (["--confidence", "95"], "confidence is 95.0; expected between 0 and 1"),
        (["--use_peft"], "unknown option --use_peft"),
        (["--tool_noise", "words", "--tools", "[]"], "tool_noise does nothing without tools"),
    ],
)
def test_mistakes(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert evaluate(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("etude: error: ")
    assert message in error
    assert not Path("out/evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise", "words", "--noise_columns", "text"], "has no text in 'text'"),
        (["--compare_to", "empty"], "'empty' holds no tokenizer"),
        (["--compare_to", "headless"], "has no config.json"),
        (["--reward", "mine.py:lacking"], "'lacking' needs 'answer', which no column provides"),
    ],
)
def test_what_a_model_is_not_needed_for_is_found_out_before_one_plays(
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
    tokenizer: Any,
    arguments: list[str],
    message: str,
) -> None:
    Path("empty").mkdir()
    tokenizer.save_pretrained("headless")
    with Path("mine.py").open("a") as file:
        file.write("\ndef lacking(completions, answer):\n    return [0.0 for _ in completions]\n")
    assert evaluate(*arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "clean" not in said.out
    assert not Path("out").exists()


def test_the_first_model_is_kept_where_the_second_breaks(
    workplace: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are damaged, which nothing but loading them tells; and what was there before is replaced
    only by something."""
    assert evaluate("--max_tasks=3") == 0
    shutil.copytree(models / "gpt2", "damaged")
    Path("damaged/model.safetensors").write_bytes(b"damaged")
    other = ["--max_tasks=2", "--overwrite_output_dir"]
    assert evaluate(*other, "--model_name_or_path=damaged") == 2
    assert RunDirectory("out").read_evaluation()["tasks"] == 3
    assert evaluate(*other, "--compare_to=damaged") == 2
    assert "can't be loaded from the directory 'damaged'" in capsys.readouterr().err
    run = RunDirectory("out")
    assert run.read_evaluation()["tasks"] == 2
    assert list(run.read_evaluation()["models"]) == ["A"]
    assert len(run.read_episodes()) == 2


def test_it_runs_in_one_process(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate() == 2
    assert "runs in one process" in capsys.readouterr().err


def test_noises_by_name() -> None:
    found = load_noises(["all", "characters(rate=0.5)"], list(SHIPPED), ["a {prompt}"])
    assert list(found) == [*SHIPPED, "characters(rate=0.5)"]
    assert found["paraphrase"] == Paraphrase(["a {prompt}"])
    assert found["characters(rate=0.5)"] == CharacterNoise(rate=0.5)
    assert load_noises(["etude.data.noise:CharacterNoise(0.5)"], [])[
        "etude.data.noise:CharacterNoise(0.5)"
    ] == CharacterNoise(0.5)
    with pytest.raises(ConfigError, match="there is no noise 'caps'"):
        load_noises(["caps"], [])


def test_noises_under_names_of_ones_own(workplace: Path) -> None:
    settings = yaml.safe_load(Path("eval.yaml").read_text())
    settings["noise"] = {"typos": "characters(rate=0.4)", "loud": "mine.py:shout", "other": "paraphrase"}
    settings["paraphrases"] = ["so {prompt}"]
    Path("eval.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    assert evaluate("--tool_noise.bad=injection") == 0
    run = RunDirectory("out")
    names = ["clean", "typos", "loud", "other", "tool_bad"]
    assert list(run.read_evaluation()["models"]["A"]["conditions"]) == names
    assert run.read_episodes(split="A/other")[0].prompt == "so how much is 0+0, please?"


def test_help_and_checks_load_nothing_slow() -> None:
    code = "import sys\nfrom etude.app.cli import main\ncode = main(sys.argv[1:])\n"
    code += "print('LOADED', *sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    needed = ["--model_name_or_path=m", "--test_dataset=t", "--reward=r", "--output_dir=o"]
    for arguments in (["--help"], [*needed, "--samples=0"], [*needed, "--paraphrases={prompt}"]):
        said = subprocess.run(
            [sys.executable, "-c", code, "eval", *arguments], capture_output=True, text=True, check=True
        )
        assert said.stdout.splitlines()[-1] == "LOADED"
