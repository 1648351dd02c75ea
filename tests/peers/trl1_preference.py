"""What TRL 1.16 computes from preferences, as numbers that `test_trl1_preference.py` compares ours with.

Runs in the peer's environment, by `make test-peers`; with the name of a file to write, by itself.

TRL's own trainers are built around a tiny model. Their losses are evaluated twice. "losses": on given
log-probabilities of tokens, which a model stands for that returns them, with the gradient by each. "whole":
on a batch of token ids through the model itself, with the gradient of one of its weights and what is logged.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl1_losses import MODEL, VOCABULARY
from written import write

REFERENCE = 1.25  # the reference's weights are the model's times this
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
PROMPT, LENGTHS = 2, ([5, 3, 6, 2], [4, 6, 2, 3])  # tokens of the prompt, of chosen and of rejected answers
LABELS = [True, True, False, True, False, False, True, False]

# Settings of DPOConfig. The imitation term is a mean over the tokens of a batch in TRL, and over those of
# each answer in ours: equal where the batch is one pair.
LOSSES = {
    **{
        kind: {"loss_type": kind}
        for kind in (
            "sigmoid",
            "hinge",
            "ipo",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sigmoid_norm",
        )
    },
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.05},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "aot, smooth": {"loss_type": "aot", "label_smoothing": 0.1},
    "aot_unpaired, smooth": {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
    "hinge, steep": {"loss_type": "hinge", "beta": 0.5},
    "discopop, wide": {"loss_type": "discopop", "discopop_tau": 0.5},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ipo, js_divergence": {"loss_type": "ipo", "f_divergence_type": "js_divergence"},
    "ld": {"ld_alpha": 0.5},
    "ipo, ld": {"loss_type": "ipo", "ld_alpha": 0.25},
    "wpo": {"use_weighting": True},
    "wpo, two": {"use_weighting": True, "loss_type": ["apo_zero", "ipo"], "loss_weights": [1.0, 0.01]},
}
ONE_PAIR = {
    "sft": {"loss_type": "sft"},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}
KTO = {
    "kto": {},
    "kto, weighted": {"desirable_weight": 1.5, "undesirable_weight": 0.75, "beta": 0.3},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}
CPO = {
    "sigmoid": {},
    "sigmoid, smooth": {"label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
    "alphapo": {"loss_type": "alphapo", "beta": 2.0, "alpha": 0.25},
}
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "per_device_train_batch_size": 4,
}
PAIRS = {"prompt": ["w2 w3"] * 2, "chosen": ["w4"] * 2, "rejected": ["w5"] * 2}
RATED = {"prompt": ["w2", "w3"], "completion": ["w4", "w5"], "label": [True, False]}


class Given:
    """Stands for a model: each call gives the next log-probabilities [B, T], after a prompt's zeros."""

    def __init__(self, *passes: Tensor, collisions: Tensor | None = None) -> None:
        self.passes = list(passes)
        self.collisions = collisions

    def __call__(self, **_: Any) -> Any:
        logprobs = self.passes.pop(0)
        zeros = torch.zeros_like(logprobs)
        fields = {"log_probs": logprobs, "entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return type("Output", (), {**fields, "log_sum_sq_probs": self.collisions})()


class Peer:
    """One model, given log-probabilities, and answers of different lengths: chosen ones, then rejected ones.

    Attributes:
        mask: [N, T] 1 where a token belongs to the answer.
        now, ref, collisions, other, other_ref: [N, T − 1] of the tokens after the first; 0 outside of the
            answer.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**MODEL))
        self.model.config._name_or_path = folder
        self.model.save_pretrained(folder)
        vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0", pad_token="w1")
        lengths = [*LENGTHS[0], *LENGTHS[1]]
        size = PROMPT + max(lengths)
        self.mask = torch.tensor([[PROMPT <= t < PROMPT + n for t in range(size)] for n in lengths]).long()
        inside = self.mask[:, 1:]
        self.now = -3 * torch.rand(inside.shape) * inside
        self.collisions = -2 * torch.rand(inside.shape) * inside
        self.ref, self.other, self.other_ref = (
            (self.now + 0.6 * torch.randn(inside.shape)) * inside for _ in range(3)
        )
        self.other = self.other + 0.3 * inside  # the policy has moved: the KL is not below 0
        self.prompts = [torch.randint(2, VOCABULARY, (1 + i,)).tolist() for i in range(4)]
        self.answers = [torch.randint(2, VOCABULARY, (n,)).tolist() for n in lengths]

    def trainer(self, kind: type, config: type, rows: dict[str, Any], settings: dict[str, Any]) -> Any:
        model = LlamaForCausalLM.from_pretrained(self.folder)
        more = {}
        if kind in (DPOTrainer, KTOTrainer):
            more["ref_model"] = LlamaForCausalLM.from_pretrained(self.folder)
            for parameter in more["ref_model"].parameters():
                parameter.data *= REFERENCE
        arguments = config(output_dir=self.folder, **QUIET, **settings)
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=self.tokenizer,
            **more,
        )
        trainer.model.train()
        return trainer

    # ---- given log-probabilities ----

    def pair_loss(self, settings: dict[str, Any], pairs: int = 4) -> dict[str, Any]:
        trainer = self.trainer(DPOTrainer, DPOConfig, PAIRS, settings)
        rows = [*range(pairs), *range(4, 4 + pairs)]
        now = self.now[rows].requires_grad_()
        trainer.ref_model = Given(self.ref[rows])
        batch = {name: torch.ones_like(self.mask[rows]) for name in ("input_ids", "attention_mask")}
        given = Given(now, collisions=self.collisions[rows])
        loss = trainer.compute_loss(given, {**batch, "completion_mask": self.mask[rows]})
        return self.shown(settings, loss, now, rows)

    def rated_loss(self, settings: dict[str, Any]) -> dict[str, Any]:
        trainer = self.trainer(KTOTrainer, KTOConfig, RATED, settings)
        now, rows = self.now.clone().requires_grad_(), list(range(8))
        unpaired = "loss_type" in settings
        trainer.ref_model = Given(*([] if unpaired else [self.other_ref]), self.ref)
        batch: dict[str, Tensor] = {"label": torch.tensor(LABELS)}
        for prefix in ("", "KL_"):
            batch[f"{prefix}completion_mask"] = self.mask
            batch[f"{prefix}input_ids"] = batch[f"{prefix}attention_mask"] = torch.ones_like(self.mask)
        loss = trainer.compute_loss(Given(*([] if unpaired else [self.other]), now), batch)
        return {**self.shown(settings, loss, now, rows), "kl": trainer._metrics["train"]["kl"][0]}

    def shown(self, settings: dict[str, Any], loss: Tensor, now: Tensor, rows: list[int]) -> dict[str, Any]:
        (gradients,) = torch.autograd.grad(loss, now)
        return {"settings": settings, "loss": loss.item(), "gradients": self.of_answers(gradients, rows)}

    def free_loss(self, settings: dict[str, Any], orpo: bool = False) -> dict[str, Any]:
        """Of averages where TRL averages, else of sums; without the imitation term."""
        if orpo:
            trainer = self.trainer(ORPOTrainer, ORPOConfig, PAIRS, settings)
            kind, average = trainer.odds_ratio_loss, True
        else:
            trainer = self.trainer(CPOTrainer, CPOConfig, PAIRS, settings)
            kind, average = trainer.cpo_loss, trainer.loss_type in ("ipo", "simpo")
        now = self.now.clone().requires_grad_()
        logprobs = now.sum(1) / self.mask.sum(1) if average else now.sum(1)
        loss = kind(*logprobs.chunk(2))[0].mean() * (-1 if orpo else 1)
        return self.shown(settings, loss, now, list(range(8)))

    def of_answers(self, values: Tensor, rows: list[int] | None = None) -> list[list[float]]:
        mask = self.mask[:, 1:] == 1 if rows is None else self.mask[rows, 1:] == 1
        return [row[kept].tolist() for row, kept in zip(values, mask, strict=True)]

    # ---- the whole path ----

    def whole_pairs(self, settings: dict[str, Any]) -> dict[str, Any]:
        trainer = self.trainer(DPOTrainer, DPOConfig, PAIRS, settings)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = zip(self.prompts, self.answers[:4], self.answers[4:], strict=True)
        batch = trainer.data_collator([dict(zip(names, row, strict=True)) for row in rows])
        loss = trainer.compute_loss(trainer.model, batch)
        logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
        return self.whole(settings, trainer.model, loss, logged)

    def whole_rated(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Each answer's completion stands once more behind the prompt after it."""
        trainer = self.trainer(KTOTrainer, KTOConfig, RATED, settings)
        rows = [
            {
                "prompt_ids": self.prompts[i],
                "completion_ids": self.answers[i],
                "KL_completion_ids": self.answers[i - 1] if i else self.answers[3],
                "label": LABELS[i + 1],
            }
            for i in range(4)
        ]
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
        return self.whole(settings, trainer.model, loss, logged)

    def whole_free(self, settings: dict[str, Any], orpo: bool = False) -> dict[str, Any]:
        """One pair behind a prompt of one token, which has no likelihood of its own."""
        kind = (ORPOTrainer, ORPOConfig) if orpo else (CPOTrainer, CPOConfig)
        trainer = self.trainer(*kind, PAIRS, settings)
        row: dict[str, Any] = {}
        for name, answer in (("chosen", self.answers[0]), ("rejected", self.answers[4])):
            ids = [*self.prompts[0], *answer]
            row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = ids, [1] * len(ids)
            row[f"{name}_labels"] = [-100, *answer]
        loss, logged = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator([row]))
        return self.whole(settings, trainer.model, loss, logged)

    def whole(
        self, settings: dict[str, Any], model: Any, loss: Tensor, logged: dict[str, Any]
    ) -> dict[str, Any]:
        loss.backward()
        kept = {
            name: value for name, value in logged.items() if name.startswith(("rewards/", "logps/", "kl"))
        }
        gradient = model.get_parameter(WEIGHT).grad
        return {
            "settings": settings,
            "loss": loss.item(),
            "gradient": gradient.tolist(),
            "logged": {name: float(value) for name, value in kept.items()},
        }


