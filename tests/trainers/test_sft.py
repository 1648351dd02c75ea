import copy
import json
import logging
import math
import signal
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from template_families import FAMILIES, REASONING, family_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

from etude.errors import CheckpointError, ConfigError, DataError, ModelError
from etude.runtime.run import RunDirectory
from etude.trainers.sft import SFTTrainer, smoothed_loss, tokenize_rows
from etude.trainers.sft_config import SFTConfig
from etude.types import Episode

ROWS = [  # of different lengths, with different numbers of targets
    {"prompt": f"{a}+{b}=", "completion": str(a + b) * (1 + a % 3)} for a in range(4) for b in (5, 60)
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    made.add_tokens(["<|im_start|>", "<|im_end|>"])
    made.chat_template = CHATML
    return made


def tiny_llama(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, vocabulary: int = 260
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_bart() -> BartForCausalLM:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=260, d_model=16, decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2,
        dropout=0.0, init_std=0.2, max_position_embeddings=64, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    return BartForCausalLM(config)


def settings(directory, **options: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "overwrite_output_dir": True,
        "max_steps": 1,
        "per_device_train_batch_size": len(ROWS),
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return SFTConfig(**defaults | options)


def loss_by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Any]) -> float:
    """Mean negative log-likelihood of the completions' tokens, one row at a time, without padding."""
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        ids = [*prompt, *tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(len(prompt), len(ids)):
            total -= logprobs_TV[position - 1, ids[position]].item()
            count += 1
    return total / count


def test_label_smoothing_by_hand():
    """Two tokens of even odds and of 3 to 1; a tenth of the probability goes to both alike."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.bfloat16)
    loss = smoothed_loss(logits.double(), torch.tensor([1, 0]), 0.1)
    second = -0.95 * math.log(3 / 4) - 0.05 * math.log(1 / 4)
    assert loss.item() == pytest.approx(math.log(2) + second, rel=1e-2)
    assert smoothed_loss(logits, torch.tensor([1, 0]), 0.1).dtype == torch.float32


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_bart], ids=["llama", "bart, whose own loss does not shift"]
)
def test_the_logged_loss_is_the_cross_entropy_of_the_targets(tmp_path, tokenizer, build):
    model = build()
    expected = loss_by_hand(model.eval(), tokenizer, ROWS)
    trainer = SFTTrainer(model, settings(tmp_path), train_dataset=ROWS, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_accumulated_batches_equal_one_batch(tmp_path, tokenizer, batch):
    """Rows differ in their number of targets: a mean of means would give other weights."""

    def trained(size: int, steps: int) -> tuple[dict[str, torch.Tensor], float]:
        args = settings(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
        )
        model = tiny_llama(dtype=torch.float64)
        trainer = SFTTrainer(model, args, train_dataset=ROWS, processing_class=tokenizer)
        trainer.train()
        return model.state_dict(), trainer.state.log_history[0]["loss"]

    (whole, whole_loss), (parts, parts_loss) = trained(8, 1), trained(batch, -(-8 // batch))
    assert parts_loss == pytest.approx(whole_loss, rel=1e-6)
    start = tiny_llama(dtype=torch.float64).state_dict()
    assert max((whole[k] - start[k]).abs().max().item() for k in start) > 1e-3
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-9, atol=1e-11)


def test_evaluation_has_a_loss(tmp_path, tokenizer):
    model = tiny_llama()
    args = settings(tmp_path, per_device_eval_batch_size=8)
    trainer = SFTTrainer(model, args, eval_dataset={"all": ROWS, "one": ROWS[:1]}, processing_class=tokenizer)
    metrics = trainer.evaluate()
    assert metrics["eval_all_loss"] == pytest.approx(loss_by_hand(model, tokenizer, ROWS), rel=1e-5)
    assert metrics["eval_one_loss"] == pytest.approx(loss_by_hand(model, tokenizer, ROWS[:1]), rel=1e-5)


def test_it_learns(tmp_path, tokenizer):
    model = tiny_llama()
    before = loss_by_hand(model, tokenizer, ROWS[:3])
    args = settings(tmp_path, max_steps=60, learning_rate=2e-2)
    SFTTrainer(model, args, train_dataset=ROWS[:3], processing_class=tokenizer).train()
    assert loss_by_hand(model.eval(), tokenizer, ROWS[:3]) < 0.1 * before


MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("row", "learned"),
    [
        ("hi", "hi</s>"),
        ({"text": "hi"}, "hi</s>"),
        ({"messages": MESSAGES}, "4<|im_end|>"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "4<|im_end|>"),
        ({"segments": [{"source": "prompt", "text": "2?"}, {"source": "model", "text": "4"}]}, "4</s>"),
    ],
)
def test_each_format_is_tokenised(tmp_path, tokenizer, row, learned):
    [tokenized] = tokenize_rows([row], tokenizer, settings(tmp_path))
    assert set(tokenized) == {"input_ids", "labels"}
    labels = [label for label in tokenized["labels"] if label != -100]
    # A text's first token has nothing before it to predict it from.
    assert tokenizer.decode(labels) == (learned[1:] if learned.startswith("hi") else learned)


def test_every_turn_is_learned_where_a_template_drops_earlier_reasoning(tmp_path):
    qwen3 = family_tokenizer("qwen3")
    tokenized = tokenize_rows(
        [{"messages": REASONING}, {"messages": REASONING[:2]}], qwen3, settings(tmp_path)
    )
    learned = [qwen3.decode([label for label in labels if label != -100]) for labels in tokenized["labels"]]
    first, second = (turn for [turn] in FAMILIES["qwen3"].turns["reasoning"])
    assert learned == [first, second, first]


def test_files_processes_and_columns(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**row, "note": "not used"}) for row in ROWS))
    one = tokenize_rows(str(path), tokenizer, settings(tmp_path))
    two = tokenize_rows(str(path), tokenizer, settings(tmp_path, dataset_num_proc=2))
    assert one.to_list() == two.to_list()
    assert len(one) == len(ROWS)


def test_what_is_cut_and_left_out_is_said(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "123456", "completion": "78"}, {"prompt": "1", "completion": "234567"}, ROWS[0]]
    with caplog.at_level(logging.WARNING, logger="etude"):
        tokenized = tokenize_rows(rows, tokenizer, settings(tmp_path, max_length=6), max_length=6)
    assert [len(row["input_ids"]) for row in tokenized] == [6, 6]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 rows are longer than max_length=6 and are cut",
        "1 of 3 rows have nothing to learn and are left out",
    ]


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        (
            [{"instruction": "a", "output": "b"}],
            {},
            "columns are 'instruction', 'output'; expected one",
        ),
        ([], {}, "has no rows"),
        ("missing.jsonl", {}, "no file or folder 'missing.jsonl'"),
        (
            [{"prompt": "1234", "completion": "5"}],
            {"max_length": 4},
            "none of the 1 rows is left: all have nothing to learn",
        ),
        ([{"messages": MESSAGES[:1]}], {}, "none of the 1 rows is left: all have nothing to learn"),
        (
            [ROWS[0], {"prompt": "a", "completion": None}],
            {},
            "row 1: prompt is a str and completion a None",
        ),
        (["a"], {"completion_only_loss": True}, "row 0: completion_only_loss=True"),
    ],
)
def test_data_that_is_wrong(tmp_path, tokenizer, rows, options, match):
    with pytest.raises(DataError, match=match):
        SFTTrainer(
            tiny_llama(), settings(tmp_path, **options), train_dataset=rows, processing_class=tokenizer
        )


def test_models_and_settings_that_do_not_fit(tmp_path, tokenizer):
    args = settings(tmp_path)
    with pytest.raises(ModelError, match="tokenizer has 260 tokens and the model embeds 258; call"):
        SFTTrainer(tiny_llama(vocabulary=258), args, train_dataset=ROWS, processing_class=tokenizer)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=260, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ConfigError, match="packing and neftune_noise_alpha are for decoders"):
        SFTTrainer(t5, settings(tmp_path, packing=True), train_dataset=ROWS, processing_class=tokenizer)
    with pytest.raises(ConfigError, match="expected SFTConfig"):
        SFTTrainer(tiny_llama(), TrainingArguments(use_cpu=True), processing_class=tokenizer)
    with pytest.raises(ConfigError, match="pass its tokenizer"):
        SFTTrainer(tiny_llama(), args, train_dataset=ROWS)
    with pytest.raises(ConfigError, match="already loaded"):
        SFTTrainer(
            tiny_llama(), settings(tmp_path, model_init_kwargs={"dtype": "auto"}), processing_class=tokenizer
        )
    with pytest.raises(ConfigError, match="max_length is 1"):
        settings(tmp_path, max_length=1)


def test_what_is_saved_loads_again(tmp_path, tokenizer):
    base = tmp_path / "secret" / "base"
    tiny_llama().save_pretrained(base)
    tokenizer.save_pretrained(base)
    args = settings(tmp_path / "tuned", learning_rate=1e-2)
    trainer = SFTTrainer(str(base), args, train_dataset=ROWS)  # model and tokenizer by name
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned").get_vocab() == tokenizer.get_vocab()
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert card.data.tags == ["etude", "sft"]
    assert "# tuned" in card.text
    assert "from `base` with `SFTTrainer`" in card.text
    assert "| learning_rate | `0.01` |" in card.text
    assert "| lr_scheduler_type | `linear` |" in card.text
    assert "| max_steps | `1` |" in card.text
    assert "num_train_epochs" not in card.text, "which max_steps overrules"
    assert "secret" not in card.text
    # As `push_to_hub` does, with what it was given.
    trainer.create_model_card(model_name="Adder", tags="sums", dataset_tags=["a/b"], finetuned_from="c/d")
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert (card.data.tags, card.data.datasets) == (["etude", "sft", "sums"], ["a/b"])
    assert (card.data.model_name, card.data.base_model) == ("Adder", "c/d")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_an_adapter_is_trained_alone(tmp_path, tokenizer):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = tiny_llama()
    frozen = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = settings(tmp_path, learning_rate=1e-1, max_steps=2)
    trainer = SFTTrainer(
        model, args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer, peft_config=lora
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before
    trainer.save_model()
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"
    restored = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    batch = torch.tensor([tokenizer.encode("1+2=3")])
    torch.testing.assert_close(restored(batch).logits, trainer.model.eval()(batch).logits)
    for name, weight in trainer.model.unload().state_dict().items():
        assert torch.equal(weight, frozen[name])
    with pytest.raises(ConfigError, match="already has an adapter"):
        SFTTrainer(restored, args, train_dataset=ROWS, processing_class=tokenizer, peft_config=lora)


def test_a_run_that_is_resumed_ends_where_an_unbroken_one_does(tmp_path, tokenizer):
    def trained(directory, *, resume: bool = False, **options: Any) -> dict[str, torch.Tensor]:
        args = settings(
            directory, save_strategy="steps", save_steps=2, per_device_train_batch_size=3, max_steps=5,
            learning_rate=1e-2, logging_steps=3, **options,
        )  # fmt: skip
        trainer = SFTTrainer(tiny_llama(), args, train_dataset=ROWS, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2") if resume else None)
        return trainer.model.state_dict()

    def curve() -> list[dict[str, float]]:
        rows = RunDirectory(tmp_path).read_metrics()
        return [{name: value for name, value in row.items() if name != "time"} for row in rows]

    unbroken, expected = trained(tmp_path), curve()
    assert [row["step"] for row in expected] == [2, 3, 4, 5]  # each checkpoint's, where a mean begins anew
    assert (tmp_path / "checkpoint-2" / "README.md").exists()
    resumed = trained(tmp_path, resume=True)
    for name, weight in unbroken.items():
        torch.testing.assert_close(resumed[name], weight)
    assert curve() == expected


def test_nothing_is_reported_to_anyone_unless_asked(tmp_path):
    assert settings(tmp_path).report_to == []


TEXTS = ["ab" * n for n in (3, 9, 2, 14, 5, 7, 1, 11)]


def test_packed_rows_do_not_see_each_other(tmp_path, tokenizer):
    """The same rows in one step, in bins or not: the same loss and the same weights."""

    def trained(**options: Any) -> tuple[dict[str, torch.Tensor], float, int]:
        args = settings(
            tmp_path, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_length=30, **options
        )
        model = tiny_llama(dtype=torch.float64)
        trainer = SFTTrainer(model, args, train_dataset=TEXTS, processing_class=tokenizer)
        trainer.train()
        return model.state_dict(), trainer.state.log_history[0]["loss"], len(trainer.train_dataset)

    apart, loss, count = trained(per_device_train_batch_size=8)
    packed, packed_loss, bins = trained(per_device_train_batch_size=8, packing=True)
    assert (count, bins) == (8, 4)
    assert packed_loss == pytest.approx(loss, rel=1e-9)
    for name, weight in apart.items():
        torch.testing.assert_close(packed[name], weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_rows_too_long_for_a_bin(tmp_path, tokenizer, strategy, caplog):
    args = settings(tmp_path, packing=True, packing_strategy=strategy, max_length=10)
    with caplog.at_level(logging.WARNING, logger="etude"):
        trainer = SFTTrainer(tiny_llama(), args, train_dataset=TEXTS, processing_class=tokenizer)
    bins = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    assert all(sum(len(row["input_ids"]) for row in rows) <= 10 for rows in bins)
    kept = sum(len(row["input_ids"]) for rows in bins for row in rows)
    whole = sum(len(text) + 1 for text in TEXTS)
    if strategy == "bfd":
        assert kept == sum(min(10, len(text) + 1) for text in TEXTS) < whole
        assert "5 of 8 rows are longer than max_length=10 and are cut" in caplog.text
    else:
        assert kept == whole
        assert not caplog.records


def test_dynamic_fine_tuning_by_hand(tmp_path, tokenizer):
    """Each token's loss counts as much as the model believed in it (arXiv:2508.05629, eq. 9)."""
    model = tiny_llama(dtype=torch.float64)
    args = settings(tmp_path, loss_type="dft", max_steps=1)
    trainer = SFTTrainer(model, args, train_dataset=ROWS[:1], processing_class=tokenizer)
    batch = trainer.collate([trainer.train_dataset[0]])
    loss = trainer.compute_loss(model.train(), batch)
    logprobs = trainer.scorer(model, batch).logprobs.detach()
    assert loss.item() == pytest.approx(-(logprobs.exp() * logprobs).mean().item(), rel=1e-12)
    loss.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    (-(trainer.scorer(model, batch).logprobs * logprobs.exp()).mean()).backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad)


def test_a_formatting_function(tmp_path, tokenizer):
    rows = [{"question": "2+2", "answer": "4"}]
    as_text = SFTTrainer(
        tiny_llama(),
        settings(tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
        formatting_func=lambda row: f"{row['question']}={row['answer']}",
    ).train_dataset[0]
    assert tokenizer.decode(as_text["input_ids"]) == "2+2=4</s>"
    as_row = SFTTrainer(
        tiny_llama(),
        settings(tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
        formatting_func=lambda row: {"prompt": row["question"], "completion": row["answer"]},
    ).train_dataset[0]
    assert [label for label in as_row["labels"] if label != -100] == tokenizer.encode("4</s>")


def test_a_formatting_function_that_returns_something_else(tmp_path, tokenizer):
    arguments = {"train_dataset": [{"question": "2+2"}], "processing_class": tokenizer}
    with pytest.raises(DataError, match="row 0: formatting_func returned a list; expected a text, or a row"):
        SFTTrainer(tiny_llama(), settings(tmp_path), formatting_func=lambda row: ["2+2"], **arguments)


def test_metrics_are_means_over_tokens_of_all_steps_since_the_last_log(tmp_path, tokenizer):
    args = settings(tmp_path, max_steps=4, per_device_train_batch_size=2, logging_steps=2, learning_rate=0.0)
    model = tiny_llama()
    trainer = SFTTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    scorer, hits, count = trainer.scorer, 0, 0
    with torch.no_grad():
        for i in range(len(ROWS)):
            scores = scorer(model, trainer.collate([trainer.train_dataset[i]]))
            hits, count = hits + int(scores.hits.sum()), count + len(scores.hits)
    metrics = trainer.evaluate()
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(hits / count)
    assert {"mean_token_accuracy", "entropy", "loss", "grad_norm"} <= set(first) & set(second)
    assert first["entropy"] != second["entropy"]


def test_metrics_of_ones_own(tmp_path, tokenizer):
    def accuracy(prediction: Any) -> dict[str, float]:
        logits, labels = prediction
        wanted = labels[:, 1:]
        return {"accuracy": float((logits[:, :-1].argmax(-1) == wanted)[wanted != -100].mean())}

    model = tiny_llama()
    args = settings(tmp_path, per_device_eval_batch_size=3)
    trainer = SFTTrainer(model, args, eval_dataset=ROWS, processing_class=tokenizer, compute_metrics=accuracy)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"])
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(model, tokenizer, ROWS), rel=1e-5)


def test_noise_is_there_while_training_only(tmp_path, tokenizer):
    model = tiny_llama()
    args = settings(tmp_path, neftune_noise_alpha=50.0)
    trainer = SFTTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer)
    quiet = loss_by_hand(model.eval(), tokenizer, ROWS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(quiet, rel=1e-5)
    trainer.train()
    assert abs(trainer.state.log_history[-2]["loss"] - quiet) > 1e-3
    assert not model.get_input_embeddings()._forward_hooks


def test_dropout_can_be_switched_off(tmp_path, tokenizer):
    config = {"vocab_size": 260, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=None, eos_token_id=256))  # 0.1 in four places
    batch = torch.tensor([tokenizer.encode("1+2=3")])
    assert not torch.equal(model.train()(batch).logits, model(batch).logits)
    args = settings(tmp_path, disable_dropout=True, learning_rate=0.0)
    SFTTrainer(model, args, train_dataset=ROWS, processing_class=tokenizer)
    model.train()
    assert torch.equal(model(batch).logits, model(batch).logits)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_learns(tmp_path, tokenizer, family):
    torch.manual_seed(0)
    shared = {"vocab_size": 260, "pad_token_id": 257, "eos_token_id": 256, "decoder_start_token_id": 257}
    if family == "t5":
        config = T5Config(**shared, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
        model = T5ForConditionalGeneration(config)
    else:
        layers = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers",)}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
        model = BartForConditionalGeneration(
            BartConfig(**shared, **layers, **heads, **sizes, dropout=0.0, init_std=0.1)
        )
    args = settings(tmp_path, max_steps=60, learning_rate=2e-2)
    rows = ROWS[:3]
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    row = trainer.train_dataset[0]
    assert row["source_ids"] == tokenizer(rows[0]["prompt"]).input_ids
    assert row["input_ids"] == [*tokenizer.encode(rows[0]["completion"]), tokenizer.eos_token_id]
    before = trainer.evaluate()["eval_loss"]
    expected = model(
        input_ids=torch.tensor([row["source_ids"]]), labels=torch.tensor([row["labels"]])
    ).loss.item()
    one = trainer.compute_loss(model, trainer.collate([row])).item()
    assert one == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 * before
    trainer.save_model()
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).config.is_encoder_decoder
    again = SFTTrainer(str(tmp_path), settings(tmp_path), eval_dataset=rows)  # found by name, too
    assert again.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_settings_that_do_not_go_together(tmp_path):
    with pytest.raises(ConfigError, match="packing fills rows up to max_length"):
        settings(tmp_path, packing=True, max_length=None)
    with pytest.raises(ConfigError, match="expected bfd or bfd_split"):
        settings(tmp_path, packing_strategy="wrapped")
    with pytest.raises(ConfigError, match="expected nll or dft"):
        settings(tmp_path, loss_type="mse")
    with pytest.raises(ConfigError, match="label_smoothing_factor belongs to the loss nll"):
        settings(tmp_path, loss_type="dft", label_smoothing_factor=0.1)


def test_the_run_directory_tells_what_happened(tmp_path, tokenizer, capsys):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "max_steps": 4}
    args = settings(tmp_path / "run", disable_tqdm=False, learning_rate=1e-2, **options)
    parts = {"train_dataset": ROWS, "eval_dataset": ROWS[:2], "processing_class": tokenizer}
    SFTTrainer(tiny_llama(), args, **parts).train()
    run = RunDirectory(tmp_path / "run")
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    assert {"loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy"} <= rows[1].keys()
    losses = [row["validation/loss"] for row in rows if "validation/loss" in row]
    summary = run.read_summary()
    assert (summary["before"]["loss"], summary["after"]["loss"]) == (losses[0], losses[-1])
    assert summary["seconds"] > 0
    assert run.read_config()["learning_rate"] == 1e-2
    assert "sft run  4/4" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Mean token accuracy" in page
    SFTTrainer(tiny_llama(), args, **parts).train()  # over the old one, whose rows are gone
    assert len(run.read_metrics()) == len(rows)
    played = settings(tmp_path / "played", **options)
    RunDirectory(tmp_path / "played").append_episodes(0, "train", [Episode()])
    with pytest.raises(CheckpointError, match="holds a run that played episodes"):
        SFTTrainer(tiny_llama(), played, **parts).train()


