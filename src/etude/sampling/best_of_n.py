"""Best of n: sample several continuations of each query and keep those that score highest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from etude.data.encoding import decode
from etude.errors import ConfigError, RewardError
from etude.math.counters import mix
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.sampling.params import sampling_params


class BestOfNSampler:
    """Samples `sample_size` continuations of each query, which share its cache, and returns the best.

    The arguments are TRL 0.7.4's.

    Args:
        model: a causal language model, with or without a value head.
        tokenizer: of the model.
        queries_to_scores: takes a query's texts (query and continuation), returns a score for each.
        length_sampler: gives `max_new_tokens`, anew for each query.
        sample_size: continuations per query.
        seed: of the continuations; `set_seed` decides it by default.
        n_candidates: how many of them are returned per query, best first.
        generation_config: settings that `generate`'s keywords override.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        queries_to_scores: Callable[[list[str]], Sequence[float] | Tensor],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    ) -> None:
        if not 1 <= n_candidates <= sample_size:
            raise ConfigError(
                f"n_candidates is {n_candidates} and sample_size {sample_size}; "
                "expected 1 <= n_candidates <= sample_size"
            )
        self.tokenizer = tokenizer
        self.queries_to_scores = queries_to_scores
        self.length_sampler = length_sampler
        self.sample_size = sample_size
        self.n_candidates = n_candidates
        self.seed = torch.initial_seed() if seed is None else seed
        if isinstance(generation_config, GenerationConfig):
            generation_config = generation_config.to_diff_dict()
            generation_config.pop("transformers_version", None)
        self.settings = dict(generation_config or {})
        self.sampler = LocalSampler(model, tokenizer)
        self._sampled = 0

    def generate(
        self,
        tokenized_query: Tensor | Sequence[int] | Sequence[Tensor] | Sequence[Sequence[int]],
        skip_special_tokens: bool = True,
        device: Any = None,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """The best continuations of each query.

        Args:
            tokenized_query: token ids of one query, or of several.
            skip_special_tokens: leave special tokens out of the texts.
            device: taken for compatibility; the model stays where it is.
            generation_kwargs: as for `transformers`' `generate`; sampling unless `do_sample=False`.

        Returns:
            For each query its `n_candidates` best texts, query included, best first.

        Raises:
            RewardError: there are not as many scores as texts, or one of them is not a finite number.
        """
        queries = _queries(tokenized_query)
        settings = {**self.settings, **generation_kwargs}
        params = [
            sampling_params({**settings, "max_new_tokens": int(self.length_sampler())}, self.tokenizer)
            for _ in queries
        ]
        n = self.sample_size
        seeds = [mix(self.seed, self._sampled + i) for i in range(n * len(queries))]
        self._sampled += len(seeds)
        turns = continue_all(
            self.sampler,
            [query for query in queries for _ in range(n)],
            [settings for settings in params for _ in range(n)],
            seeds,
        )
        special = set(self.tokenizer.all_special_ids) if skip_special_tokens else set()
        best = []
        for i, query in enumerate(queries):
            ids = [[*query, *turn.token_ids] for turn in turns[i * n : (i + 1) * n]]
            texts = [decode(self.tokenizer, [t for t in tokens if t not in special]) for tokens in ids]
            order = self._scores(texts).argsort(descending=True, stable=True)
            best.append([texts[j] for j in order[: self.n_candidates].tolist()])
        return best

    def _scores(self, texts: list[str]) -> Tensor:
        scores = torch.as_tensor(self.queries_to_scores(texts), dtype=torch.float64).flatten()
        if len(scores) != len(texts) or not scores.isfinite().all():
            raise RewardError(
                f"queries_to_scores gave {scores.tolist()} for {len(texts)} texts; expected a finite number "
                "for each"
            )
        return scores


def _queries(tokenized: Any) -> list[list[int]]:
    if isinstance(tokenized, Tensor):
        tokenized = tokenized.tolist()
    tokenized = [query.flatten().tolist() if isinstance(query, Tensor) else query for query in tokenized]
    return (
        [tokenized] if tokenized and isinstance(tokenized[0], int) else [list(query) for query in tokenized]
    )
