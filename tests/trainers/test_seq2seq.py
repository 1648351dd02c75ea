"""Encoder–decoders in the online trainers: what a step computes, and from episodes to better weights."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from encoder_decoders import BOS, EOS, FAMILIES, FIRST, START, VOCAB, make_seq2seq, seq2seq_tokenizer

from etude import (
    AutoModelForSeq2SeqLMWithValueHead,
    GRPOConfig,
    GRPOTrainer,
    IterativeSFTConfig,
    IterativeSFTTrainer,
    MixedEnvironment,
    PPOConfig,
    PPOTrainer,
    ReinforceConfig,
    ReinforcePlusPlusConfig,
    ReinforcePlusPlusTrainer,
    ReinforceTrainer,
    RLOOConfig,
    RLOOTrainer,
    RunDirectory,
    TextEnvironment,
    TextHistory,
)
from etude.data.batch import Trajectory
from etude.errors import ConfigError, DataError, ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.forward import PolicyForward
from etude.models.loading import load_language_model
from etude.models.value_head import load_with_value_head
from etude.trainers.learner import Learner

F64 = torch.float64
TASKS = [{"prompt": text} for text in ("one", "number two", "3", "and four")]


@pytest.fixture(scope="session")
def tokenizer():
    return seq2seq_tokenizer()


def with_values(family="t5", dtype=torch.float32, seed=0):
    model = AutoModelForSeq2SeqLMWithValueHead(make_seq2seq(family, dtype, seed))
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.3)
    return model


def batch(seed=0, forced=(START,)):
    """Two answers to each of three sources, of uneven lengths; (queries, responses, scores)."""
    generator = torch.Generator().manual_seed(seed)
    sources = [torch.randint(FIRST, VOCAB, (n,), generator=generator) for n in (3, 8, 5)]
    queries = [sources[i % 3] for i in range(6)]
    said = [torch.randint(FIRST, VOCAB, (2 + i,), generator=generator) for i in range(6)]
    responses = [torch.cat([torch.tensor(forced), ids]) for ids in said]
    return queries, responses, torch.randn(6, generator=generator).tolist()


def plain(model, query, response):
    """(log-probabilities, values) of what was sampled, by transformers' forward with labels."""
    logits, _, values = model(input_ids=query[None], labels=response[None, 1:])
    chosen = logits[0].log_softmax(-1).gather(-1, response[1:, None])[:, 0]
    return chosen, values[0]


FIRST_WEIGHT = {
    "t5": "block.0.layer.0.SelfAttention.v.weight",
    "bart": "layers.0.self_attn.v_proj.weight",
    "marian": "layers.0.self_attn.v_proj.weight",
}


