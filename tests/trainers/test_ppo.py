"""PPO: one step against an independent implementation, the settings, and what users get wrong."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import GPTJConfig, GPTJForCausalLM

from etude.data.batch import Trajectory
from etude.errors import ConfigError, DataError, ModelError, RewardError
from etude.models.adapters import add_adapter
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.models.value_model import ValueModel
from etude.trainers.ppo import PPOTrainer
from etude.trainers.ppo_config import PPOConfig

F64 = torch.float64
TRL_KEYS = {
    "objective/kl",
    "objective/kl_dist",
    "objective/logprobs",
    "objective/ref_logprobs",
    "objective/kl_coef",
    "objective/entropy",
    "ppo/mean_non_score_reward",
    "ppo/mean_scores",
    "ppo/std_scores",
    "tokens/queries_len_mean",
    "tokens/queries_len_std",
    "tokens/queries_dist",
    "tokens/responses_len_mean",
    "tokens/responses_len_std",
    "tokens/responses_dist",
    "ppo/loss/policy",
    "ppo/loss/value",
    "ppo/loss/total",
    "ppo/policy/entropy",
    "ppo/policy/approxkl",
    "ppo/policy/policykl",
    "ppo/policy/clipfrac",
    "ppo/policy/advantages",
    "ppo/policy/advantages_mean",
    "ppo/policy/ratio",
    "ppo/returns/mean",
    "ppo/returns/var",
    "ppo/val/vpred",
    "ppo/val/error",
    "ppo/val/clipfrac",
    "ppo/val/mean",
    "ppo/val/var",
    "ppo/val/var_explained",
    "ppo/learning_rate",
    "time/ppo/forward_pass",
    "time/ppo/compute_rewards",
    "time/ppo/compute_advantages",
    "time/ppo/optimize_step",
    "time/ppo/calc_stats",
    "time/ppo/total",
}


def batch(vocabulary, rows=6, seed=0):
    """Queries, responses of uneven length, masks with holes, scores."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high, shape):
        return torch.randint(0, high, shape, generator=generator)

    queries = [integers(vocabulary, (2 + i % 3,)) for i in range(rows)]
    responses = [integers(vocabulary, (4 + 2 * i,)) for i in range(rows)]
    masks = [(torch.rand(len(r), generator=generator) < 0.6).long() for r in responses]
    for mask in masks:
        mask[0] = 1
    scores = torch.randn(rows, generator=generator, dtype=F64).tolist()
    return queries, responses, masks, scores


def naive_ppo_step(model, reference, config, queries, responses, masks, scores, shuffles):
    """PPO as a student would write it: plain forwards, one sequence at a time, loops over tokens."""

    def look(policy, query, response):
        logits, _, values = policy(torch.cat([query, response])[None])
        states = slice(len(query) - 1, len(query) + len(response) - 1)
        distributions = logits[0, states].log_softmax(-1)
        return distributions.gather(-1, response[:, None])[:, 0], values[0, states], distributions

    rows = []
    with torch.no_grad():
        for query, response, mask, score in zip(queries, responses, masks, scores, strict=True):
            at = mask.nonzero()[:, 0].tolist()
            logprobs, values, full = look(model, query, response)
            ref_logprobs, _, ref_full = look(reference, query, response)
            kl = []
            for t in at:
                difference = (logprobs[t] - ref_logprobs[t]).item()
                kl.append(
                    {
                        "kl": difference,
                        "abs": abs(difference),
                        "mse": difference**2 / 2,
                        "full": (full[t].exp() * (full[t] - ref_full[t])).sum().item(),
                    }[config.kl_penalty]
                )
            rewards = [-config.init_kl_coef * k for k in kl]
            rewards[-1] += score
            value = [values[t].item() for t in at]
            advantages = []
            for i in range(len(at)):  # the definition: a discounted sum of temporal differences
                total = 0.0
                for j in range(i, len(at)):
                    following = value[j + 1] if j + 1 < len(at) else 0.0
                    delta = rewards[j] + config.gamma * following - value[j]
                    total += (config.gamma * config.lam) ** (j - i) * delta
                advantages.append(total)
            returns = [a + v for a, v in zip(advantages, value, strict=True)]
            rows.append((query, response, at, logprobs[at], values[at], advantages, returns))
    everything = np.array([a for row in rows for a in row[5]])
    mean, std = everything.mean(), math.sqrt(everything.var(ddof=1) + 1e-8)

    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate)
    step = config.mini_batch_size * config.gradient_accumulation_steps
    for order in shuffles:
        for start in range(0, len(order), step):
            chosen = [rows[i] for i in order[start : start + step]]
            count = sum(len(row[2]) for row in chosen)
            loss = torch.zeros((), dtype=F64)
            for query, response, at, old_logprobs, old_values, advantages, returns in chosen:
                logprobs, values, _ = look(model, query, response)
                for i, t in enumerate(at):
                    ratio = (logprobs[t] - old_logprobs[i]).exp()
                    advantage = (advantages[i] - mean) / std
                    kept = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
                    loss = loss + torch.max(-advantage * ratio, -advantage * kept) / count
                    near = values[t].clamp(
                        old_values[i] - config.cliprange_value, old_values[i] + config.cliprange_value
                    )
                    worst = torch.max((values[t] - returns[i]) ** 2, (near - returns[i]) ** 2)
                    loss = loss + config.vf_coef * 0.5 * worst / count
            optimizer.zero_grad()
            loss.backward()
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()


