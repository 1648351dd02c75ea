"""REINFORCE, REINFORCE++ and what all algorithms share, against an independent implementation."""

import statistics

import pytest
import torch

from etude.data.batch import Trajectory
from etude.errors import ConfigError
from etude.trainers.group_config import GRPOConfig, ReinforceConfig, ReinforcePlusPlusConfig, RLOOConfig
from etude.trainers.grpo import GRPOTrainer
from etude.trainers.reinforce import ReinforceTrainer
from etude.trainers.reinforce_plus_plus import ReinforcePlusPlusTrainer
from etude.trainers.rloo import RLOOTrainer
from etude.types import NamedReward

F64 = torch.float64
TRAINERS = {
    ReinforceConfig: ReinforceTrainer,
    ReinforcePlusPlusConfig: ReinforcePlusPlusTrainer,
    RLOOConfig: RLOOTrainer,
    GRPOConfig: GRPOTrainer,
}


def episodes(vocabulary, turn_rewards=False, count=6):
    """Trajectories with holes between sampled tokens, the last without any; perhaps rewards at tokens."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        query = torch.randint(0, vocabulary, (2 + i % 3,), generator=generator)
        response = torch.randint(0, vocabulary, (5 + i,), generator=generator)
        mask = (torch.rand(len(response), generator=generator) < 0.7).long()
        mask[:2] = 1 if i < count - 1 else 0
        mask = mask if i < count - 1 else torch.zeros_like(mask)
        end = torch.randn((), generator=generator, dtype=F64).item()
        row = Trajectory.of_response(query, response, end, mask)
        row.sampler_logprobs = -3 * torch.rand(len(row.sampled), generator=generator, dtype=F64) - 2.5
        row.rewards = (NamedReward("answer", end),)
        if turn_rewards and len(row.sampled):
            early = torch.randn((), generator=generator, dtype=F64).item()
            row.rewards += (NamedReward("turn", early, position=int(row.sampled[1])),)
            row.score += early
        rows.append(row)
    return rows


def logprobs_of(model, row):
    logits = model(row.token_ids[None]).logits[0].log_softmax(-1)
    return logits[row.sampled - 1].gather(-1, row.token_ids[row.sampled][:, None])[:, 0], logits[
        row.sampled - 1
    ]


def to_go(values):
    return [sum(values[i:]) for i in range(len(values))]


def plain_advantages(config, rows, old, ref):
    """A list per episode with a number per token, by the formulas' words."""
    kl = [(o - r).tolist() for o, r in zip(old, ref, strict=True)]
    present = [i for i, row in enumerate(rows) if len(row.sampled)]
    follow = []
    for row in rows:
        early = {
            int((row.sampled == reward.position).nonzero()): reward.value
            for reward in row.rewards
            if reward.position is not None
        }
        gained = [early.get(i, 0.0) for i in range(len(row.sampled))]
        if gained:
            gained[-1] += row.score - sum(gained)
        follow.append(to_go(gained))
    if isinstance(config, ReinforceConfig):
        total = [row.score - config.beta * sum(kl[i]) for i, row in enumerate(rows)]
        mean = statistics.fmean(total[i] for i in present)
        spread = statistics.stdev(total[i] for i in present) + 1e-4 if config.normalize_advantages else 1.0
        return [[(g - config.beta * sum(kl[i]) - mean) / spread for g in follow[i]] for i in range(len(rows))]
    size = config.num_generations
    if size == 1:
        tokens = [
            [g - config.beta * k for g, k in zip(follow[i], to_go(kl[i]), strict=True)]
            for i in range(len(rows))
        ]
    else:
        tokens = []
        for i in range(len(rows)):
            group = [rows[j].score for j in present if j // size == i // size]
            tokens.append([g - statistics.fmean(group) for g in follow[i]])
    everything = [token for row in tokens for token in row]
    mean, spread = statistics.fmean(everything), statistics.variance(everything)
    return [[(token - mean) / (spread + 1e-8) ** 0.5 for token in row] for row in tokens]


def plain_gradient(model, reference, config, rows):
    """By plain forwards, one sequence at a time, of the one optimizer step on the batch."""
    with torch.no_grad():
        old = [logprobs_of(model, row)[0] for row in rows]
        ref = [logprobs_of(reference, row)[0] for row in rows]
    advantages = plain_advantages(config, rows, old, ref)
    acting = sum(len(row.sampled) > 0 for row in rows)
    tokens = sum(len(row.sampled) for row in rows)
    loss = torch.zeros((), dtype=F64)
    for i, row in enumerate(rows):
        if not len(row.sampled):
            continue
        logprobs, everything = logprobs_of(model, row)
        weights = torch.tensor(advantages[i], dtype=F64)
        if config.importance_sampling_correction == "token_truncate":
            gap = old[i] - row.sampler_logprobs
            weights = weights * gap.exp().clamp_max(config.importance_sampling_cap)
        elif config.importance_sampling_correction == "sequence_mask":
            whole = (old[i] - row.sampler_logprobs).sum().exp()
            weights = weights * (whole if whole <= config.importance_sampling_cap else 0)
        entropy = -(everything.exp() * everything).sum(-1).sum() / tokens
        loss = loss - config.entropy_coef * entropy
        if isinstance(config, ReinforceConfig):
            loss = loss - (weights * logprobs).sum() / acting
        else:
            ratio = (logprobs - old[i]).exp()  # 1, so that nothing is clipped
            loss = loss - (weights * ratio).sum() / tokens
            if config.num_generations > 1:
                loss = loss + config.beta * ((logprobs - ref[i]) ** 2 / 2).sum() / tokens
    loss.backward()


@pytest.mark.parametrize("turns", [False, True], ids=["end", "turns"])
@pytest.mark.parametrize(
    ("config_class", "settings"),
    [
        (ReinforceConfig, {}),
        (ReinforceConfig, {"beta": 0.2, "entropy_coef": 0.3}),
        (ReinforceConfig, {"normalize_advantages": True}),
        (ReinforceConfig, {"importance_sampling_correction": "token_truncate", "beta": 0.1}),
        (
            ReinforceConfig,
            {"importance_sampling_correction": "sequence_mask", "importance_sampling_cap": 3.0},
        ),
        (ReinforcePlusPlusConfig, {"beta": 0.2}),
        (ReinforcePlusPlusConfig, {"beta": 0.0, "entropy_coef": 0.1}),
        (ReinforcePlusPlusConfig, {"beta": 0.2, "num_generations": 3}),
        (ReinforcePlusPlusConfig, {"importance_sampling_correction": "token_truncate", "beta": 0.1}),
    ],
    ids=str,
)
def test_a_step_equals_an_independent_implementation(config_class, settings, turns, tokenizer, make_llama):
    config = config_class(per_device_train_batch_size=6, learning_rate=0.05, max_grad_norm=None, **settings)
    ours, plain, reference = make_llama(0, F64), make_llama(0, F64), make_llama(5, F64)
    trainer = TRAINERS[config_class](
        ours,
        config,
        processing_class=tokenizer,
        ref_model=make_llama(5, F64) if config.beta else None,
        optimizers=(torch.optim.SGD(ours.parameters(), lr=0.05), None),
    )
    rows = episodes(len(tokenizer), turns)
    stats = trainer.learn(rows)
    plain_gradient(plain, reference, config, rows)
    moved = 0.0
    for (name, parameter), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected - 0.05 * expected.grad, atol=1e-10, rtol=0, msg=name)
        moved = max(moved, (0.05 * expected.grad).abs().max().item())
    assert moved > 1e-4
    assert {"sampler/gap_mean", "sampler/gap_max", "entropy", "loss"} <= set(stats)
    assert ("sampler/weight_max" in stats) == (config.importance_sampling_correction != "none")