@pytest.mark.parametrize("family", FIRST_WEIGHT)
def test_a_ppo_step_by_hand(family, tokenizer):
    """KL, rewards, advantages, and the gradient that an optimizer of 1 · gradient is given."""
    model = with_values(family, F64)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    if family == "bart":
        model.pretrained_model.generation_config.forced_bos_token_id = None
    before = copy.deepcopy(model)
    config = PPOConfig(batch_size=6, mini_batch_size=6, ppo_epochs=1, init_kl_coef=0.2, vf_coef=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = PPOTrainer(config, model, reference, tokenizer, optimizer=optimizer)
    assert trainer.is_encoder_decoder
    assert trainer.config.is_encoder_decoder
    queries, responses, scores = batch()
    stats = trainer.step(queries, responses, scores)

    kls, advantages, returns, terms = [], [], [], []
    for query, response, score in zip(queries, responses, scores, strict=True):
        logprobs, values = plain(before, query, response)
        with torch.no_grad():
            kl = logprobs - plain(reference, query, response)[0]
            rewards = -0.2 * kl
            rewards[-1] += score
            following = torch.cat([values[1:], values.new_zeros(1)])
            deltas = rewards + following - values
            gae = [
                sum(deltas[j] * 0.95 ** (j - i) for j in range(i, len(deltas))) for i in range(len(deltas))
            ]
        kls.append(kl.sum())
        advantages += gae
        returns += [a + v for a, v in zip(gae, values.detach(), strict=True)]
        terms.append((logprobs, values))
    advantages, returns = torch.stack(advantages), torch.stack(returns)
    whitened = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
    logprobs, values = (torch.cat(parts) for parts in zip(*terms, strict=True))
    ratio = (logprobs - logprobs.detach()).exp()
    loss = -(whitened * ratio).mean() + 0.5 * 0.5 * ((values - returns) ** 2).mean()
    loss.backward()

    assert stats["objective/kl"] == pytest.approx(torch.stack(kls).mean().item(), abs=1e-6)
    assert stats["ppo/returns/mean"] == pytest.approx(returns.mean().item(), abs=1e-6)
    assert stats["ppo/val/vpred"] == pytest.approx(values.mean().item(), abs=1e-6)
    assert np.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
    assert stats["tokens/queries_len_mean"] == pytest.approx((3 + 8 + 5) / 3)
    assert stats["tokens/responses_len_mean"] == pytest.approx(1 + 4.5)
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        expected = then - 1e-3 * then.grad if then.grad is not None else then
        torch.testing.assert_close(now, expected, rtol=1e-6, atol=1e-7, msg=name)
    assert before.pretrained_model.get_encoder().get_parameter(FIRST_WEIGHT[family]).grad.abs().max() > 1e-3


OUTCOMES = [
    {"mini_batch_size": 2, "accumulation": 3},
    {"mini_batch_size": 6, "max_tokens_per_pass": 16},
    {"mini_batch_size": 3, "accumulation": 2, "share_prefixes": False},
    {"mini_batch_size": 1, "accumulation": 6},
]


def outcome(kl_kind, **settings):
    """What was observed, the weights after an update, and the sources and rows of each pass."""
    model = with_values("bart", F64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    accelerator = Accelerator()
    policy, optimizer = accelerator.prepare(PolicyForward(model), optimizer)
    reference = PolicyForward(make_seq2seq("bart", F64, seed=3))
    given = {"mini_batch_size": 6, "accumulation": 1, "epochs": 2, "max_grad_norm": 1.0, "temperature": 0.9}
    learner = Learner(accelerator, policy, reference, optimizer, kl_kind=kl_kind, **{**given, **settings})
    passes = []
    policy.register_forward_pre_hook(lambda _, args: passes.append((args[10].lengths, args[1])))
    rows = [Trajectory.of_response(q, r, s, starts=[(START,)]) for q, r, s in zip(*batch(), strict=True)]
    for i, row in enumerate(rows):
        row.bootstrap = i % 2 == 0
    experience = learner.observe(rows)

    def loss(minibatch):
        weights = torch.tensor(minibatch.indices, dtype=F64)[:, None] - 2
        terms = (minibatch.values**2 - weights * minibatch.logprobs) * minibatch.observed.mask
        return terms.sum() / minibatch.denominator, {}

    learner.update(experience, loss, torch.Generator().manual_seed(3))
    return experience, model.state_dict(), passes


@pytest.mark.parametrize("settings", OUTCOMES, ids=str)
@pytest.mark.parametrize("kl_kind", ["k1", "full"])
def test_cutting_a_step_up_changes_nothing(kl_kind, settings):
    whole, weights, once = outcome(kl_kind)
    cut, cut_weights, passes = outcome(kl_kind, **settings)
    for name in ("mask", "logprobs", "values", "ref_logprobs", "kl", "last_values", "entropies"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=0, atol=1e-11)
    torch.testing.assert_close(cut_weights, weights, rtol=0, atol=1e-10)
    assert whole.kl.abs().max() > 0.01
    assert all(len(sources) == 3 for sources, _ in once)
    assert len(passes) > len(once)
    if settings["mini_batch_size"] == 2:
        assert all(len(sources) == 1 for sources, _ in passes), "a group's answers share a pass"
    limit = settings.get("max_tokens_per_pass")
    assert limit is None or all(sum(s) + sum(n) <= limit or len(n) == 1 for s, n in passes)


TRAINERS = {
    "grpo": (GRPOTrainer, GRPOConfig, {"beta": 0.04}),
    "rloo": (RLOOTrainer, RLOOConfig, {"beta": 0.04}),
    "reinforce": (ReinforceTrainer, ReinforceConfig, {}),
    "reinforce++": (ReinforcePlusPlusTrainer, ReinforcePlusPlusConfig, {}),
    "iterative sft": (IterativeSFTTrainer, IterativeSFTConfig, {}),
}


def trainer_of(kind, model, environment, **settings):
    """A trainer that plays 16 episodes an iteration, four of each task but for PPO and REINFORCE."""
    common = {"learning_rate": 3e-3, "disable_progress": True, **settings}
    if kind == "ppo":
        steps = common.pop("max_steps", 1) * 16
        config = PPOConfig(batch_size=16, mini_batch_size=16, steps=steps, ppo_epochs=2, **common)
        return PPOTrainer(config, model, environment=environment, train_dataset=TASKS)
    trainer, config, own = TRAINERS[kind]
    settings = {"max_steps": 1, "num_generations": 4, **own, **common}
    args = config(per_device_train_batch_size=16, **settings)
    return trainer(model, args, environment=environment, train_dataset=TASKS)


def early_letters(completions):
    """Planted: the share of letters from a to m."""
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in completions]


def playing(model, tokenizer, **settings):
    kwargs = {"max_new_tokens": 8, **settings}
    return TextEnvironment(
        model, tokenizer, rewards=early_letters, max_turns=1, max_length=None, generation_kwargs=kwargs
    )


@pytest.mark.parametrize("kind", ["ppo", *TRAINERS])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_iteration_of_each_algorithm(kind, family, tokenizer, tmp_path):
    """The first ratio is 1, the sampler's log-probabilities are the trainer's, and weights move."""
    model = make_seq2seq(family)
    settings = {"num_generations": 1} if kind == "reinforce" else {}
    before = {name: p.clone() for name, p in model.named_parameters()}
    environment = playing(model, tokenizer)
    trainer = trainer_of(kind, model, environment, output_dir=str(tmp_path), **settings)
    if kind == "ppo":
        trainer.config.ppo_epochs = trainer.learner.epochs = 1
    trainer.train()
    [row] = RunDirectory(tmp_path).read_metrics()
    assert row["sampler/gap_max"] < 2e-4
    if kind == "ppo":
        assert row["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert row["ppo/policy/clipfrac"] == 0
    elif "ratio" in row:
        assert row["ratio"] == pytest.approx(1, abs=1e-6)
    for part in ("encoder", "decoder"):
        assert any((p != before[name]).any() for name, p in model.named_parameters() if part in name)
    again = load_language_model(tmp_path)
    assert type(again) is type(model)
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in again.named_parameters())
    assert (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("family", "kind"), [("t5", "ppo"), ("t5", "rloo"), ("bart", "ppo"), ("bart", "grpo")]
)
def test_a_planted_reward_goes_up(family, kind, tokenizer, tmp_path):
    environment = playing(make_seq2seq(family), tokenizer)
    settings = {"output_dir": str(tmp_path), "max_steps": 14, "learning_rate": 1e-2, "save_steps": 0}
    if kind == "ppo":
        settings |= {"init_kl_coef": 0.01, "adap_kl_ctrl": False}
    trainer_of(kind, environment.model, environment, **settings).train()
    rewards = [row["reward"] for row in RunDirectory(tmp_path).read_metrics()]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.15


def test_a_resumed_run_ends_in_the_same_weights(tokenizer, tmp_path):
    ends = []
    for folder, stops in (("whole", (4,)), ("cut", (2, 4))):
        for i, stop in enumerate(stops):
            model = with_values("t5")
            settings = {"output_dir": str(tmp_path / folder), "max_steps": stop, "save_steps": 2}
            trainer = trainer_of("ppo", model, playing(model, tokenizer), **settings)
            trainer.train(resume_from_checkpoint=i > 0)
        ends.append(model.state_dict())
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    saved = load_with_value_head(tmp_path / "cut")
    torch.testing.assert_close(saved.state_dict(), ends[0], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_adapters_are_their_own_reference(family, tokenizer):
    model = add_adapter(make_seq2seq(family), lora_config(4, 8.0))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    args = GRPOConfig(per_device_train_batch_size=6, num_generations=2, beta=0.1, learning_rate=1e-2)
    trainer = GRPOTrainer(model, args, processing_class=tokenizer)
    assert trainer.ref_model is None
    rows = [Trajectory.of_response(q, r, s, starts=[(START,)]) for q, r, s in zip(*batch(), strict=True)]
    first, second = trainer.learn(rows), trainer.learn(rows)
    assert first["kl"] == 0
    assert first["ratio"] == pytest.approx(1, abs=1e-6)
    assert second["kl"] > 1e-4
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    parts = {
        part
        for part in ("encoder", "decoder")
        for n, p in model.named_parameters()
        if f".{part}." in n and "lora_B" in n and p.any()
    }
    assert parts == {"encoder", "decoder"}


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_what_transformers_generates(family, tokenizer):
    model = with_values(family)
    trainer = PPOTrainer(PPOConfig(batch_size=3, mini_batch_size=3), model, tokenizer=tokenizer)
    queries = batch()[0][:3]
    responses = trainer.generate(queries, max_new_tokens=7)
    forced = [BOS] if family == "bart" else []
    for query, response in zip(queries, responses, strict=True):
        settings = {"max_new_tokens": 7 + len(forced), "do_sample": False, "forced_eos_token_id": None}
        expected = model.generate(query[None], **settings)[0]
        assert response.tolist() == expected.tolist()
        assert response[: 1 + len(forced)].tolist() == [START, *forced]
    assert torch.equal(trainer.generate(queries[0], return_prompt=False, max_new_tokens=7)[0], responses[0])
    both = trainer.generate(queries, generate_ref_response=True, max_new_tokens=7)
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)), "the reference is a copy as yet"
    assert all(torch.equal(a, b) for a, b in zip(both[0], responses, strict=True))
    stats = trainer.step(queries, responses, [1.0, 0.0, 0.5])
    trained = sum(len(response) - 1 - len(forced) for response in responses)
    assert (stats["objective/logprobs"] != 0).sum() == trained, "what is forced wasn't sampled"