class RecordedOrder:
    """Lets a test see in which order the trainer went through the batch."""

    def __init__(self, monkeypatch):
        self.shuffles = []
        original = torch.randperm

        def randperm(*args, **kwargs):
            order = original(*args, **kwargs)
            self.shuffles.append(order.tolist())
            return order

        monkeypatch.setattr(torch, "randperm", randperm)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mini_batch_size": 2},
        {"mini_batch_size": 1, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5},
        {"kl_penalty": "full", "gamma": 0.9, "lam": 0.7},
        {"kl_penalty": "abs", "vf_coef": 0.5},
        {"kl_penalty": "mse", "cliprange": 0.05, "cliprange_value": 0.01},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:the KL to the reference")  # the responses are random: nobody sampled them
def test_a_step_equals_an_independent_implementation(
    settings, family, tokenizer, make_llama, make_gpt2, monkeypatch
):
    make = make_llama if family == "llama" else make_gpt2
    config = PPOConfig(
        **{"batch_size": 6, "mini_batch_size": 6, "ppo_epochs": 2, "learning_rate": 0.05, **settings}
    )
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(AutoModelForCausalLMWithValueHead(make(0, F64)))
    reference = AutoModelForCausalLMWithValueHead(make(5, F64))
    ours, naive = models
    data = batch(len(tokenizer))
    # Not Adam, which would blow rounding up where a gradient is nearly zero.
    optimizer = torch.optim.SGD(ours.parameters(), lr=config.learning_rate)
    trainer = PPOTrainer(config, ours, reference, tokenizer, optimizer=optimizer)
    recorded = RecordedOrder(monkeypatch)
    stats = trainer.step(data[0], data[1], data[3], data[2])
    assert len(recorded.shuffles) == 2
    naive_ppo_step(naive, reference, config, *data, recorded.shuffles)
    start = AutoModelForCausalLMWithValueHead(make(0, F64)).state_dict()
    moved = 0.0
    for name, parameter in ours.state_dict().items():
        # Scores and whitening run in float32; everything else is float64.
        torch.testing.assert_close(parameter, naive.state_dict()[name], atol=2e-6, rtol=0, msg=name)
        if "v_head" not in name:
            moved = max(moved, (parameter - start[name]).abs().max().item())
    assert moved > 1e-3
    assert stats["ppo/policy/clipfrac"] >= 0


class NaivePair(torch.nn.Module):
    """A policy and a critic with nothing in common, called as `naive_ppo_step` calls a model."""

    def __init__(self, policy, critic):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.head = torch.nn.Linear(32, 1).double()

    def forward(self, input_ids):
        trunk = self.critic.get_decoder()
        states = trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.policy(input_ids=input_ids, use_cache=False).logits, None, self.head(states)[..., 0]


@pytest.mark.parametrize(
    "settings",
    [
        {"mini_batch_size": 2},
        {"mini_batch_size": 1, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5},
        {"kl_penalty": "full", "vf_coef": 0.5},
        {"gradient_checkpointing": True, "max_tokens_per_pass": 20},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "unpacked"])
