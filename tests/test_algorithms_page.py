"""docs/algorithms.md: its table is measured on the trainers, its lists are the code's, its code runs."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import torch

import etude
from etude.app.cli import build_arguments
from etude.app.group import _TRAINERS
from etude.app.options import COMMANDS, read_options
from etude.app.parsing import parse_options
from etude.app.references import load_object
from etude.data.batch import Trajectory
from etude.errors import ConfigError
from etude.math.kl import kl_estimate
from etude.tools.calculator import calculator
from etude.trainers.credit import Credit, gae_credit
from etude.trainers.experience import Experience, Minibatch
from etude.trainers.group_config import ClippedConfig, GroupConfig
from etude.trainers.online_config import OnlineConfig
from etude.trainers.ppo import PPOTrainer
from etude.trainers.ppo_config import PPOConfig
from etude.types import STOP_POLICIES, NamedReward

PAGE = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text("utf-8")
TRAINERS = {PPOConfig: PPOTrainer, **_TRAINERS}
F64 = torch.float64
LENGTHS = (1, 2, 3, 4)


def table(first_heading):
    """The rows below a heading's table, as lists of cells."""
    [block] = re.findall(rf"^\| {first_heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()]


ROWS = table("algorithm \\| command")


def config_of(command, **changes):
    """The settings that a command line makes."""
    name, *words = command.strip("`").removeprefix("etude ").split()
    words += [f"--{option}=x" for option in ("model_name_or_path", "train_dataset", "reward", "output_dir")]
    config = build_arguments(name, parse_options(read_options(name), words))[-1]
    return dataclasses.replace(config, **changes)


def sized(config, batch, **changes):
    """The same settings for batches of so many episodes."""
    if isinstance(config, PPOConfig):
        return dataclasses.replace(config, batch_size=batch, mini_batch_size=batch, **changes)
    changes["num_generations"] = batch if config.num_generations > 1 else 1
    return dataclasses.replace(
        config, per_device_train_batch_size=batch, max_grad_norm=None, max_steps=2, **changes
    )


@pytest.fixture
def make_trainer(make_llama, tokenizer):
    def make(config, **rest):
        if isinstance(config, PPOConfig):
            return PPOTrainer(config, make_llama(), tokenizer=tokenizer, **rest)
        return TRAINERS[type(config)](make_llama(), config, processing_class=tokenizer, **rest)

    return make


def experience_of(lengths, scores=(1.0, 0.0, 0.0, 0.0), seed=0, **given):
    """Episodes with so many sampled tokens each, of random likelihood."""
    rows = [
        Trajectory(torch.arange(n + 1), torch.arange(1, n + 1), score, rewards=(NamedReward("r", score),))
        for n, score in zip(lengths, scores, strict=True)
    ]
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    noise = {
        name: torch.rand(mask.shape, generator=generator, dtype=F64) for name in ("logprobs", "ref_logprobs")
    }
    numbers = {name: -1 - value for name, value in noise.items()}
    for name in ("values", "kl", "entropies"):
        numbers[name] = torch.zeros(mask.shape, dtype=F64)
    numbers |= {name: given[name] for name in given}
    numbers = {name: value * mask for name, value in numbers.items()}
    return Experience(rows, mask, last_values=torch.zeros(len(rows), dtype=F64), **numbers)


def loss_of(trainer, experience, moved, advantage=1.0):
    """The loss of a whole optimizer step in which the policy has moved, and its gradient's weights [B, N]."""
    logprobs = (experience.logprobs + moved).requires_grad_()
    minibatch = Minibatch(
        list(range(len(LENGTHS))),
        experience,
        logprobs,
        torch.zeros_like(experience.entropies),
        experience.values,
        experience.mask.sum(),
        torch.tensor(len(LENGTHS)),
    )
    advantages = torch.full_like(experience.logprobs, advantage) * experience.mask
    if isinstance(trainer, PPOTrainer):
        loss, _ = trainer.loss(minibatch, Credit(advantages, experience.values, torch.zeros_like(advantages)))
    else:
        loss, _, _ = trainer.loss(minibatch, advantages)
    return loss, -torch.autograd.grad(loss, logprobs)[0]


def measured_share(trainer):
    """What weighs a token's −log π where nothing has moved."""
    experience = experience_of(LENGTHS)
    _, weights = loss_of(trainer, experience, torch.zeros_like(experience.logprobs))
    own = experience.mask.sum(1, keepdim=True)
    shares = {
        "1 / tokens": 1 / experience.mask.sum(),
        "1 / episodes": torch.tensor(1 / len(LENGTHS)),
        "1 / (episodes × length)": 1 / (len(LENGTHS) * own),
        "1 / (episodes × limit)": torch.tensor(1 / (len(LENGTHS) * 512)),
    }
    found = [
        name
        for name, share in shares.items()
        if torch.allclose(weights, (share * experience.mask).to(F64), atol=1e-9)
    ]
    assert len(found) == 1
    return found[0]


def measured_ratio(trainer):
    """By what a token's gradient grows where the policy has moved a little and what is left far off."""
    experience = experience_of(LENGTHS)
    generator = torch.Generator().manual_seed(5)
    moved = 1e-4 * torch.rand(experience.logprobs.shape, generator=generator, dtype=F64) * experience.mask
    _, base = loss_of(trainer, experience, torch.zeros_like(moved))
    _, weights = loss_of(trainer, experience, moved)
    grown = torch.where(experience.mask, weights / base, 1.0).log()
    sums, counts = moved.sum(1, keepdim=True), experience.mask.sum(1, keepdim=True)
    levels = {
        "–": torch.zeros_like(moved),
        "token": moved,
        "episode": sums * experience.mask,
        "episode, mean": sums / counts * experience.mask,
    }
    [found] = [name for name, level in levels.items() if torch.allclose(grown, level, atol=1e-9)]
    _, far = loss_of(trainer, experience, 2.0 * experience.mask)
    if found == "–":
        torch.testing.assert_close(far, base)
    elif far.any():
        torch.testing.assert_close(far, base * (1 + trainer.config.epsilon_high))
        found += ", as a weight"
    return found


def measured_kl(config, make_trainer):
    """Where a KL to the reference counts: what changes with it."""
    if isinstance(config, PPOConfig):
        trainer = make_trainer(config)
        plain, with_kl = (
            gae_credit(
                experience_of(LENGTHS, kl=kl),
                torch.ones(4, dtype=F64),
                score_scale=1.0,
                kl_coef=1.0,
                gamma=1.0,
                lam=1.0,
                whiten_rewards=False,
                accelerator=trainer.accelerator,
            ).kl_rewards
            for kl in (torch.zeros(4, 4, dtype=F64), one_kl())
        )
        assert (with_kl - plain).nonzero().tolist() == [[3, 2]]
        return f"reward, token, {trainer.learner.kl_kind}"
    try:
        trainer = make_trainer(dataclasses.replace(config, beta=0.5))
    except ConfigError as error:
        assert "beta" in str(error)  # noqa: PT017
        return "–"
    plain, with_kl = experience_of(LENGTHS), experience_of(LENGTHS, kl=one_kl())
    scores = torch.ones(4, dtype=F64)
    per_episode = trainer.penalised(scores, plain) - trainer.penalised(scores, with_kl)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=F64)
    per_token = trainer.spread(advantages, plain) - trainer.spread(advantages, with_kl)
    moved = 0.1 * plain.mask
    other = experience_of(LENGTHS, seed=1)
    other.logprobs = plain.logprobs
    in_loss = loss_of(trainer, other, moved)[0] - loss_of(trainer, plain, moved)[0]
    assert (per_episode.any(), per_token.any(), bool(in_loss != 0)).count(True) == 1
    if per_episode.any():
        assert per_episode.tolist() == [0.0, 0.0, 0.0, 0.5]
        return f"reward, episode, {trainer.kl_kind}"
    if per_token.any():
        return f"reward, token, {trainer.kl_kind}"
    shares = loss_of(make_trainer(config), plain, torch.zeros_like(plain.logprobs))[1]
    found = []
    for kind in ("k1", "k2", "k3"):
        terms = [
            (kl_estimate(e.logprobs + moved, e.ref_logprobs, kind) * shares).sum() for e in (other, plain)
        ]
        if torch.isclose(in_loss, 0.5 * (terms[0] - terms[1]), atol=1e-9):
            found.append(kind)
    assert len(found) == 1
    return f"loss, {found[0]}"