def test_generate_begins_where_it_is_told_and_step_knows(tokenizer):
    trainer = PPOTrainer(
        PPOConfig(batch_size=2, mini_batch_size=2), with_values("mbart"), tokenizer=tokenizer
    )
    queries, responses, _ = batch()
    with pytest.raises(DataError, match=f"begins with token 9; expected the decoder's start token, {START}:"):
        trainer.step(queries[:2], [torch.tensor([9, 10, 11])] * 2, [1.0, 0.0])
    said = trainer.generate(queries[:2], decoder_start_token_id=9, forced_bos_token_id=10, max_new_tokens=4)
    assert [response[:2].tolist() for response in said] == [[9, 10]] * 2
    stats = trainer.step(queries[:2], said, [1.0, 0.0])
    assert (stats["objective/logprobs"] != 0).sum() == sum(len(response) - 2 for response in said)
    with pytest.raises(DataError, match=f"begins with token .*; expected the .* {START} or 9"):
        trainer.step(queries[:2], [response[1:] for response in responses[:2]], [1.0, 0.0])


def test_what_an_environment_begins_with_is_known_to_step(tokenizer):
    model = with_values("mbart")
    environment = playing(model, tokenizer, decoder_start_token_id=8)
    config = PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1)
    trainer = PPOTrainer(config, model, environment=environment)
    queries, responses, masks, rewards, histories = environment.run(TASKS)
    for query, response, mask, history in zip(queries, responses, masks, histories, strict=True):
        assert query.tolist() == history.episode.source_ids
        assert response[0] == 8
        assert mask.tolist() == [0] + [1] * (len(response) - 1)
    stats = trainer.step(queries, responses, rewards, masks)
    assert np.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6


