"""docs/preferences.md: its tables are measured on the trainers, its lists are the code's, its code runs."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import etude
from etude.app.cli import build_arguments
from etude.app.options import COMMANDS, read_options
from etude.app.parsing import parse_options
from etude.app.preference import _TRAINERS
from etude.math.unpaired import kto_loss
from etude.trainers.dpo import DPOTrainer
from etude.trainers.dpo_config import MARGIN_LOSSES, OTHER_LOSSES, DPOConfig
from etude.trainers.kto_config import KTOConfig
from etude.trainers.preference import Pairs

PAGE = (Path(__file__).parents[1] / "docs" / "preferences.md").read_text("utf-8")
TOKENS = 2.0


def table(first_heading):
    """The rows below a heading's table, as lists of cells."""
    [block] = re.findall(rf"^\| {first_heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()]


REFERRED = table(r"command \| loss of a pair \| at the start: up, down")
FREE = table(r"command \| loss of a pair \| source")


def config_of(command):
    """The settings that a command line makes."""
    name, *words = command.strip("`").removeprefix("etude ").split()
    words += [f"--{option}=x" for option in ("model_name_or_path", "train_dataset", "output_dir")]
    return build_arguments(name, parse_options(read_options(name), [*words, "--use_cpu"]))[-1]


def pushes(config, make_llama, tokenizer):
    """How a loss moves both log-probabilities where the policy is its reference, in units of β."""
    chosen, rejected = (torch.tensor([-3.0], requires_grad=True) for _ in range(2))
    if isinstance(config, KTOConfig):
        log_ratios = torch.cat([chosen, rejected]) + 3
        loss = kto_loss(log_ratios, torch.tensor([True, False]), 0.0, config.beta).sum()
    else:
        trainer = DPOTrainer(make_llama(), args=config, processing_class=tokenizer)
        tokens = torch.tensor([TOKENS])
        pairs = Pairs(chosen, rejected, tokens, tokens, torch.tensor([-3.0]), torch.tensor([-3.0]))
        loss = trainer.compare(pairs).losses.sum()
    up, down = torch.autograd.grad(loss, (chosen, rejected), materialize_grads=True)
    return -up.item() / config.beta, down.item() / config.beta


@pytest.mark.parametrize("row", REFERRED, ids=lambda row: row[0])
def test_the_table_says_how_losses_push_at_the_start(row, make_llama, tokenizer):
    said = []
    for cell in row[2].split(", "):
        number, _, per = cell.partition(" / ")
        said.append(float(number) / (TOKENS if per == "tokens" else 1))
    assert pushes(config_of(row[0]), make_llama, tokenizer) == pytest.approx(said, abs=0.003)


def test_every_loss_and_trainer_is_on_the_page_and_nothing_else():
    configs = [config_of(row[0]) for row in [*REFERRED, *FREE]]
    said = {kind for config in configs if isinstance(config, DPOConfig) for kind, _ in config.weighted_losses}
    assert said == {*MARGIN_LOSSES, *OTHER_LOSSES}
    assert {type(config) for config in configs} == set(_TRAINERS)
    assert {c.loss_type for c in configs if isinstance(c, KTOConfig)} == {"kto", "apo_zero_unpaired"}
    cpo = {config.loss_type for config in configs if isinstance(config, etude.CPOConfig)}
    assert cpo == {"sigmoid", "hinge", "ipo", "simpo"}  # alphapo is the table's AlphaPO
    trainers = {row[0].strip("`"): row[1].strip("`") for row in table("trainer \\| command")}
    assert {name for name, command in COMMANDS.items() if command.module == "preference"} == {
        command.removeprefix("etude ") for command in trainers.values()
    }
    assert set(trainers) == {trainer.__name__ for trainer in _TRAINERS.values()}


def test_settings_and_metrics_that_the_page_names_exist():
    fields = {field.name for cls in _TRAINERS for field in dataclasses.fields(cls)}
    named = set(re.findall(r"`(\w+_\w+)(?:=.*?)?`", PAGE))
    losses = {*MARGIN_LOSSES, *OTHER_LOSSES, "forward_kl", "js_divergence", "alpha_divergence"}
    other = {
        "ref_model",
        "peft_config",
        "mean_token_accuracy",
        "nll_loss",
        "log_odds_ratio",
        "log_odds_chosen",
    }
    columns = {"ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"}
    assert named - fields - losses - other - columns == set()
    assert len(named & fields) > 10


def test_every_code_block_runs(tokenizer, make_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"tokenizer": tokenizer}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        names["model"] = make_llama()
        exec(block.replace("max_steps=2", "max_steps=2, use_cpu=True"), names)
    runs = {path.parent.name for path in tmp_path.glob("runs/*/report.html")}
    assert runs == {"dpo", "mpo", "simpo", "kto", "dpo-lora", "margin"}


def test_links_lead_somewhere():
    docs = Path(__file__).parents[1] / "docs"
    headings = {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", PAGE, re.M)
    }
    for place, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", PAGE):
        if place:
            assert (docs / place).exists(), place
        else:
            assert anchor in headings