def test_early_stopping_goes_back_to_the_best(tmp_path, tokenizer):
    """At such a rate the loss goes up and down, and at some point is above its best twice running."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = settings(tmp_path, early_stopping_patience=2, learning_rate=1.0, max_steps=80, **options)
    model = tiny_llama()
    trainer = SFTTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses.index(min(losses)) == len(losses) - 3
    assert trainer.state.global_step == len(losses) < 80
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    with pytest.raises(ConfigError, match="early_stopping_patience counts evaluations"):
        settings(tmp_path, early_stopping_patience=2)


class Interrupt(TrainerCallback):
    """Ctrl-C in the second step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_leaves_a_checkpoint_where_only_the_best_are_kept(tmp_path, tokenizer):
    args = settings(
        tmp_path, max_steps=6, learning_rate=1e-2, eval_strategy="steps", eval_steps=1, save_strategy="best",
        metric_for_best_model="loss", greater_is_better=True,  # the first stays the best
    )  # fmt: skip
    parts = {"train_dataset": ROWS, "eval_dataset": ROWS, "processing_class": tokenizer}
    with pytest.raises(KeyboardInterrupt):
        SFTTrainer(tiny_llama(), args, callbacks=[Interrupt()], **parts).train()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_an_interrupt_waits_for_a_checkpoint(tmp_path, tokenizer):
    args = settings(tmp_path, max_steps=6)
    parts = {"train_dataset": ROWS, "processing_class": tokenizer}
    with pytest.raises(KeyboardInterrupt):
        SFTTrainer(tiny_llama(), args, callbacks=[Interrupt()], **parts).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    resumed = SFTTrainer(tiny_llama(), args, **parts)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["step"] for row in RunDirectory(tmp_path).read_metrics()] == [1, 2, 3, 4, 5, 6]
    unbroken = SFTTrainer(tiny_llama(), settings(tmp_path / "other", max_steps=6), **parts)
    unbroken.train()
    for name, weight in unbroken.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight)


def test_a_base_model_is_given_a_chat_template(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "base")
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(CHATML)
    with pytest.raises(DataError, match="has no chat template"):
        SFTTrainer(str(tmp_path / "base"), settings(tmp_path), train_dataset=[{"messages": MESSAGES}])
    args = settings(tmp_path / "run", chat_template_path=str(tmp_path / "chat.jinja"))
    trainer = SFTTrainer(str(tmp_path / "base"), args, train_dataset=[{"messages": MESSAGES}])
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == CHATML
    args = settings(tmp_path, chat_template_path=str(tmp_path / "run"))  # that of another tokenizer
    other = SFTTrainer(str(tmp_path / "base"), args, train_dataset=[{"messages": MESSAGES}])
    assert other.train_dataset[0] == trainer.train_dataset[0]
    with pytest.raises(ModelError, match="has no chat template; give a Jinja file"):
        SFTTrainer(
            str(tmp_path / "base"),
            settings(tmp_path, chat_template_path=str(tmp_path / "base")),
            eval_dataset=["a"],
        )