def test_what_the_environments_of_a_mixed_one_begin_with_is_known_to_step(tokenizer):
    model = make_seq2seq("mbart")
    parts = {
        "to eight": playing(model, tokenizer, decoder_start_token_id=8),
        "as it is": playing(model, tokenizer),
    }
    mixed = MixedEnvironment(parts)
    config = PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1)
    trainer = PPOTrainer(config, model, environment=mixed, tokenizer=tokenizer)
    assert trainer.starts == [(START,), (8,)]


def test_histories_in_lock_step(tokenizer):
    """What a caller's history holds before its first turn is read by the encoder."""
    model = make_seq2seq("bart")
    environment = playing(model, tokenizer, do_sample=False)
    ids = torch.tensor(tokenizer("number two").input_ids)
    [history] = environment.generate([TextHistory("number two", ids)])
    query, response, mask = history.split_query_response_tokens()
    assert torch.equal(query, ids)
    settings = {"max_new_tokens": 9, "do_sample": False, "forced_eos_token_id": None}
    assert response.tolist() == model.generate(ids[None], **settings)[0].tolist()
    assert mask.tolist() == [0, 0] + [1] * (len(response) - 2)
    [again] = environment.generate([history])
    assert again.episode.source_ids == ids.tolist()
    assert len(again.episode.segments) == 4


