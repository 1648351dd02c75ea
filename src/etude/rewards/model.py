"""A reward model as a reward: one score for each episode, after its last token.

Not covered: models that score steps (`process`), classifiers of sentiment and the like (`classifier`), reward
models on the policy's own weights (`adapter`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from etude.data.formats import to_episodes
from etude.data.scored import answered_ids, scored_ids
from etude.errors import RewardError
from etude.rewards.reading import EpisodeReader, Reading
from etude.rewards.scores import check_scores, check_weight
from etude.types import Episode


class ModelReward:
    """What a reward model gives for an episode: prompt, model, tools and all.

    The model is what `RewardTrainer` saves, whole, merged or as a LoRA adapter, or any other sequence
    classifier with one label. Its weights are its own; it is put in eval mode.

    Args:
        model_or_path: the model, or its directory or hub id.
        tokenizer: of the model; loaded with it if a path was given.
        read: "tokens", the episode's own tokens, where the policy's tokenizer is the reward model's; "text",
            the episode's text in the reward model's tokens; "messages", the prompt as a user's message (or
            the task's own messages) and what the model wrote as the assistant's, in the reward model's chat
            template. None finds out: tokens where they mean the same to both, else messages if there is a
            template, else text.
        append_eos: an episode that doesn't end with a special token is read with the end-of-sequence token
            behind it, as answers in training are.
        batch_size: episodes per forward pass.
        max_length: a longer text loses its beginning; by default what tokenizer and model allow.
        dtype: of the weights that are loaded; "auto" takes the checkpoint's.
        device: moves the model there; by default it stays, and a loaded one goes to CUDA if there is one.
        name: in metrics.
        weight: of its score in the episode's reward.

    Raises:
        ConfigError: a setting is out of range.
        ModelError: the model can't be found, has no score head, or has no tokenizer.
    """

    def __init__(
        self,
        model_or_path: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        read: Reading | None = None,
        append_eos: bool = True,
        batch_size: int = 16,
        max_length: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        name: str = "reward_model",
        weight: float = 1.0,
    ) -> None:
        self.name = name
        self.weight = check_weight(weight, name)
        self.append_eos = append_eos
        self.reader = EpisodeReader(
            model_or_path,
            tokenizer,
            "sequence",
            read=read,
            batch_size=batch_size,
            max_length=max_length,
            dtype=dtype,
            device=device,
        )

    async def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        """Score episodes, in a thread; None for one without any token.

        Raises:
            RewardError: the model gave NaN or infinity, or doesn't know a token.
        """
        return check_scores(await asyncio.to_thread(self._score, episodes), self.name, episodes)

    def score_texts(self, texts: Sequence[str | Mapping[str, Any]]) -> list[float]:
        """One score per text, in order, each read as in training.

        Args:
            texts: strings, or rows of a dataset: `prompt` and `completion`, or `messages`.
        """
        rows = [{"text": text} if isinstance(text, str) else text for text in texts]
        with self.reader.lock:
            episodes = [to_episodes(row, self.reader.tokenizer, append_eos=False)[-1] for row in rows]
            scores = self._scores(episodes)
        if None in scores:
            raise RewardError(f"text {scores.index(None)} has no token to score; leave it out")
        return [score for score in scores if score is not None]

    def _score(self, episodes: Sequence[Episode]) -> list[float | None]:
        with self.reader.lock:
            read = self.reader.reading_of(episodes)
            if read == "tokens":
                self.reader.check_tokens(episodes, self.name)
            return self._scores([self.reader.encoded(episode, read) for episode in episodes])

    def _scores(self, episodes: Sequence[Episode]) -> list[float | None]:
        """Of episodes in the model's own tokens."""
        reader = self.reader
        texts = [
            scored_ids(
                answered_ids(episode),
                reader.tokenizer,
                append_eos=self.append_eos,
                max_length=reader.max_length,
            ).ids
            for episode in episodes
        ]
        present = [i for i, ids in enumerate(texts) if ids]
        found = reader.scores_at([texts[i] for i in present], [[len(texts[i]) - 1] for i in present])
        scores: list[float | None] = [None] * len(texts)
        for i, score in zip(present, found, strict=True):
            scores[i] = score.item()
        return scores
