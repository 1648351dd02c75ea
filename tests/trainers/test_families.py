"""A step of PPO and of GRPO on every kind of decoder of transformers."""

import numpy as np
import pytest
import torch
from decoder_families import FAMILIES, VOCAB, make_family

from etude.data.batch import Trajectory
from etude.models.adapters import add_adapter, lora_config
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.trainers.group_config import GRPOConfig
from etude.trainers.grpo import GRPOTrainer
from etude.trainers.ppo import PPOTrainer
from etude.trainers.ppo_config import PPOConfig

# They compute attention, states or a softmax in float32 whatever the model is in.
ROUNDED = {"gemma2", "gptj", "codegen", "mpt", "gpt_neo", "llama4", "mamba", "mamba2"}


def family_trunk(family, **settings):
    classes, configuration, _ = FAMILIES[family]
    return make_family(classes, {**configuration, **settings})


def with_values(trunk):
    torch.manual_seed(1)
    return AutoModelForCausalLMWithValueHead(trunk, v_head_init_strategy="normal")


def sampled_rows():
    """Queries, responses of uneven length, scores."""
    generator = torch.Generator().manual_seed(2)

    def ids(n):
        return torch.randint(0, VOCAB, (n,), generator=generator)

    return [ids(3 + i) for i in range(4)], [ids(n) for n in (4, 11, 6, 9)], [0.5, -1.0, 2.0, 0.0]


def as_trajectories(queries, responses, scores):
    return [Trajectory.of_response(*row) for row in zip(queries, responses, scores, strict=True)]


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def ppo_trainer(model, tokenizer, **settings):
    """One optimizer step of two passes, whose rows are others than those that were observed together."""
    config = PPOConfig(
        batch_size=4,
        mini_batch_size=2,
        gradient_accumulation_steps=2,
        ppo_epochs=1,
        max_grad_norm=1.0,
        **settings,
    )
    return PPOTrainer(config, model, tokenizer=tokenizer, optimizer=sgd(model))


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_a_first_step(stats):
    assert all(np.isfinite(value).all() for value in stats.values())
    assert np.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
    assert np.abs(stats["objective/kl_dist"]).max() == 0, "the reference is the policy itself"
    assert stats["ppo/gradient_norm"] > 1e-3


def plain_logprobs(trunk, query, response):
    """One sequence by itself, in the family's own forward."""
    with torch.no_grad():
        logits = trunk(torch.cat([query, response])[None], use_cache=False).logits[0]
    return logits[len(query) - 1 : -1].log_softmax(-1).gather(-1, response[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ppo_step(family, tokenizer):
    trunk, (queries, responses, scores) = family_trunk(family), sampled_rows()
    expected = [plain_logprobs(trunk, q, r) for q, r in zip(queries, responses, strict=True)]
    model = with_values(trunk)
    before = copies(model)
    trainer = ppo_trainer(model, tokenizer)
    observed = trainer.learner.observe(as_trajectories(queries, responses, scores))
    torch.testing.assert_close(
        observed.logprobs[observed.mask].double(),
        torch.cat(expected).double(),
        rtol=0,
        atol=2e-6 if family in ROUNDED else 1e-12,
    )
    assert_a_first_step(trainer.step(queries, responses, scores))
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grpo_step(family, tokenizer):
    model = family_trunk(family)
    before = copies(model)
    config = GRPOConfig(per_device_train_batch_size=4, num_generations=2, beta=0.1, max_grad_norm=1.0)
    trainer = GRPOTrainer(model, config, processing_class=tokenizer, optimizers=(sgd(model), None))
    stats = trainer.learn(as_trajectories(*sampled_rows()))
    assert all(np.isfinite(value) for value in stats.values())
    assert stats["ratio"] == pytest.approx(1, abs=1e-6)
    assert stats["kl"] == 0
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("family", ["opt", "gptj", "bloom", "mixtral", "mamba", "falcon_h1"])
def test_a_ppo_step_of_adapters(family, tokenizer):
    """The reference is the base model, switched to by leaving the adapters out."""
    torch.manual_seed(1)
    model = with_values(add_adapter(family_trunk(family), lora_config(4, 8.0)))
    before = copies(model)
    assert_a_first_step(ppo_trainer(model, tokenizer).step(*sampled_rows()))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if "lora_B" in name} < moved
    assert all("lora_" in name or name.startswith("v_head.") for name in moved)


NOISY = {  # what a family does in training mode, by modules of their own and by functions
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3},
    "mixtral": {"router_jitter_noise": 0.3},
    "gptj": {"resid_pdrop": 0.3, "attn_pdrop": 0.3},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "stablelm": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "mamba": {},
}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", NOISY)
def test_activation_checkpointing_changes_nothing_and_dropout_is_off(family, adapter, tokenizer):
    after, forwards = [], []
    for checkpointing in (False, True):
        model = family_trunk(family, **NOISY[family]).train()
        if adapter:
            torch.manual_seed(3)
            dropout = 0.0 if family == "mixtral" else 0.3  # which peft's adapters of experts don't have
            model = add_adapter(model, lora_config(4, 8.0, dropout=dropout))
        model = with_values(model)
        trainer = ppo_trainer(model, tokenizer, gradient_checkpointing=checkpointing)
        calls = []
        for name, module in model.named_modules():
            if name.endswith((".mlp", ".fc1", ".mixer")):
                module.register_forward_pre_hook(lambda *_, c=calls: c.append(torch.is_grad_enabled()))
        assert_a_first_step(trainer.step(*sampled_rows()))
        forwards.append(sum(calls))
        after.append(copies(model))
        assert not any(module.training for module in trainer.learner.policy.modules())
    torch.testing.assert_close(after[1], after[0], rtol=0, atol=1e-12)
    assert forwards[1] == 2 * forwards[0] > 0, "each layer is computed again in the backward pass"