def one_kl():
    kl = torch.zeros(4, 4, dtype=F64)
    kl[3, 2] = 1.0
    return kl


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_the_table_says_what_the_trainers_do(row, make_trainer):
    _, command, _, credit, ratio, share, kl, _ = row
    config = sized(config_of(command), 4)
    if not isinstance(config, PPOConfig):
        config = dataclasses.replace(config, beta=0.0)
    trainer = make_trainer(config)
    assert measured_share(trainer) == share
    assert measured_ratio(trainer) == ratio
    assert measured_kl(config, make_trainer) == kl
    if isinstance(config, PPOConfig):
        assert credit == "–"
        return
    experience = experience_of((2, 2, 2, 2))
    advantages = trainer.spread(trainer._advantages(experience), experience)
    assert advantages[0, 0] == pytest.approx(float(credit), abs=0.006)


def test_every_algorithm_is_on_the_page_and_nothing_else():
    configs = [config_of(row[1]) for row in ROWS]

    def below(cls):
        return {cls, *(each for sub in cls.__subclasses__() for each in below(sub))}

    ours = {cls for cls in below(OnlineConfig) if cls.__module__.startswith("etude.")}
    assert {type(config) for config in configs} == ours - {OnlineConfig, GroupConfig, ClippedConfig}
    online = {
        name
        for name, command in COMMANDS.items()
        if "Training" in command.classes
        and issubclass(load_object(command.classes["Training"]), OnlineConfig)
    }
    assert {row[1].strip("`").split()[1] for row in ROWS} == online
    for name in ("loss_type", "importance_sampling_level", "multi_objective_aggregation"):
        choices = typing.get_args(typing.get_type_hints(etude.GRPOConfig)[name])
        said = {getattr(config, name) for config in configs if isinstance(config, etude.GRPOConfig)}
        assert said == set(choices), name
    headings = {anchor(heading) for heading in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)} | {"reinforce-1"}
    linked = set(re.findall(r"\]\(#(.*?)\)", PAGE))
    assert linked <= headings


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_table_of_reasons_is_the_library_s():
    rows = {cells[0].strip("`"): cells[1:] for cells in table("reason \\| bootstrap")}
    yes = {True: "yes", False: "no"}
    assert rows == {
        str(reason): [yes[policy.bootstrap], policy.reward, yes[policy.train]]
        for reason, policy in STOP_POLICIES.items()
    }


