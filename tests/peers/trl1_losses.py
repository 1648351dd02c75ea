"""What TRL 1.16 computes, as numbers that `test_trl1.py` compares ours with: `trl1_losses.json` beside this.

Runs in the peer's environment, by `make test-peers`; with the name of a file to write, by itself.

TRL's own trainers are built around a tiny model, and TRL's own methods evaluated: `_compute_loss` for losses
and their gradients, `_generate_and_score_completions` for advantages and importance weights. What they
sample is given instead. So are log-probabilities, in float64, but for those of "forward", which TRL
computes from the model.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from written import write

VOCABULARY, LONGEST, GROUP, TEMPERATURE = 16, 10, 4, 0.7
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}

# Rewards of two functions on two groups; a quarter is exact in float32. None: doesn't apply.
REWARDS = [[1, 0.25], [0, 1], [1, None], [0.5, 2], [0, 1.5], [None, None], [1, 0.25], [0, None]]
WEIGHTS = [1.0, 0.5]
ADVANTAGES = [1.5, -0.5, 0.0, -1.0, 0.75, 0.25, -2.0, 1.0]

# The settings of TRL's GRPOConfig or RLOOConfig.
NO_CORRECTION = {"use_bias_correction_kl": False}
LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.25},
    "grpo, higher": {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3},
    "dapo, higher": {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.3},
    "grpo, kl": {"loss_type": "grpo", "beta": 0.1, **NO_CORRECTION},
    "dapo, kl": {"loss_type": "dapo", "beta": 0.1, **NO_CORRECTION},
    "dr_grpo, kl": {"loss_type": "dr_grpo", "beta": 0.1, **NO_CORRECTION},
    "cispo, kl": {"loss_type": "cispo", "epsilon_high": 1.25, "beta": 0.1, **NO_CORRECTION},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
    "gspo, kl": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.05,
        "epsilon_high": 0.1,
        "beta": 0.1,
        **NO_CORRECTION,
    },
}
# Caps that some ratios are above and some below.
IMPORTANCE = {
    mode: {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.25}
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
}
LOSSES |= {
    "dapo, token_truncate": {"loss_type": "dapo", **IMPORTANCE["token_truncate"]},
    "cispo, token_mask": {"loss_type": "cispo", "epsilon_high": 1.25, **IMPORTANCE["token_mask"]},
    "gspo, kl, sequence_mask": {**LOSSES["gspo, kl"], **IMPORTANCE["sequence_mask"]},
}
RLOO_LOSSES = {"rloo": {"beta": 0.0}, "rloo, higher": {"beta": 0.0, "epsilon": 0.3, "epsilon_high": 0.5}}
GRPO_ADVANTAGES = {
    "group": {"scale_rewards": "group"},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none"},
    "normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum"},
}
RLOO_ADVANTAGES = {
    "rloo": {"beta": 0.0},
    "rloo, kl": {"beta": 0.1},
    "rloo, kl, normalized": {"beta": 0.1, "normalize_advantages": True},
}


class Given:
    """What a trainer would sample or compute, given to it instead.

    Attributes:
        passes: log-probabilities that the next forward passes give; without any, the model's are computed.
        seen: what the last pass gave.
    """

    passes: list[Tensor]
    seen: tuple[Tensor, Tensor]

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **options: Any) -> tuple[Any, Any, None]:
        if self.passes:
            logprobs = self.passes.pop(0)
            return logprobs, torch.zeros_like(logprobs), None
        logprobs, entropies, _ = super()._get_per_token_logps_and_entropies(*arguments, **options)
        self.seen = logprobs, entropies
        return logprobs, entropies, None


class GivenGRPO(Given, GRPOTrainer):
    pass


class GivenRLOO(Given, RLOOTrainer):
    completions: list[list[int]]

    def _generate(self, prompts: list[str]) -> tuple[list[list[int]], list[list[int]], list[str]]:
        return [[2]] * len(prompts), self.completions, [""] * len(prompts)


class Peer:
    """The trainers of TRL, on one model and one batch of episodes; everything per token is [B, T].

    Attributes:
        prompts, completions: token ids, [B] of different lengths.
        mask: 1 where a completion's token is the model's, 0 for a tool's and for padding.
        now, old, ref, sampler: log-probabilities: the model's, and others not far from them.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)
        vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w2")),
            eos_token="w0",
            pad_token="w1",
        )
        lengths = [10, 4, 7, 3, 9, 5, 10, 6]
        self.prompts = [torch.randint(2, VOCABULARY, (2 + i % 3,)).tolist() for i in range(len(lengths))]
        self.completions = [torch.randint(2, VOCABULARY, (length,)).tolist() for length in lengths]
        self.mask = torch.tensor([[i < length for i in range(LONGEST)] for length in lengths]).long()
        self.mask[:, 2:4] *= torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])[:, None]  # a tool answered
        self.now, self.entropies = self._forward()
        self.old, self.ref, self.sampler = (
            self.now + size * torch.randn(self.now.shape, dtype=torch.float64) for size in (0.2, 0.5, 0.2)
        )

    def _trainer(self, kind: type, config: type, settings: dict[str, Any]) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        arguments = config(
            output_dir=self.folder,
            per_device_train_batch_size=len(self.prompts),
            num_generations=GROUP,
            max_completion_length=LONGEST,
            temperature=TEMPERATURE,
            reward_weights=WEIGHTS,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            **{"beta": 0.0, **settings},
        )
        columns = zip(*REWARDS, strict=True)
        trainer = kind(
            model,
            [_reward(f"reward_{k}", list(column)) for k, column in enumerate(columns)],
            arguments,
            train_dataset=Dataset.from_dict({"prompt": ["w2"]}),
            processing_class=self.tokenizer,
            **({"rollout_func": self._rollout} if kind is GivenGRPO else {}),
        )
        trainer.passes = []
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        return trainer

    def _rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        lengths = [len(completion) for completion in self.completions]
        return {
            "prompt_ids": self.prompts,
            "completion_ids": [list(completion) for completion in self.completions],
            "logprobs": [row[:n].tolist() for row, n in zip(self.sampler, lengths, strict=True)],
            "env_mask": [row[:n].tolist() for row, n in zip(self.mask, lengths, strict=True)],
        }

    def _forward(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of TRL's own pass over the model, padded on both sides."""
        trainer = self._trainer(GivenGRPO, GRPOConfig, {})
        self.sampler = torch.zeros(self.mask.shape)
        batch = trainer._generate_and_score_completions(self._inputs())
        batch["advantages"] = torch.ones(len(self.prompts))
        trainer._compute_loss(trainer.model, batch)
        logprobs, entropies = trainer.seen
        return logprobs.detach().double(), entropies.detach().double()

    def _inputs(self) -> list[dict[str, str]]:
        return [{"prompt": "w2"} for _ in self.prompts]

    def loss(self, settings: dict[str, Any], rloo: bool = False) -> dict[str, Any]:
        """The loss, its gradient by the log-probabilities now, and the KL it measures."""
        kind = (GivenRLOO, RLOOConfig) if rloo else (GivenGRPO, GRPOConfig)
        trainer = self._trainer(*kind, settings)
        now = self.now.clone().requires_grad_()
        trainer.passes = [now]
        batch = {
            "prompt_ids": torch.ones(len(self.prompts), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(self.prompts), 1, dtype=torch.long),
            "completion_ids": torch.ones_like(self.mask),
            "completion_mask": self.mask,
            "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
            "old_per_token_logps": self.old,
            "old_logps": (self.old * self.mask).sum(1),
            "ref_per_token_logps": self.ref,
            "num_items_in_batch": self.mask.sum(),
        }
        if "vllm_importance_sampling_mode" in settings:
            trainer.use_vllm = True
            batch["importance_sampling_ratio"] = self.weights(settings)
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        assert not now.grad[self.mask == 0].any()
        kl = trainer._metrics["train"].get("kl")
        return {
            "settings": settings,
            "loss": loss.item(),
            "gradients": self.rows(now.grad),
            **({"kl": kl[0]} if kl else {}),
        }

    def advantages(self, settings: dict[str, Any], rloo: bool = False) -> dict[str, Any]:
        kind = (GivenRLOO, RLOOConfig) if rloo else (GivenGRPO, GRPOConfig)
        trainer = self._trainer(*kind, settings)
        if rloo:
            trainer.completions = self.completions
            trainer.passes = [self.old * self.mask, self.ref * self.mask]
        batch = trainer._generate_and_score_completions(self._inputs())
        return {"settings": settings, "advantages": batch["advantages"].tolist()}

    def weights(self, settings: dict[str, Any]) -> Tensor:
        """Importance weights of tokens that another engine sampled: [B, T], or [B, 1] for whole sequences."""
        trainer = self._trainer(GivenGRPO, GRPOConfig, settings)
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
        trainer.passes = [self.old]
        return trainer._generate_and_score_completions(self._inputs())["importance_sampling_ratio"]

    def importance(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"settings": settings, "weights": self.rows(self.weights(settings).expand(self.mask.shape))}

    def rows(self, values: Tensor) -> list[list[float]]:
        """Of the model's tokens only."""
        return [row[kept == 1].tolist() for row, kept in zip(values, self.mask, strict=True)]


def _reward(name: str, scores: list[float | None]) -> Any:
    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return scores

    reward.__name__ = name
    return reward


def values(folder: str) -> dict[str, Any]:
    """Everything there is to compare."""
    peer = Peer(folder)
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    sampled = [row[: len(ids)].tolist() for row, ids in zip(peer.mask, peer.completions, strict=True)]
    return {
        "model": {"config": MODEL, "weights": {name: weight.tolist() for name, weight in weights.items()}},
        "temperature": TEMPERATURE,
        "max_completion_length": LONGEST,
        "group": GROUP,
        "prompts": peer.prompts,
        "completions": peer.completions,
        "sampled": sampled,
        "logprobs": peer.rows(peer.now),
        "entropies": peer.rows(peer.entropies),
        "old_logprobs": peer.rows(peer.old),
        "ref_logprobs": peer.rows(peer.ref),
        "sampler_logprobs": peer.rows(peer.sampler),
        "rewards": REWARDS,
        "reward_weights": WEIGHTS,
        "given_advantages": ADVANTAGES,
        "losses": {
            **{name: peer.loss(settings) for name, settings in LOSSES.items()},
            **{name: peer.loss(settings, rloo=True) for name, settings in RLOO_LOSSES.items()},
        },
        "advantages": {
            **{name: peer.advantages(settings) for name, settings in GRPO_ADVANTAGES.items()},
            **{name: peer.advantages(settings, rloo=True) for name, settings in RLOO_ADVANTAGES.items()},
        },
        "importance": {name: peer.importance(settings) for name, settings in IMPORTANCE.items()},
    }


if __name__ == "__main__":
    write(values)
