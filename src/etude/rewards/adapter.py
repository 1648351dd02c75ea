"""A reward model that is a second adapter on the policy's own base weights, as a reward.

The policy's tokens are its tokens, so episodes are scored as they were played: nothing is decoded and encoded
again. Not covered: reward models with weights of their own (`classifier`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from etude.errors import ConfigError, ModelError
from etude.models.reward_adapter import RewardAdapter
from etude.rewards.scores import check_scores, check_weight
from etude.types import Episode


class AdapterReward:
    """One label's score after the last token of each episode: prompt, model, tools and all.

    The policy's weights and adapters are afterwards what they were, and between two batches, too: sampling
    that goes on meanwhile, on the same event loop, notices nothing.

    Args:
        model: a value-head model that was loaded with a `reward_adapter`, or a `RewardAdapter`.
        label: index of the label whose score is the reward. By default the second of two, or the only one.
        batch_size: episodes per forward pass.
        name: in metrics.
        weight: of its score in the episode's reward.

    Raises:
        ConfigError: a setting is out of range.
        ModelError: the model has no reward adapter.
    """

    def __init__(
        self,
        model: Any,
        *,
        label: int | None = None,
        batch_size: int = 16,
        name: str = "reward_adapter",
        weight: float = 1.0,
    ) -> None:
        adapter = model if isinstance(model, RewardAdapter) else getattr(model, "reward_adapter", None)
        if not isinstance(adapter, RewardAdapter):
            raise ModelError(
                f"the {type(model).__name__} has no reward adapter; expected a value-head model loaded with "
                "reward_adapter=, or a RewardAdapter"
            )
        labels = adapter.score.out_features
        if label is None:
            label = labels - 1 if labels <= 2 else -1  # which of several can't be guessed
        if not 0 <= label < labels:
            raise ConfigError(f"label says which of {labels} scores counts; expected 0 to {labels - 1}")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
        self.name = name
        self.weight = check_weight(weight, name)
        self.adapter = adapter
        self.label = label
        self.batch_size = batch_size

    async def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        """Score episodes, on the event loop's own thread: the sampler runs there, with the same weights.

        Raises:
            RewardError: the model gave NaN or infinity.
        """
        order = sorted(range(len(episodes)), key=lambda i: len(episodes[i].token_ids))
        scores = [0.0] * len(episodes)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self._scores([episodes[i].token_ids for i in chosen])
            for i, score in zip(chosen, batch, strict=True):
                scores[i] = score
            await asyncio.sleep(0)
        return check_scores(scores, self.name, episodes)

    def _scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        device = self.adapter.model.device
        lengths = torch.tensor([len(ids) for ids in sequences], device=device)
        ids_BT = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long, device=device)
        for row, ids in zip(ids_BT, sequences, strict=True):
            row[: len(ids)] = torch.tensor(ids, device=device)
        # On the right, where no token looks at it, whatever the family.
        mask_BT = (torch.arange(ids_BT.shape[1], device=device) < lengths[:, None]).long()
        scores_BTL = self.adapter.scores(ids_BT, mask_BT)
        rows = torch.arange(len(sequences), device=device)
        scores: list[float] = scores_BTL[rows, lengths - 1, self.label].tolist()
        return scores
