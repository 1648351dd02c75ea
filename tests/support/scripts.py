"""Logits processors that put words in a model's mouth."""

import torch


class Script:
    """Makes a model say what is written for the prompt that it was given, turn by turn.

    Args:
        turns: texts of turns by the beginning of the prompt; the longest that fits counts.
        header: what every turn but the first follows.
    """

    def __init__(self, tokenizer, turns, header="<response>"):
        self.header = tokenizer.encode(header, add_special_tokens=False)
        self.turns = {tuple(encoded(tokenizer, p)): _turns(tokenizer, said) for p, said in turns.items()}

    def __call__(self, input_ids, scores):
        ids = input_ids[0].tolist()
        prompt = max((p for p in self.turns if tuple(ids[: len(p)]) == p), key=len)
        begins = [len(prompt), *ends_of(self.header, ids, start=len(prompt))]
        return _forced(scores, self.turns[prompt][len(begins) - 1][len(ids) - begins[-1]])


class ChatScript:
    """The same in chats, by a text that occurs in the conversation.

    Args:
        headers: each turn follows one of these.
        earlier: how many turns a prompt has already.
    """

    def __init__(self, tokenizer, turns, headers, earlier=0):
        self.tokenizer = tokenizer
        self.headers = [encoded(tokenizer, header) for header in headers]
        self.turns = {text: _turns(tokenizer, said) for text, said in turns.items()}
        self.earlier = earlier

    def __call__(self, input_ids, scores):
        ids = input_ids[0].tolist()
        begins = sorted(end for header in self.headers for end in ends_of(header, ids))[self.earlier :]
        start = self.tokenizer.decode(ids[: begins[0]])
        [said] = [said for text, said in self.turns.items() if text in start]
        return _forced(scores, said[len(begins) - 1][len(ids) - begins[-1]])


def encoded(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def ends_of(part, ids, start=0):
    width = len(part)
    return [i + width for i in range(start, len(ids) - width + 1) if ids[i : i + width] == part]


def _turns(tokenizer, said):
    return [encoded(tokenizer, turn) for turn in said]


def _forced(scores, token):
    forced = torch.full_like(scores, -torch.inf)
    forced[0, token] = 0.0
    return forced
