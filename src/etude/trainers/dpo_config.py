"""The settings of direct preference optimisation and its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from etude.errors import ConfigError
from etude.trainers.preference_config import ReferenceConfig, require_smoothing

# By what a loss is a function of: `math.preference` has them.
MARGIN_LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "sft")
OTHER_LOSSES = ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired")


@dataclass
class DPOConfig(ReferenceConfig):
    """`ReferenceConfig` and what direct preference optimisation adds.

    Attributes:
        loss_type: sigmoid (DPO), hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot,
            aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm; or several of them, which are
            added.
        loss_weights: of each of several losses; 1 by default.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round (sigmoid,
            sigmoid_norm, aot, aot_unpaired; robust, which needs one); the ε of exo_pair, which needs one
            (1e-3).
        f_divergence_type: what holds the policy to its reference: reverse_kl, forward_kl, js_divergence,
            alpha_divergence.
        f_alpha_divergence_coef: the α of the α-divergence.
        reference_free: no reference: log-probabilities themselves stand in for log-ratios.
        ld_alpha: weight of the tokens by which an answer is longer than the other (LD-DPO); none: 1.
        use_weighting: weigh each pair by how likely the policy is to write its answers (WPO).
        discopop_tau: how soon discopop turns from one loss to the other.
    """

    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    reference_free: bool = False
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05

    @property
    def weighted_losses(self) -> list[tuple[str, float]]:
        """The losses that are added, each with its weight."""
        kinds = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        return list(zip(kinds, self.loss_weights or [1.0] * len(kinds), strict=True))

    def __post_init__(self) -> None:
        kinds = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        self._check_losses(kinds)
        if self.loss_weights is not None and len(self.loss_weights) != len(kinds):
            raise ConfigError(
                f"there are {len(self.loss_weights)} loss_weights and {len(kinds)} losses (loss_type); "
                "expected one weight for each"
            )
        if self.f_divergence_type != "alpha_divergence":
            self.require_unused("f_alpha_divergence_coef", "f_divergence_type=alpha_divergence")
        if "discopop" not in kinds:
            self.require_unused("discopop_tau", "loss_type=discopop")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ConfigError(f"ld_alpha is {self.ld_alpha}; expected 0 <= ld_alpha <= 1")
        if self.reference_free and (self.precompute_ref_log_probs or self.sync_ref_model):
            raise ConfigError(
                "reference_free has no reference to compute or to move; leave precompute_ref_log_probs and "
                "sync_ref_model out"
            )
        super().__post_init__()

    def _check_losses(self, kinds: list[str]) -> None:
        known = (*MARGIN_LOSSES, *OTHER_LOSSES)
        unknown = [kind for kind in kinds if kind not in known]
        if unknown or not kinds:
            listed = ", ".join(known)
            raise ConfigError(f"loss_type is {self.loss_type!r}; expected one or several of {listed}")
        if self.f_divergence_type != "reverse_kl" and (others := set(kinds) & set(OTHER_LOSSES)):
            raise ConfigError(
                f"f_divergence_type={self.f_divergence_type} makes rewards up to a constant, which cancels "
                f"between two answers only, not in {', '.join(sorted(others))}; expected losses of the "
                f"margin: {', '.join(MARGIN_LOSSES)}"
            )
        require_smoothing(self.label_smoothing)
        if not set(kinds) & set(_SMOOTHED):
            self.require_unused("label_smoothing", f"one of the losses {', '.join(_SMOOTHED)}")
        if "exo_pair" in kinds and not self.label_smoothing:
            raise ConfigError("exo_pair needs a label_smoothing above 0; its paper takes 1e-3")
        if "robust" in kinds and not self.label_smoothing:
            raise ConfigError(
                "robust needs a label_smoothing above 0, the share of pairs that are labelled the wrong way "
                "round; with 0 it is sigmoid"
            )
        if self.use_weighting and any(kind.startswith("aot") for kind in kinds):
            raise ConfigError(
                "use_weighting weighs pairs, and aot sorts answers out of their pairs; leave one of them out"
            )
