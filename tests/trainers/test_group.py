"""GRPO and RLOO: a step against an independent implementation, groups that teach nothing, whole runs."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from etude.data.batch import Trajectory
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, DataError, ModelError, RewardError
from etude.models.adapters import add_adapter, lora_config
from etude.models.forward import PolicyForward
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.runtime.run import RunDirectory
from etude.trainers.group_config import GRPOConfig, RLOOConfig
from etude.trainers.grpo import GRPOTrainer
from etude.trainers.rloo import RLOOTrainer
from etude.types import StopReason

F64 = torch.float64
GROUP, ROWS = 4, 12
TRAINERS = {GRPOConfig: GRPOTrainer, RLOOConfig: RLOOTrainer}


def group_rows(vocabulary, seed=0):
    """Queries, responses, masks with holes, scores: three groups, the second constant; row 1 was lost."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(ROWS):
        query = torch.randint(0, vocabulary, (2 + i // GROUP,), generator=generator)
        response = torch.randint(0, vocabulary, (4 + i,), generator=generator)
        mask = (torch.rand(len(response), generator=generator) < 0.6).long()
        mask[0] = 1
        score = torch.randn((), generator=generator, dtype=F64).item()
        rows.append((query, response, mask, 0.1 if i // GROUP == 1 else score))
    query, response, mask, _ = rows[1]
    rows[1] = (query, response, torch.zeros_like(mask), 50.0)
    return rows


def trajectories_of(rows):
    return [Trajectory.of_response(query, response, score, mask) for query, response, mask, score in rows]


def plain_advantages(config, scores, kept):
    """One number per row, by the formulas' words."""
    advantages = [0.0] * len(scores)
    everyone = [score for score, keep in zip(scores, kept, strict=True) if keep]
    for start in range(0, len(scores), GROUP):
        members = [i for i in range(start, start + GROUP) if kept[i]]
        group = [scores[i] for i in members]
        if len(set(group)) < 2:
            continue
        for i in members:
            if isinstance(config, RLOOConfig):
                advantages[i] = scores[i] - statistics.fmean(scores[j] for j in members if j != i)
            else:
                advantages[i] = scores[i] - statistics.fmean(group)
                if config.scale_rewards != "none":
                    spread = group if config.scale_rewards == "group" else everyone
                    advantages[i] /= statistics.stdev(spread) + 1e-4
    if isinstance(config, RLOOConfig) and config.normalize_advantages:
        spread = statistics.variance(a for a, keep in zip(advantages, kept, strict=True) if keep)
        advantages = [a / (spread**0.5 + 1e-4) for a in advantages]
    return advantages


def plain_loss(config, logprobs, old, reference, advantage, tokens, episodes):
    """One episode's part of the loss; the first three are of its n sampled tokens."""
    moved, n = logprobs - old, len(old)
    rloo = isinstance(config, RLOOConfig)
    if rloo:
        moved = moved.sum().expand(n)
    elif config.importance_sampling_level == "sequence":
        moved = moved.mean().expand(n)
    ratio = moved.exp()
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    kept = ratio.clamp(1 - config.epsilon, 1 + high)
    if not rloo and config.loss_type == "cispo":
        loss = -kept.detach() * advantage * logprobs
    else:
        loss = torch.max(-advantage * ratio, -advantage * kept)
    if rloo:
        return loss.mean() / episodes
    if config.beta:
        away = reference - logprobs
        loss = loss + config.beta * (away.exp() - 1 - away)
    return {
        "grpo": loss.mean() / episodes,
        "dr_grpo": loss.sum() / (episodes * (config.max_completion_length or 1)),
    }.get(config.loss_type, loss.sum() / tokens)


def plain_step(model, reference, config, rows, shuffles):
    """A step as a student would write it: plain forwards, one sequence at a time."""

    def look(policy, query, response, at):
        logits = policy(torch.cat([query, response])[None]).logits
        states = slice(len(query) - 1, len(query) + len(response) - 1)
        return logits[0, states].log_softmax(-1).gather(-1, response[:, None])[at, 0]

    positions = [mask.nonzero()[:, 0] for _, _, mask, _ in rows]
    with torch.no_grad():
        old = [look(model, row[0], row[1], at) for row, at in zip(rows, positions, strict=True)]
        ref = [look(reference, row[0], row[1], at) for row, at in zip(rows, positions, strict=True)]
    scores = [row[3] for row in rows]
    if isinstance(config, RLOOConfig):
        scores = [s - config.beta * (o - r).sum().item() for s, o, r in zip(scores, old, ref, strict=True)]
    advantages = plain_advantages(config, scores, [len(at) > 0 for at in positions])
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate)
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    for order in shuffles:
        for start in range(0, len(order), size):
            chosen = [i for i in order[start : start + size] if len(positions[i])]
            tokens = sum(len(positions[i]) for i in chosen)
            loss = torch.zeros((), dtype=F64)
            for i in chosen:
                logprobs = look(model, rows[i][0], rows[i][1], positions[i])
                loss = loss + plain_loss(config, logprobs, old[i], ref[i], advantages[i], tokens, len(chosen))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()


@pytest.fixture
def shuffles(monkeypatch):
    """The orders in which a trainer goes through its batch."""
    seen = []
    original = torch.randperm

    def randperm(*args, **kwargs):
        order = original(*args, **kwargs)
        seen.append(order.tolist())
        return order

    monkeypatch.setattr(torch, "randperm", randperm)
    return seen


def settings_of(config_class, **settings):
    common = {"per_device_train_batch_size": ROWS, "num_generations": GROUP, "learning_rate": 0.05}
    return config_class(**{**common, "num_iterations": 2, **settings})


SMALL_STEPS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "steps_per_generation": 6}


@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (GRPOConfig, {}),
        (GRPOConfig, {"beta": 0.3, "loss_type": "grpo"}),
        (GRPOConfig, {"loss_type": "dr_grpo", "max_completion_length": 20, "scale_rewards": "none"}),
        (GRPOConfig, {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.01}),
        (GRPOConfig, {"loss_type": "cispo", "epsilon": 0.05, "epsilon_high": 0.02}),
        (GRPOConfig, {"scale_rewards": "batch", "epsilon": 0.02, "epsilon_high": 0.04, **SMALL_STEPS}),
        (GRPOConfig, {"loss_type": "grpo", "beta": 0.1, "max_grad_norm": 0.2, **SMALL_STEPS}),
        (RLOOConfig, {}),
        (RLOOConfig, {"beta": 0.0, "epsilon": 0.05, **SMALL_STEPS}),
        (RLOOConfig, {"normalize_advantages": True, "epsilon_high": 0.01}),
    ],
    ids=lambda value: value.__name__[:4] if isinstance(value, type) else "-".join(map(str, value.values())),
)
def test_a_step_equals_an_independent_implementation(config_class, settings, tokenizer, make_llama, shuffles):
    config = settings_of(config_class, **settings)
    ours, plain, reference = make_llama(0, F64), make_llama(0, F64), make_llama(5, F64)
    # Not Adam, which would blow rounding up where a gradient is nearly zero.
    optimizer = torch.optim.SGD(ours.parameters(), lr=config.learning_rate)
    trainer = TRAINERS[config_class](
        ours,
        config,
        processing_class=tokenizer,
        ref_model=make_llama(5, F64) if config.beta else None,
        optimizers=(optimizer, None),
    )
    rows = group_rows(len(tokenizer))
    stats = trainer.learn(trajectories_of(rows))
    assert len(shuffles) == 2
    plain_step(plain, reference, config, rows, shuffles)
    start = make_llama(0, F64).state_dict()
    for name, parameter in ours.state_dict().items():
        torch.testing.assert_close(parameter, plain.state_dict()[name], atol=1e-9, rtol=0, msg=name)
    assert max((p - start[n]).abs().max() for n, p in ours.state_dict().items()) > 1e-3
    assert ("kl" in stats) == bool(config.beta)
    assert stats["ratio"] != 1.0
    constant = 0 if isinstance(config, RLOOConfig) and config.beta else 1 / 3  # the penalty tells them apart
    assert stats["frac_reward_zero_std"] == pytest.approx(constant)


