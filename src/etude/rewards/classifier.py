"""A sequence-classification model as a reward: a reward model, a sentiment or toxicity classifier.

Not covered: models that score every token (`trainers`), judges that write their verdict.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from etude.errors import ConfigError, ModelError
from etude.models.positions import length_limit
from etude.rewards.scores import check_scores, check_weight
from etude.types import Episode


class ClassifierReward:
    """One label's score of each episode's text.

    Texts are batched by length and scored without gradients. The model is put in eval mode; the tokenizer
    is copied, so neither padding nor truncation is ever set on yours. A text longer than the limit keeps
    its end, which holds the answer; a text without tokens is scored as the end-of-sequence token alone.

    Args:
        model_or_path: a sequence-classification model, or a folder or hub name to load one from.
        tokenizer: of the model; loaded with it if a path was given.
        label: index or name of the label whose score is the reward. By default the second of two, or the
            only one.
        function_to_apply: "none" (the logit), "sigmoid", or "softmax" over the labels, all in float32.
        text: "completion", what the model wrote, or "all", the prompt and what the model wrote. Tool text is
            in neither.
        batch_size: texts per forward pass.
        max_length: in tokens; by default what tokenizer and model allow.
        device: moves the model there; by default it stays, and a loaded one goes to CUDA if there is one.
        name: in metrics.
        weight: of its score in the episode's reward.

    Raises:
        ConfigError: a setting is out of range or doesn't fit the model's labels.
        ModelError: no tokenizer; the model can't tell padding from text; nothing can stand for an empty text.
    """

    def __init__(
        self,
        model_or_path: Any,
        tokenizer: Any = None,
        *,
        label: int | str | None = None,
        function_to_apply: Literal["none", "sigmoid", "softmax"] = "none",
        text: Literal["completion", "all"] = "completion",
        batch_size: int = 16,
        max_length: int | None = None,
        device: str | torch.device | None = None,
        name: str = "classifier",
        weight: float = 1.0,
    ) -> None:
        _check_choice("function_to_apply", function_to_apply, ("none", "sigmoid", "softmax"))
        _check_choice("text", text, ("completion", "all"))
        for setting, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"{setting} is {value}; expected at least 1")
        self.name = name
        self.weight = check_weight(weight, name)
        self.function_to_apply, self.text, self.batch_size = function_to_apply, text, batch_size

        self.model, tokenizer, device = _load(model_or_path, tokenizer, device)
        if device is not None:
            self.model.to(device)
        self.label = _label_index(label, self.model.config)
        if function_to_apply == "softmax" and self.model.config.num_labels == 1:
            raise ConfigError(
                "function_to_apply is 'softmax' and the model has one label, whose share is always 1; "
                "use 'none' or 'sigmoid'"
            )
        # Calling a fast tokenizer with truncation sets it on the tokenizer, so this one is our own.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        self.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # it is meant
        self.max_length = length_limit(self.tokenizer, self.model.config, max_length)
        if batch_size > 1:
            _check_padding(self.tokenizer, self.model.config)
        if not self.tokenizer("")["input_ids"] and self.tokenizer.eos_token_id is None:
            raise ModelError("an empty text has no tokens; set tokenizer.eos_token, which will stand for it")
        self._lock = threading.Lock()  # one pass at a time: memory, and tokenizers aren't thread-safe

    async def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        """Score episodes, in a thread.

        Raises:
            RewardError: the model gave NaN or infinity.
        """
        if self.text == "all":
            texts = [episode.prompt + episode.completion for episode in episodes]
        else:
            texts = [episode.completion for episode in episodes]
        return check_scores(await asyncio.to_thread(self.score_texts, texts), self.name, episodes)

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """One score per text, in order."""
        with self._lock, torch.no_grad():
            self.model.eval()
            encodings = [self._encode(text) for text in texts]
            order = sorted(range(len(texts)), key=lambda i: len(encodings[i]["input_ids"]))
            scores = [0.0] * len(texts)
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                scores_B = self._forward([encodings[i] for i in batch])
                for i, score in zip(batch, scores_B.tolist(), strict=True):
                    scores[i] = score
            return scores

    def _encode(self, text: str) -> dict[str, list[int]]:
        encoding = self.tokenizer(text, truncation=self.max_length is not None, max_length=self.max_length)
        if encoding["input_ids"]:
            return dict(encoding)
        alone = {"input_ids": [self.tokenizer.eos_token_id], "attention_mask": [1]}
        return {key: alone.get(key, [0]) for key in encoding}

    def _forward(self, encodings: list[dict[str, list[int]]]) -> torch.Tensor:
        inputs = self.tokenizer.pad(encodings, padding=len(encodings) > 1, return_tensors="pt").to(
            self.model.device
        )
        logits_BL = self.model(**inputs).logits.float()
        if self.function_to_apply == "softmax":
            logits_BL = logits_BL.softmax(-1)
        elif self.function_to_apply == "sigmoid":
            logits_BL = logits_BL.sigmoid()
        return logits_BL[:, self.label]


def _load(
    model_or_path: Any, tokenizer: Any, device: str | torch.device | None
) -> tuple[Any, Any, str | torch.device | None]:
    """(model, tokenizer, device to move the model to)"""
    if isinstance(model_or_path, str | PathLike):
        model = AutoModelForSequenceClassification.from_pretrained(model_or_path)
        tokenizer = AutoTokenizer.from_pretrained(model_or_path) if tokenizer is None else tokenizer
        return model, tokenizer, device or ("cuda" if torch.cuda.is_available() else None)
    if not hasattr(getattr(model_or_path, "config", None), "num_labels"):
        raise ModelError(
            f"the model is {type(model_or_path).__name__}; expected a sequence-classification model or a path"
        )
    if tokenizer is None:
        raise ModelError("a model came without its tokenizer; pass tokenizer=..., or a path for both")
    return model_or_path, tokenizer, device


def _label_index(label: int | str | None, config: Any) -> int:
    labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is None and len(labels) <= 2:
        return len(labels) - 1
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    raise ConfigError(
        f"label is {label!r}; expected one of {', '.join(labels)}, or an index from 0 to {len(labels) - 1}"
    )


def _check_padding(tokenizer: Any, config: Any) -> None:
    """Models find a text's last token, or its positions, by the padding token of their own config."""
    if tokenizer.pad_token_id is None or config.pad_token_id != tokenizer.pad_token_id:
        raise ModelError(
            f"the padding token is {tokenizer.pad_token_id} in the tokenizer and {config.pad_token_id} in "
            f"the model's config; expected the same: set tokenizer.pad_token and model.config.pad_token_id, "
            f"or batch_size=1"
        )


def _check_choice(setting: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{setting} is {value!r}; expected one of {', '.join(choices)}")
