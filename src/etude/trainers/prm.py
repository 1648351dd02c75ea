"""Process reward models: for each step of an answer, the probability that it is right.

The loss is the cross entropy of a step's label after its last token (Lightman et al. 2023, "Let's verify step
by step"), a mean over the steps of the whole optimizer step. Encoders can be trained, too: they see the later
steps, and judge in hindsight.

Not covered: labels that are estimated while training, by rolling answers out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from etude.data.files import Rows, load_rows
from etude.data.formats import detect_format
from etude.data.scored import pack_scored, scored_ids
from etude.data.steps import to_steps
from etude.math.reward_model import step_log_odds, step_loss
from etude.trainers.means import Sums
from etude.trainers.reward import ScoreTrainer, calibration_sums
from etude.trainers.reward_config import PRMConfig
from etude.trainers.tokenizing import map_rows


class PRMTrainer(ScoreTrainer):
    """Train a process reward model on rows of `prompt, completions, labels`: steps, each right or wrong.

    The other arguments are those of `DataTrainer`. Metrics, over steps: `accuracy`, and `accuracy_right` and
    `accuracy_wrong` among steps that are the one or the other; of the probability that a step is right, the
    `brier` score and the expected `calibration_error`.
    """

    method = "prm"
    config_class = PRMConfig
    kind = "token"
    on_the_card = ("step_separator", "train_on_last_step_only", "disable_dropout")

    def tokenize(self, rows: Rows) -> Dataset:
        dataset = load_rows(rows)
        detect_format(dataset.column_names, ("stepwise",))
        return map_rows(
            dataset,
            _tokenize_steps,
            self.args,
            what="have no step that max_length leaves",
            tokenizer=self.tokenizer,
            separator=self.args.step_separator,
            last_only=self.args.train_on_last_step_only,
            max_length=self.limit,
        )

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = pack_scored(
            [row["input_ids"] for row in rows], [row["ends"] for row in rows], share=self.reader.packs
        )
        return {**batch, "labels": torch.tensor([y for row in rows for y in row["labels"]]).long()}

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Sums]:
        log_odds_M = step_log_odds(self.reader(model, batch))
        labels_M = batch["labels"]
        total = step_loss(log_odds_M, labels_M).sum()
        log_odds_M, right_M = log_odds_M.detach(), labels_M == 1
        hits_M = (log_odds_M > 0) == right_M
        return total, {
            "accuracy": (hits_M.sum(), len(hits_M)),
            "accuracy_right": (hits_M[right_M].sum(), right_M.sum()),
            "accuracy_wrong": (hits_M[~right_M].sum(), (~right_M).sum()),
            **calibration_sums(log_odds_M.sigmoid(), labels_M),
        }


def _tokenize_steps(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    separator: str,
    last_only: bool,
    max_length: int | None,
) -> dict[str, Any]:
    steps = to_steps(row, tokenizer, step_separator=separator)
    scored = scored_ids(steps.episode.token_ids, tokenizer, append_eos=False, max_length=max_length)
    judged = [(scored.place(end), label) for end, label in zip(steps.ends, steps.labels, strict=True)]
    judged = [(place, label) for place, label in judged[-1 if last_only else 0 :] if place is not None]
    return {
        "input_ids": scored.ids,
        "ends": [place for place, _ in judged],
        "labels": [int(label) for _, label in judged],
        "cut": bool(scored.dropped),
        "learned": bool(judged),
    }
