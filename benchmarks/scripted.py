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
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LogitsProcessorList

from benchmarks.common import Stopwatch

EOS, PAD = "<|endoftext|>", "<|pad|>"
MAX_NEW_TOKENS = 96  # the longest scripted turn is 64 words and a call
MAX_TOOL_RESPONSE = 100  # characters; the echo stays below it


PROBE = list(range(10, 26))  # token ids whose log-probabilities every side gives


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
        task: its text: the prompt without the preamble that all tasks share.
        task_start: where the task's first token is, which no other task begins with.
        prompt_length: tokens of preamble and task; the token after them is one that no other episode of the
            task begins with.
        token_ids: the whole episode: prompt, turns and tool replies.
        mask: 1 where the model writes.
    """

    task: str
    task_start: int
    prompt_length: int
    token_ids: list[int]
    mask: list[int]

    @property
    def task_token(self) -> int:
        return self.token_ids[self.task_start]

    @property
    def first_sampled(self) -> int:
        return self.token_ids[self.prompt_length]


@dataclass(frozen=True)
class Script:
    """The episodes of one run, in the order in which their tasks are handed over.

    Attributes:
        preamble: what stands before every task.
        episodes: those of a group (samples of one task) are neighbours.
    """

    preamble: str
    episodes: list[ScriptedEpisode]


@dataclass(frozen=True)
class Shape:
    """How much there is to do. Lengths are in words of one token each.

    Attributes:
        tasks: different prompts.
        samples: episodes of each task, with texts and lengths of their own.
        examples: worked examples in the preamble.
        call_end, answer_end: what a turn ends with that calls a tool, or submits.
    """

    tasks: int = 32
    samples: int = 1
    turns: int = 4
    prompt_words: tuple[int, int] = (40, 120)
    turn_words: tuple[int, int] = (16, 64)
    examples: int = 0
    call_end: str = "<call>"
    answer_end: str = "<submit>"

    @property
    def episodes(self) -> int:
        return self.tasks * self.samples


def write_script(tokenizer: Tokenizer, shape: Shape, seed: int) -> Script:
    """Episodes of `shape` whose words are drawn from `seed`."""
    vocabulary = tokenizer.get_vocab()
    inner = sorted(
        word[1:] for word in vocabulary if re.fullmatch("Ġ[a-z]{3,}", word)
    )  # " word" is one token
    first = [word for word in inner if word in vocabulary]  # and so is "word"
    lengths, words = Random(0), Random(seed)

    def some_words(bounds: tuple[int, int]) -> str:
        return "".join(f" {word}" for word in words.choices(inner, k=lengths.randint(*bounds)))

    def one_example() -> str:
        word = words.choice(first)
        turn = f"<request><Echo>{word}{shape.call_end}{echo(word)}<response>"
        return f"{words.choice(first)}{some_words((8, 8))}?\n\n{turn}\n\n{word}{shape.answer_end}\n\n"

    def one_episode(task: str, opening: str) -> ScriptedEpisode:
        prompt_ids = tokenizer.encode(preamble + task).ids
        token_ids, mask = list(prompt_ids), [0] * len(prompt_ids)

        def append(text: str, *, by_model: bool) -> None:
            ids = tokenizer.encode(text).ids
            token_ids.extend(ids)
            mask.extend([int(by_model)] * len(ids))

        for turn in range(1, shape.turns + 1):
            word = words.choice(first)
            calls = turn < shape.turns
            end = f"<request><Echo>{word}{shape.call_end}" if calls else f" {word}{shape.answer_end}"
            start = f" {opening}" if turn == 1 else ""
            append(start + some_words(shape.turn_words) + end, by_model=True)
            if calls:
                append(echo(word) + "<response>", by_model=False)
        return ScriptedEpisode(task, task_start, len(prompt_ids), token_ids, mask)

    preamble = "".join(one_example() for _ in range(shape.examples))
    starts = words.sample(first, shape.tasks)
    task_start = len(tokenizer.encode(preamble + starts[0]).ids) - 1
    episodes = []
    for start in starts:
        task = start + some_words(shape.prompt_words)
        episodes += [one_episode(task, opening) for opening in words.sample(inner, shape.samples)]
    assert len({episode.task_token for episode in episodes}) == shape.tasks
    return Script(preamble, episodes)


def save_script(path: Path, script: Script) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(script)))


def load_script(path: Path) -> Script:
    script = json.loads(path.read_text())
    return Script(script["preamble"], [ScriptedEpisode(**episode) for episode in script["episodes"]])


class ForcedTokens:
    """A logits processor that leaves each row the next token of its script.

    A row is recognised by its task's first token and the first token it sampled, and its place in the script
    is its length; padding, left or right, counts for neither. A row that has sampled nothing gets the next
    script of its task that nobody plays yet: each is handed out once. Where a batch goes on after a row's
    turn has ended, that row runs on along its script, and past the script's end repeats its last token: the
    caller cuts these tokens off, or writes padding over them.

    One row alone is never padded, and is served without counting: a library that asks row by row shouldn't
    be timed for that.
    """

    def __init__(self, episodes: Sequence[ScriptedEpisode], pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id
        self.task_start = episodes[0].task_start
        self.prompt_length = {episode.task_token: episode.prompt_length for episode in episodes}
        self.waiting: dict[int, deque[int]] = defaultdict(deque)
        for episode in episodes:
            self.waiting[episode.task_token].append(episode.first_sampled)
        self.scripts = {(e.task_token, e.first_sampled): e.token_ids for e in episodes}

    def __call__(self, input_ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        rows, width = input_ids_BT.shape
        lengths_B, starts_B = [width], [0]
        if rows > 1:
            tokens_BT = (input_ids_BT != self.pad_token_id).int()
            lengths_B, starts_B = tokens_BT.sum(dim=1).tolist(), tokens_BT.argmax(dim=1).tolist()
        next_B = [self._next(*row) for row in zip(input_ids_BT, starts_B, lengths_B, strict=True)]
        next_B1 = torch.tensor(next_B, device=scores_BV.device)[:, None]
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, next_B1, scores_BV.gather(1, next_B1))

    def _next(self, ids_T: torch.Tensor, padding: int, length: int) -> int:
        task = int(ids_T[padding + self.task_start])
        if length == self.prompt_length[task]:
            return self.waiting[task].popleft()
        script = self.scripts[task, int(ids_T[padding + self.prompt_length[task]])]
        return script[min(length, len(script) - 1)]


def check_played(
    episodes: Sequence[ScriptedEpisode],
    queries: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
) -> None:
    """Compare what `TextEnvironment.run` returned with the script; a task's samples may come in any order.

    Raises:
        ScriptMismatchError: naming the first episode and token that differ.
    """
    if not len(queries) == len(responses) == len(masks) == len(episodes):
        raise ScriptMismatchError(f"{len(queries)} episodes came back; the script has {len(episodes)}")
    unplayed = {(episode.task, episode.first_sampled): episode for episode in episodes}
    for number, (asked, query, response, mask) in enumerate(
        zip(episodes, queries, responses, masks, strict=True)
    ):
        episode = unplayed.pop((asked.task, int(response[0])), None)
        if episode is None:
            raise ScriptMismatchError(f"episode {number} begins like none of its task's that is left")
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
    """What a side says of itself: versions, threads, and log-probabilities of one text."""
    probe_1T = torch.tensor([PROBE], device=next(model.parameters()).device)
    target = {"decoder_input_ids": probe_1T} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        logits_TV = model(probe_1T, **target).logits[0, :-1]
    logprobs_T = logits_TV.float().log_softmax(-1).gather(-1, probe_1T[0, 1:, None])[:, 0]
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", *packages)},
        "threads": torch.get_num_threads(),
        "probe_logprobs": logprobs_T.tolist(),
        "dtype": str(logits_TV.dtype),
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
        request: {"script": path, "tool_ms": latency of the tool, "turns": turns of an episode, "options":
            further keywords of the class}.

    Raises:
        ScriptMismatchError: the episodes played are not the scripted ones.
    """
    script = load_script(Path(request["script"]))
    episodes = script.episodes
    generation_kwargs = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": MAX_NEW_TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "logits_processor": LogitsProcessorList([ForcedTokens(episodes, tokenizer.pad_token_id)]),
    }
    with Stopwatch() as watch:
        environment = text_environment(
            model,
            tokenizer,
            tools=[Echo(request["tool_ms"])],
            reward_fn=lambda texts: [float(len(text)) for text in texts],
            prompt=script.preamble,
            max_turns=request["turns"],
            max_tool_reponse=MAX_TOOL_RESPONSE,
            generation_kwargs=generation_kwargs,
            **request["options"],
        )
        queries, responses, masks, _, _ = environment.run([episode.task for episode in episodes])
    check_played(episodes, queries, responses, masks)
    return {**watch.times, "episodes": len(episodes)}
