"""The reference that preference training compares its policy with: the policy as training found it.

Four ways to have one. A frozen model beside the policy: a copy, or one that is given. The policy with its
adapters switched off, where these are new. The policy with its trained weights put back to what they were,
where an adapter goes on training. And the policy itself, as long as nothing has been trained: what is
computed then is kept as columns of the dataset. A frozen model may follow the policy from afar (TR-DPO).

Not covered: copies of models that are sharded over processes (pass one that is loaded by itself).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from etude.errors import CheckpointError, ConfigError, ModelError
from etude.models.reference import create_reference_model, reference_by_disabled_adapters
from etude.models.scorer import TokenScorer
from etude.models.wrappers import unwrapped
from etude.trainers.preference_config import ReferenceConfig

Batch = Mapping[str, Any]
FOLLOWER_FILE = "reference.safetensors"  # in a checkpoint, of a reference that moves


class Reference(ABC):
    """Gives log-probabilities; never a gradient."""

    def prepare(self, accelerator: Accelerator) -> None:  # noqa: B027  # most have nothing of their own
        """Put what belongs to the reference alone where the policy is."""

    @abstractmethod
    def logprobs(self, policy: nn.Module, batch: Batch) -> Tensor:
        """Of the batch's targets [M]. `policy` is the model that trains, in its wrappers."""


class FrozenModel(Reference):
    """A model of its own."""

    def __init__(self, model: Any) -> None:
        self.model: nn.Module = model.requires_grad_(False).eval()
        self.scorer = TokenScorer(model)

    def prepare(self, accelerator: Accelerator) -> None:
        self.model = accelerator.prepare_model(self.model, evaluation_mode=True)

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: Batch) -> Tensor:
        return self.scorer(self.model, batch).logprobs


class DisabledAdapters(Reference):
    """The policy without its adapters."""

    def __init__(self, scorer: TokenScorer) -> None:
        self.scorer = scorer

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: Batch) -> Tensor:
        with reference_by_disabled_adapters(policy), evaluation_mode(policy):
            return self.scorer(policy, batch).logprobs


class InitialWeights(Reference):
    """The policy with what trains put back to where it began: an adapter costs a copy of itself only."""

    def __init__(self, scorer: TokenScorer, policy: nn.Module) -> None:
        self.scorer = scorer
        self.pairs = [(p, p.detach().clone()) for p in policy.parameters() if p.requires_grad]

    def prepare(self, accelerator: Accelerator) -> None:
        self.pairs = [(p, initial.to(accelerator.device)) for p, initial in self.pairs]

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: Batch) -> Tensor:
        with self._put_back(), evaluation_mode(policy):
            return self.scorer(policy, batch).logprobs

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        now = [(parameter, parameter.data) for parameter, _ in self.pairs]
        try:
            for parameter, initial in self.pairs:
                parameter.data = initial
            yield
        finally:
            for parameter, trained in now:
                parameter.data = trained


class Untrained(Reference):
    """The policy itself, while it is what it began as."""

    def __init__(self, scorer: TokenScorer, has_begun: Callable[[], bool]) -> None:
        self.scorer = scorer
        self.has_begun = has_begun

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: Batch) -> Tensor:
        if self.has_begun():
            raise ConfigError(
                "these rows came after training had begun, and the policy it began with is gone "
                "(precompute_ref_log_probs); give them as eval_dataset when the trainer is made, or pass a "
                "ref_model"
            )
        with evaluation_mode(policy):
            return self.scorer(policy, batch).logprobs


