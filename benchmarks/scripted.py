"""Episodes that are written beforehand and forced token by token.

Two libraries can only be compared on the same work. So a script fixes every episode to the token, and a
logits processor leaves the model one token to choose: the forward is computed in full, the choice is not
free. After the run the played episodes are compared with the script, tool replies and masks included.

All scripts of one shape have the same token counts, whatever their seed: words are drawn from those that
are a single token. Every run plays new words, so that no cache of an earlier run can help.

Runs under every side's interpreter: torch, `tokenizers` and `transformers` only, as old as the oldest peer's.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LogitsProcessorList

EOS, PAD = "<|endoftext|>", "<|pad|>"
MAX_NEW_TOKENS = 96  # the longest scripted turn is 64 words and a call
MAX_TOOL_RESPONSE = 100  # characters; the echo stays below it


class ScriptMismatchError(RuntimeError):
    """A side played something else than the script: its time means nothing."""


class Echo:
    """The tool: sleeps, then says the word back."""

    def __init__(self, milliseconds: float) -> None:
        self.seconds = milliseconds / 1000

    def __call__(self, query: str) -> str:
        """Say a word back.

        Args:
            query: the word.
        """
        if self.seconds:
            time.sleep(self.seconds)
        return echo(query)


def echo(word: str) -> str:
    return f"the echo of {word} is {word}"


@dataclass(frozen=True)
class ScriptedEpisode:
    """One episode, to the token.

    Attributes:
        prompt: its text; the first token is this episode's own, which is how a row is recognised.
        prompt_length: tokens of the prompt.
        token_ids: the whole episode: prompt, turns and tool replies.
        mask: 1 where the model writes.
    """

    prompt: str
    prompt_length: int
    token_ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class Shape:
    """How much there is to do. Lengths are in words of one token each."""

    episodes: int = 32
    turns: int = 4
    prompt_words: tuple[int, int] = (40, 120)
    turn_words: tuple[int, int] = (16, 64)


def write_script(tokenizer: Tokenizer, shape: Shape, seed: int) -> list[ScriptedEpisode]:
    """Episodes of `shape` whose words are drawn from `seed`."""
    vocabulary = tokenizer.get_vocab()
    inner = sorted(
        word[1:] for word in vocabulary if re.fullmatch("Ġ[a-z]{3,}", word)
    )  # " word" is one token
    first = [word for word in inner if word in vocabulary]  # and so is "word"
    lengths, words = Random(0), Random(seed)
    openings = words.sample(first, shape.episodes)

    def some_words(bounds: tuple[int, int]) -> str:
        return "".join(f" {word}" for word in words.choices(inner, k=lengths.randint(*bounds)))

    def one_episode(opening: str) -> ScriptedEpisode:
        prompt = opening + some_words(shape.prompt_words)
        token_ids = list(tokenizer.encode(prompt).ids)
        prompt_length = len(token_ids)
        mask = [0] * prompt_length

        def append(text: str, *, by_model: bool) -> None:
            ids = tokenizer.encode(text).ids
            token_ids.extend(ids)
            mask.extend([int(by_model)] * len(ids))

        for turn in range(1, shape.turns + 1):
            word = words.choice(first)
            call = f"<request><Echo>{word}<call>" if turn < shape.turns else f" {word}<submit>"
            append(some_words(shape.turn_words) + call, by_model=True)
            if turn < shape.turns:
                append(echo(word) + "<response>", by_model=False)
        return ScriptedEpisode(prompt, prompt_length, token_ids, mask)

    return [one_episode(opening) for opening in openings]


def save_script(path: Path, episodes: Sequence[ScriptedEpisode]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(episode) for episode in episodes]))


def load_script(path: Path) -> list[ScriptedEpisode]:
    return [ScriptedEpisode(**episode) for episode in json.loads(path.read_text())]


class ForcedTokens:
    """A logits processor that leaves each row the next token of its script.

    A row is recognised by its first token, and its place in the script is its length; left padding counts
    for neither. Where a batch goes on after a row's turn has ended, that row runs on along its script, and
    past the script's end repeats its last token: the caller cuts these tokens off.
    """

    def __init__(self, episodes: Sequence[ScriptedEpisode], pad_token_id: int) -> None:
        self.scripts = {episode.token_ids[0]: episode.token_ids for episode in episodes}
        self.pad_token_id = pad_token_id

    def __call__(self, input_ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        width = input_ids_BT.shape[1]
        lengths_B = (input_ids_BT != self.pad_token_id).sum(dim=1).tolist()
        next_B = [
            self._next(int(row_T[width - length]), length)
            for row_T, length in zip(input_ids_BT, lengths_B, strict=True)
        ]
        next_B1 = torch.tensor(next_B, device=scores_BV.device)[:, None]
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, next_B1, scores_BV.gather(1, next_B1))

    def _next(self, first_token: int, length: int) -> int:
        script = self.scripts[first_token]
        return script[min(length, len(script) - 1)]


def check_played(
    episodes: Sequence[ScriptedEpisode],
    queries: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
) -> None:
    """Compare what `TextEnvironment.run` returned with the script.

    Raises:
        ScriptMismatchError: naming the first episode and token that differ.
    """
    if not len(queries) == len(responses) == len(masks) == len(episodes):
        raise ScriptMismatchError(f"{len(queries)} episodes came back; the script has {len(episodes)}")
    for number, (episode, query, response, mask) in enumerate(
        zip(episodes, queries, responses, masks, strict=True)
    ):
        split = episode.prompt_length
        _compare(f"episode {number}, prompt", query.tolist(), episode.token_ids[:split])
        _compare(f"episode {number}, response", response.tolist(), episode.token_ids[split:])
        _compare(f"episode {number}, mask", mask.tolist(), episode.mask[split:])


def _compare(what: str, played: list[int], scripted: list[int]) -> None:
    if played == scripted:
        return
    pairs = zip(played, scripted, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(played), len(scripted)))
    raise ScriptMismatchError(
        f"{what}: {len(played)} tokens played, {len(scripted)} scripted; at {place}: "
        f"{played[place : place + 8]} instead of {scripted[place : place + 8]}"
    )


def describe(model: torch.nn.Module, *packages: str) -> dict[str, Any]:
    """What a side says of itself: versions, threads, and the logits that prove it has the same model."""
    probe = torch.arange(10, 26)[None]
    with torch.no_grad():
        logits = model(probe).logits[0, -1, :8]
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", *packages)},
        "threads": torch.get_num_threads(),
        "probe_logits": logits.tolist(),
    }


def timed_rollout(
    text_environment: Callable[..., Any], model: Any, tokenizer: Any, request: dict[str, Any]
) -> dict[str, Any]:
    """Play a script once and time it.

    The clock covers building the environment and playing, so nothing prepared beforehand is free; it does
    not cover reading the script and checking what was played.

    Args:
        text_environment: a class with the signature of TRL 0.7.4's `TextEnvironment`.
        model, tokenizer: what that class takes.
        request: {"script": path, "tool_ms": latency of the tool, "turns": turns of an episode}.

    Raises:
        ScriptMismatchError: the episodes played are not the scripted ones.
    """
    episodes = load_script(Path(request["script"]))
    generation_kwargs = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": MAX_NEW_TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "logits_processor": LogitsProcessorList([ForcedTokens(episodes, tokenizer.pad_token_id)]),
    }
    start, cpu_start = time.perf_counter(), time.process_time()
    environment = text_environment(
        model,
        tokenizer,
        tools=[Echo(request["tool_ms"])],
        reward_fn=lambda texts: [float(len(text)) for text in texts],
        prompt="",
        max_turns=request["turns"],
        max_tool_reponse=MAX_TOOL_RESPONSE,
        generation_kwargs=generation_kwargs,
    )
    queries, responses, masks, _, _ = environment.run([episode.prompt for episode in episodes])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    check_played(episodes, queries, responses, masks)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}
