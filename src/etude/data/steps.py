"""Dataset rows → answers in steps, each right or wrong: what process reward models learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from etude.data.encoding import encode_control
from etude.data.formats import to_episode, to_prompt
from etude.errors import DataError
from etude.types import Episode, Segment


class Steps(NamedTuple):
    """An answer in steps.

    Attributes:
        episode: the prompt and the steps; these are targets.
        ends: index into the episode's tokens of each step's last token, where it is judged.
        labels: of each step: right or wrong.
    """

    episode: Episode
    ends: list[int]
    labels: list[bool]


def to_steps(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, step_separator: str = "\n"
) -> Steps:
    """Tokenise a row of `prompt, completions, labels`: a prompt, steps, and for each whether it is right.

    Steps are strings, pieces of one answer; the prompt is a string, or messages which that answers. Or steps
    are lists of messages, each with one of the assistant (and what tools said to it): then a turn is a step.

    Args:
        row: of a dataset.
        tokenizer: of the model to train.
        step_separator: follows each step that is a string, and its last token is where the step is judged.

    Raises:
        DataError: a value has the wrong type, or there isn't one label per step.
    """
    steps, labels = row["completions"], row["labels"]
    if not isinstance(labels, list) or not all(label in (True, False) for label in labels):
        raise DataError(f"labels is {str(labels)[:60]}; expected a list of true and false")
    if not isinstance(steps, list) or not steps:
        raise DataError(f"completions is {str(steps)[:60]}; expected a list of steps")
    if len(steps) != len(labels):
        raise DataError(f"there are {len(steps)} steps and {len(labels)} labels; expected one label per step")
    if all(isinstance(step, str) for step in steps):
        episode, ends = _pieces(row, steps, tokenizer, step_separator)
    elif all(isinstance(step, list) for step in steps):
        episode, ends = _turns(row, steps, tokenizer)
    else:
        kinds = ", ".join(dict.fromkeys(type(step).__name__ for step in steps))
        raise DataError(f"the steps are of type {kinds}; expected strings only, or lists of messages only")
    return Steps(episode, ends, [bool(label) for label in labels])


def _pieces(
    row: Mapping[str, Any], steps: list[str], tokenizer: PreTrainedTokenizerBase, separator: str
) -> tuple[Episode, list[int]]:
    episode = Episode(task=dict(row), segments=[to_prompt(row, tokenizer)])
    ends = []
    for number, step in enumerate(steps):
        ids = encode_control(tokenizer, step) + encode_control(tokenizer, separator)
        if not ids:
            raise DataError(f"step {number} is empty, and so is step_separator: no token to judge it at")
        episode.append(Segment("model", step + separator, ids, target=True))
        ends.append(len(episode) - 1)
    return episode, ends


def _turns(
    row: Mapping[str, Any], steps: list[list[Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[Episode, list[int]]:
    for number, step in enumerate(steps):
        speakers = [message.get("role") for message in step if isinstance(message, Mapping)]
        if speakers.count("assistant") != 1:
            raise DataError(
                f"step {number} has messages of {speakers}; expected one of the assistant in each"
            )
    completion = [message for step in steps for message in step]
    beside = {name: value for name, value in row.items() if name in ("tools", "chat_template_kwargs")}
    conversation = {"prompt": row["prompt"], "completion": completion, **beside}
    episode = to_episode(conversation, tokenizer, append_eos=False)
    episode.task = dict(row)
    ends = [end - 1 for _, end, segment in episode.spans() if segment.target]
    if len(ends) != len(steps):
        raise DataError(
            f"the chat template marks {len(ends)} parts of {len(steps)} turns; expected one in each"
        )
    return episode, ends
