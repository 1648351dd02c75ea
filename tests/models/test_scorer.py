"""Scores of tokens equal those of plain forwards, whatever the family, the layout and the wrapper."""

import pytest
import torch
from decoder_families import FAMILIES, VOCAB, make_family
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from etude.data.collate import IGNORED, pack
from etude.errors import ModelError
from etude.models.scorer import TokenScorer

F64 = torch.float64
CHUNK = 4 * VOCAB * 3  # three rows of logits


def rows(lengths=(5, 14, 3, 9), seed=5, first=1):
    """Token ids, and labels at two thirds of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(first, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    labels = [[IGNORED if i % 3 == 1 else token for i, token in enumerate(row)] for row in ids]
    return ids, labels


def by_hand(model, ids, labels):
    """Log-probabilities of labels, one plain forward of each row."""
    found = []
    for row, wanted in zip(ids, labels, strict=True):
        logprobs = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        found += [logprobs[t - 1, row[t]] for t in range(1, len(row)) if wanted[t] != IGNORED]
    return torch.stack(found)


def close(actual, expected):
    """Some families compute parts in float32, whatever the weights are."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gpt_oss", "gpt2", "gptj", "bloom", "mamba", "falcon_h1"]
)
def test_each_family_equals_plain_forwards(family):
    classes, configuration, _ = FAMILIES[family]
    model = make_family(classes, configuration, F64)
    ids, labels = rows()
    expected = by_hand(model, ids, labels)
    wanted = gradients(model, (expected * torch.arange(len(expected))).sum())
    scores = TokenScorer(model, CHUNK)(model, pack(ids, labels))
    close(scores.logprobs, expected)
    found = gradients(model, (scores.logprobs * torch.arange(len(expected))).sum())
    assert found.keys() >= {n for n, g in wanted.items() if g.abs().max() > 0}
    for name, gradient in wanted.items():
        close(found[name], gradient)


def make_llama_here(**settings):
    classes, configuration, _ = FAMILIES["llama"]
    return make_family(classes, {**configuration, **settings}, F64)


@pytest.mark.parametrize("chunk_bytes", [CHUNK, 1 << 30])
def test_entropies_and_hits(chunk_bytes):
    model = make_llama_here()
    ids, labels = rows()
    with torch.no_grad():
        batch = pack(ids, labels)
        logits = TokenScorer(model).logits(model, batch)
        likeliest = logits.argmax(-1)
        batch["targets"] = torch.where(torch.arange(len(likeliest)) % 2 == 0, likeliest, batch["targets"])
        scores = TokenScorer(model, chunk_bytes)(model, batch)
    torch.testing.assert_close(scores.hits, likeliest == batch["targets"])
    assert 0 < scores.hits.sum() < len(scores.hits)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(scores.entropies, expected, rtol=1e-9, atol=1e-9)


def test_a_shared_prompt_is_computed_once():
    model = make_llama_here()
    [prompt, one, other], _ = rows((40, 6, 9))
    ids = [[*prompt, *one], [*prompt, *other], one]
    labels = [[IGNORED] * 40 + one, [IGNORED] * 40 + other, one]
    batch = pack(ids, labels, share=True)
    assert len(batch["input_ids"]) == 40 + 6 + 9 + 6
    scores = TokenScorer(model)(model, batch)
    torch.testing.assert_close(scores.logprobs, by_hand(model, ids, labels), rtol=1e-9, atol=1e-9)