def learnt(make_llama, tokenizer, rows, config):
    model = make_llama(0, F64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = TRAINERS[type(config)](model, config, processing_class=tokenizer, optimizers=(optimizer, None))
    trainer.learn(trajectories_of(rows))
    start = make_llama(0, F64).state_dict()
    return {name: parameter - start[name] for name, parameter in model.state_dict().items()}


@pytest.mark.parametrize("config_class", [GRPOConfig, RLOOConfig])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # the very first batch teaches nothing
def test_what_learn_refuses(config_class, tokenizer, make_llama):
    trainer = TRAINERS[config_class](make_llama(), settings_of(config_class), processing_class=tokenizer)
    rows = trajectories_of(group_rows(len(tokenizer)))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(DataError, match="learn got no trajectories"):
        trainer.learn([])
    with pytest.raises(DataError, match="11 trajectories; expected a multiple of num_generations"):
        trainer.learn(rows[:-1])
    for bad in (math.nan, math.inf):
        with pytest.raises(RewardError, match=r"score of trajectory 3 is (nan|inf)"):
            trainer.learn([*rows[:3], replace(rows[3], score=bad), *rows[4:]])
    silent = [replace(row, sampled=row.sampled[:0], compared=False) for row in rows]
    with pytest.warns(UserWarning, match="nothing to learn"):
        trainer.learn(silent)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(("config_class", "beta"), [(GRPOConfig, 0.0), (RLOOConfig, 0.0)])
def test_a_constant_group_gives_no_gradient(config_class, beta, tokenizer, make_llama):
    """With two groups, the mean over episodes is half of what it is with the telling one alone."""
    rows = group_rows(len(tokenizer))[GROUP : 3 * GROUP]  # constant, telling
    kind = {"loss_type": "grpo"} if config_class is GRPOConfig else {}
    kind |= {"beta": beta, "max_grad_norm": None, "num_iterations": 1}
    both = settings_of(config_class, per_device_train_batch_size=2 * GROUP, **kind)
    alone = settings_of(config_class, per_device_train_batch_size=GROUP, **kind)
    moved = learnt(make_llama, tokenizer, rows, both)
    expected = learnt(make_llama, tokenizer, rows[GROUP:], alone)
    assert max(change.abs().max() for change in expected.values()) > 1e-3
    for name, change in moved.items():
        torch.testing.assert_close(change, expected[name] / 2, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize(("config_class", "beta"), [(GRPOConfig, 0.0), (GRPOConfig, 0.5), (RLOOConfig, 0.0)])
def test_a_batch_of_constant_groups_warns_and_changes_nothing(config_class, beta, tokenizer, make_llama):
    """Not even by Adam's momentum."""
    model = make_llama()
    trainer = TRAINERS[config_class](model, settings_of(config_class, beta=beta), processing_class=tokenizer)
    rows = group_rows(len(tokenizer))
    trainer.learn(trajectories_of(rows))
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    constant = [
        (query, response, mask, float(i // GROUP)) for i, (query, response, mask, _) in enumerate(rows)
    ]
    with pytest.warns(UserWarning, match="nothing to learn"):
        stats = trainer.learn(trajectories_of(constant))
    assert stats["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.state_dict().items())


def test_an_interrupted_episode_leaves_its_group(tokenizer, make_llama):
    """Its score is not the whole of it, and there is no value to go on from."""
    rows = group_rows(len(tokenizer))
    moved = []
    for lost_score in (0.0, 1000.0):
        model = make_llama(0, F64)
        trainer = GRPOTrainer(model, settings_of(GRPOConfig), processing_class=tokenizer)
        trajectories = trajectories_of(rows)
        trajectories[2].bootstrap, trajectories[2].score = True, lost_score
        trainer.learn(trajectories)
        moved.append(model.state_dict())
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


def test_without_beta_the_reference_is_not_computed(tokenizer, make_llama, monkeypatch):
    calls = []
    forward = PolicyForward.forward
    monkeypatch.setattr(
        PolicyForward, "forward", lambda self, *inputs: calls.append(self.model) or forward(self, *inputs)
    )
    for beta, forwards in ((0.0, 1), (0.1, 2)):
        calls.clear()
        config = settings_of(GRPOConfig, beta=beta, num_iterations=1)
        trainer = GRPOTrainer(make_llama(), config, processing_class=tokenizer)
        trainer.learn(trajectories_of(group_rows(len(tokenizer))))
        assert len(calls) == forwards
        assert (trainer.ref_model is None) == (beta == 0)


@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(adapter, tokenizer, make_llama):
    after = []
    for checkpointing in (False, True):
        model = make_llama(0, F64)
        if adapter:
            torch.manual_seed(4)
            model = add_adapter(model, lora_config(4, 8.0))
        config = settings_of(GRPOConfig, gradient_checkpointing=checkpointing)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        trainer = GRPOTrainer(model, config, processing_class=tokenizer, optimizers=(optimizer, None))
        assert trainer.learn(trajectories_of(group_rows(len(tokenizer))))["grad_norm"] > 1e-3
        after.append(model.state_dict())
    for name, parameter in after[0].items():
        torch.testing.assert_close(parameter, after[1][name], atol=1e-12, rtol=0, msg=name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # the compiler's own
def test_layers_and_head_are_compiled_on_request(tokenizer, make_llama):
    model = make_llama()
    trainer = GRPOTrainer(model, settings_of(GRPOConfig, compile=True), processing_class=tokenizer)
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    head = trainer.learner.policy.head
    assert (
        head.passes.scores
        is not GRPOTrainer(
            make_llama(), settings_of(GRPOConfig), processing_class=tokenizer
        ).learner.policy.head.passes.scores
    )


def test_cuda_graphs_need_a_gpu(tokenizer, make_llama):
    config = settings_of(GRPOConfig, cuda_graphs=True)
    with pytest.raises(ConfigError, match="one CUDA device"):
        GRPOTrainer(make_llama(), config, processing_class=tokenizer).sampler  # noqa: B018


def test_a_model_by_the_name_of_its_directory(tokenizer, make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    trainer = RLOOTrainer(str(tmp_path), settings_of(RLOOConfig), processing_class=tokenizer)
    assert torch.equal(trainer.model.lm_head.weight, make_llama().lm_head.weight)


# ---- whole runs ----


def vowel_share(completions):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


RUN_TASKS = [{"prompt": f"say {word}:"} for word in ("one", "two", "three", "four", "five")]


@pytest.fixture
def make_group_trainer(tokenizer, make_llama, tmp_path):
    def make(directory="run", config_class=GRPOConfig, adapter=False, generation=None, **settings):
        torch.manual_seed(3)
        model = make_llama()
        if adapter:
            model = add_adapter(model, lora_config(4, 8.0, 0.0, None))
        generation = {"max_new_tokens": 8, **(generation or {})}
        environment = TextEnvironment(
            model, tokenizer, rewards=vowel_share, max_turns=1, generation_kwargs=generation
        )
        settings = {
            "output_dir": str(tmp_path / directory),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "num_iterations": 2,
            "max_steps": 12,
            "learning_rate": 3e-3,
            "eval_steps": 2,
            "success_reward": 0.3,
            "disable_progress": True,
            "load_best_model_at_end": False,
            **settings,
        }
        return TRAINERS[config_class](
            model,
            config_class(**settings),
            environment=environment,
            train_dataset=RUN_TASKS,
            eval_dataset=RUN_TASKS[:2],
            test_dataset=RUN_TASKS[2:],
        )

    return make


def untimed(directory):
    timed = ("time", "tokens_per_second")
    return [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in RunDirectory(directory).read_metrics()
    ]


def test_tasks_are_played_in_groups(make_group_trainer, tmp_path):
    trainer = make_group_trainer(max_steps=2, episodes_to_log=-1)
    played = [trainer._task(step, i)["prompt"] for step in range(5) for i in range(8)]
    assert all(len(set(played[i : i + 4])) == 1 for i in range(0, 40, 4))
    for epoch in (played[:20:4], played[20::4]):
        assert sorted(epoch) == sorted(row["prompt"] for row in RUN_TASKS)
    assert (
        make_group_trainer(max_steps=-1, num_train_epochs=2).total_iterations == 5
    )  # 2 × 5 tasks, 2 at a time
    assert make_group_trainer(max_steps=7).total_iterations == 4  # 2 optimizer steps each

    summary = trainer.train()
    assert summary.steps == 1
    episodes = RunDirectory(tmp_path / "run").read_episodes(split="train")
    for group in (episodes[:4], episodes[4:]):
        assert len({episode.prompt for episode in group}) == 1
        assert len({episode.completion for episode in group}) == 4, "each from a seed of its own"


@pytest.mark.parametrize(
    "settings",
    [
        {"config_class": GRPOConfig, "beta": 0.02},
        {"config_class": RLOOConfig},
        {"config_class": GRPOConfig, "beta": 0.02, "adapter": True},
    ],
    ids=["grpo", "rloo", "adapter"],
)
def test_a_resumed_group_run_is_the_same_run(make_group_trainer, tmp_path, settings):
    whole = make_group_trainer("whole", save_steps=3, **settings)
    summary = whole.train()
    assert summary.steps == 6
    assert "<html" in summary.report.read_text()
    first = make_group_trainer("parts", save_steps=3, **settings)
    first.config.max_steps = 6
    first.train()
    second = make_group_trainer("parts", save_steps=3, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    start = make_group_trainer("start", **settings).model.state_dict()
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, second.model.state_dict()[name]), name
    assert any(not torch.equal(p, start[n]) for n, p in whole.model.state_dict().items())
    row = next(row for row in untimed(tmp_path / "whole") if "reward" in row)
    assert {"loss", "kl", "entropy", "ratio", "clip_ratio", "grad_norm"} <= set(row)
    assert row["sampler/gap_max"] < 2e-4


def test_it_learns(make_group_trainer, tmp_path):
    make_group_trainer(max_steps=24, learning_rate=1e-2, eval_steps=0, steps_per_generation=2).train()
    rewards = [row["reward"] for row in untimed(tmp_path / "run") if "reward" in row]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.2


def test_dynamic_sampling_fills_the_batch_with_groups_that_tell(make_group_trainer, tmp_path):
    """Some tasks always score 0: their groups are replaced by others, the same in a resumed run."""

    def trainer_in(directory, **settings):
        trainer = make_group_trainer(directory, dynamic_sampling=True, episodes_to_log=-1, **settings)

        def fickle(prompts, completions):
            return [0.0 if "o" in p else len(set(c)) / 8 for p, c in zip(prompts, completions, strict=True)]

        environment = trainer.environment
        trainer.environment = TextEnvironment(
            trainer.model,
            trainer.tokenizer,
            rewards=fickle,
            max_turns=1,
            generation_kwargs={"max_new_tokens": environment.params.max_new_tokens},
        )
        return trainer

    trainer = trainer_in("whole", max_sampling_rounds=30, max_steps=4)
    played, batch = trainer.collect(0)
    assert len(batch) == 8 < len(played)
    for group in trainer._groups(batch):
        assert len({episode.prompt for episode in group}) == 1
        assert len({episode.reward for episode in group}) > 1
    assert [episode.token_ids for episode in trainer.collect(0)[1]] == [e.token_ids for e in batch]
    trainer.train()
    rows = [row for row in untimed(tmp_path / "whole") if "reward" in row]
    assert all(row["frac_reward_zero_std"] == 0.0 for row in rows)
    whole = RunDirectory(tmp_path / "whole").read_episodes(split="train")
    assert len(whole) > 16, "what was played is written, whether it was learned from or not"

    few = trainer_in("few", max_sampling_rounds=1)
    played, batch = few.collect(0)
    assert len(played) == len(batch) == 8
    assert len([group for group in few._groups(batch) if few._tells(group)]) < 2


def test_truncated_completions_are_compared_and_not_trained_on(make_group_trainer, tmp_path):
    plain = make_group_trainer(max_steps=2)
    trainer = make_group_trainer(max_steps=2, mask_truncated_completions=True)
    _, batch = trainer.collect(0)
    cut = [episode.stop is StopReason.TURN_TOKENS for episode in batch]
    assert any(cut)
    assert [not len(trainer.trajectory(episode).sampled) for episode in batch] == cut
    assert all(trainer.trajectory(episode).compared for episode in batch)
    assert all(len(plain.trajectory(episode).sampled) for episode in batch)
    changed = make_group_trainer(stop_policies={"turn_tokens": {"reward": "clamp"}})
    assert all(changed.trajectory(e).score <= 0 for e, c in zip(batch, cut, strict=True) if c)


def test_the_batches_are_explained_in_one_line(make_group_trainer, capsys):
    trainer = make_group_trainer(gradient_accumulation_steps=1, steps_per_generation=2)
    assert trainer.describe_batches() == (
        "batches: 2 tasks × 4 = 8 episodes an iteration, in steps of 4 (4 per pass), 2 times over: "
        "4 optimizer steps; × 3 iterations = 12 steps, 24 episodes"
    )


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (
            GRPOConfig,
            {"stop_policies": {"bored": {}}},
            "stop_policies names 'bored'; expected one of submitted",
        ),
        (GRPOConfig, {"stop_policies": {"done": {"reward": "halve"}}}, "expected keep, clamp or drop"),
        (
            GRPOConfig,
            {"stop_policies": {"done": {"rewards": "keep"}}},
            "unexpected keyword argument 'rewards'",
        ),
        (GRPOConfig, {"importance_sampling_cap": 0.5}, r"importance_sampling_cap is 0\.5"),
        (GRPOConfig, {"dynamic_sampling": True, "max_sampling_rounds": 0}, "max_sampling_rounds is 0"),
        (GRPOConfig, {"num_generations": 1}, r"num_generations is 1; expected at least 2.*a group of one"),
        (GRPOConfig, {"num_generations": 3}, r"= 8 episodes per process; expected a multiple of num_gen"),
        (GRPOConfig, {"steps_per_generation": 3}, "expected a multiple of gradient_accumulation_steps"),
        (GRPOConfig, {"loss_type": "dr_grpo"}, "set max_completion_length"),
        (GRPOConfig, {"max_completion_length": 9}, "does nothing without loss_type dr_grpo"),
        (GRPOConfig, {"loss_type": "ppo"}, "loss_type is 'ppo'; expected one of grpo, dr_grpo"),
        (GRPOConfig, {"scale_rewards": "std"}, "scale_rewards is 'std'"),
        (GRPOConfig, {"loss_type": "cispo", "importance_sampling_level": "sequence"}, "cispo weighs tokens"),
        (GRPOConfig, {"beta": -1.0}, "beta is -1.0"),
        (RLOOConfig, {"epsilon": -0.1}, "epsilon is -0.1"),
        (RLOOConfig, {"max_steps": 0}, "max_steps is 0"),
        (RLOOConfig, {"num_train_epochs": 0}, "num_train_epochs is 0"),
        (RLOOConfig, {"temperature": 0.7}, r"samples at temperature 1.0.*0.7; set both to the same"),
    ],
)
def test_settings_that_users_get_wrong(make_group_trainer, config_class, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_group_trainer(config_class=config_class, **settings)


def test_other_things_that_users_get_wrong(make_group_trainer, make_llama, tokenizer):
    config = settings_of(GRPOConfig)
    with pytest.raises(ConfigError, match="args is a RLOOConfig; expected a GRPOConfig"):
        GRPOTrainer(make_llama(), settings_of(RLOOConfig), processing_class=tokenizer)
    with pytest.raises(ConfigError, match="ref_model does nothing while beta is 0"):
        GRPOTrainer(make_llama(), config, processing_class=tokenizer, ref_model=make_llama())
    with pytest.raises(ModelError, match="its pretrained_model"):
        GRPOTrainer(AutoModelForCausalLMWithValueHead(make_llama()), config, processing_class=tokenizer)
    with pytest.raises(ConfigError, match="GRPOTrainer needs the model's tokenizer"):
        GRPOTrainer(make_llama(), config)
    assert GRPOConfig(scale_rewards=True).reward_scale == "group"
    assert GRPOConfig(scale_rewards=False).reward_scale == "none"