@pytest.mark.parametrize("config_class", [RLOOConfig, GRPOConfig])
def test_turn_rewards_reach_the_tokens_before_them(config_class, tokenizer, make_llama):
    """RLOO: a token's advantage is what follows it less the others' scores; GRPO: process supervision."""
    rows = episodes(len(tokenizer), turn_rewards=True)[:4]
    config = config_class(per_device_train_batch_size=4, num_generations=4, beta=0.0)
    trainer = TRAINERS[config_class](make_llama(0, F64), config, processing_class=tokenizer)
    experience = trainer.learner.observe(rows)
    advantages = trainer.spread(trainer._advantages(experience), experience)
    for i, row in enumerate(rows):
        early, count = row.rewards[1].value, len(row.sampled)
        if config_class is RLOOConfig:
            others = statistics.fmean(rows[j].score for j in range(4) if j != i)
            expected = [row.score - others] * 2 + [row.score - early - others] * (count - 2)
        else:
            given = [r.rewards[1].value for r in rows] + [r.rewards[0].value for r in rows]
            mean, spread = statistics.fmean(given), statistics.stdev(given) + 1e-4
            end = (row.rewards[0].value - mean) / spread
            expected = [end + (early - mean) / spread] * 2 + [end] * (count - 2)
        assert advantages[i, :count].tolist() == pytest.approx(expected, abs=1e-6)
        assert not advantages[i, count:].any()


def test_reinforce_asks_for_one_step_per_batch() -> None:
    with pytest.raises(ConfigError, match="good for one optimizer step"):
        ReinforceConfig(num_iterations=2)
    with pytest.raises(ConfigError, match="good for one optimizer step"):
        ReinforceConfig(steps_per_generation=2)


def test_an_entropy_bonus_keeps_variety(tokenizer, make_llama) -> None:
    entropies = []
    for coef in (0.0, 5.0):
        config = GRPOConfig(
            per_device_train_batch_size=4, num_generations=4, learning_rate=1e-2, entropy_coef=coef
        )
        trainer = GRPOTrainer(make_llama(), config, processing_class=tokenizer)
        for _ in range(5):
            stats = trainer.learn(episodes(len(tokenizer))[:4])
        entropies.append(stats["entropy"])
    assert entropies[1] > entropies[0] + 0.05


def test_one_step_on_a_batch_needs_no_pass_before_it(tokenizer, make_llama) -> None:
    """The update's own log-probabilities are the old ones: the same weights as with a pass before."""
    after, gaps = [], []
    for correction in ("none", "token_truncate"):  # with a cap that is never reached, and weights of 1
        rows = episodes(len(tokenizer))[:4]
        model = make_llama(0, F64)
        for row in rows:
            row.sampler_logprobs = logprobs_of(model, row)[0].detach()
        config = GRPOConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_generations=4,
            importance_sampling_correction=correction,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = GRPOTrainer(model, config, processing_class=tokenizer, optimizers=(optimizer, None))
        stats = trainer.learn(rows)
        gaps.append(stats["sampler/gap_max"])
        after.append(model.state_dict())
    assert max(gaps) < 1e-10
    for name, parameter in after[0].items():
        torch.testing.assert_close(parameter, after[1][name], atol=1e-12, rtol=0, msg=name)