def test_rows_without_a_target():
    model = make_llama_here()
    ids, labels = rows()
    nothing = pack(ids, [[IGNORED] * len(row) for row in labels])
    scores = TokenScorer(model)(model, nothing)
    assert scores.logprobs.shape == (0,)
    scores.logprobs.sum().backward()  # a process whose batch has none takes part all the same


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_adapters():
    model = get_peft_model(
        make_llama_here(), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    model.double().eval()
    ids, labels = rows()
    scores = TokenScorer(model, CHUNK)(model, pack(ids, labels))
    torch.testing.assert_close(scores.logprobs, by_hand(model, ids, labels), rtol=1e-9, atol=1e-9)
    trained = gradients(model, scores.logprobs.sum())
    assert trained
    assert all("lora" in name for name in trained)
    prompt_tuning = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    virtual = get_peft_model(make_llama_here(), prompt_tuning)
    with pytest.raises(ModelError, match="PROMPT_TUNING adapters put virtual tokens before the text"):
        TokenScorer(virtual)


SEQ2SEQ = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
BART = {
    **SEQ2SEQ, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3,
    "max_position_embeddings": 64, "dropout": 0.0,
}  # fmt: skip
ENCODER_DECODERS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(**SEQ2SEQ, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, initializer_factor=3.0)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**BART)),
    "marian": lambda: MarianMTModel(MarianConfig(**BART)),
}


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders_equal_plain_forwards(family):
    torch.manual_seed(0)
    model = ENCODER_DECODERS[family]().double().eval()
    sources, _ = rows((7, 3, 5), seed=1, first=3)
    ids, labels = rows((4, 6, 2), first=3)
    expected = []
    for source, row, wanted in zip(sources, ids, labels, strict=True):
        inputs = {"input_ids": torch.tensor([source]), "labels": torch.tensor([row])}
        logprobs = model(**inputs).logits[0].log_softmax(-1)
        expected += [logprobs[t, row[t]] for t in range(len(row)) if wanted[t] != IGNORED]
    scorer = TokenScorer(model, CHUNK)
    assert scorer.head is not None
    scores = scorer(model, pack(ids, labels, sources=sources))
    torch.testing.assert_close(scores.logprobs, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert scores.logprobs.std() > 0.1


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_padded_logits_go_with_labels_as_in_transformers(family):
    classes, configuration, _ = FAMILIES[family]
    model = make_family(classes, configuration, F64)
    ids, labels = rows()
    with torch.no_grad():
        batch = pack(ids, labels)
        logits, padded = TokenScorer(model).padded_logits(model, batch)
        logprobs = logits[:, :-1].log_softmax(-1)
        wanted = padded[:, 1:]
        chosen = logprobs.gather(-1, wanted.clamp(min=0)[..., None])[..., 0][wanted != IGNORED]
        close(chosen, by_hand(model, ids, labels))


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_noise_is_neftunes(family):
    """Of each sequence, by its own length: what the embeddings give differs by ± α / √(L · D), uniformly."""
    classes, configuration, _ = FAMILIES[family]
    model = make_family(classes, configuration, torch.float32)
    lengths = (50, 3, 100)
    ids = [[1] * n for n in lengths]
    scorer, batch = TokenScorer(model), pack(ids, ids)
    seen = []
    handle = model.base_model.h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    torch.manual_seed(0)
    for alpha in (5.0, 0.0):
        scorer(model, batch, noise=alpha)
    handle.remove()
    noise = seen[0] - seen[1]
    if family == "gpt2":
        parts = noise[0].split(lengths)
    else:
        parts = [row[:n] for row, n in zip(noise, lengths, strict=True)]
    for part, n in zip(parts, lengths, strict=True):
        bound = 5.0 / (n * part.shape[-1]) ** 0.5
        assert part.abs().max() <= bound * 1.001
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_dropout_of_attention_while_training():
    """Supervised training leaves out attention weights where the model says so, packed or not."""
    classes, configuration, _ = FAMILIES["llama"]
    model = make_family(classes, {**configuration, "attention_dropout": 0.5}, F64)
    ids, labels = rows()
    scorer, batch = TokenScorer(model), pack(ids, labels)
    assert scorer.packs
    with torch.no_grad():
        expected = scorer(model, batch).logprobs
        torch.testing.assert_close(scorer(model, batch).logprobs, expected)
        model.train()
        assert (scorer(model, batch).logprobs - expected).abs().max() > 0.1
