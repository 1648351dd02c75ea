"""The settings that all training on preferences has in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from etude.errors import ConfigError
from etude.trainers.data_config import DataConfig


@dataclass
class PreferenceConfig(DataConfig):
    """`DataConfig` and what preferences add.

    Attributes:
        learning_rate: of AdamW; 1e-6 unless given.
        disable_dropout: train without dropout, so that two answers are compared by the same model.
        beta: how much a change of log-probability counts; each method says what for.
        truncation_mode: what prompts with answers longer than max_length lose: keep_start cuts off the
            answer's end, keep_end the prompt's beginning, and only then the answer's end.
    """

    learning_rate: float = 1e-6
    disable_dropout: bool = True
    beta: float = 0.1
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"beta is {self.beta}; expected a number > 0")
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ConfigError(f"truncation_mode is {self.truncation_mode!r}; expected keep_start or keep_end")
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(self, name):
                raise ConfigError(f"{name} is for supervised fine-tuning and does nothing here; leave it out")
        super().__post_init__()

    def require_unused(self, names: str | tuple[str, ...], without: str) -> None:
        """Refuse settings that have an effect only together with something that isn't there.

        Raises:
            ConfigError: one of them differs from its default.
        """
        defaults: dict[str, Any] = {setting.name: setting.default for setting in fields(self)}
        for name in (names,) if isinstance(names, str) else names:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name} does nothing without {without}; set that too, or leave it out")


@dataclass
class ReferenceConfig(PreferenceConfig):
    """`PreferenceConfig`, for methods that compare the policy with a reference.

    Attributes:
        beta: strength of the tie to the reference: the higher, the closer the policy stays.
        precompute_ref_log_probs: compute the reference's log-probabilities of all rows once, before training.
        precompute_ref_batch_size: rows at a time while doing so; that of training or evaluation by default.
        sync_ref_model: let the reference follow the policy (TR-DPO, Gorbatovski et al. 2024,
            arXiv:2404.09656, "soft" for a share below 1).
        ref_model_mixup_alpha: the policy's share α: reference ← α policy + (1 − α) reference.
        ref_model_sync_steps: steps between two such changes.
    """

    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512

    def __post_init__(self) -> None:
        if not self.sync_ref_model:
            self.require_unused(("ref_model_mixup_alpha", "ref_model_sync_steps"), "sync_ref_model")
        if not self.precompute_ref_log_probs:
            self.require_unused("precompute_ref_batch_size", "precompute_ref_log_probs")
        elif self.sync_ref_model:
            raise ConfigError(
                "a reference that follows the policy (sync_ref_model) can't be computed once and for all "
                "(precompute_ref_log_probs); leave one of them out"
            )
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ConfigError(
                f"ref_model_mixup_alpha is {self.ref_model_mixup_alpha}; expected 0 < alpha <= 1"
            )
        for name in ("ref_model_sync_steps", "precompute_ref_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        super().__post_init__()


@dataclass
class ORPOConfig(PreferenceConfig):
    """`PreferenceConfig` for odds-ratio preference optimisation.

    Attributes:
        beta: weight of the odds-ratio term beside imitation, the paper's λ.
    """


@dataclass
class SimPOConfig(PreferenceConfig):
    """`PreferenceConfig` and what SimPO adds.

    Attributes:
        beta: scale of the rewards, which are log-probabilities per token; 2 unless given.
        simpo_gamma: how far apart the two rewards are to be.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round.
        alpha: shape of the reward, r = (1 − p^(−α))/α (AlphaPO); 0 is SimPO's own.
    """

    beta: float = 2.0
    simpo_gamma: float = 1.0
    label_smoothing: float = 0.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        require_smoothing(self.label_smoothing)
        super().__post_init__()


@dataclass
class CPOConfig(PreferenceConfig):
    """`PreferenceConfig` and what contrastive preference optimisation adds.

    Attributes:
        beta: how much a difference of log-probabilities counts.
        loss_type: of sums over tokens: sigmoid (CPO), hinge (SLiC-HF); of means over tokens: ipo, simpo,
            alphapo (simpo with cpo_alpha at 0 unless given).
        cpo_alpha: weight of imitating the chosen answer; 1 unless given.
        simpo_gamma: how far apart simpo's rewards are to be.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round (sigmoid, simpo).
        alpha: shape of the reward, r = (1 − p^(−α))/α; 0 is the log-probability.
    """

    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    cpo_alpha: float | None = None
    simpo_gamma: float = 0.5
    label_smoothing: float = 0.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        known = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
        if self.loss_type not in known:
            raise ConfigError(f"loss_type is {self.loss_type!r}; expected one of {', '.join(known)}")
        if self.cpo_alpha is None:
            self.cpo_alpha = 0.0 if self.loss_type == "alphapo" else 1.0
        if self.loss_type not in ("simpo", "alphapo"):
            self.require_unused("simpo_gamma", "loss_type=simpo")
        if self.loss_type in ("hinge", "ipo"):
            self.require_unused("label_smoothing", "loss_type=sigmoid or simpo")
        if self.cpo_alpha < 0:
            raise ConfigError(f"cpo_alpha is {self.cpo_alpha}; expected a number >= 0")
        require_smoothing(self.label_smoothing)
        super().__post_init__()


def require_smoothing(label_smoothing: float) -> None:
    """Refuse what is no share of wrong labels.

    Raises:
        ConfigError: it isn't in [0, ½).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing is {label_smoothing}; expected 0 <= label_smoothing < 0.5")
