"""A trainer whose policy is compared with a reference: what DPO and KTO have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset

from etude.errors import ConfigError
from etude.models.scorer import TokenScorer
from etude.trainers.data_trainer import DataTrainer, Model
from etude.trainers.preference_config import ReferenceConfig
from etude.trainers.reference import (
    FollowPolicy,
    FrozenModel,
    Reference,
    add_columns,
    digest_of,
    make_reference,
)


class ReferenceTrainer(DataTrainer):
    """The arguments are those of `DataTrainer`, and:

    Args:
        ref_model: the reference, a model or the name or path of one; by default what `model` is before
            training.

    Raises:
        ConfigError: the reference is given and not used, or is the model itself.
    """

    args: Any  # of a `ReferenceConfig`
    reference: Reference | None
    follower: FollowPolicy | None = None

    def __init__(
        self,
        model: str | Model,
        ref_model: str | Model | None = None,
        args: ReferenceConfig | None = None,
        **options: Any,
    ) -> None:
        self.given_reference = ref_model
        self.new_adapter = options.get("peft_config") is not None
        super().__init__(model, args, **options)
        if self.reference is not None:
            self._begin(self.reference)

    def prepare(self, model: Model) -> None:
        self.scorer = TokenScorer(model)
        self.reference = self.make_reference(model)

    def make_reference(self, model: Model) -> Reference | None:
        """None for a method that is set to do without."""
        given = self.given_reference
        if isinstance(given, str):
            given = self.load_model(given, **(self.args.model_init_kwargs or {}))
        return make_reference(
            model,
            self.scorer,
            given,
            self.args,
            new_adapter=self.new_adapter,
            has_begun=lambda: self.state.global_step > 0,
        )

    @abstractmethod
    def score_rows(self, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
        """Columns that spare these rows the reference, where they are computed beforehand."""

    def _begin(self, reference: Reference) -> None:
        reference.prepare(self.accelerator)
        if self.args.sync_ref_model:
            assert isinstance(reference, FrozenModel)
            self.follower = FollowPolicy(reference, self.args, self.accelerator)
            self.add_callback(self.follower)
        if not self.args.precompute_ref_log_probs:
            return
        model: Any = reference.model if isinstance(reference, FrozenModel) else self.model
        scored = partial(self._scored, digest_of(model))
        if self.train_dataset is not None:
            self.train_dataset = scored(self.args.per_device_train_batch_size, self.train_dataset)
        if isinstance(self.eval_dataset, Mapping):
            evaluated = {
                k: scored(self.args.per_device_eval_batch_size, v) for k, v in self.eval_dataset.items()
            }
            self.eval_dataset = evaluated
        elif self.eval_dataset is not None:
            self.eval_dataset = scored(self.args.per_device_eval_batch_size, self.eval_dataset)

    def _scored(self, digest: str, batch_size: int, dataset: Any) -> Dataset:
        size = self.args.precompute_ref_batch_size or batch_size
        with self.accelerator.autocast():
            return add_columns(
                dataset, self.score_rows, size, self.accelerator, digest, self.method, self.scoring_settings()
            )

    def scoring_settings(self) -> Any:
        """What `score_rows` depends on besides the model and the rows."""
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.follower is not None:
            self.follower.load(resume_from_checkpoint)


def require_no_reference(ref_model: Any) -> None:
    """For a method that is set to do without.

    Raises:
        ConfigError: one is given.
    """
    if ref_model is not None:
        raise ConfigError("reference_free compares with no reference; leave ref_model out")
