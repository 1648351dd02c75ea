"""Our numbers against TRL 1.16's on the same tensors: log-probabilities, losses, gradients, advantages.

`make test` compares with `trl1_losses.json`; `make test-peers` lets TRL make these numbers again and fails
where they have changed. Where we differ from TRL, and on purpose, the inputs leave that out:

- The KL in GRPO's loss. TRL 1.16 multiplies k3 by the policy ratio (`use_bias_correction_kl`, on by default;
  DeepSeek-V3.2), ours is the k3 of the GRPO paper: compared with that switched off.
- CISPO's `epsilon_high` is the cap itself in TRL, so that its default of 0.2 shrinks every weight to at most
  0.2. Ours is how far above 1 the cap lies; `epsilon` bounds weights from below, and 1 switches that off.
- 'bnpo' divides by the tokens of one pass in TRL, ours by those of the optimizer step: compared in one pass.
- A constant group: TRL's advantages are what rounding leaves of 0, divided by 1e-4; ours are exactly 0.
- Episodes without a token of the model's count in TRL's denominators ('grpo', 'dr_grpo', RLOO), not in ours.
- RLOO in TRL takes a tool's tokens for the model's.
"""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from peer_numbers import made_again, require_same
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from etude.data.batch import PackedBatch, Trajectory
from etude.math.group import decoupled_advantages
from etude.math.kl import kl_estimate
from etude.math.masked import masked_mean
from etude.math.off_policy import importance_weights
from etude.models.forward import PolicyForward
from etude.trainers.experience import Experience, Minibatch
from etude.trainers.group import Scores
from etude.trainers.group_config import GRPOConfig, RLOOConfig
from etude.trainers.grpo import GRPOTrainer
from etude.trainers.rloo import RLOOTrainer

VALUES = Path(__file__).with_name("trl1_losses.json")
PEER = json.loads(VALUES.read_text())
ATOL = 1e-5


def rows(name):
    """[B, N] float64, padded with 0: what the file has per token of the model's."""
    return pad_rows(PEER[name])


def pad_rows(values):
    return pad_sequence([torch.tensor(row, dtype=torch.float64) for row in values], batch_first=True)


def mask():
    return pad_rows([[1] * len(row) for row in PEER["logprobs"]]).bool()


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=ours.dtype), atol=ATOL, rtol=ATOL)


@cache
def peer_model():
    model = LlamaForCausalLM(LlamaConfig(**PEER["model"]["config"]))
    weights = {name: torch.tensor(values) for name, values in PEER["model"]["weights"].items()}
    model.load_state_dict(weights)
    return model.eval()


def trajectories():
    """The episodes, scored with the weighted sum of those rewards that apply."""
    found = []
    names = ("prompts", "completions", "sampled", "rewards", "sampler_logprobs")
    for prompt, completion, sampled, rewards, sampler in zip(*(PEER[name] for name in names), strict=True):
        weighted = [w * r for w, r in zip(PEER["reward_weights"], rewards, strict=True) if r is not None]
        trajectory = Trajectory.of_response(
            torch.tensor(prompt), torch.tensor(completion), sum(weighted), torch.tensor(sampled)
        )
        trajectory.sampler_logprobs = torch.tensor(sampler, dtype=torch.float64)
        found.append(trajectory)
    return found


def scored():
    """Which episodes some reward applies to."""
    return torch.tensor([any(r is not None for r in rewards) for rewards in PEER["rewards"]])


def groups():
    return torch.arange(len(PEER["rewards"])) // PEER["group"]


def experience():
    return Experience(
        trajectories(),
        mask(),
        logprobs=rows("old_logprobs"),
        values=torch.zeros(mask().shape),
        ref_logprobs=rows("ref_logprobs"),
        kl=rows("old_logprobs") - rows("ref_logprobs"),
        last_values=torch.zeros(len(mask())),
        entropies=torch.zeros(mask().shape),
    )