def make_reference(
    policy: Any,
    scorer: TokenScorer,
    ref_model: Any,
    config: ReferenceConfig,
    *,
    new_adapter: bool,
    has_begun: Callable[[], bool],
) -> Reference:
    """The cheapest reference that serves.

    Args:
        policy: the model that trains, as yet untrained and unwrapped.
        scorer: the policy's.
        ref_model: a model that is given to compare with, or None.
        config: whether it is computed beforehand, and whether it moves.
        new_adapter: what trains was put on the policy just now and has no effect yet.
        has_begun: whether the policy has been trained.

    Raises:
        ConfigError: the reference is the policy itself, or one that can't move is to.
    """
    if ref_model is policy:
        raise ConfigError(
            "ref_model is the model that trains; leave it out: the policy is compared with what it began as"
        )
    adapted = any(isinstance(part, PeftModel) for part in unwrapped(policy))
    if config.sync_ref_model and (adapted or (ref_model is not None and _differ(ref_model, policy))):
        raise ConfigError(
            "sync_ref_model mixes the policy's weights into a model of the same kind beside it; leave it out "
            "with adapters, and with a ref_model of another kind"
        )
    if ref_model is not None:
        return FrozenModel(ref_model)
    if new_adapter:
        return DisabledAdapters(scorer)
    if config.precompute_ref_log_probs:
        return Untrained(scorer, has_begun)
    if adapted:
        return InitialWeights(scorer, policy)
    return FrozenModel(create_reference_model(policy))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is random; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---- computed beforehand ----


def add_columns(
    dataset: Dataset,
    score: Callable[[list[dict[str, Any]]], dict[str, list[float]]],
    batch_size: int,
    accelerator: Accelerator,
    *known: Any,
) -> Dataset:
    """The dataset with columns that a model computes from its rows, each process from its share.

    What was computed is kept in the datasets library's cache, and found again for the same rows, model and
    settings.

    Args:
        score: a few rows → the columns' values for them.
        batch_size: how many rows.
        known: what the values depend on besides the rows.
    """
    mine = dataset.shard(accelerator.num_processes, accelerator.process_index, contiguous=True)
    fingerprint = Hasher.hash([mine._fingerprint, batch_size, *known])

    def of_columns(columns: Mapping[str, list[Any]]) -> dict[str, list[float]]:
        return score([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])

    scored = mine.map(
        of_columns,
        batched=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names,
        new_fingerprint=fingerprint,
        cache_file_name=_cache_file(fingerprint),
        desc="Scoring by the reference",
    )
    for name in scored.column_names:
        dataset = dataset.add_column(name, gather_object(list(scored[name])))
    return dataset


def _cache_file(fingerprint: str) -> str:
    """Beside what the datasets library keeps: rows from memory have no place of their own there."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "reference-logprobs")
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{fingerprint}.arrow")


def digest_of(model: nn.Module) -> str:
    """A hash of the model's class, configuration and weights.

    Raises:
        ModelError: the weights aren't here.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in unwrapped(model):
        digest.update(f"{type(part).__name__} {getattr(part, 'config', '')}".encode())
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ModelError(f"the model's {name} holds no data here, so it can't be recognised again")
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- one that moves ----


class FollowPolicy(TrainerCallback):
    """After every few steps, mixes the policy's weights into the reference; keeps it in checkpoints.

    Gorbatovski et al. 2024, "Learn your reference model for real good alignment", eq. 4 and 5.
    """

    def __init__(self, reference: FrozenModel, config: ReferenceConfig, accelerator: Accelerator) -> None:
        self.reference = reference
        self.config = config
        self.accelerator = accelerator

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.config.ref_model_sync_steps:
            return
        policy = dict(self.accelerator.unwrap_model(model).named_parameters())
        for name, parameter in self._frozen().named_parameters():
            parameter.lerp_(policy[name].to(parameter.dtype), self.config.ref_model_mixup_alpha)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            place = Path(args.output_dir, f"checkpoint-{state.global_step}", FOLLOWER_FILE)
            save_file({name: p.contiguous() for name, p in self._frozen().named_parameters()}, place)

    def load(self, checkpoint: str) -> None:
        """Put the reference where it was when `checkpoint` was written.

        Raises:
            CheckpointError: that one has none.
        """
        place = Path(checkpoint, FOLLOWER_FILE)
        if not place.is_file():
            raise CheckpointError(
                f"{checkpoint} holds no {FOLLOWER_FILE}; it was written without sync_ref_model"
            )
        loaded = load_file(place)
        for name, parameter in self._frozen().named_parameters():
            parameter.data.copy_(loaded[name])

    def _frozen(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.reference.model)


def _differ(one: nn.Module, other: nn.Module) -> bool:
    def shapes(model: nn.Module) -> dict[str, Sequence[int]]:
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    return shapes(one) != shapes(other)
