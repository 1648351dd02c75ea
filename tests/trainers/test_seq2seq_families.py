"""Every family of encoder–decoders that `docs/models.md` lists: sampled, scored, updated, saved, adapted."""

import numpy as np
import pytest
import torch
from encoder_decoders import FAMILIES, FIRST, RELATIVES, VOCAB, make_seq2seq, seq2seq_tokenizer

from etude import PPOConfig, PPOTrainer
from etude.data.batch import Trajectory
from etude.models.adapters import add_adapter, lora_config
from etude.models.value_head import load_with_value_head

EVERY = sorted({**FAMILIES, **RELATIVES})


def queries():
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randint(FIRST, VOCAB, (n,), generator=generator) for n in (3, 9)]
    return [sources[i % 2] for i in range(4)]


def trainer_of(model):
    torch.manual_seed(0)
    policy = load_with_value_head(model, v_head_init_strategy="normal")
    config = PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=1e-2, max_grad_norm=1.0)
    return PPOTrainer(config, policy, tokenizer=seq2seq_tokenizer())


def plain(model, query, response):
    """(log-probabilities, values) of what follows the response's first token."""
    logits, _, values = model(input_ids=query[None], decoder_input_ids=response[None])
    return logits[0, :-1].log_softmax(-1).gather(-1, response[1:, None])[:, 0], values[0, :-1]


@pytest.mark.parametrize("family", EVERY)
def test_a_family(family, tmp_path):
    """What was sampled is scored as plain forwards score it, and a step moves both halves of the model."""
    trainer = trainer_of(make_seq2seq(family))
    responses = trainer.generate(queries(), do_sample=True, max_new_tokens=8)
    assert len({tuple(response.tolist()) for response in responses}) > 1
    rows = [
        Trajectory.of_response(query, response, 1.0, starts=trainer.starts)
        for query, response in zip(queries(), responses, strict=True)
    ]
    observed = trainer.learner.observe(rows)
    begun = len(trainer.starts[0])
    with torch.no_grad():
        for i, (query, response) in enumerate(zip(queries(), responses, strict=True)):
            logprobs, values = plain(trainer.model, query, response)
            n = len(response) - begun
            torch.testing.assert_close(observed.logprobs[i, :n], logprobs[begun - 1 :], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(observed.values[i, :n], values[begun - 1 :], rtol=1e-4, atol=1e-4)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    stats = trainer.step(queries(), responses, [1.0, 0.0, 0.5, -1.0])
    assert np.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
    assert np.abs(stats["objective/kl_dist"]).max() == 0
    trunk = trainer.model.pretrained_model
    for part in (trunk.get_encoder(), trunk.get_decoder()):
        names = {
            name for name, p in trainer.model.named_parameters() if any(p is q for q in part.parameters())
        }
        assert any((before[name] != dict(trainer.model.named_parameters())[name]).any() for name in names)
    trainer.save_pretrained(tmp_path)
    again = load_with_value_head(tmp_path)
    with torch.no_grad():
        found, expected = (
            plain(model.eval(), queries()[1], responses[1]) for model in (again, trainer.model)
        )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", EVERY)
def test_an_adapter_on_a_family(family):
    trainer = trainer_of(add_adapter(make_seq2seq(family), lora_config(2, 4.0)))
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    responses = trainer.generate(queries(), do_sample=True, max_new_tokens=6)
    stats = trainer.step(queries(), responses, [1.0, 0.0, 0.5, -1.0])
    assert np.abs(stats["objective/kl_dist"]).max() == 0
    assert np.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameters[name], weight) for name, weight in frozen.items())
    moved = [name for name, p in parameters.items() if "lora_B" in name and p.any()]
    for part in ("encoder.", "decoder."):
        assert any(part in name for name in moved)
