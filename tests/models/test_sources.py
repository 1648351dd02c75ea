"""The training forward of encoder–decoders against plain forwards of one source and its labels each."""

import pytest
import torch
from encoder_decoders import BOS, EOS, FAMILIES, FIRST, START, VOCAB, make_seq2seq
from peft import LoraConfig

from etude.data.batch import PackedBatch, Trajectory
from etude.errors import DataError
from etude.models.adapters import add_adapter
from etude.models.forward import PolicyForward
from etude.models.reference import reference_by_disabled_adapters
from etude.models.update_mode import update_mode
from etude.models.value_head import AutoModelForSeq2SeqLMWithValueHead

F64 = torch.float64
CHUNK = 4 * VOCAB * 5  # five rows of logits


def ids(n, generator):
    return torch.randint(FIRST, VOCAB, (n,), generator=generator)


def trajectories(groups=((7, (3, 9, 1)), (2, (6,)), (11, (4, 8))), forced=(START,), seed=0):
    """For each source's length, answers of some lengths; the last token is an end where a length is odd."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length, answers in groups:
        source = torch.cat([ids(length - 1, generator), torch.tensor([EOS])])
        for n in answers:
            said = torch.cat([torch.tensor(forced), ids(n, generator)])
            said[-1] = EOS if n % 2 else said[-1]
            made.append(
                Trajectory(
                    said,
                    torch.arange(len(forced), len(said)),
                    score=0.0,
                    bootstrap=n % 2 == 0,
                    source_ids=source.clone(),
                )
            )
    return [made[i] for i in torch.randperm(len(made), generator=generator)]


def with_values(family):
    model = AutoModelForSeq2SeqLMWithValueHead(make_seq2seq(family, F64))
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.5)
    return model


def plain(model, trajectory, temperature=1.0):
    """(log-probabilities, entropies, values, last value) by transformers' own forward with labels.

    The decoder's input is made of the labels by the model, and doesn't come from the trajectory: mBART begins
    with the last label, the others with their start token.
    """
    labels = torch.cat([trajectory.token_ids[1:], torch.tensor([START])])
    logits, _, values = model(input_ids=trajectory.source_ids[None], labels=labels[None])
    logprobs = (logits[0] / temperature).log_softmax(-1)
    at = trajectory.sampled - 1
    chosen = logprobs[at, labels[at]]
    whole = model(input_ids=trajectory.source_ids[None], decoder_input_ids=trajectory.token_ids[None])
    return chosen, -(logprobs.exp() * logprobs).sum(-1)[at], values[0, at], whole[2][0, -1:]


def forward(policy, batch, **settings):
    return policy(
        batch.input_ids,
        batch.lengths,
        batch.states,
        batch.targets,
        batch.last_states,
        sources=batch.sources,
        **settings,
    )


def loss_of(logprobs, entropies, values, last):
    """In which no two tokens weigh the same."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=F64)
    return (weights * logprobs).sum() + (weights * values**2).sum() + (last**3).sum() + (entropies**2).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_of(model, batch_of, temperature=1.0):
    each = [plain(model, t, temperature) for t in batch_of]
    logprobs, entropies, values, _ = (torch.cat(parts) for parts in zip(*each, strict=True))
    return (
        logprobs,
        entropies,
        values,
        torch.cat([e[3] for e, t in zip(each, batch_of, strict=True) if t.bootstrap]),
    )


def assert_same_gradients(found, expected, tolerance):
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() >= {name for name, gradient in expected.items() if gradient.any()}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=tolerance, msg=name)


