"""The table in `docs/models.md` says what the library finds out about each family, and nothing else.

That value head, reloading, LoRA, PPO and GRPO work is tested for each family in
`models/test_decoder_families` and `trainers/test_families`, and what the sampler does in
`sampling/test_families`.
"""

import re
from pathlib import Path

import pytest
import transformers as t
from decoder_families import FAMILIES, PADS_RIGHT, WIDE, make_family
from peft import LoraConfig, PromptTuningConfig

from etude.errors import ModelError
from etude.models.adapters import add_adapter, lora_config
from etude.models.forward import PolicyForward
from etude.models.packing import supports_packing
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.sampling.local import LocalSampler

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
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


def table():
    return re.findall(r"^\| \w+(?:ForCausalLM|LMHeadModel) \|.*", PAGE_TEXT, re.MULTILINE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_line(family):
    assert line(family) in table()


def test_each_line_is_tested():
    assert len(table()) == len(FAMILIES)


def prompt_tuned():
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return AutoModelForCausalLMWithValueHead(add_adapter(make_family(*FAMILIES["llama"][:2]), adapter))


REFUSED = {
    "an encoder-decoder": lambda: AutoModelForCausalLMWithValueHead(
        t.T5ForConditionalGeneration(t.T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2))
    ),
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