def test_expert_iteration_on_answers_of_one_s_own(tokenizer):
    model = make_seq2seq("t5", F64)
    args = IterativeSFTConfig(per_device_train_batch_size=3, num_generations=1, learning_rate=1e-2)
    trainer = IterativeSFTTrainer(model, args, processing_class=tokenizer)
    queries, responses, _ = batch()
    labels = [torch.cat([response[1:], torch.tensor([EOS])]) for response in responses[:3]]
    labels[1][1] = -100
    expected = [
        model(input_ids=query[None], labels=wanted[None]).loss * (wanted != -100).sum()
        for query, wanted in zip(queries, labels, strict=False)
    ]
    loss = trainer.step(input_ids=queries[:3], labels=labels)["loss"]
    assert loss == pytest.approx(sum(expected).item() / sum((w != -100).sum() for w in labels).item())
    assert trainer.step(input_ids=queries[:3], labels=labels)["loss"] < loss
    with pytest.raises(DataError, match="an encoder-decoder learns to answer: pass input_ids"):
        trainer.step(texts=["one"])


def test_what_is_refused(tokenizer, make_llama):
    config = PPOConfig(batch_size=2, mini_batch_size=2)
    with pytest.raises(ModelError, match="can't have a value model of its own; leave value_model out"):
        PPOTrainer(config, make_seq2seq(), tokenizer=tokenizer, value_model=make_seq2seq("bart"))
    with pytest.raises(
        ModelError, match="T5ForConditionalGeneration is an encoder-decoder model; expected a"
    ):
        PPOTrainer(config, make_llama(), tokenizer=tokenizer, value_model=make_seq2seq())
    with pytest.raises(ModelError, match=r"language model of transformers \(its pretrained_model\)"):
        GRPOTrainer(with_values(), GRPOConfig(), processing_class=tokenizer)
    trainer = PPOTrainer(config, make_llama(), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="decoder_start_token_id: the model is a decoder"):
        trainer.generate([torch.tensor([5, 6])], decoder_start_token_id=2)
