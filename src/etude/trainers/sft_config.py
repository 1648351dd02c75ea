"""The settings of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from etude.errors import ConfigError
from etude.trainers.data_config import DataConfig


@dataclass
class SFTConfig(DataConfig):
    """`DataConfig` and what supervised fine-tuning adds.

    Attributes:
        completion_only_loss: learn the completion only. None: True where rows have one (prompt and
            completion, segments).
        assistant_only_loss: in messages, learn what the assistant says only.
        append_eos: end texts, completions and segments with the end-of-sequence token.
        packing: fill each row of a batch with as many rows of the data as fit max_length tokens. They never
            see each other; steps get fewer and fuller.
        packing_strategy: what becomes of rows longer than max_length: bfd cuts off their end, bfd_split makes
            rows of their own of the pieces. Both fill by best-fit decreasing.
        loss_type: nll is the cross entropy; dft weighs each token by its own probability (dynamic
            fine-tuning, Wu et al. 2025, arXiv:2508.05629).
        neftune_noise_alpha: noise on the input embeddings of this strength (Jain et al. 2023); 5 to 15.
    """

    completion_only_loss: bool | None = None
    assistant_only_loss: bool = True
    packing: bool = False
    packing_strategy: Literal["bfd", "bfd_split"] = "bfd"
    loss_type: Literal["nll", "dft"] = "nll"

    def __post_init__(self) -> None:
        if self.packing and self.max_length is None:
            raise ConfigError("packing fills rows up to max_length tokens; set max_length too")
        if self.packing_strategy not in ("bfd", "bfd_split"):
            raise ConfigError(
                f"packing_strategy is {self.packing_strategy!r}; expected bfd or bfd_split. (What is called "
                "wrapped elsewhere lets texts read their neighbours; bfd_split keeps all tokens without that)"
            )
        if self.packing_strategy != "bfd" and not self.packing:
            raise ConfigError("packing_strategy does nothing without packing; set packing too")
        if self.loss_type not in ("nll", "dft"):
            raise ConfigError(f"loss_type is {self.loss_type!r}; expected nll or dft")
        if self.loss_type == "dft" and self.label_smoothing_factor:
            raise ConfigError("label_smoothing_factor belongs to the loss nll; leave it out with dft")
        super().__post_init__()
