"""The table in `docs/models.md` says what the library finds out about each family, and nothing else.

That value head, reloading, LoRA, PPO and GRPO work is tested for each family in
`models/test_decoder_families` and `trainers/test_families`, for encoder–decoders in
`trainers/test_seq2seq_families`, and what the sampler does in `sampling/test_families`.
"""

import re
from pathlib import Path

import pytest
from decoder_families import FAMILIES, PADS_RIGHT, WIDE, make_family
from encoder_decoders import FAMILIES as SEQ2SEQ_FAMILIES
from encoder_decoders import RELATIVES, make_seq2seq, seq2seq_tokenizer
from peft import LoraConfig, PromptTuningConfig

from etude.errors import ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.forward import PolicyForward
from etude.models.packing import supports_packing
from etude.models.score_head import with_score_head
from etude.models.value_head import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from etude.sampling.encoder_decoder import EncoderDecoderBackend
from etude.sampling.local import LocalSampler
from etude.trainers.critic import critic_of

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
ENCODER_DECODERS = {**SEQ2SEQ_FAMILIES, **RELATIVES}
SEQ2SEQ = "ForConditionalGeneration|MTModel|EncoderDecoderModel"
SAMPLER = {
    "packed": "all rows in one step",
    "pieces": "row by row",
    "tokens": "row by row, prompts too token by token",
    "whole": "row by row, from the start",
}


def line(family):
    classes, configuration, way = FAMILIES[family]
    model = make_family(classes, configuration)
    update = "packed" if supports_packing(model) else "padded"
    notes = []
    if model.get_output_embeddings().weight.shape[1] != model.config.hidden_size:
        notes.append("value head on the `word_embed_proj_dim` numbers that enter the output layer")
    if family in PADS_RIGHT:
        notes.append("pad on the right")
    if PolicyForward(model).head is None:
        notes.append("whole logits, not in chunks")
    try:
        add_adapter(make_family(classes, configuration), LoraConfig(task_type="CAUSAL_LM"))
        lora = "✓"
    except ModelError:
        lora = "✓ by `all-linear`"
    adapter = add_adapter(model, lora_config(4, 8.0)).peft_config["default"]
    if adapter.target_parameters:
        notes.append("LoRA on the experts too, without dropout")
    if adapter.exclude_modules:
        spared = sorted({f"`{name.rpartition('.')[2]}`" for name in adapter.exclude_modules})
        notes.append(f"no LoRA on {', '.join(spared)}")
    cells = [type(model).__name__, update, SAMPLER[way], "✓", "✓", lora, "✓", "; ".join(notes)]
    return f"| {' | '.join(cells)} |".replace("  ", " ")


PAGE_TEXT = PAGE.read_text()


def seq2seq_line(family):
    model = make_seq2seq(family)
    backend = LocalSampler(model, seq2seq_tokenizer())._backend
    sampler = "in one step" if isinstance(backend, EncoderDecoderBackend) else "row by row"
    try:
        add_adapter(make_seq2seq(family), LoraConfig(task_type="SEQ_2_SEQ_LM"))
        lora = "✓"
    except ModelError:
        lora = "✓ by `all-linear`"
    try:
        with_score_head(make_seq2seq(family), "sequence")
        reward = "✓"
    except ModelError:
        reward = "none in `transformers`"
    notes = "whole logits, not in chunks" if PolicyForward(model).head is None else ""
    return f"| {' | '.join([type(model).__name__, sampler, lora, reward, notes])} |".replace("  ", " ")


def table(names="ForCausalLM|LMHeadModel"):
    return re.findall(rf"^\| \w*(?:{names}) \|.*", PAGE_TEXT, re.MULTILINE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_line(family):
    assert line(family) in table()


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_s_line(family):
    assert seq2seq_line(family) in table(SEQ2SEQ)


def test_each_line_is_tested():
    assert len(table()) == len(FAMILIES)
    assert len(table(SEQ2SEQ)) == len({name for name, _ in ENCODER_DECODERS.values()})


def test_the_snippet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_seq2seq("t5").save_pretrained("t5-directory")
    [snippet] = re.findall(r"```python\n(.*?)```", PAGE_TEXT, re.DOTALL)
    scope = {
        "tokenizer": seq2seq_tokenizer(),
        "reward": lambda completions: [float(len(text)) for text in completions],
        "tasks": [{"prompt": text} for text in ("one", "two", "three", "four")],
    }
    exec(snippet, scope)
    assert [mask[0].item() for mask in scope["masks"]] == [0] * 4
    assert abs(scope["stats"]["ppo/policy/ratio"][0] - 1) < 1e-6


def prompt_tuned():
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return AutoModelForCausalLMWithValueHead(add_adapter(make_family(*FAMILIES["llama"][:2]), adapter))


REFUSED = {
    "an encoder-decoder": lambda: AutoModelForCausalLMWithValueHead(make_seq2seq()),
    "a decoder in an": lambda: AutoModelForSeq2SeqLMWithValueHead(make_family(*FAMILIES["llama"][:2])),
    "a value model beside": lambda: critic_of(make_seq2seq(), make_seq2seq()),
    "a model without a language-model head": lambda: AutoModelForCausalLMWithValueHead(
        make_family(*FAMILIES["llama"][:2]).model
    ),
    "a model that looks ahead": lambda: LocalSampler(
        make_family("RoFormer", {**WIDE, "embedding_size": 32}), tokenizer=None
    ),
    "prompt-learning adapters": prompt_tuned,
    "an adapter that peft can't put": lambda: add_adapter(
        make_family(*FAMILIES["olmo2"][:2]), LoraConfig(task_type="CAUSAL_LM")
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_what_the_page_says(what):
    quoted = re.search(rf"^\| {what}.*\| `(.*?)`", PAGE_TEXT, re.MULTILINE)[1]
    with pytest.raises(ModelError) as refusal:
        REFUSED[what]()
    assert all(part in str(refusal.value) for part in quoted.split("…"))
