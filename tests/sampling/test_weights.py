"""Weights that change between two turns: noticed however it happens, and what becomes of the cache then."""

import asyncio
import contextlib
import warnings
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.runtime.loop import run_sync
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.sampling.weights import WeightWatch
from etude.types import SamplingParams

VOCAB = 59
COMMON = {"vocab_size": VOCAB, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)
QUERY = [5, 17, 2, 40, 8]
FED = [11, 3]


class Wordless:
    """A tokenizer for tests that look at ids only."""

    def decode(self, ids, **_):
        return ""


def make_trunk(family="llama"):
    torch.manual_seed(0)
    if family == "gptj":
        config = GPTJConfig(
            **COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3, rotary_dim=4
        )
        return GPTJForCausalLM(config).double().eval()
    config = LlamaConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


def make_adapted(family="llama"):
    """A model with two adapters, "default" and "other", that really change it."""
    trunk = make_trunk(family)
    modules = ["q_proj", "v_proj", "fc_in" if family == "gptj" else "up_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(trunk, config)
        model.add_adapter("other", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.5)
    return model.eval()


def generated(model, ids, count=8):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


def sampled(sampler, ids=QUERY):
    [turn] = continue_all(sampler, [ids], GREEDY, seeds=[0])
    return turn.token_ids


# ---- every way to change weights ----


def by_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    model(torch.tensor([QUERY])).logits.square().mean().backward()
    optimizer.step()


def by_assignment(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * -0.7


def by_two_assignments(model):
    """The second tensor is likely to lie where the first one lay."""
    by_assignment(model)
    by_assignment(model)


def changed_weights(model):
    return {name: tensor * -0.7 for name, tensor in model.state_dict().items()}


def by_load_state_dict(model):
    model.load_state_dict(changed_weights(model))


def by_assigned_state_dict(model):
    model.load_state_dict(changed_weights(model), assign=True)


def by_other_adapter(model):
    model.set_adapter("other")


def by_both_adapters(model):
    model.base_model.set_adapter(["default", "other"])


def by_merge(model):
    """By itself it changes nothing; beside a change of the adapter it does."""
    model.set_adapter("other")
    model.merge_adapter()


def by_scale(model):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def by_removal(model):
    model.base_model.unload()


PLAIN = [by_optimizer, by_assignment, by_two_assignments, by_load_state_dict, by_assigned_state_dict]
ADAPTED = [by_other_adapter, by_both_adapters, by_merge, by_scale, by_removal]


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("change", [*PLAIN, *ADAPTED])
def test_a_change_is_noticed_once_and_the_session_is_rebuilt(change, family):
    model = make_trunk(family) if change in PLAIN else make_adapted(family)
    sampler = LocalSampler(model, Wordless(), slots=1)
    right = generated(sampler.model, QUERY)

    async def play():
        session = sampler.session(seed=0)
        first = await session.sample(QUERY, GREEDY)
        change(model)
        fed = sampler.tokens_fed
        second = await session.sample(FED, GREEDY)
        return first, second, sampler.tokens_fed - fed

    first, second, fed = run_sync(play())
    assert first.token_ids == right
    history = [*QUERY, *first.token_ids, *FED]
    assert second.token_ids == generated(sampler.model, history)
    assert (first.policy_version, second.policy_version) == (0, 1)
    assert fed == len(history) + 7


def test_looking_at_a_model_is_no_change():
    model = make_adapted()
    sampler = LocalSampler(model, Wordless())
    sampled(sampler)
    model.train()
    model(torch.tensor([QUERY])).logits.mean().backward()
    model.eval()
    generated(model, QUERY)
    model.zero_grad()
    with model.disable_adapter():
        pass
    sampled(sampler)
    assert sampler.policy_version == 0


def test_new_weights_at_the_old_address_are_noticed():
    """As an allocator gives it out again."""
    layer, place = torch.nn.Linear(3, 2, bias=False), np.ones((2, 3), dtype=np.float32)
    layer.weight.data = torch.from_numpy(place)
    address = layer.weight.data_ptr()
    watch = WeightWatch(layer)
    assert not watch.changed()
    layer.weight.data = torch.zeros(2, 3)
    place[:] = 2
    layer.weight.data = torch.from_numpy(place)
    assert layer.weight.data_ptr() == address
    assert watch.changed()
    assert not watch.changed()


def test_what_torch_does_not_count_can_be_said():
    model = make_trunk()
    sampler = LocalSampler(model, Wordless())

    async def play():
        session = sampler.session(seed=0)
        first = await session.sample(QUERY, GREEDY)
        for parameter in model.parameters():
            parameter.data.mul_(-0.7)  # as an 8-bit optimizer writes: past torch's counters
        sampler.weights_changed()
        return first, await session.sample(FED, GREEDY)

    first, second = run_sync(play())
    assert second.token_ids == generated(model, [*QUERY, *first.token_ids, *FED])
    assert second.policy_version == 1


def test_replaced_weights_do_not_stay_in_memory():
    model = make_trunk()
    sampler = LocalSampler(model, Wordless())
    sampled(sampler)
    old = [weakref.ref(parameter) for parameter in model.parameters()]
    by_assigned_state_dict(model)
    assert not any(parameter() is not None for parameter in old)


# ---- adapters ----


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_adapters_switched_off_are_the_base_model(family):
    base = generated(make_trunk(family), QUERY)
    model = make_adapted(family)
    adapted = generated(model, QUERY)
    assert base != adapted
    sampler = LocalSampler(model, Wordless(), slots=2)
    assert sampled(sampler) == adapted
    with model.disable_adapter():
        assert sampled(sampler) == base
    assert sampled(sampler) == adapted


def test_a_session_goes_through_the_switch():
    """A turn with the adapter, one without, one with it again: each of the whole history."""
    model = make_adapted()
    sampler = LocalSampler(model, Wordless(), slots=1)

    async def play():
        session, history, versions = sampler.session(seed=0), [], []
        for without in (False, True, False):
            with model.disable_adapter() if without else contextlib.nullcontext():
                history += FED
                turn = await session.sample(FED, GREEDY)
                assert turn.token_ids == generated(sampler.model, history)
                history += turn.token_ids
                versions.append(turn.policy_version)
        return versions

    assert run_sync(play()) == [0, 1, 2]


def test_a_value_head_is_looked_through():
    trunk = make_trunk()
    expected = generated(trunk, QUERY)
    model = AutoModelForCausalLMWithValueHead(trunk)
    sampler = LocalSampler(model, Wordless())
    assert sampler.model is trunk
    assert sampled(sampler) == expected
    with torch.no_grad():
        for parameter in model.v_head.parameters():
            parameter.add_(1.0)
    assert sampled(sampler) == expected
    assert sampler.policy_version == 0, "the value head samples nothing"


# ---- the cache that is kept ----


@torch.no_grad()
def mixed(model, seen, new, count, change):
    """Greedy tokens after `seen`, of old weights, and `new`, of those after `change`."""
    cache = model(torch.tensor([seen]), use_cache=True).past_key_values
    change(model)
    tokens = []
    for _ in range(count):
        out = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        new = [int(out.logits[0, -1].argmax())]
        tokens += new
    return tokens


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_kept_cache_goes_on_and_new_sessions_get_nothing_of_it(family):
    query = [*range(30), *QUERY]  # long enough to be copied
    model = make_trunk(family)
    sampler = LocalSampler(model, Wordless(), slots=3, keep_cache=True)

    async def play():
        session = sampler.session(seed=0)
        first = await session.sample(query, GREEDY)
        by_load_state_dict(model)
        fed = sampler.tokens_fed
        second = await session.sample(FED, GREEDY)
        fed = sampler.tokens_fed - fed
        return first, second, fed, await sampler.session(seed=1).sample(query, GREEDY)

    first, second, fed, fresh = run_sync(play())
    assert (first.policy_version, second.policy_version) == (0, 1)
    assert fed == 1 + len(FED) + 7, "only what the old weights hadn't seen"
    history = [*query, *first.token_ids, *FED]
    assert second.token_ids != generated(model, history), "not the tokens of the new weights alone"
    assert fresh.token_ids == generated(model, query)
    assert sampler.tokens_copied == 0

    again = make_trunk(family)
    seen = history[: -1 - len(FED)]
    assert second.token_ids == mixed(again, seen, history[len(seen) :], 8, by_load_state_dict)


def test_a_turn_keeps_the_version_of_its_first_token():
    model = make_trunk()
    sampler = LocalSampler(model, Wordless(), slots=1, keep_cache=True)

    async def play():
        turn = asyncio.create_task(sampler.session(seed=0).sample(QUERY, GREEDY))
        for _ in range(5):
            await asyncio.sleep(0)
        by_load_state_dict(model)
        return await turn

    turn = run_sync(play())
    assert turn.policy_version == 0
    assert sampler.policy_version == 1
    assert turn.token_ids != generated(make_trunk(), QUERY), "its later tokens are of the new weights"
