"""docs/data.md: its snippets run, and its tables say what trainers take, templates make, and errors say."""

import copy
import re
from pathlib import Path

import pytest
from template_families import CHAT, FAMILIES, TEMPLATES, TOOLS, family_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from etude.data.formats import COLUMNS, detect_format
from etude.data.templates import conversation_rows
from etude.errors import DataError
from etude.trainers.dpo_config import DPOConfig
from etude.trainers.kto import tokenize_ratings
from etude.trainers.kto_config import KTOConfig
from etude.trainers.preference import tokenize_pairs
from etude.trainers.prm import PRMTrainer
from etude.trainers.reward import RewardTrainer
from etude.trainers.reward_config import PRMConfig, RewardConfig
from etude.trainers.sft import tokenize_rows
from etude.trainers.sft_config import SFTConfig

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS, SPLIT, TURNS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TOKENIZER = family_tokenizer("qwen2.5")


def table(title):
    """Its lines after the title's and the ruler, as cells."""
    after = PAGE[PAGE.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in after]


def example_rows():
    names = {}
    exec(ROWS, names)
    return names["rows"]


@pytest.fixture(scope="module")
def takes(tmp_path_factory):
    """For each trainer, what makes a dataset of rows."""
    options = {"output_dir": str(tmp_path_factory.mktemp("runs")), "use_cpu": True, "disable_tqdm": True}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sft, dpo, kto = SFTConfig(**options), DPOConfig(**options), KTOConfig(**options)

    def model():
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), tie_word_embeddings=False, **small))

    reward = RewardTrainer(model(), RewardConfig(**options), processing_class=TOKENIZER)
    process = PRMTrainer(model(), PRMConfig(**options), processing_class=TOKENIZER)
    return {
        "SFT": lambda rows: tokenize_rows(rows, TOKENIZER, sft),
        "DPO, CPO, ORPO, SimPO": lambda rows: tokenize_pairs(rows, TOKENIZER, dpo),
        "KTO": lambda rows: tokenize_ratings(rows, TOKENIZER, kto),
        "reward model": reward.tokenize,
        "process reward model": process.tokenize,
    }


def test_the_formats_are_those_there_are():
    assert {name.strip("`"): columns for name, columns, *_ in table("format")} == {
        name: ", ".join(columns) for name, columns in COLUMNS.items()
    }
    assert {name: detect_format(row, tuple(COLUMNS)) for name, row in example_rows().items()} == {
        name: name for name in COLUMNS
    }


def learned(row):
    return TOKENIZER.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("line", table("format"), ids=lambda line: line[0])
def test_which_trainer_takes_which(takes, line):
    row = example_rows()[line[0].strip("`")]
    for (trainer, tokenize), cell in zip(takes.items(), line[2:], strict=True):
        if not cell:
            with pytest.raises(DataError, match="expected one of these combinations"):
                tokenize([row])
            continue
        rows = [row, {**row, "label": True}] if cell == "the wanted" else [row]
        made = tokenize(rows)
        assert len(made) == (2 if cell == "as two" else 1), trainer
        if cell.startswith("the "):
            assert learned(made[0]) == {"the chosen": "4", "the wanted": "22"}[cell] + "<|im_end|>"


def test_snippets_print_what_they_say(capsys):
    for snippet in (SPLIT, TURNS):
        exec(snippet, {"qwen3": family_tokenizer("qwen3")})
        said = [line.removeprefix("# ") for line in snippet.splitlines() if line.startswith("# ")]
        assert capsys.readouterr().out.splitlines() == said


def test_the_marked_template_is_the_tested_one():
    [shown] = re.findall(r"```jinja\n(.*?)```", PAGE, re.DOTALL)
    tested = (TEMPLATES / "deepseek-r1-marked.jinja").read_text(encoding="utf-8")
    assert shown == tested[tested.index("{{- bos_token") :]


def line(family):
    expected, tokenizer = FAMILIES[family], family_tokenizer(family)
    end = next(iter(expected.turns.values()))[-1][-1].rstrip()
    special = [token for token in expected.special.replace("~", "").split() if end.endswith(token)]
    counts = [
        str(len(conversation_rows(tokenizer, expected.conversations[kind], expected.tools)))
        if kind in expected.turns
        else ""
        for kind in ("chat", "tools", "reasoning")
    ]
    return [family, f"`{special[0]}`".replace("|", "\\|") if special else "nothing", *counts]


def test_each_template_s_line():
    assert [cells[:5] for cells in table("template")] == [
        line(family) for family in FAMILIES if family != "deepseek-r1"
    ]


def test_what_is_said(takes):
    bare = copy.deepcopy(TOKENIZER)
    bare.chat_template = None
    silent = family_tokenizer("zephyr")
    steps = {**example_rows()["stepwise"], "labels": [True]}
    tries = [
        lambda: detect_format(["question", "answer"]),
        lambda: detect_format(["text", "messages"]),
        lambda: takes["DPO, CPO, ORPO, SimPO"]([example_rows()["prompt-completion"]]),
        lambda: takes["process reward model"]([steps]),
        lambda: conversation_rows(bare, CHAT),
        lambda: conversation_rows(silent, TOOLS),
    ]
    for (given, said), attempt in zip(table("given"), tries, strict=True):
        with pytest.raises(DataError) as caught:
            attempt()
        assert said in str(caught.value), given