# T5's norms and softmax are in single precision, whatever its weights are.
TOLERANCE = {"t5": 1e-7, "t5 gated": 1e-7}


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_forwards_of_each_pair(family, temperature):
    model, batch_of = with_values(family), trajectories()
    expected = expected_of(model, batch_of, temperature)
    wanted = gradients(model, loss_of(*expected))
    batch = PackedBatch.of(batch_of)
    assert len(batch.sources.lengths) == 3 < len(batch_of)
    policy = PolicyForward(model, CHUNK)
    assert not policy.packs
    assert (policy.head is None) == (family == "marian")  # whose forward adds a bias to the layer's output
    output = forward(policy, batch, temperature=temperature, entropy_gradient=True)
    found = output.logprobs, output.entropies, output.values, output.last_values
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert output.logprobs.std() > 0.3
    assert output.values.std() > 0.3
    tolerance = TOLERANCE.get(family, 1e-12)
    assert_same_gradients(gradients(model, loss_of(*found)), wanted, tolerance)
    whole = forward(policy, batch, temperature=temperature, keep_logits=True)
    torch.testing.assert_close(whole.logprobs, expected[0], rtol=1e-7, atol=1e-7)
    assert whole.logits.shape == (len(batch.states), VOCAB)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_s_source_read_once_has_the_gradients_of_reading_it_for_each(family):
    model, batch_of = with_values(family), trajectories()
    policy, encoded = PolicyForward(model), []
    model.pretrained_model.get_encoder().register_forward_hook(lambda _, args, out: encoded.append(out[0]))
    once = PackedBatch.of(batch_of)
    each = PackedBatch.of(batch_of)
    given = [t.source_ids for t in batch_of]
    each.sources = torch.cat(given), [len(source) for source in given], torch.arange(len(given))
    outputs = []
    for batch in (once, each):
        output = forward(policy, batch)
        found = output.logprobs, output.entropies, output.values, output.last_values
        outputs.append((found, gradients(model, loss_of(*found))))
    assert [len(states) for states in encoded] == [3, len(batch_of)]
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-7, atol=1e-7)
    assert_same_gradients(outputs[0][1], outputs[1][1], TOLERANCE.get(family, 1e-12))
    assert any("encoder" in name and gradient.any() for name, gradient in outputs[0][1].items())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_activation_checkpointing_changes_nothing(family):
    """And dropout, which these models have, is off in an update."""
    model, batch = with_values(family), PackedBatch.of(trajectories())
    policy, found = PolicyForward(model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with update_mode(policy):
            output = forward(policy, batch)
            loss = output.logprobs.sum() + (output.values**2).sum()
            found.append(gradients(model, loss))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert any("encoder" in name and gradient.any() for name, gradient in found[0].items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_the_model_without_them(family):
    base = make_seq2seq(family, F64)
    batch_of = trajectories()
    batch = PackedBatch.of(batch_of)
    with torch.no_grad():
        expected = forward(PolicyForward(base, CHUNK), batch).logprobs
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = AutoModelForSeq2SeqLMWithValueHead(add_adapter(base, config).double()).eval()
    policy = PolicyForward(model, CHUNK)
    output = forward(policy, batch)
    torch.testing.assert_close(
        output.logprobs, torch.cat([plain(model, t)[0] for t in batch_of]), rtol=1e-7, atol=1e-7
    )
    assert (output.logprobs - expected).abs().max() > 0.1
    trained = gradients(model, output.logprobs.sum() + output.values.sum())
    assert all("lora" in name or "v_head" in name for name in trained)
    assert {True, False} == {"encoder" in name for name, gradient in trained.items() if gradient.any()}
    with torch.no_grad(), reference_by_disabled_adapters(model):
        assert torch.equal(forward(policy, batch).logprobs, expected)


def test_a_forced_token_is_no_choice_and_the_first_choice_is_made_in_its_state():
    """By hand: with [start, forced, x, y] the choices are x and y, made in the states of `forced` and x."""
    model = with_values("bart")
    [trajectory] = trajectories(groups=((5, (2,)),), forced=(START, BOS))
    assert trajectory.sampled.tolist() == [2, 3]
    batch = PackedBatch.of([trajectory])
    assert batch.input_ids[batch.states].tolist() == [BOS, trajectory.token_ids[2]]
    output = forward(PolicyForward(model), batch)
    logits, _, values = model(
        input_ids=trajectory.source_ids[None], decoder_input_ids=trajectory.token_ids[None]
    )
    logprobs = logits[0].log_softmax(-1)
    x, y = trajectory.token_ids[2:].tolist()
    torch.testing.assert_close(output.logprobs, torch.stack([logprobs[1, x], logprobs[2, y]]))
    torch.testing.assert_close(output.values, values[0, 1:3])
    torch.testing.assert_close(output.last_values, values[0, 3:])


def test_sources_for_whom_there_is_no_encoder_and_none_for_whom_there_is(make_llama):
    with_source, policy = PackedBatch.of(trajectories()), PolicyForward(make_llama())
    with pytest.raises(DataError, match="have source_ids, and LlamaForCausalLM is a decoder"):
        forward(policy, with_source)
    without = PackedBatch.of([Trajectory(torch.tensor([START, 7]), torch.tensor([1]), 0.0)])
    with pytest.raises(
        DataError, match="BartForConditionalGeneration is an encoder-decoder model, and these"
    ):
        forward(PolicyForward(make_seq2seq("bart")), without)
