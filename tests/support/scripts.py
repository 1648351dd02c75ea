"""A logits processor that puts words in a model's mouth."""

import torch


class Script:
    """Makes a model say what is written for the prompt that it was given, turn by turn.

    Args:
        turns: texts of turns by the beginning of the prompt; the longest that fits counts.
        header: what every turn but the first follows, and the first one too if the prompt ends in it.
    """

    def __init__(self, tokenizer, turns, header="<response>"):
        self.header = tokenizer.encode(header, add_special_tokens=False)
        self.turns = {
            tuple(tokenizer.encode(prompt, add_special_tokens=False)): [
                tokenizer.encode(turn, add_special_tokens=False) for turn in said
            ]
            for prompt, said in turns.items()
        }

    def __call__(self, input_ids, scores):
        ids = tuple(input_ids[0].tolist())
        prompt = max((p for p in self.turns if ids[: len(p)] == p), key=len)
        width = len(self.header)
        ends = [i + width for i in range(len(ids)) if list(ids[i : i + width]) == self.header]
        begins = [len(prompt)] if not ends or ends[0] > len(prompt) else []
        begins += ends
        forced = torch.full_like(scores, -torch.inf)
        forced[0, self.turns[prompt][len(begins) - 1][len(ids) - begins[-1]]] = 0.0
        return forced
