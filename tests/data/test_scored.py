import copy

import pytest
import torch
from scoring_models import encoder_tokenizer

from etude.data.encoding import bos_ids, end_ids
from etude.data.formats import to_episode
from etude.data.scored import answered_ids, pack_scored, scored_ids

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}[eos]\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def encoders():
    return encoder_tokenizer()


def test_what_a_tokenizer_puts_around_a_text(tokenizer, encoders):
    assert (bos_ids(tokenizer), end_ids(tokenizer)) == ([], [])
    assert (bos_ids(encoders), end_ids(encoders)) == ([2], [3])


def test_a_text_ends_as_its_tokenizer_ends_texts(tokenizer, encoders):
    ids, eos = tokenizer("ab")["input_ids"], tokenizer.eos_token_id
    assert scored_ids(ids, tokenizer).ids == [*ids, eos]
    assert scored_ids(ids, tokenizer, append_eos=False).ids == ids
    assert scored_ids([*ids, eos], tokenizer).ids == [*ids, eos]
    assert scored_ids([], tokenizer).ids == [eos]
    assert scored_ids([*ids, tokenizer.unk_token_id], tokenizer).ids == [*ids, tokenizer.unk_token_id, eos]
    like_gpt2 = copy.deepcopy(tokenizer)
    like_gpt2.unk_token = like_gpt2.eos_token
    assert scored_ids([*ids, eos], like_gpt2).ids == [*ids, eos]
    whole = encoders("ab")["input_ids"]
    for append_eos in (True, False):  # [SEP] is no option
        assert scored_ids(whole[:-1], encoders, append_eos=append_eos).ids == whole
        assert scored_ids(whole, encoders, append_eos=append_eos).ids == whole


def test_a_text_that_is_too_long_keeps_what_comes_first_and_its_end(tokenizer, encoders):
    text = scored_ids(encoders("abcdefg")["input_ids"], encoders, max_length=5)
    assert encoders.convert_ids_to_tokens(text.ids) == ["[CLS]", "e", "f", "g", "[SEP]"]
    assert (text.kept, text.dropped) == (1, 4)
    assert [text.place(i) for i in range(9)] == [0, None, None, None, None, 1, 2, 3, 4]
    whole = scored_ids(encoders("abc")["input_ids"], encoders, max_length=5)
    assert whole.dropped == 0
    assert [whole.place(i) for i in range(5)] == [0, 1, 2, 3, 4]
    ids = tokenizer("abcd")["input_ids"]
    assert scored_ids(ids, tokenizer, max_length=3).ids == [*ids[2:], tokenizer.eos_token_id]


def test_the_models_last_words_are_the_last(tokenizer):
    tokenizer.chat_template = CHATML
    try:
        row = {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        }
        episode = to_episode(row, tokenizer)
    finally:
        tokenizer.chat_template = None
    assert episode.text.endswith("b[eos]\n")
    assert answered_ids(episode)[-2:] == tokenizer("b[eos]")["input_ids"]
    assert len(answered_ids(episode)) == len(episode) - 1
    segments = [{"source": s, "text": s[0]} for s in ("prompt", "model", "tool")]
    played = to_episode({"segments": segments}, tokenizer)
    assert answered_ids(played) == tokenizer("pm")["input_ids"]
    asked = to_episode({"segments": segments[:1]}, tokenizer)
    assert answered_ids(asked) == tokenizer("p")["input_ids"]


def test_places_where_beginnings_are_shared():
    rows = [[*range(20), 1, 2], [*range(20), 3], [7, 8]]
    for share in (False, True):
        batch = pack_scored(rows, [[3, 21], [20], [1, 0]], share=share)
        assert batch["input_ids"][batch["places"]].tolist() == [3, 2, 3, 8, 7]
        assert len(batch["input_ids"]) == (25 if share else 45)
    assert batch["places"].dtype == torch.long