@pytest.mark.filterwarnings("ignore:the KL to the reference")
def test_a_step_of_two_models_equals_an_independent_implementation(
    settings, family, tokenizer, make_llama, make_gpt2, monkeypatch
):
    config = PPOConfig(
        **{"batch_size": 6, "mini_batch_size": 6, "ppo_epochs": 2, "learning_rate": 0.05, **settings}
    )

    def make_critic(dtype=F64):
        torch.manual_seed(7)
        if family != "unpacked":
            return (make_llama if family == "llama" else make_gpt2)(7, dtype)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "initializer_range": 0.2}
        return GPTJForCausalLM(GPTJConfig(vocab_size=len(tokenizer), **sizes)).to(dtype).eval()

    naive = NaivePair(make_llama(0, F64), make_critic())
    policy, critic = make_llama(0, F64), ValueModel(make_critic())
    critic.v_head.summary.load_state_dict(naive.head.state_dict())
    start = {name: p.clone() for name, p in naive.named_parameters()}
    reference = NaivePair(make_llama(5, F64), make_critic())
    data = batch(len(tokenizer))
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=config.learning_rate)
    trainer = PPOTrainer(config, policy, reference.policy, tokenizer, optimizer=optimizer, value_model=critic)
    assert trainer.accelerator.unwrap_model(trainer.learner.policy).values_pack == (family != "unpacked")
    recorded = RecordedOrder(monkeypatch)
    trainer.step(data[0], data[1], data[3], data[2])
    naive_ppo_step(naive, reference, config, *data, recorded.shuffles)
    pairs = {
        "policy": (policy, naive.policy),
        "critic": (critic.model, naive.critic.get_decoder()),
        "head": (critic.v_head.summary, naive.head),
    }
    moved = dict.fromkeys(pairs, 0.0)
    for part, (ours, theirs) in pairs.items():
        expected = theirs.state_dict()
        assert expected
        for name, parameter in ours.state_dict().items():
            torch.testing.assert_close(parameter, expected[name], atol=2e-6, rtol=0, msg=f"{part} {name}")
    for name, parameter in naive.named_parameters():
        part = name.partition(".")[0]
        moved[part] = max(moved[part], (parameter - start[name]).abs().max().item())
    assert min(moved.values()) > 1e-4, moved
    assert not torch.equal(policy.lm_head.weight, start["policy.lm_head.weight"])


