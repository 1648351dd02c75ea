import math
import random

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from etude.data.collate import IGNORED
from etude.errors import ConfigError, DataError
from etude.trainers.cpo import CPOTrainer
from etude.trainers.dpo import DPOTrainer
from etude.trainers.kto import KTOTrainer
from etude.trainers.orpo import ORPOTrainer
from etude.trainers.preference import tokenize_pairs
from etude.trainers.simpo import SimPOTrainer

PAIRS = [  # answers of different lengths; two rows share a prompt long enough to be computed once
    {
        "prompt": f"what is {a} plus {b} in this list of sums? ",
        "chosen": str(a + b),
        "rejected": "no " * (1 + b),
    }
    for a, b in ((1, 0), (1, 0), (20, 1), (3, 2))
]
PAIRS[1] = {**PAIRS[1], "chosen": "it is 1", "rejected": "2"}
REFERRED = (DPOTrainer, KTOTrainer)
TRAINERS = (*REFERRED, ORPOTrainer, SimPOTrainer, CPOTrainer)


def made(kind, model, tokenizer, directory, rows=PAIRS, *, optimizer=None, **options):
    parts = {
        name: options.pop(name) for name in ("ref_model", "peft_config", "eval_dataset") if name in options
    }
    settings = {
        "output_dir": str(directory),
        "overwrite_output_dir": True,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        **options,
    }
    return kind(
        model,
        args=kind.config_class(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        **parts,
    )


def plain_logprob(model, tokenizer, prompt, answer):
    """Of an answer and its end, one row at a time, without packing; and its number of tokens."""
    before = tokenizer.encode(prompt)
    ids = [*before, *tokenizer.encode(answer), tokenizer.eos_token_id]
    with torch.no_grad():
        logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(before), len(ids))
    return sum(logprobs_TV[i - 1, ids[i]].item() for i in places), len(places)


# ---- the loss, from the text on ----


def test_dpo_from_the_text_on(make_llama, tokenizer, tmp_path):
    """Packed, with prompts shared, two models, against single rows and DPO's equation."""
    policy, reference = make_llama(0, torch.float64), make_llama(1, torch.float64)
    expected = []
    for row in PAIRS:
        chosen, rejected = (
            plain_logprob(policy, tokenizer, row["prompt"], row[side])[0]
            - plain_logprob(reference, tokenizer, row["prompt"], row[side])[0]
            for side in ("chosen", "rejected")
        )
        expected.append((chosen, rejected, math.log(1 + math.exp(-0.3 * (chosen - rejected)))))
    trainer = made(DPOTrainer, policy, tokenizer, tmp_path, beta=0.3, ref_model=reference, eval_dataset=PAIRS)
    metrics = trainer.evaluate()
    means = [sum(column) / len(PAIRS) for column in zip(*expected, strict=True)]
    assert metrics["eval_loss"] == pytest.approx(means[2], rel=1e-9)
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.3 * means[0], rel=1e-9)
    assert metrics["eval_rewards/rejected"] == pytest.approx(0.3 * means[1], rel=1e-9)
    assert metrics["eval_rewards/margins"] == pytest.approx(0.3 * (means[0] - means[1]), rel=1e-9)
    assert metrics["eval_rewards/accuracies"] == sum(c > r for c, r, _ in expected) / len(PAIRS)


