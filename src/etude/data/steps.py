"""Dataset rows → answers in steps, each right or wrong: what process reward models learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from etude.data.encoding import encode_control
from etude.data.formats import to_prompt
from etude.errors import DataError
from etude.types import Episode, Segment


class Steps(NamedTuple):
    """An answer in steps.

    Attributes:
        episode: the prompt, then each step with its separator as a segment, all of them targets.
        ends: index into the episode's tokens of each step's last token.
        labels: of each step: right or wrong.
    """

    episode: Episode
    ends: list[int]
    labels: list[bool]


def to_steps(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, step_separator: str = "\n"
) -> Steps:
    """Tokenise a row of `prompt, completions, labels`.

    Args:
        row: the prompt is a string, or messages that the steps answer; the steps are strings.
        tokenizer: of the model to train.
        step_separator: follows each step; its last token is where the step is judged.

    Raises:
        DataError: a value has the wrong type, or there isn't one label per step.
    """
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise DataError(f"completions is {str(steps)[:60]}; expected a list of steps, each a string")
    if not isinstance(labels, list) or not all(label in (True, False) for label in labels):
        raise DataError(f"labels is {str(labels)[:60]}; expected a list of true and false")
    if len(steps) != len(labels):
        raise DataError(f"there are {len(steps)} steps and {len(labels)} labels; expected one label per step")
    episode = Episode(task=dict(row), segments=[to_prompt(row, tokenizer)])
    ends = []
    for step in steps:
        ids = encode_control(tokenizer, step) + encode_control(tokenizer, step_separator)
        if not ids:
            raise DataError("a step is empty, and so is the step_separator: there is no token to judge it at")
        episode.append(Segment("model", step + step_separator, ids, target=True))
        ends.append(len(episode) - 1)
    return Steps(episode, ends, [bool(label) for label in labels])
