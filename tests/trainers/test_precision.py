"""Half precision: by autocast, in the model's weights, and what is refused."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from decoder_families import FAMILIES, make_family
from encoder_decoders import VOCAB, make_seq2seq, seq2seq_tokenizer

from etude.data.batch import Trajectory
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.loading import load_causal_lm
from etude.models.value_head import AutoModelForCausalLMWithValueHead, load_with_value_head
from etude.runtime.run import RunDirectory
from etude.trainers.group_config import GRPOConfig
from etude.trainers.grpo import GRPOTrainer
from etude.trainers.ppo import PPOTrainer
from etude.trainers.ppo_config import PPOConfig

BF16 = {"mixed_precision": "bf16"}


@pytest.fixture(autouse=True)
def _a_precision_of_its_own():
    """Accelerate keeps the first trainer's precision for a process's life."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def with_values(trunk):
    torch.manual_seed(1)
    return AutoModelForCausalLMWithValueHead(trunk, v_head_init_strategy="normal")


def half_rows(rows=8):
    generator = torch.Generator().manual_seed(2)

    def ids(n):
        return torch.randint(0, 50, (n,), generator=generator)

    return [(ids(3 + i % 3), ids(4 + 5 * (i % 3) + i), float(i % 4)) for i in range(rows)]


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "weights"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gptj", "bloom"])
def test_a_step_in_bfloat16(family, weights, tokenizer):
    """Observation and update compute the same, in passes of their own: the first ratio is exactly 1."""
    classes, configuration, _ = FAMILIES[family]
    exact = with_values(make_family(classes, configuration, torch.float32))
    model = with_values(make_family(classes, configuration, weights))
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: gradients.__setitem__(name, g.dtype))
    config = PPOConfig(
        batch_size=8,
        mini_batch_size=2,
        gradient_accumulation_steps=4,
        ppo_epochs=1,
        max_grad_norm=1.0,
        accelerator_kwargs=BF16 if weights == torch.float32 else {},
    )
    trainer = PPOTrainer(config, model, tokenizer=tokenizer, optimizer=sgd(model))
    queries, responses, scores = zip(*half_rows(), strict=True)
    observed = trainer.learner.observe([Trajectory.of_response(*row) for row in half_rows()])
    stats = trainer.step(list(queries), list(responses), list(scores))
    assert all(np.isfinite(value).all() for value in stats.values())
    assert np.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
    assert np.abs(stats["objective/kl_dist"]).max() == 0
    assert {observed.logprobs.dtype, observed.values.dtype, observed.entropies.dtype} == {torch.float32}
    assert model.v_head.summary.weight.dtype == torch.float32
    assert all(gradients[name] == parameter.dtype for name, parameter in model.named_parameters())
    # Far from a plain float32 forward by no more than bfloat16's 8 bits explain, and not the same.
    for i, (query, response, _) in enumerate(half_rows()):
        with torch.no_grad():
            logits, _, values = exact(torch.cat([query, response])[None])
        states = slice(len(query) - 1, -1)
        expected = logits[0, states].log_softmax(-1).gather(-1, response[:, None])[:, 0]
        logprobs, found = observed.logprobs[i, : len(response)], observed.values[i, : len(response)]
        assert 0 < (logprobs - expected).abs().max() < 0.5
        assert (logprobs - expected).abs().mean() < 0.05
        assert (found - values[0, states]).abs().mean() < 0.1


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "weights"])
@pytest.mark.parametrize("family", ["t5", "t5 gated", "bart"])
def test_an_encoder_decoder_s_step_in_bfloat16(family, weights):
    """T5's attention takes another kernel where its bias has a gradient: observed and updated by the same."""
    torch.manual_seed(0)
    model = load_with_value_head(make_seq2seq(family, weights), v_head_init_strategy="normal")
    config = PPOConfig(
        batch_size=8,
        mini_batch_size=2,
        gradient_accumulation_steps=4,
        ppo_epochs=1,
        gradient_checkpointing=family == "t5",
        accelerator_kwargs=BF16 if weights == torch.float32 else {},
    )
    trainer = PPOTrainer(config, model, tokenizer=seq2seq_tokenizer(), optimizer=sgd(model))
    queries, responses, scores = zip(*half_rows(), strict=True)
    said = [torch.cat([torch.tensor(trainer.starts[0]), ids.clamp(max=VOCAB - 1)]) for ids in responses]
    stats = trainer.step([query.clamp(max=VOCAB - 1) for query in queries], said, list(scores))
    assert np.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
    assert np.abs(stats["objective/kl_dist"]).max() == 0
    assert np.abs(stats["objective/logprobs"]).max() > 1


