"""The attention that sampler and trainer share: leaks, the cache, and what is refused."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from etude.errors import ModelError
from etude.models.attention import install, packed_attention
from etude.models.packing import supports_packing
from etude.models.plans import PackedPlan, packed_inputs
from etude.models.slot_cache import SlotCache

SMALL = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make_mistral(window):
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)).double().eval()


def ids(n, seed=0):
    return torch.randint(0, 53, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def packed_logits(model, sequences):
    plan = PackedPlan([len(s) for s in sequences])
    logits = model(**packed_inputs([t for s in sequences for t in s], plan)).logits[0]
    return logits.split([len(s) for s in sequences])


def test_changing_one_sequence_leaves_its_neighbours_bitwise_alone(make_llama):
    model = make_llama(dtype=torch.float64)
    assert supports_packing(model)
    a, b, c = ids(9), ids(10, 1), ids(11, 2)
    before = packed_logits(model, [a, b, c])
    after = packed_logits(model, [a, [t ^ 1 for t in b], c])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("lengths", [(6, 7, 5), (2, 9, 30)], ids=["masked", "uneven"])
@torch.no_grad()
def test_those_that_share_a_prefix_dont_see_each_other(make_llama, lengths):
    model = make_llama(dtype=torch.float64)
    assert supports_packing(model)
    plan = PackedPlan([9, 12, *lengths], prefixes=[None, None, *[1] * len(lengths)])
    other, prefix, a, b, c = (ids(n, seed) for seed, n in enumerate(plan.lengths))

    def outputs(*pieces):
        flat = [token for piece in pieces for token in piece]
        return model(**packed_inputs(flat, plan)).logits[0].split(plan.lengths)

    before = outputs(other, prefix, a, b, c)
    after = outputs(other, prefix, a, [t ^ 1 for t in b], c)
    assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [True, True, True, False, True]
    moved = outputs(other, [t ^ 1 for t in prefix], a, b, c)
    assert [torch.equal(x, y) for x, y in zip(before, moved, strict=True)] == [True, *[False] * 4]


@pytest.mark.parametrize("window", [None, 4, 7])
@torch.no_grad()
def test_sliding_windows(window):
    model = make_mistral(window)
    sequences = [ids(15), ids(16, 1), ids(3, 2)]
    expected = [model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences]
    assert supports_packing(model)
    for actual, plain in zip(packed_logits(model, sequences), expected, strict=True):
        torch.testing.assert_close(actual, plain)
    for actual, plain in zip(packed_logits(model, sequences[:2]), expected[:2], strict=True):
        torch.testing.assert_close(actual, plain)


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_a_cache_fed_in_pieces_equals_one_forward(window):
    """Prompts, single tokens and short pieces of several sequences, mixed in the same steps."""
    model = make_mistral(window)
    sequences = {0: ids(14), 3: ids(12, 1), 1: ids(13, 2)}
    expected = {slot: model(torch.tensor([s]), use_cache=False).logits[0] for slot, s in sequences.items()}
    assert supports_packing(model)
    cache = SlotCache(slots=5, length=4)
    pieces = {0: [6, 1, 1, 3, 1, 1, 1], 3: [1, 1, 5, 1, 1, 2, 1], 1: [7, 1, 1, 1, 1, 1, 1]}
    done = dict.fromkeys(sequences, 0)
    for step in range(7):
        lengths = [pieces[slot][step] for slot in sequences]
        past = list(done.values())
        needed = max(p + n for p, n in zip(past, lengths, strict=True))
        cache.resize(5, max(needed, cache.length), kept=range(5))
        plan = PackedPlan(lengths, past=past, cache=cache, slots=list(sequences))
        fed = [t for s, p, n in zip(sequences.values(), past, lengths, strict=True) for t in s[p : p + n]]
        outputs = model(**packed_inputs(fed, plan)).logits[0].split(lengths)
        for (slot, first), output in zip(done.items(), outputs, strict=True):
            torch.testing.assert_close(output, expected[slot][first : first + len(output)])
        done = {slot: p + n for (slot, p), n in zip(done.items(), lengths, strict=True)}
    assert all(done[slot] == len(s) for slot, s in sequences.items())


@pytest.mark.parametrize("window", [None, 6])
def test_a_common_beginning_is_read_once(window):
    """Two families and a row of its own: the same logits, whether it is said that they begin alike or not."""
    model = make_mistral(window)
    install(model)
    beginnings = ids(40, seed=1), ids(30, seed=2)
    sequences = [[*beginnings[i // 3], *ids(1 + i % 3, seed=10 + i)] for i in range(6)] + [ids(9, seed=3)]
    families = [(7, 40)] * 3 + [(8, 30), (8, 30), (8, 29)] + [None]

    def last_logits(families):
        cache = SlotCache(slots=8, length=48)
        slots = [5, 1, 7, 0, 3, 2, 6]
        for slot, sequence in zip(slots, sequences, strict=True):
            plan = PackedPlan([len(sequence) - 1], past=[0], cache=cache, slots=[slot])
            model(**packed_inputs(sequence[:-1], plan))
        past = [len(sequence) - 1 for sequence in sequences]
        plan = PackedPlan([1] * 7, past=past, cache=cache, slots=slots, families=families)
        logits = model(**packed_inputs([sequence[-1] for sequence in sequences], plan)).logits[0]
        return logits, [(group.members, group.length) for group in plan.shared]

    with torch.no_grad():
        together, groups = last_logits(families)
        apart, none = last_logits([None] * 7)
        alone = torch.stack([model(torch.tensor([sequence])).logits[0, -1] for sequence in sequences])
    assert (groups, none) == ([({0, 1, 2}, 40), ({3, 4, 5}, 29)], [])
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(together, alone)


def test_decoding_together_is_used_only_where_it_pays():
    cache = SlotCache(slots=64, length=64)
    close = PackedPlan([1, 1, 5, 1], past=[9, 10, 0, 12], cache=cache, slots=[2, 3, 4, 5])
    assert close.decoding is not None
    assert close.decoding.members == {0, 1, 3}
    scattered = PackedPlan([1, 1], past=[9, 10], cache=cache, slots=[0, 60])
    assert scattered.decoding is None
    alone = PackedPlan([1, 6], past=[9, 0], cache=cache, slots=[0, 1])
    assert alone.decoding is None


@pytest.mark.parametrize("lengths", [(15, 16, 3), (15, 16)])
def test_soft_caps_and_windows_train_as_in_a_plain_forward(lengths):
    torch.manual_seed(0)
    config = Gemma2Config(
        **SMALL, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    )
    check_gradients(Gemma2ForCausalLM(config).double(), lengths)


@pytest.mark.parametrize("lengths", [(15, 16, 3), (15, 16)])
def test_sinks_train_as_in_a_plain_forward(lengths):
    torch.manual_seed(0)
    config = GptOssConfig(**SMALL, head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    check_gradients(GptOssForCausalLM(config).double(), lengths, moved="sinks")


def check_gradients(model, lengths, moved="q_proj"):
    model.eval()
    sequences = [ids(n, seed) for seed, n in enumerate(lengths)]
    alone = torch.cat([model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    alone.log_softmax(-1)[:, 3].sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any(moved in name and gradient.abs().max() > 1e-3 for name, gradient in expected.items())
    model.zero_grad()
    assert supports_packing(model)
    plan = PackedPlan(lengths)
    packed = model(**packed_inputs([t for s in sequences for t in s], plan)).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    packed.log_softmax(-1)[:, 3].sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            model.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_tensor_that_is_not_known_is_refused():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ModelError, match="position_bias"):
        packed_attention(torch.nn.Identity(), x, x, x, PackedPlan([3]), position_bias=x)


@torch.no_grad()
def test_calls_without_a_plan_are_as_before(make_llama, make_gpt2):
    for model in (make_llama(dtype=torch.float64), make_gpt2(dtype=torch.float64)):
        x, mask = torch.tensor([ids(7), ids(7, 1)]), torch.ones(2, 7, dtype=torch.long)
        mask[1, :3] = 0
        before = model(x, attention_mask=mask).logits
        install(model)
        install(model)
        assert torch.equal(model(x, attention_mask=mask).logits, before)