def test_losses_without_a_reference_from_the_text_on(make_llama, tokenizer, tmp_path):
    model = make_llama(0, torch.float64)
    sums = [
        [plain_logprob(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        for row in PAIRS
    ]
    (chosen, chosen_means), (rejected, rejected_means) = (
        (
            torch.tensor([row[i][0] for row in sums], dtype=torch.float64),
            torch.tensor([row[i][0] / row[i][1] for row in sums], dtype=torch.float64),
        )
        for i in (0, 1)
    )
    odds = [p / (1 - p) for p in (chosen_means.exp(), rejected_means.exp())]
    expected = {
        ORPOTrainer: -chosen_means - 0.2 * logsigmoid((odds[0] / odds[1]).log()),
        CPOTrainer: -logsigmoid(0.2 * (chosen - rejected)) - chosen_means,
        SimPOTrainer: -logsigmoid(0.2 * (chosen_means - rejected_means) - 1),
    }
    for kind, losses in expected.items():
        trainer = made(kind, model, tokenizer, tmp_path, beta=0.2, eval_dataset=PAIRS)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-9), kind


def test_a_prompt_is_computed_once(make_llama, tokenizer, tmp_path):
    """That of both answers, and of the two rows that have the same one."""
    trainer = made(ORPOTrainer, make_llama(), tokenizer, tmp_path)
    rows = list(trainer.train_dataset)
    tokens = len(trainer.collate(rows)["input_ids"])
    answers = sum(
        label != IGNORED for row in rows for side in ("chosen", "rejected") for label in row[f"{side}_labels"]
    )
    prompts = {row["prompt"]: len(tokenizer.encode(row["prompt"])) for row in PAIRS}
    assert tokens <= answers + sum(prompts.values())


@pytest.mark.parametrize("kind", TRAINERS)
def test_encoder_decoders(kind, tokenizer, tmp_path):
    """T5's answers by its own labels, one at a time; the same model trains."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
        initializer_factor=3.0, decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).double()

    def logprob(prompt, text):
        labels = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
        logits = model(input_ids=torch.tensor([tokenizer.encode(prompt)]), labels=labels).logits
        return -torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()

    trainer = made(kind, model, tokenizer, tmp_path, eval_dataset=PAIRS, max_steps=2)
    metrics = trainer.evaluate()
    for side in ("chosen", "rejected"):
        expected = sum(logprob(row["prompt"], row[side]) for row in PAIRS) / len(PAIRS)
        assert metrics[f"eval_logps/{side}"] == pytest.approx(expected, rel=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_logps/chosen"] != metrics["eval_logps/chosen"]


# ---- steps ----


@pytest.mark.parametrize("kind", TRAINERS)
def test_accumulated_batches_equal_one_batch(kind, make_llama, tokenizer, tmp_path):
    def trained(size):
        model = make_llama(0, torch.float64)
        rows = 8 if kind is KTOTrainer else 4
        options = {}
        if kind in REFERRED:  # a sharper reference: the policy's KL from it is above 0
            options["ref_model"] = make_llama(1, torch.float64, initializer_range=0.3)
        trainer = made(
            kind, model, tokenizer, tmp_path, per_device_train_batch_size=size,
            gradient_accumulation_steps=rows // size, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            **options,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 1
        return model.state_dict(), trainer.state.log_history[0]

    whole, whole_log = trained(8 if kind is KTOTrainer else 4)
    start = make_llama(0, torch.float64).state_dict()
    assert max((whole[name] - start[name]).abs().max().item() for name in start) > 1e-4
    if kind is KTOTrainer:
        assert whole_log["kl"] > 0
    for size in (1, 2) if kind in REFERRED else (1,):
        parts, parts_log = trained(size)
        for name, weight in whole.items():
            # Llama's norms are computed in float32, whatever the weights are.
            torch.testing.assert_close(parts[name], weight, rtol=1e-6, atol=1e-8)
        for name in set(whole_log) - {"epoch", "step", "learning_rate"}:
            assert parts_log[name] == pytest.approx(whole_log[name], rel=1e-6), name


@pytest.mark.parametrize("kind", REFERRED)
def test_a_run_that_is_resumed_ends_where_an_unbroken_one_does(kind, make_llama, tokenizer, tmp_path):
    """Its reference, too, which follows the policy."""
    more = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}

    def trained(resume=None):
        trainer = made(
            kind, make_llama(), tokenizer, tmp_path, save_strategy="steps", save_steps=2, max_steps=5,
            per_device_train_batch_size=2, **more,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return trainer.model.state_dict(), losses

    unbroken, losses = trained()
    resumed, again = trained(str(tmp_path / "checkpoint-2"))
    assert len(losses) == 5
    assert again == losses  # the first two are read from the checkpoint
    for name, weight in unbroken.items():
        assert torch.equal(resumed[name], weight)


def random_pairs(seed, count):
    """Whatever is asked, answers in letters up to m are preferred to those in later ones."""
    draw = random.Random(seed)

    def letters(among, most):
        return "".join(draw.choices(among, k=draw.randint(2, most)))

    return [
        {
            "prompt": letters("abcdefghijklmnopqrstuvwxyz", 8) + ":",
            "chosen": letters("abcdefghijklm", 6),
            "rejected": letters("nopqrstuvwxyz", 6),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", TRAINERS)
def test_it_learns_what_is_preferred(kind, make_llama, tokenizer, tmp_path):
    """On pairs that it has never seen."""
    model = make_llama()
    held_out = random_pairs(1, 40)

    def preferred():
        pairs = [
            [
                plain_logprob(model.eval(), tokenizer, row["prompt"], row[side])
                for side in ("chosen", "rejected")
            ]
            for row in held_out
        ]
        return sum(a / n > b / m for (a, n), (b, m) in pairs) / len(held_out)

    assert preferred() < 0.8
    trainer = made(
        kind, model, tokenizer, tmp_path, random_pairs(0, 64), max_steps=24, learning_rate=3e-3,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert preferred() > 0.95
    logged = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert logged[-1]["rewards/margins"] > logged[0]["rewards/margins"] + 0.1
    assert logged[-1]["entropy"] < logged[0]["entropy"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("kind", REFERRED)
def test_an_adapter_is_trained_alone_and_loads_again(kind, make_llama, tokenizer, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = make_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = made(
        kind, model, tokenizer, tmp_path, peft_config=lora, max_steps=3, learning_rate=0.1, eval_dataset=PAIRS
    )
    trainer.train()
    trainer.save_model()
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    restored = PeftModel.from_pretrained(make_llama(), tmp_path)
    ids = torch.tensor([tokenizer.encode(PAIRS[0]["prompt"])])
    logits = trainer.model.eval()(ids).logits
    torch.testing.assert_close(restored(ids).logits, logits)
    assert not torch.allclose(make_llama()(ids).logits, logits)
    for name, weight in trainer.model.unload().state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_model_is_saved_and_loads_again(make_llama, tokenizer, tmp_path):
    trainer = made(ORPOTrainer, make_llama(), tokenizer, tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    card = (tmp_path / "README.md").read_text()
    assert "`ORPOTrainer`" in card
    assert "| beta | `0.1` |" in card


# ---- data ----


def said(tokenizer, row, side):
    return tokenizer.decode([i for i in row[f"{side}_labels"] if i != IGNORED])


CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content }}<submit>{% endfor %}" + (
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "2+2"), ("assistant", "4"), ("assistant", "5"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"chosen": "2+2=4", "rejected": "2+2=5"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
    ids=["text", "implicit prompt", "messages", "messages, implicit prompt"],
)
def test_each_format_is_tokenised(row, tokenizer, tmp_path):
    messages = isinstance(row["chosen"], list)
    if messages:
        tokenizer.chat_template = CHAT
    try:
        config = DPOTrainer.config_class(output_dir=str(tmp_path), use_cpu=True)
        [pair] = tokenize_pairs([row], tokenizer, config)
    finally:
        tokenizer.chat_template = None
    end = "<submit>" if messages else "[eos]"
    assert (said(tokenizer, pair, "chosen"), said(tokenizer, pair, "rejected")) == (f"4{end}", f"5{end}")
    assert set(pair) == {f"{side}_{what}" for side in ("chosen", "rejected") for what in ("ids", "labels")}
    start = pair["chosen_labels"].index(pair["chosen_ids"][-2])
    assert pair["chosen_ids"][:start] == pair["rejected_ids"][:start]


def test_long_rows_are_cut_at_either_end(tokenizer, tmp_path, caplog):
    rows = [
        {"prompt": "123456", "chosen": "7", "rejected": "89abc"},
        {"prompt": "1", "chosen": "2", "rejected": "3"},
    ]

    def cut(mode):
        config = DPOTrainer.config_class(
            output_dir=str(tmp_path), use_cpu=True, max_length=8, truncation_mode=mode
        )
        pair = tokenize_pairs(rows, tokenizer, config)[0]
        return tokenizer.decode(pair["chosen_ids"]), tokenizer.decode(pair["rejected_ids"])

    assert cut("keep_start") == ("1234567[eos]", "12345689")
    assert cut("keep_end") == ("567[eos]", "5689abc[eos]")
    assert "1 of 2 rows are longer than max_length=8 and are cut" in caplog.text


def test_an_answer_that_is_cut_away_leaves_its_row_out(tokenizer, tmp_path, caplog):
    config = DPOTrainer.config_class(output_dir=str(tmp_path), use_cpu=True, max_length=4)
    rows = [
        {"prompt": "1234", "chosen": "7", "rejected": "8"},
        {"prompt": "1", "chosen": "2", "rejected": "3"},
    ]
    assert len(tokenize_pairs(rows, tokenizer, config)) == 1
    assert "1 of 2 rows have an answer without a token to compare and are left out" in caplog.text


def test_data_of_another_kind(make_llama, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"expected one of these combinations: \[prompt \+\] chosen"):
        made(ORPOTrainer, make_llama(), tokenizer, tmp_path, [{"prompt": "a", "completion": "b"}])


# ---- settings ----


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (DPOTrainer, {"loss_type": "sigmod"}, "loss_type is 'sigmod'; expected one or several of sigmoid"),
        (DPOTrainer, {"loss_type": []}, "expected one or several of"),
        (DPOTrainer, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 loss_weights and 2 losses"),
        (DPOTrainer, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing does nothing without"),
        (DPOTrainer, {"loss_type": "exo_pair"}, "exo_pair needs a label_smoothing above 0"),
        (DPOTrainer, {"loss_type": ["robust", "sft"]}, "robust needs a label_smoothing above 0"),
        (DPOTrainer, {"label_smoothing": 0.5}, "expected 0 <= label_smoothing < 0.5"),
        (DPOTrainer, {"discopop_tau": 0.1}, "discopop_tau does nothing without loss_type=discopop"),
        (DPOTrainer, {"f_alpha_divergence_coef": 0.1}, "does nothing without f_divergence_type="),
        (
            DPOTrainer,
            {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"},
            "not in apo_zero; expected losses of the margin",
        ),
        (DPOTrainer, {"ld_alpha": 1.5}, "ld_alpha is 1.5"),
        (DPOTrainer, {"use_weighting": True, "loss_type": "aot"}, "leave one of them out"),
        (DPOTrainer, {"reference_free": True, "sync_ref_model": True}, "has no reference"),
        (DPOTrainer, {"sync_ref_model": True, "precompute_ref_log_probs": True}, "once and for all"),
        (DPOTrainer, {"ref_model_sync_steps": 2}, "does nothing without sync_ref_model"),
        (DPOTrainer, {"precompute_ref_batch_size": 2}, "does nothing without precompute_ref_log_probs"),
        (DPOTrainer, {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 0}, "at least 1"),
        (DPOTrainer, {"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, "0 < alpha <= 1"),
        (DPOTrainer, {"beta": 0.0}, "beta is 0.0; expected a number > 0"),
        (DPOTrainer, {"truncation_mode": "middle"}, "expected keep_start or keep_end"),
        (DPOTrainer, {"label_smoothing_factor": 0.1}, "label_smoothing_factor is for supervised"),
        (DPOTrainer, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is for supervised"),
        (CPOTrainer, {"loss_type": "dpo"}, "loss_type is 'dpo'; expected one of sigmoid, hinge"),
        (CPOTrainer, {"simpo_gamma": 1.0}, "simpo_gamma does nothing without loss_type=simpo"),
        (CPOTrainer, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing does nothing without"),
        (CPOTrainer, {"cpo_alpha": -1.0}, "cpo_alpha is -1.0"),
        (SimPOTrainer, {"label_smoothing": -0.1}, "expected 0 <= label_smoothing < 0.5"),
        (KTOTrainer, {"loss_type": "bco"}, "loss_type is 'bco'; expected kto or apo_zero_unpaired"),
        (KTOTrainer, {"desirable_weight": -1.0}, "desirable_weight is -1.0"),
    ],
)
def test_settings_that_are_wrong_or_do_nothing(kind, options, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        kind.config_class(output_dir=str(tmp_path), use_cpu=True, **options)


def test_alphapo_leaves_imitation_out_unless_asked(tmp_path):
    config = CPOTrainer.config_class
    place = {"output_dir": str(tmp_path), "use_cpu": True}
    assert config(loss_type="alphapo", **place).cpo_alpha == 0.0
    assert config(loss_type="alphapo", cpo_alpha=0.5, **place).cpo_alpha == 0.5
    assert config(loss_type="simpo", **place).cpo_alpha == 1.0


def test_imitation_is_left_out_at_0(make_llama, tokenizer, tmp_path):
    model = make_llama()
    without = made(CPOTrainer, model, tokenizer, tmp_path, cpo_alpha=0.0, eval_dataset=PAIRS).evaluate()
    half = made(CPOTrainer, model, tokenizer, tmp_path, cpo_alpha=0.5, eval_dataset=PAIRS).evaluate()
    assert half["eval_loss"] == pytest.approx(without["eval_loss"] + 0.5 * half["eval_nll_loss"], rel=1e-5)