def test_the_first_ratio_is_one(tokenizer, make_gpt2):
    """Also for a model with dropout, in training mode, in mini-batches other than those that observed."""
    model = AutoModelForCausalLMWithValueHead(make_gpt2()).train()
    config = PPOConfig(batch_size=6, mini_batch_size=3, ppo_epochs=1, learning_rate=0.0)
    queries, responses, masks, scores = batch(len(tokenizer))
    stats = PPOTrainer(config, model, tokenizer=tokenizer).step(queries, responses, scores, masks)
    assert np.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
    assert stats["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_accumulation_equals_one_large_batch(tokenizer, make_llama):
    """1 × 6, 3 × 2 and 6 × 1 end in the same weights: denominators count the whole step."""
    results = []
    for size in (6, 2, 1):
        torch.manual_seed(1)
        model = AutoModelForCausalLMWithValueHead(make_llama(0, F64))
        config = PPOConfig(
            batch_size=6, mini_batch_size=size, gradient_accumulation_steps=6 // size, learning_rate=1e-3
        )
        queries, responses, masks, scores = batch(len(tokenizer))
        PPOTrainer(config, model, tokenizer=tokenizer).step(queries, responses, scores, masks)
        results.append(model.state_dict())
    for other in results[1:]:
        for name, parameter in results[0].items():
            torch.testing.assert_close(parameter, other[name], atol=1e-8, rtol=0, msg=name)


def test_statistics_have_trl_s_keys(tokenizer, make_llama):
    config = PPOConfig(batch_size=6, mini_batch_size=3)
    queries, responses, masks, scores = batch(len(tokenizer))
    trainer = PPOTrainer(config, AutoModelForCausalLMWithValueHead(make_llama()), tokenizer=tokenizer)
    stats = trainer.step(queries, responses, scores, masks)
    assert not TRL_KEYS - set(stats)
    assert stats["ppo/mean_scores"] == pytest.approx(np.mean(scores))
    assert stats["ppo/std_scores"] == pytest.approx(np.std(scores, ddof=1))
    assert stats["tokens/responses_len_mean"] == 9.0


def test_scores_scaled_normalised_clipped(tokenizer, make_llama):
    def scaled(**settings):
        config = PPOConfig(batch_size=4, mini_batch_size=4, **settings)
        trainer = PPOTrainer(config, AutoModelForCausalLMWithValueHead(make_llama()), tokenizer=tokenizer)
        tokens = torch.tensor([1, 2])
        played = [Trajectory.of_response(tokens, tokens, score) for score in (1.0, 2.0, 3.0, 6.0)]
        return trainer._scaled(played)[0].tolist()

    std = math.sqrt(14 / 3)  # of 1, 2, 3, 6 around 3, unbiased
    assert scaled() == [1, 2, 3, 6]
    assert scaled(use_score_scaling=True) == pytest.approx([x / std for x in (1, 2, 3, 6)], rel=1e-5)
    normalised = scaled(use_score_scaling=True, use_score_norm=True)
    assert normalised == pytest.approx([(x - 3) / std for x in (1, 2, 3, 6)], rel=1e-5)
    assert scaled(score_clip=2.5) == [1, 2, 2.5, 2.5]


def test_kl_control(tokenizer, make_llama):
    queries, responses, masks, scores = batch(len(tokenizer))
    reference = AutoModelForCausalLMWithValueHead(make_llama(5))

    def coefficient(**settings):
        config = PPOConfig(batch_size=6, mini_batch_size=6, target=0.01, horizon=100, **settings)
        model = AutoModelForCausalLMWithValueHead(make_llama())
        trainer = PPOTrainer(config, model, reference, tokenizer)
        stats = trainer.step(queries, responses, scores, masks)
        return stats["objective/kl"], trainer.kl_ctl.value

    kl, adapted = coefficient()
    error = max(-0.2, min(0.2, kl / 0.01 - 1))
    assert adapted == pytest.approx(0.2 * (1 + error * 6 / 100))
    assert coefficient(adap_kl_ctrl=False)[1] == 0.2


def test_a_negative_kl_is_reported_with_its_cause(tokenizer, make_gpt2):
    queries, responses, masks, scores = batch(len(tokenizer))  # random: not sampled from the policy
    model, reference = (AutoModelForCausalLMWithValueHead(make_gpt2(seed)) for seed in (0, 5))
    trainer = PPOTrainer(PPOConfig(batch_size=6, mini_batch_size=6), model, reference, tokenizer)
    with pytest.warns(UserWarning, match="not sampled from the policy itself"):
        assert trainer.step(queries, responses, scores, masks)["objective/kl"] < -1


def test_without_kl_there_is_no_reference(tokenizer, make_llama, monkeypatch):
    """Nothing is copied, nothing computed, and no statistic says that the KL is 0."""
    queries, responses, masks, scores = batch(len(tokenizer))
    settings = {"batch_size": 6, "mini_batch_size": 3, "adap_kl_ctrl": False, "learning_rate": 1e-3}

    def trained(reference=None, **more):
        torch.manual_seed(1)
        model = AutoModelForCausalLMWithValueHead(make_llama(0, F64))
        trainer = PPOTrainer(PPOConfig(**settings, **more), model, reference, tokenizer)
        calls = []
        forward = trainer.learner._forward
        trainer.learner._forward = lambda policy, *args, **kwargs: (
            calls.append(policy),
            forward(policy, *args, **kwargs),
        )[1]
        return trainer, trainer.step(queries, responses, scores, masks), len(calls)

    monkeypatch.setattr("etude.trainers.policy.create_reference_model", None)  # calling it would raise
    alone, stats, passes = trained(init_kl_coef=0.0)
    assert alone.ref_model is None
    assert alone.learner.reference is None
    assert not TRL_KEYS - set(stats)
    assert math.isnan(stats["objective/kl"])
    for name in ("objective/kl_dist", "objective/ref_logprobs"):
        assert np.isnan(stats[name]).all()
    assert "kl" not in stats
    with pytest.raises(ConfigError, match=r"pass ref_model="):
        alone.generate(queries, max_new_tokens=2, generate_ref_response=True)

    # A reference that is given is looked at, though it moves nothing.
    other, measured, more = trained(AutoModelForCausalLMWithValueHead(make_llama(5, F64)), init_kl_coef=0.0)
    assert abs(measured["objective/kl"]) > 1e-3
    assert measured["kl"] == measured["objective/kl"]
    assert more == passes + 2  # observed in two mini-batches
    for name, parameter in alone.model.state_dict().items():
        assert torch.equal(parameter, other.model.state_dict()[name]), name
    with pytest.raises(ConfigError, match="num_shared_layers is of the reference"):
        PPOTrainer(
            PPOConfig(**settings, init_kl_coef=0.0), make_llama(), tokenizer=tokenizer, num_shared_layers=1
        )


def test_shared_layers_take_their_memory_once(tokenizer, make_llama):
    def bytes_held(num_shared_layers):
        model = AutoModelForCausalLMWithValueHead(make_llama(num_hidden_layers=3))
        config = PPOConfig(batch_size=6, mini_batch_size=3, learning_rate=1e-2)
        trainer = PPOTrainer(config, model, tokenizer=tokenizer, num_shared_layers=num_shared_layers)
        queries, responses, masks, scores = batch(len(tokenizer))
        trainer.step(queries, responses, scores, masks)  # what was shared still is
        tensors = [*model.parameters(), *trainer.ref_model.parameters()]
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tensors}
        return sum(storages.values()), model, trainer.ref_model

    size = lambda *modules: sum(p.nbytes for module in modules for p in module.parameters())  # noqa: E731
    twice, model, _ = bytes_held(None)
    assert twice == 2 * size(model)
    shared, model, reference = bytes_held(2)
    decoder = model.pretrained_model.model
    assert shared == 2 * size(model) - size(decoder.embed_tokens, *decoder.layers[:2])
    assert not torch.equal(decoder.norm.weight, reference.pretrained_model.model.norm.weight), "it learned"