def test_the_first_ratio_in_every_optimizer_step_s_own_passes(tokenizer, make_llama):
    """GRPO with a reference, rows without a sampled token among the others, and a budget of tokens."""
    config = GRPOConfig(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        beta=0.1,
        max_tokens_per_pass=30,
        accelerator_kwargs=BF16,
    )
    model = make_llama()
    trainer = GRPOTrainer(model, config, processing_class=tokenizer, optimizers=(sgd(model), None))
    rows = [
        Trajectory.of_response(*(row if i not in (1, 6) else (*row, torch.zeros(len(row[1])))))
        for i, row in enumerate(half_rows())
    ]
    stats = trainer.learn(rows)
    assert stats["ratio"] == pytest.approx(1, abs=1e-6)
    assert stats["kl"] == 0
    assert stats["approxkl"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_sampler_s_gap_is_logged_and_within_its_precision(precision, tokenizer, make_llama, tmp_path):
    model = with_values(make_llama())
    env = TextEnvironment(
        model,
        tokenizer,
        rewards=lambda completions: [float(len(c) % 3) for c in completions],
        max_turns=1,
        generation_kwargs={"max_new_tokens": 16},
    )
    config = PPOConfig(
        output_dir=str(tmp_path),
        batch_size=8,
        mini_batch_size=4,
        ppo_epochs=1,
        steps=16,
        disable_progress=True,
        accelerator_kwargs={"mixed_precision": precision},
    )
    tasks = [{"prompt": f"say {word}:"} for word in ("one", "two", "three", "four")]
    PPOTrainer(config, model, environment=env, train_dataset=tasks).train()
    gaps = [row["sampler/gap_max"] for row in RunDirectory(tmp_path).read_metrics()]
    assert len(gaps) == 2
    assert max(gaps) < (2e-4 if precision == "no" else 0.1)
    again = load_causal_lm(tmp_path)
    assert again.dtype == torch.float32
    assert torch.equal(again.lm_head.weight, model.pretrained_model.lm_head.weight)


def test_adapters_on_half_precision_weights_are_in_float32(tokenizer, make_llama):
    for weights in (torch.bfloat16, torch.float16):
        model = with_values(add_adapter(make_llama(dtype=weights), lora_config(4, 8.0)))
        config = PPOConfig(
            batch_size=8, mini_batch_size=4, gradient_accumulation_steps=2, ppo_epochs=1, learning_rate=1e-3
        )
        trainer = PPOTrainer(config, model, tokenizer=tokenizer)
        queries, responses, scores = zip(*half_rows(), strict=True)
        stats = trainer.step(list(queries), list(responses), list(scores))
        assert np.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        assert all(torch.isfinite(p).all() for p in trained)
        moved = [p.any() for name, p in model.named_parameters() if "lora_B" in name]
        assert len(moved) > 0
        assert all(moved)


def test_weights_in_which_small_steps_are_lost(tokenizer, make_llama):
    with pytest.raises(ModelError, match=r"weights to train are float16.*load the model in float32"):
        PPOTrainer(PPOConfig(), with_values(make_llama(dtype=torch.float16)), tokenizer=tokenizer)
    model = make_llama(dtype=torch.bfloat16)
    before = model.model.norm.weight.clone()
    config = GRPOConfig(
        per_device_train_batch_size=8, num_generations=4, gradient_accumulation_steps=1, learning_rate=1e-5
    )
    with pytest.warns(UserWarning, match="less than 1/256 of a weight is lost"):
        trainer = GRPOTrainer(model, config, processing_class=tokenizer)
    assert trainer.learn([Trajectory.of_response(*row) for row in half_rows()])["loss"] is not None
    assert torch.equal(model.model.norm.weight, before), "which is what the warning is about"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is here")
def test_float16_needs_a_gpu(tokenizer, make_llama):
    config = PPOConfig(accelerator_kwargs={"mixed_precision": "fp16"})
    with pytest.raises(ConfigError, match="fp16 does nothing without a GPU"):
        PPOTrainer(config, with_values(make_llama()), tokenizer=tokenizer)
