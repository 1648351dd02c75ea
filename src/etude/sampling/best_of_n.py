"""Best of n: sample several continuations of each query and keep those that score highest.

Not covered: episodes with tools, columns of tasks, several rewards at once (`environments.best_of_n`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from etude.data.encoding import decode
from etude.errors import ConfigError, RewardError
from etude.math.counters import mix
from etude.math.kl import best_of_n_kl
from etude.protocols import Reward
from etude.runtime.loop import run_sync
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.sampling.params import decoder_start, sampling_params
from etude.types import Episode, Sampled, Segment, StopReason

_STOPS = {
    "eos": StopReason.END_OF_SEQUENCE,
    "length": StopReason.TURN_TOKENS,
    "stop": StopReason.NO_TOOL_CALL,
}


class BestOfNSampler:
    """Samples `sample_size` continuations of each query, which share its cache, and returns the best.

    The arguments are TRL 0.7.4's.

    Args:
        model: a language model, with or without a value head.
        tokenizer: of the model.
        queries_to_scores: takes a query's texts (query and continuation; an encoder–decoder's answers alone),
            returns a score for each; or a `Reward`, which scores each continuation as an episode of one turn.
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
        queries_to_scores: Callable[[list[str]], Sequence[float] | Tensor] | Reward,
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

    @property
    def kl_bound(self) -> float:
        """Nats by which the best one's distribution is from the model's own at most, see `best_of_n_kl`."""
        return best_of_n_kl(self.sample_size)

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
            For each query its `n_candidates` best texts, best first; a decoder's include the query.

        Raises:
            RewardError: there are not as many scores as texts, or one of them is not a finite number.
        """
        queries = _queries(tokenized_query)
        settings = {**self.settings, **generation_kwargs}
        start = list(decoder_start(settings, self.sampler.decoder_start))
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
            start,
        )
        special = set(self.tokenizer.all_special_ids) if skip_special_tokens else set()
        ids = [[*(start or queries[i // n]), *turn.token_ids] for i, turn in enumerate(turns)]
        texts = [decode(self.tokenizer, [t for t in tokens if t not in special]) for tokens in ids]
        best = []
        found = self._scores(queries, turns, texts, start)
        for scores, texts_n in zip(found, _groups(texts, n), strict=True):
            order = scores.argsort(descending=True, stable=True)
            best.append([texts_n[i] for i in order[: self.n_candidates].tolist()])
        return best

    def _scores(
        self, queries: Sequence[list[int]], turns: Sequence[Sampled], texts: Sequence[str], start: list[int]
    ) -> list[Tensor]:
        """For each query the scores [n] of its continuations."""
        score, n = self.queries_to_scores, self.sample_size
        given: list[Any]
        if isinstance(score, Reward):
            episodes = [
                _episode(self.tokenizer, queries[i // n], turn, start) for i, turn in enumerate(turns)
            ]
            given = _groups([score.weight * _total(each) for each in run_sync(score(episodes))], n)
        else:
            given = [score(list(texts_n)) for texts_n in _groups(texts, n)]
        scores = [torch.as_tensor(scores_n, dtype=torch.float64).flatten() for scores_n in given]
        for scores_n in scores:
            if len(scores_n) != n or not scores_n.isfinite().all():
                raise RewardError(
                    f"{getattr(score, 'name', 'queries_to_scores')} gave {scores_n.tolist()} for {n} texts; "
                    "expected a finite number for each"
                )
        if len(scores) != len(queries):
            raise RewardError(
                f"there are {len(scores) * n} scores for {len(turns)} texts; expected one for each"
            )
        return scores


def _groups(items: Sequence[Any], n: int) -> list[Any]:
    return [items[start : start + n] for start in range(0, len(items), n)]


def _total(score: float | Sequence[float | None] | None) -> float:
    """Of a reward's score of one episode, as `Episode.reward` counts it: what doesn't apply adds nothing."""
    parts = score if isinstance(score, Sequence) else [score]
    return sum(part for part in parts if part is not None)


def _episode(
    tokenizer: PreTrainedTokenizerBase, query: list[int], turn: Sampled, start: list[int]
) -> Episode:
    prompt = decode(tokenizer, query)
    before = [Segment("prompt", prompt, query, encoder=bool(start))]
    if start:
        before.append(Segment("environment", "", start))
    return Episode(
        task={"prompt": prompt},
        segments=[*before, *turn.segments()],
        stop=_STOPS[turn.finish],
    )


def _queries(tokenized: Any) -> list[list[int]]:
    if isinstance(tokenized, Tensor):
        tokenized = tokenized.tolist()
    tokenized = [query.flatten().tolist() if isinstance(query, Tensor) else query for query in tokenized]
    return (
        [tokenized] if tokenized and isinstance(tokenized[0], int) else [list(query) for query in tokenized]
    )