def test_settings_that_the_page_names_exist():
    fields = {field.name for cls in TRAINERS for field in dataclasses.fields(cls)}
    named = set(re.findall(r"`(\w+_\w+)`", PAGE)) - set(map(str, STOP_POLICIES)) - {"value_model"}
    assert named - fields == set()
    assert len(named) > 15


def test_every_code_block_runs(tokenizer, make_llama, make_trainer, tmp_path, monkeypatch, capsys):
    """Each one's settings train: two iterations of a few episodes. What is printed is what is shown."""
    monkeypatch.chdir(tmp_path)

    def exact(completions):
        return [float(len(text) % 3) for text in completions]

    env = etude.TextEnvironment(
        None, tokenizer, rewards=[exact], max_turns=1, generation_kwargs={"max_new_tokens": 5}
    )
    tasks = [{"prompt": f"say {i}:"} for i in range(8)]
    names = {"model": make_llama(), "tokenizer": tokenizer, "calculator": calculator, "exact": exact}
    trained, shown = set(), ""
    for language, block in re.findall(r"```(python|text)\n(.*?)```", PAGE, re.DOTALL):
        if language == "text":
            assert shown == block
            continue
        names |= {"env": env, "tasks": tasks}
        exec(block.replace("num_generations=8)\nGRPO", "max_steps=1, disable_progress=True)\nGRPO"), names)
        shown = capsys.readouterr().out
        few = {"overwrite_output_dir": True, "disable_progress": True, "gradient_accumulation_steps": 1}
        few |= {"steps": 8} if isinstance(names["config"], PPOConfig) else {"steps_per_generation": 1}
        config = sized(names["config"], 4, **few)
        make_trainer(config, environment=env, train_dataset=tasks).train()
        trained.add(type(config))
    assert trained == set(TRAINERS)