def values(folder: str) -> dict[str, Any]:
    """Everything there is to compare."""
    peer = Peer(folder)
    given = ("now", "ref", "collisions", "other", "other_ref")
    return {
        "model": {
            "config": MODEL,
            "weights": {name: weight.tolist() for name, weight in peer.model.state_dict().items()},
        },
        "reference": REFERENCE,
        "weight": WEIGHT,
        "prompts": peer.prompts,
        "answers": peer.answers,
        "labels": LABELS,
        "given": {name: peer.of_answers(getattr(peer, name)) for name in given},
        "losses": {
            **{name: peer.pair_loss(settings) for name, settings in LOSSES.items()},
            **{name: peer.pair_loss(settings, pairs=1) for name, settings in ONE_PAIR.items()},
        },
        "rated": {name: peer.rated_loss(settings) for name, settings in KTO.items()},
        "free": {
            **{name: peer.free_loss({"cpo_alpha": 0.0, **settings}) for name, settings in CPO.items()},
            "orpo": peer.free_loss({"beta": 1.0}, orpo=True),
        },
        "whole": {
            "dpo": peer.whole_pairs({}),
            "dpo, ipo and apo": peer.whole_pairs({"loss_type": ["ipo", "apo_zero"], "beta": 0.5}),
            "dpo, wpo": peer.whole_pairs({"use_weighting": True}),
            "kto": peer.whole_rated({}),
            "orpo": peer.whole_free({"beta": 0.2}, orpo=True),
            "cpo": peer.whole_free({"cpo_alpha": 0.5}),
            "simpo": peer.whole_free({"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
        },
    }


if __name__ == "__main__":
    write(values)