def our_settings(theirs):
    """TRL's settings in our meaning of them."""
    names = {
        "vllm_importance_sampling_mode": "importance_sampling_correction",
        "vllm_importance_sampling_clip_max": "importance_sampling_cap",
    }
    ours = {
        names.get(name, name): value for name, value in theirs.items() if name != "use_bias_correction_kl"
    }
    if ours.get("loss_type") == "cispo":
        ours |= {"epsilon": 1.0, "epsilon_high": ours["epsilon_high"] - 1}
    if ours.get("loss_type") == "dr_grpo":
        ours["max_completion_length"] = PEER["max_completion_length"]
    return ours


def trainer_like(name, settings, tokenizer):
    kind, config = (RLOOTrainer, RLOOConfig) if name.startswith("rloo") else (GRPOTrainer, GRPOConfig)
    return kind(peer_model(), config(**our_settings(settings)), processing_class=tokenizer)


def test_log_probabilities_and_entropies_of_the_same_model():
    """Ours packed end to end, with logits at the model's tokens only; theirs padded on both sides."""
    batch = PackedBatch.of(trajectories())
    output = PolicyForward(peer_model())(
        batch.input_ids, batch.lengths, batch.states, batch.targets, batch.last_states, PEER["temperature"]
    )
    close(batch.unpack(output.logprobs), rows("logprobs"))
    close(batch.unpack(output.entropies), rows("entropies"))


@pytest.mark.parametrize("name", PEER["losses"])
def test_losses_and_their_gradients(name, tokenizer):
    theirs = PEER["losses"][name]
    trainer = trainer_like(name, theirs["settings"], tokenizer)
    logprobs = rows("logprobs").requires_grad_()
    observed = experience()
    minibatch = Minibatch(
        list(range(len(observed.trajectories))),
        observed,
        logprobs,
        entropies=observed.entropies,
        values=observed.values,
        denominator=observed.mask.sum(),
        sequences=observed.mask.any(1).sum(),
    )
    advantages = torch.tensor(PEER["given_advantages"], dtype=torch.float64)
    advantages, _ = trainer.corrected(advantages[:, None].expand_as(logprobs), observed)
    loss, _, _ = trainer.loss(minibatch, advantages)
    (gradients,) = torch.autograd.grad(loss, logprobs)
    close(loss, theirs["loss"])
    close(gradients, pad_rows(theirs["gradients"]))


def test_kl_to_the_reference():
    measured = {values["kl"] for values in PEER["losses"].values() if "kl" in values}
    assert len(measured) == 1
    kl = kl_estimate(rows("logprobs"), rows("ref_logprobs"), "k3")
    close(masked_mean(kl, mask()), measured.pop())


@pytest.mark.parametrize("name", PEER["advantages"])
def test_advantages(name, tokenizer):
    theirs = PEER["advantages"][name]
    if name == "normalize_then_sum":
        rewards = torch.tensor(
            [[math.nan if reward is None else reward for reward in row] for row in PEER["rewards"]]
        )
        advantages = decoupled_advantages(rewards, torch.tensor(PEER["reward_weights"]), groups())
    else:
        trainer = trainer_like(name, theirs["settings"], tokenizer)
        observed = experience().only(scored())
        scores = torch.tensor([trajectory.score for trajectory in observed.trajectories], dtype=torch.float64)
        penalised = trainer.penalised(scores, observed)
        credit = trainer.credit(Scores(penalised, groups(), scored(), observed.trajectories))
        advantages_BN = trainer.spread(credit, observed)
        assert (advantages_BN == advantages_BN[:, :1])[observed.mask].all()
        advantages = advantages_BN[:, 0]
    close(advantages, theirs["advantages"])


@pytest.mark.parametrize("mode", PEER["importance"])
def test_importance_weights(mode):
    theirs = PEER["importance"][mode]
    cap = theirs["settings"]["vllm_importance_sampling_clip_max"]
    weights = importance_weights(rows("old_logprobs"), rows("sampler_logprobs"), mask(), mode=mode, cap=cap)
    close(weights[mask()], pad_rows(theirs["weights"])[mask()])


@pytest.mark.peers
def test_the_numbers_are_those_of_trl(tmp_path):
    require_same(made_again(VALUES.with_name("trl1_losses.py"), tmp_path), PEER, "values")