def test_early_stopping_and_the_ratio_threshold(tokenizer, make_llama, monkeypatch):
    queries, responses, masks, scores = batch(len(tokenizer))

    def epochs(**settings):
        config = PPOConfig(
            batch_size=6, mini_batch_size=6, ppo_epochs=5, learning_rate=0.02, adap_kl_ctrl=False, **settings
        )
        model = AutoModelForCausalLMWithValueHead(make_llama())
        stats = PPOTrainer(config, model, tokenizer=tokenizer).step(queries, responses, scores, masks)
        return len(stats["ppo/policy/ratio"]) // sum(int(mask.sum()) for mask in masks)

    assert epochs() == 5
    assert epochs(early_stopping=True, target_kl=1e-6) < 5
    with pytest.warns(UserWarning, match="the mini-batch is skipped"):
        epochs(ratio_threshold=0.5)


@pytest.mark.filterwarnings("ignore:the KL to the reference")
def test_a_skipped_mini_batch_changes_nothing_even_where_the_ratio_overflowed(trainer, tokenizer):
    queries, responses, masks, scores = batch(len(tokenizer))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    observe = trainer.learner.observe

    def long_ago(*args):
        experience = observe(*args)
        experience.logprobs = experience.logprobs - 200.0  # e^200 is inf in float32
        return experience

    trainer.learner.observe = long_ago
    with pytest.warns(UserWarning, match="the mini-batch is skipped"):
        trainer.step(queries, responses, scores, masks)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_lora_s_reference_is_the_base_model(tokenizer, make_llama):
    base = make_llama()
    model = AutoModelForCausalLMWithValueHead(
        add_adapter(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    )
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    config = PPOConfig(batch_size=6, mini_batch_size=3, learning_rate=5e-3)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer)
    assert trainer.ref_model is None
    queries, responses, masks, scores = batch(len(tokenizer))
    first = trainer.step(queries, responses, scores, masks)
    second = trainer.step(queries, responses, scores, masks)
    assert abs(first["objective/kl"]) < 1e-5
    assert abs(second["objective/kl"]) > 1e-4, "the adapters moved"
    np.testing.assert_allclose(first["objective/ref_logprobs"], second["objective/ref_logprobs"], atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    ours, references = trainer.generate(queries, max_new_tokens=8, generate_ref_response=True)
    with_base = PPOTrainer(config, AutoModelForCausalLMWithValueHead(make_llama()), tokenizer=tokenizer)
    assert [r.tolist() for r in references] == [
        r.tolist() for r in with_base.generate(queries, max_new_tokens=8)
    ]
    assert [r.tolist() for r in ours] != [r.tolist() for r in references]


def test_generate(tokenizer, make_llama):
    model = AutoModelForCausalLMWithValueHead(make_llama(dtype=F64))
    trainer = PPOTrainer(PPOConfig(batch_size=1), model, tokenizer=tokenizer)
    queries = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    greedy = trainer.generate(queries, max_new_tokens=6, eos_token_id=-1)
    expected = model.generate(
        queries[0][None],
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert greedy[0].tolist() == expected[0].tolist()
    without = trainer.generate(queries, return_prompt=False, max_new_tokens=6, eos_token_id=-1)
    assert [r.tolist() for r in without] == [
        g[len(q) :].tolist() for g, q in zip(greedy, queries, strict=True)
    ]
    single = trainer.generate(queries[0], max_new_tokens=6, eos_token_id=-1)
    assert single.shape == (1, 9)
    lengths = iter([3, 5])
    sampled = trainer.generate(
        queries, length_sampler=lambda: next(lengths), return_prompt=False, do_sample=True, eos_token_id=-1
    )
    assert [len(r) for r in sampled] == [3, 5]
    pair = trainer.generate(queries, generate_ref_response=True, max_new_tokens=4)
    assert [r.tolist() for r in pair[0]] == [r.tolist() for r in pair[1]], "before training they are one"
    with pytest.raises(DataError, match=r"shape \(1, 3\)"):
        trainer.generate(torch.tensor([[1, 2, 3]]))


@pytest.fixture
def trainer(tokenizer, make_llama):
    config = PPOConfig(batch_size=6, mini_batch_size=3)
    return PPOTrainer(config, AutoModelForCausalLMWithValueHead(make_llama()), tokenizer=tokenizer)


def test_what_users_get_wrong_in_a_step(trainer, tokenizer):
    queries, responses, masks, scores = batch(len(tokenizer))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(DataError, match="queries has 5 entries; expected batch_size = 6"):
        trainer.step(queries[:5], responses, scores, masks)
    with pytest.raises(DataError, match=r"responses\[0\] is shape \(1, 4\)"):
        trainer.step(queries, [responses[0][None], *responses[1:]], scores)
    with pytest.raises(DataError, match="scores is a Tensor; expected a list"):
        trainer.step(queries, responses, torch.zeros(6))
    with pytest.raises(DataError, match=r"scores\[1\] has shape \(2,\)"):
        trainer.step(queries, responses, [0.0, torch.zeros(2), 0.0, 0.0, 0.0, 0.0])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(RewardError, match=r"scores\[2\] is (nan|inf); expected a finite number"):
            trainer.step(queries, responses, [0.0, 0.0, bad, 0.0, 0.0, 0.0], masks)
    with pytest.raises(DataError, match="mask"):
        trainer.step(queries, responses, scores, [mask[:-1] for mask in masks])
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), "nothing was lost"


def test_masked_episodes(trainer, tokenizer):
    queries, responses, masks, scores = batch(len(tokenizer))
    masks[2] = torch.zeros_like(masks[2])
    stats = trainer.step(queries, responses, scores, masks)
    assert all(math.isfinite(value) for value in stats.values() if isinstance(value, float))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.warns(UserWarning, match="nothing to learn"):
        trainer.step(queries, responses, scores, [torch.zeros_like(mask) for mask in masks])
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_what_learn_refuses(trainer, tokenizer):
    queries, responses, masks, scores = batch(len(tokenizer))
    rows = [Trajectory.of_response(*row) for row in zip(queries, responses, scores, masks, strict=True)]
    with pytest.raises(DataError, match="learn got no trajectories"):
        trainer.learn([])
    for bad in (math.nan, -math.inf):
        with pytest.raises(RewardError, match=r"score of trajectory 2 is (nan|-inf)"):
            trainer.learn([*rows[:2], replace(rows[2], score=bad), *rows[3:]])
    with pytest.raises(DataError, match="give the model a prompt"):
        trainer.step([torch.tensor([], dtype=torch.long), *queries[1:]], responses, scores)
    assert math.isfinite(trainer.learn(rows[:5])["loss"]), "the last mini-batch is smaller"


def test_constant_scores_do_not_blow_up(trainer, tokenizer):
    queries, responses, masks, _ = batch(len(tokenizer))
    trainer.step(queries, responses, [1.0] * 6, masks)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 7, "mini_batch_size": 2},
            r"7 is not a multiple of 2 × 1 = 2; the nearest that is: 8",
        ),
        ({"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 3}, r"2 × 3 = 6"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"kl_penalty": "k9"}, "expected one of kl, abs, mse, full"),
        ({"use_score_norm": True}, "use_score_scaling"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, "repo_id"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**settings)


def test_what_users_get_wrong_in_setting_up(tokenizer, make_llama):
    model = AutoModelForCausalLMWithValueHead(make_llama())
    with pytest.raises(ConfigError, match="expected a PPOConfig"):
        PPOTrainer({"batch_size": 1}, model, tokenizer=tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokenizer"):
        PPOTrainer(PPOConfig(batch_size=1), model)
    with pytest.raises(ModelError, match="expected an AutoModelForCausalLMWithValueHead"):
        PPOTrainer(PPOConfig(batch_size=1), torch.nn.Linear(2, 2), tokenizer=tokenizer)  # type: ignore[arg-type]
    frozen = AutoModelForCausalLMWithValueHead.from_pretrained(make_llama(), is_trainable=False)
    with pytest.raises(ModelError, match="requires a gradient"):
        PPOTrainer(PPOConfig(batch_size=1), frozen, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="num_shared_layers"):
        PPOTrainer(PPOConfig(batch_size=1), model, model, tokenizer, num_shared_layers=1)
    with pytest.raises(ConfigError, match="output_dir"):
        PPOTrainer(PPOConfig(batch_size=1), model, tokenizer=tokenizer).train()
    plain = PPOTrainer(PPOConfig(batch_size=1), make_llama(), tokenizer=tokenizer)
    assert isinstance(plain.model, AutoModelForCausalLMWithValueHead)


def test_a_dataloader_of_one_s_own(tokenizer, make_llama):
    from datasets import Dataset

    rows = [{"input_ids": [1, 2, 3 + i], "query": str(i), "label": i, "review": "long"} for i in range(10)]
    dataset = Dataset.from_list(rows)
    dataset.set_format("torch")
    trainer = PPOTrainer(
        PPOConfig(batch_size=4),
        AutoModelForCausalLMWithValueHead(make_llama()),
        tokenizer=tokenizer,
        dataset=dataset,
        data_collator=lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
    )
    batches = list(trainer.dataloader)
    assert len(batches) == 2, "the incomplete one is dropped"
    assert set(batches[0]) == {"input_ids", "query", "label"}
    response = trainer.generate(
        batches[0]["input_ids"], return_prompt=False, max_new_tokens=3, do_sample=True
    )
    stats = trainer.step(batches[0]["input_ids"], response, [torch.tensor(1.0)] * 4)
    trainer.log_stats(stats, {**batches[0], "response": ["x"] * 4}, [torch.tensor(1.0)] * 4)


def test_log_stats_writes_to_the_run_directory(tokenizer, make_llama, tmp_path):
    from etude.runtime.run import RunDirectory

    config = PPOConfig(batch_size=6, mini_batch_size=3, output_dir=str(tmp_path / "run"))
    trainer = PPOTrainer(config, AutoModelForCausalLMWithValueHead(make_llama()), tokenizer=tokenizer)
    queries, responses, masks, scores = batch(len(tokenizer))
    stats = trainer.step(queries, responses, scores, masks)
    trainer.log_stats(stats, {"query": ["a"] * 6, "response": ["b"] * 6}, scores)
    [row] = RunDirectory(config.output_dir).read_metrics()
    assert row["step"] == 1
    assert row["env/reward_mean"] == pytest.approx(np.mean(scores))
    assert row["ppo/loss/total"] == pytest.approx(stats["ppo/loss/total"])


def test_save_and_reload(tokenizer, make_llama, tmp_path):
    trainer = PPOTrainer(
        PPOConfig(batch_size=1), AutoModelForCausalLMWithValueHead(make_llama()), tokenizer=tokenizer
    )
    trainer.save_pretrained(tmp_path / "model")
    reloaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[1, 2, 3]])
    for ours, theirs in zip(trainer.model(ids), reloaded(ids), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "ppo" in card
