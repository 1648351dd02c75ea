"""How a reward model reads episodes: by their own tokens, or by their text in its own words.

Where the policy's tokens mean the same to the reward model, episodes are scored as they were played: nothing
is decoded and encoded again. Elsewhere their text is encoded, in the way of the rows that reward models are
trained on. Not covered: reward models that lie on the policy's own weights (`adapter`), classifiers of texts
(`classifier`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from etude.data.encoding import decode
from etude.data.families import into_passes
from etude.data.formats import to_episode, to_episodes
from etude.data.scored import pack_scored
from etude.errors import ConfigError, ModelError, RewardError
from etude.models.adapters import base_of, find_adapter
from etude.models.loading import load_tokenizer
from etude.models.places import locate
from etude.models.positions import length_limit
from etude.models.reward_model import load_reward_model
from etude.models.score_head import Kind, check_labels
from etude.models.score_reader import ScoreReader
from etude.rewards.function import conversation_of
from etude.types import Episode

Reading = Literal["tokens", "text", "messages"]


class EpisodeReader:
    """A model that scores, its tokenizer, and how it reads episodes.

    Args:
        model_or_path: a sequence or token classifier of transformers, perhaps with adapters, or the directory
            or hub id of one; a LoRA adapter's base is found through its configuration.
        tokenizer: of the model; loaded with it if a path was given.
        kind: what the model scores.
        read: how; None finds out, see `reading_of`.
        batch_size: episodes per forward pass.
        max_length: a longer text loses its beginning; by default what tokenizer and model allow.
        dtype: of the weights that are loaded; "auto" takes the checkpoint's.
        device: moves the model there; by default it stays, and a loaded one goes to CUDA if there is one.

    Raises:
        ConfigError: a setting is out of range.
        ModelError: the model can't be found, or doesn't score, or has no tokenizer.
    """

    def __init__(
        self,
        model_or_path: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        kind: Kind,
        *,
        read: Reading | None,
        batch_size: int,
        max_length: int | None,
        dtype: str | torch.dtype,
        device: str | torch.device | None,
    ) -> None:
        if read not in (None, "tokens", "text", "messages"):
            raise ConfigError(f"read is {read!r}; expected tokens, text or messages, or none to find out")
        for setting, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"{setting} is {value}; expected at least 1")
        if isinstance(model_or_path, str | PathLike):
            self.model: Any = load_reward_model(model_or_path, kind, dtype=dtype, is_trainable=False)
            tokenizer = _tokenizer_of(model_or_path) if tokenizer is None else tokenizer
            device = device or ("cuda" if torch.cuda.is_available() else None)
        elif tokenizer is None:
            raise ModelError("a model came without its tokenizer; pass tokenizer=..., or a path for both")
        else:
            self.model = model_or_path
        if device is not None:
            self.model.to(device)
        self.scores = ScoreReader(self.model)
        if self.scores.kind != kind:
            raise ModelError(
                f"the model scores {self.scores.kind}s; ModelReward takes models that score sequences, "
                "ProcessReward those that score tokens"
            )
        check_labels(kind, self.scores.model.config.num_labels, f"the {type(self.scores.model).__name__}")
        self.tokenizer = tokenizer
        self.read = read
        self.batch_size = batch_size
        self.max_length = length_limit(tokenizer, self.scores.model.config, max_length)
        self.lock = threading.Lock()  # one call at a time: memory, and tokenizers aren't thread-safe

    def reading_of(self, episodes: Sequence[Episode]) -> Reading:
        """How to read these: by their tokens, if what the model wrote decodes to its text here.

        Found out once, by the first episodes with words of the model's. Else as messages, if the tokenizer
        has a chat template, and as text if not. The same goes for what an encoder–decoder played, whose
        tokens are two sequences.
        """
        if self.read is not None:
            return self.read
        written = [s for e in episodes for s in e.segments if s.source == "model" and s.token_ids]
        same = not any(e.source_ids for e in episodes) and all(
            self._means_the_same(s.token_ids, s.text) for s in written
        )
        read: Reading = "tokens" if same else "messages" if self.tokenizer.chat_template else "text"
        if written:
            self.read = read
        return read

    def _means_the_same(self, token_ids: Sequence[int], text: str) -> bool:
        if max(token_ids) >= len(self.tokenizer):
            return False
        return self._bare(decode(self.tokenizer, token_ids)) == self._bare(text)

    def _bare(self, text: str) -> str:
        """Without special tokens, which a turn's text leaves out at its end, and without white space."""
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return "".join(text.split())

    def check_tokens(self, episodes: Sequence[Episode], name: str) -> None:
        """Raise `RewardError` for tokens that the model doesn't embed, and for those of two sequences."""
        known: Any = self.scores.model.get_input_embeddings().num_embeddings
        for index, episode in enumerate(episodes):
            if episode.source_ids:
                raise RewardError(
                    f"reward {name!r} reads tokens, and episode {index} is an encoder-decoder's, whose "
                    "tokens are two sequences; use read='text' or 'messages'"
                )
            if max(episode.token_ids, default=0) >= known:
                raise RewardError(
                    f"reward {name!r} reads tokens, and episode {index} has one that its model doesn't know "
                    f"({max(episode.token_ids)}, of {known}); the policy has another tokenizer: use "
                    "read='text' or 'messages'"
                )

    def encoded(self, episode: Episode, read: Reading) -> Episode:
        """The episode in this model's tokens."""
        if read == "tokens":
            return episode
        if read == "text":
            segments = [{"source": s.source, "text": s.text} for s in episode.segments]
            return to_episode({"segments": segments}, self.tokenizer, append_eos=False)
        prompt = conversation_of(episode) or [{"role": "user", "content": episode.prompt}]
        row = {"prompt": prompt, "completion": _talk(episode)}
        return to_episodes(row, self.tokenizer)[-1]  # the whole conversation

    @torch.no_grad()
    def scores_at(self, sequences: Sequence[Sequence[int]], ends: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each sequence of tokens, scores [M, L] after those at `ends`."""
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        share = self.scores.packs
        # Beside each other: what begins alike, or, where rows are padded, what is about as long.
        order = sorted(range(len(sequences)), key=lambda i: 0 if share else len(sequences[i]))
        ids = [torch.tensor(sequences[i]) for i in order]
        self.model.eval()
        for places in into_passes(ids, self.batch_size, share=share):
            chosen = [order[place] for place in places]
            batch = pack_scored([sequences[i] for i in chosen], [ends[i] for i in chosen], share=share)
            moved = {
                name: value.to(self.scores.model.device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            found = self.scores(self.model, moved).cpu().split([len(ends[i]) for i in chosen])
            for i, each in zip(chosen, found, strict=True):
                scores[i] = each
        return scores


def _talk(episode: Episode) -> list[dict[str, Any]]:
    """What model and user said. Turns that a tool answered are one message with the next."""
    called = {call.turn for call in episode.tool_calls}
    replies = iter(episode.replies)
    talk: list[dict[str, Any]] = []
    said = ""
    for index, turn in enumerate(episode.model_turns):
        said += "".join(segment.text for segment in turn)
        reply = None if index in called else next(replies, None)
        if reply is not None:
            talk += [{"role": "assistant", "content": said}, {"role": "user", "content": reply}]
            said = ""
    return [*talk, {"role": "assistant", "content": said}]


def _tokenizer_of(name_or_path: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """A model's tokenizer; that of its base, where an adapter was saved without one."""
    try:
        return load_tokenizer(name_or_path)
    except ModelError:
        name = locate(name_or_path, "a reward model")
        adapter = find_adapter(name, {})
        if adapter is None:
            raise
        return load_tokenizer(base_of(adapter, name))
