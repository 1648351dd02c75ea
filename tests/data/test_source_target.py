"""Encoder-decoders' tokenizers, with small vocabularies. Not Marian's, which reads sentencepiece's files."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BartTokenizer, MBartTokenizer, PreTrainedTokenizerFast, T5Tokenizer
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from etude.data.source_target import to_source_target, to_source_targets
from etude.errors import DataError

WORDS = [(character, -2.0) for character in "▁abcdefgh."]
SPECIAL = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
LANGUAGES = [(code, 0.0) for code in FAIRSEQ_LANGUAGE_CODES]
ALPHABET = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]

T5 = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *WORDS], extra_ids=0)
BART = BartTokenizer(vocab={word: index for index, word in enumerate(ALPHABET)}, merges=[])
MBART = MBartTokenizer(
    vocab=[*SPECIAL, *WORDS, *LANGUAGES, ("<mask>", 0.0)], src_lang="en_XX", tgt_lang="de_DE"
)


def words(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    ("tokenizer", "source", "target", "nothing"),
    [
        (T5, "▁ a ▁ b </s>", "▁ c d </s>", "</s>"),
        (BART, "<s> a Ġ b </s>", "<s> c d </s>", "<s> </s>"),
        (MBART, "▁ a ▁ b </s> en_XX", "▁ c d </s> de_DE", "</s> de_DE"),
    ],
    ids=["t5", "bart", "mbart"],
)
def test_source_and_target(tokenizer, source, target, nothing):
    both = to_source_target({"prompt": "a b", "completion": "cd", "label": True}, tokenizer)
    assert (words(tokenizer, both.input_ids), words(tokenizer, both.labels)) == (source, target)
    chosen, rejected = to_source_targets({"prompt": "a b", "chosen": "cd", "rejected": ""}, tokenizer)
    assert chosen == both
    assert rejected.input_ids == both.input_ids
    assert words(tokenizer, rejected.labels) == nothing


def test_an_implicit_prompt_is_the_source():
    chosen, rejected = to_source_targets({"chosen": "a b c", "rejected": "a b d"}, T5)
    assert words(T5, chosen.input_ids) == words(T5, rejected.input_ids) == "▁ a ▁ b </s>"
    assert [words(T5, pair.labels) for pair in (chosen, rejected)] == ["▁ c </s>", "▁ d </s>"]


def bare(eos):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def test_a_tokenizer_that_ends_nothing_gets_its_eos():
    assert to_source_target({"prompt": "a", "completion": "b"}, bare("</s>")) == ([0], [1, 2])
    with pytest.raises(DataError, match="no end-of-sequence token to end answers with"):
        to_source_target({"prompt": "a", "completion": "b"}, bare(None))


def test_the_tokenizer_s_settings_do_not_cut_or_pad():
    tokenizer = bare("</s>")
    tokenizer.pad_token = "</s>"
    tokenizer("a", padding="max_length", truncation=True, max_length=3)
    assert to_source_target({"prompt": "a", "completion": "b"}, tokenizer) == ([0], [1, 2])


def test_messages_are_refused():
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}
    with pytest.raises(DataError, match="prompt is a list; expected a string: encoder-decoder models"):
        to_source_target(row, T5)
