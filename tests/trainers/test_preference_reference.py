import math

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from etude.errors import CheckpointError, ConfigError
from etude.trainers.dpo import DPOTrainer
from etude.trainers.kto import KTOTrainer
from etude.trainers.reference import (
    DisabledAdapters,
    FrozenModel,
    InitialWeights,
    Untrained,
    digest_of,
    evaluation_mode,
)

PAIRS = [
    {"prompt": f"what is {a} plus {b}? ", "chosen": str(a + b), "rejected": "no " * (1 + b)}
    for a, b in ((1, 0), (4, 2), (20, 1), (3, 2))
]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.5)
KINDS = (DPOTrainer, KTOTrainer)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks for it


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def made(kind, model, tokenizer, directory, rows=PAIRS, ref_model=None, peft_config=None, **options):
    evaluated = options.pop("eval_dataset", None)
    settings = {
        "output_dir": str(directory),
        "overwrite_output_dir": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        **options,
    }
    return kind(
        model,
        ref_model,
        kind.config_class(**settings),
        train_dataset=rows,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapted(model, seed=5):
    """With an adapter that has been trained: it has an effect."""
    torch.manual_seed(seed)
    model = get_peft_model(model, LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# ---- which reference serves ----


def test_the_reference_that_costs_least(make_llama, tokenizer, tmp_path):
    def kind(model, **options):
        return type(made(DPOTrainer, model, tokenizer, tmp_path, **options).reference)

    assert kind(make_llama()) is FrozenModel
    assert kind(make_llama(), ref_model=make_llama(1)) is FrozenModel
    assert kind(make_llama(), peft_config=LORA) is DisabledAdapters
    assert kind(adapted(make_llama())) is InitialWeights
    assert kind(make_llama(), precompute_ref_log_probs=True) is Untrained
    assert kind(adapted(make_llama()), precompute_ref_log_probs=True) is Untrained
    assert kind(make_llama(), reference_free=True) is type(None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["copy", "new adapter", "old adapter", "beforehand"])
def test_at_first_the_policy_is_its_reference(kind, way, make_gpt2, tokenizer, tmp_path):
    """Whatever the reference is, and with dropout in the model and its adapter."""
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model, options = make_gpt2(), {"eval_dataset": PAIRS}
    if way == "new adapter":
        options["peft_config"] = lora
    elif way == "old adapter":
        torch.manual_seed(0)
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    elif way == "beforehand":
        options["precompute_ref_log_probs"] = True
    trainer = made(kind, model, tokenizer, tmp_path, **options)
    start = trainer.evaluate()
    assert start["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert start["eval_loss"] == pytest.approx(math.log(2) if kind is DPOTrainer else 0.5, abs=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_all_references_of_one_start_give_one_run(kind, make_llama, tokenizer, tmp_path):
    def run(**options):
        trainer = made(kind, make_llama(), tokenizer, tmp_path, **options)
        trainer.train()
        return losses(trainer)

    expected = run()
    assert expected[0] != expected[-1]
    assert run(ref_model=make_llama()) == expected
    assert run(precompute_ref_log_probs=True) == pytest.approx(expected, rel=1e-5)
    assert run(precompute_ref_log_probs=True, precompute_ref_batch_size=3) == pytest.approx(
        expected, rel=1e-5
    )


def test_an_adapter_that_goes_on_training_is_compared_with_what_it_was(make_llama, tokenizer, tmp_path):
    """As with a copy of the whole model, which the base without its adapter would not be."""

    def run(**options):
        model = adapted(make_llama())
        for module in model.modules():  # of adapters, dropout is the adapter's own
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = made(DPOTrainer, model, tokenizer, tmp_path, **options)
        trainer.train()
        return losses(trainer), trainer

    expected, _ = run(ref_model=adapted(make_llama()))
    found, trainer = run()
    assert found == pytest.approx(expected, rel=1e-6)
    # Its own weights are back in place after each look at the old ones.
    pairs = trainer.reference.pairs
    assert len(pairs) == 8
    assert all(not torch.equal(now, initial) for now, initial in pairs)


def test_without_a_reference(make_llama, tokenizer, tmp_path):
    trainer = made(DPOTrainer, make_llama(), tokenizer, tmp_path, reference_free=True, eval_dataset=PAIRS)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/chosen"] == pytest.approx(0.1 * metrics["eval_logps/chosen"], rel=1e-6)
    with pytest.raises(ConfigError, match="leave ref_model out"):
        made(DPOTrainer, make_llama(), tokenizer, tmp_path, reference_free=True, ref_model=make_llama(1))


def test_references_that_cannot_be(make_llama, tokenizer, tmp_path):
    model = make_llama()
    with pytest.raises(ConfigError, match="ref_model is the model that trains"):
        made(DPOTrainer, model, tokenizer, tmp_path, ref_model=model)
    with pytest.raises(ConfigError, match="leave it out with adapters"):
        made(DPOTrainer, model, tokenizer, tmp_path, peft_config=LORA, sync_ref_model=True)
    other = make_llama(1, num_hidden_layers=1)
    with pytest.raises(ConfigError, match="ref_model of another kind"):
        made(DPOTrainer, make_llama(), tokenizer, tmp_path, ref_model=other, sync_ref_model=True)


def test_a_reference_by_name(make_llama, tokenizer, tmp_path):
    make_llama(1).save_pretrained(tmp_path / "reference")
    by_name, given = (
        made(DPOTrainer, make_llama(), tokenizer, tmp_path, ref_model=model, eval_dataset=PAIRS).evaluate()
        for model in (str(tmp_path / "reference"), make_llama(1))
    )
    assert by_name["eval_loss"] == given["eval_loss"]


# ---- computed beforehand ----


def counted(monkeypatch, kind):
    scored, calls = kind.score_rows, []

    def score_rows(self, rows):
        calls.append(len(rows))
        return scored(self, rows)

    monkeypatch.setattr(kind, "score_rows", score_rows)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_computed_is_kept_for_the_same_model(kind, make_llama, tokenizer, tmp_path, monkeypatch):
    """Another model, or another setting that matters, computes anew."""
    calls = counted(monkeypatch, kind)

    def run(seed, **options):
        calls.clear()
        trainer = made(
            kind, make_llama(seed), tokenizer, tmp_path, precompute_ref_log_probs=True, **options,
        )  # fmt: skip
        columns = set(trainer.train_dataset.column_names)
        wanted = (
            {"ref_chosen_logps", "ref_rejected_logps"}
            if kind is DPOTrainer
            else {"ref_logps", "ref_KL_logps"}
        )
        assert wanted <= columns
        return sum(calls), trainer.train_dataset.to_pandas()[sorted(wanted)].to_numpy().tolist()

    rows = 4 if kind is DPOTrainer else 8
    first, values = run(0)
    assert first == rows
    again, same = run(0)
    assert (again, same) == (0, values)
    other, others = run(1)
    assert other == rows
    assert others != values
    if kind is DPOTrainer:
        assert run(0, ld_alpha=0.5)[0] == rows


def test_rows_that_come_too_late(make_llama, tokenizer, tmp_path):
    trainer = made(
        DPOTrainer, make_llama(), tokenizer, tmp_path, precompute_ref_log_probs=True,
        eval_dataset={"first": PAIRS, "second": PAIRS[:2]},
    )  # fmt: skip
    assert all("ref_chosen_logps" in rows.column_names for rows in trainer.eval_dataset.values())
    late = trainer.tokenize(PAIRS)
    before = trainer.evaluate(late)["eval_loss"]
    assert before == pytest.approx(trainer.evaluate()["eval_first_loss"])
    trainer.train()
    with pytest.raises(ConfigError, match="came after training had begun"):
        trainer.evaluate(late)


def test_a_digest_knows_weights_and_configuration(make_llama):
    first = digest_of(make_llama(0))
    assert digest_of(make_llama(0)) == first
    assert digest_of(make_llama(1)) != first
    changed = make_llama(0)
    changed.config.rms_norm_eps *= 2
    assert digest_of(changed) != first
    halved = make_llama(0, torch.bfloat16)
    assert digest_of(halved) != first


# ---- one that moves ----


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_reference_that_follows(share, make_llama, tokenizer, tmp_path):
    """After every second step; in between it stays."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            names = [name for name, _ in model.named_parameters()]
            policy, reference = (
                {name: weights.get_parameter(name).detach().clone() for name in names}
                for weights in (model, trainer.reference.model)
            )
            seen.append((policy, reference))

    trainer = made(
        DPOTrainer, make_llama(), tokenizer, tmp_path, max_steps=4, sync_ref_model=True,
        ref_model_sync_steps=2, ref_model_mixup_alpha=share,
    )  # fmt: skip
    trainer.add_callback(Watch())
    trainer.train()
    start = dict(make_llama().named_parameters())
    for name, initial in start.items():
        policies, references = ([step[i][name] for step in seen] for i in (0, 1))
        assert torch.equal(references[0], initial)
        torch.testing.assert_close(references[1], share * policies[1] + (1 - share) * initial)
        assert torch.equal(references[2], references[1])
        torch.testing.assert_close(references[3], share * policies[3] + (1 - share) * references[1])


def test_a_checkpoint_without_the_reference_that_moved(make_llama, tokenizer, tmp_path):
    def run(resume=None, **options):
        trainer = made(
            DPOTrainer, make_llama(), tokenizer, tmp_path, save_strategy="steps", save_steps=2, **options
        )
        trainer.train(resume_from_checkpoint=resume)

    run()
    with pytest.raises(CheckpointError, match=r"holds no reference\.safetensors"):
        run(str(tmp_path / "checkpoint-2"), sync_ref_model=True, ref_model_sync_steps=1)


def test_evaluation_mode_leaves_no_trace(make_gpt2):
    model = make_gpt2().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
