import logging
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from etude.data.encoding import (
    beginning,
    bos_ids,
    control_tokens,
    encode_after,
    encode_control,
    encode_plain,
    encode_prompt,
    special_token_ids,
)
from etude.errors import ModelError

ADDED = ["<s>", "</s>", "<|im_end|>", "<call>", "<response>"]


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """Special added tokens, one of them at the end of the vocabulary, and non-special ones."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(
        ["what is 12+34? <call> it is 46 </call>", "the call ends in <|im_end|>"] * 9, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<call>", "<response>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return tokenizer


def word_level(characters: str = "0123456789+?", *, added: bool = True) -> PreTrainedTokenizerFast:
    """One token per character and per tag: most text can't be spelled, and a tag has one spelling only."""
    words = ["<unk>", "<call>", "<response>", *characters]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if added:
        tokenizer.add_tokens(["<call>", "<response>"])
    return tokenizer


def llama_like() -> LlamaTokenizer:
    """SentencePiece-style: adds BOS, puts a space before a text, falls back on bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdef<>/?", "▁a", "ab"]
    tokenizer = LlamaTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[("▁", "a"), ("a", "b")], add_bos_token=True
    )
    tokenizer.add_tokens(["<call>"])
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """T5's trap: the added tokens are pieces of the model itself, so plain text finds them there."""
    pieces = ["<unk>", "</s>", "<extra>", *"</>sextra"]
    scored = [(piece, 0.0 if len(piece) > 1 else -1.0) for piece in dict.fromkeys(pieces)]
    backend = Tokenizer(models.Unigram(scored, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", extra_special_tokens=["<extra>"]
    )


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's way: lower case, no spaces."""
    words = ["[UNK]", "the", "cat", "mat", "'", "s", "##s", *"abcdefghijklmnopqrstuvwxyz0123456789+?<>"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


class Characters(PreTrainedTokenizer):
    """A tokenizer written in Python."""

    def __init__(self, **kwargs):
        self.characters = ["<unk>", *"abcdel<>?"]
        super().__init__(unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self):
        return len(self.characters)

    def get_vocab(self):
        return {character: i for i, character in enumerate(self.characters)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.characters.index(token) if token in self.characters else 0

    def _convert_id_to_token(self, index):
        return self.characters[index]


BYTE_LEVEL, WORDS, LLAMA, UNIGRAM = byte_level_bpe(), word_level(), llama_like(), unigram()
ALL = [BYTE_LEVEL, WORDS, LLAMA, UNIGRAM]
NAMES = ["byte-level", "word-level", "llama", "unigram"]

# Random text in which added tokens, whole and broken, turn up often.
texts = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from([*ADDED, "<extra>", "<cal", "l>", " ", "\n"]))
).map("".join)


@given(texts)
@settings(deadline=None)
def test_byte_level_data_decodes_to_itself_without_added_tokens(text):
    encoded = encode_plain(BYTE_LEVEL, text)
    assert control_tokens(BYTE_LEVEL).keys().isdisjoint(encoded.ids)
    assert BYTE_LEVEL.decode(encoded.ids, clean_up_tokenization_spaces=False) == text == encoded.text
    assert encoded.escaped == 0


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
@given(text=texts)
@settings(deadline=None, max_examples=50)
def test_data_never_yields_an_added_or_unknown_token(tokenizer, text):
    encoded = encode_plain(tokenizer, text)
    forbidden = {*control_tokens(tokenizer), tokenizer.convert_tokens_to_ids("<unk>")}
    assert forbidden.isdisjoint(encoded.ids)
    assert encode_plain(tokenizer, encoded.text).escaped == 0, "what was escaped can be spelled"


def test_split_special_tokens_is_not_enough():
    """The reason for `encode_plain`: transformers leaves non-special added tokens whole."""
    ids = BYTE_LEVEL.encode("<call>", add_special_tokens=False, split_special_tokens=True)
    assert ids == [BYTE_LEVEL.convert_tokens_to_ids("<call>")]
    assert len(encode_plain(BYTE_LEVEL, "<call>").ids) > 1


def test_control_text_keeps_added_tokens_whole():
    ids = encode_control(BYTE_LEVEL, "<call>1<|im_end|>")
    assert BYTE_LEVEL.convert_ids_to_tokens(ids) == ["<call>", "1", "<|im_end|>"]
    assert encode_control(BYTE_LEVEL, "") == []


def test_control_text_ignores_the_tokenizers_settings():
    tokenizer = byte_level_bpe()
    expected = encode_control(tokenizer, "<|im_end|>1234")
    tokenizer.split_special_tokens = True
    tokenizer.pad_token = "</s>"
    tokenizer(["1", "12345"], padding="max_length", truncation=True, max_length=3)
    assert encode_control(tokenizer, "<|im_end|>1234") == expected


def test_a_word_level_vocabulary_escapes_and_counts():
    encoded = encode_plain(WORDS, "1x+é2")
    assert (encoded.text, encoded.escaped) == ("1?+?2", 2)
    assert WORDS.decode(encoded.ids) == "1?+?2"


def test_a_tag_that_only_the_added_token_could_spell_is_escaped():
    encoded = encode_plain(WORDS, "1<call>2")
    assert (encoded.text, encoded.escaped) == ("1??????2", 6)
    without_question_mark = word_level("0123456789")
    encoded = encode_plain(without_question_mark, "1<call>2")
    assert (encoded.text, encoded.escaped) == ("12", 6)
    assert without_question_mark.decode(encoded.ids) == "12"


def test_the_same_word_without_an_added_token_is_ordinary_text():
    tokenizer = word_level(added=False)
    assert encode_plain(tokenizer, "<call>").ids == [tokenizer.convert_tokens_to_ids("<call>")]


def test_tokens_added_later_are_noticed():
    tokenizer = byte_level_bpe()
    plain = encode_control(tokenizer, "<request>")
    tokenizer.add_tokens(["<request>"])
    assert encode_control(tokenizer, "<request>") == [len(tokenizer) - 1]
    assert encode_plain(tokenizer, "<request>").ids == plain
    assert "<request>" in control_tokens(tokenizer).values()


def test_characters_that_a_tokenizer_drops_in_silence_are_counted():
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "?": 2}, merges=[]))  # no unknown token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.encode("axxb") == [0, 1]
    encoded = encode_plain(tokenizer, "axxb")
    assert (encoded.ids, encoded.text, encoded.escaped) == ([0, 2, 2, 1], "a??b", 2)


def test_half_characters_are_escaped():
    encoded = encode_plain(BYTE_LEVEL, "a\ud83db\ude00")
    assert (encoded.text, encoded.escaped) == ("a?b?", 2)
    assert BYTE_LEVEL.decode(encoded.ids) == "a?b?"


def test_pieces_of_the_model_are_spelled_out():
    encoded = encode_plain(UNIGRAM, "a</s>x<extra>")
    assert UNIGRAM.convert_ids_to_tokens(encoded.ids) == list("a</s>x<extra>")
    assert encoded.escaped == 0


def test_escaping_is_logged_once_per_tokenizer(caplog):
    tokenizer = word_level()
    with caplog.at_level(logging.WARNING, logger="etude"):
        encode_plain(tokenizer, "1a")
        encode_plain(tokenizer, "1b")
    [record] = caplog.records
    assert "can't spell 1 of the 2 characters of '1a'" in record.getMessage()


def test_continuations_get_no_leading_space():
    assert LLAMA.convert_ids_to_tokens(LLAMA.encode("ab", add_special_tokens=False)) == ["▁a", "b"]
    assert LLAMA.convert_ids_to_tokens(encode_control(LLAMA, "ab")) == ["ab"]
    assert LLAMA.convert_ids_to_tokens(encode_control(LLAMA, "<call> ab")) == ["<call>", "▁a", "b"]
    assert LLAMA.convert_ids_to_tokens(encode_plain(LLAMA, "ab").ids) == ["ab"]
    legacy = llama_like()
    legacy.backend_tokenizer.pre_tokenizer = None
    legacy.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    word, call = LLAMA.convert_tokens_to_ids(["ab", "<call>"])
    assert encode_control(legacy, "ab<call>ab") == [word, call, word]
    assert encode_plain(legacy, "ab").ids == [word]
    gpt = byte_level_bpe()
    gpt.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    assert gpt.decode(gpt.encode("is")) == " is"
    assert gpt.decode(encode_control(gpt, "is")) == gpt.decode(encode_plain(gpt, "is").ids) == "is"


def with_special_tokens(tokenizer: LlamaTokenizer) -> LlamaTokenizer:
    special = [AddedToken("<end>", rstrip=True, normalized=False), AddedToken("<in>", normalized=False)]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def legacy_llama() -> LlamaTokenizer:
    """Of Llama 2's kind: a space at the beginning, and one after every added token."""
    tokenizer = llama_like()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return with_special_tokens(tokenizer)


MODERN, LEGACY = with_special_tokens(llama_like()), legacy_llama()


@pytest.mark.parametrize("tokenizer", [MODERN, LEGACY], ids=["modern", "legacy"])
@given(st.lists(st.sampled_from(["a", "b", " ", "\n", "<in>", "<end>", "ab"]), min_size=2), st.data())
def test_parts_encoded_after_what_precedes_them_are_the_whole(tokenizer, pieces, data):
    """Cut next to a special token, where no token reaches across."""
    text = "".join(pieces)
    seam = data.draw(st.sampled_from([0, *(m.end() for m in re.finditer("<in>|<end>[ \n]*", text))]))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer(text[:seam], add_special_tokens=False)["input_ids"]
    assert start + (encode_after(tokenizer, text[:seam], text[seam:]) if seam else whole) == whole


def test_a_part_after_ordinary_text_continues_it():
    def tokens(text):
        return LEGACY.convert_ids_to_tokens(encode_after(LEGACY, "a", text))

    assert tokens("ab<in>ab") == ["ab", "<in>", "▁a", "b"]
    assert len(tokens("ab<call>ab")) == 3, "a space would hide an added token that is normalized"
    assert tokens("") == []
    longer = with_special_tokens(llama_like())
    longer.add_special_tokens({"additional_special_tokens": [AddedToken("<in>b", normalized=False)]})
    assert longer.convert_ids_to_tokens(encode_after(longer, "<in>", "b")) == ["b"], "it stays what it is"


def test_prompts_start_as_the_tokenizers_own_call_does_and_end_open():
    assert (
        encode_prompt(LLAMA, "ab")
        == LLAMA("ab")["input_ids"]
        == [LLAMA.bos_token_id, *LLAMA.encode("ab")[1:]]
    )
    assert bos_ids(LLAMA) == [LLAMA.bos_token_id]
    closing = llama_like()
    closing.add_eos_token = True
    assert closing("ab")["input_ids"][-1] == closing.eos_token_id
    assert encode_prompt(closing, "ab") == encode_prompt(LLAMA, "ab")
    assert bos_ids(BYTE_LEVEL) == []  # it has a BOS and doesn't add it
    assert encode_prompt(BYTE_LEVEL, "12") == BYTE_LEVEL("12")["input_ids"]


@pytest.mark.parametrize("tokenizer", [LLAMA, BYTE_LEVEL], ids=["adds", "does not add"])
def test_a_prompt_has_one_bos_at_most(tokenizer):
    for text in ("<s>ab", "<s><s>ab"):
        assert encode_prompt(tokenizer, text).count(tokenizer.bos_token_id) == 1


def test_bos_equal_to_eos():
    tokenizer = llama_like()
    tokenizer.bos_token = tokenizer.eos_token = "</s>"  # as in OPT
    tokenizer.update_post_processor()
    assert tokenizer("")["input_ids"] == [tokenizer.eos_token_id]
    assert bos_ids(tokenizer) == [tokenizer.eos_token_id]


def test_special_token_ids_leave_out_added_tokens_that_are_not_special():
    names = set(BYTE_LEVEL.convert_ids_to_tokens(special_token_ids(BYTE_LEVEL)))
    assert names == {"<s>", "</s>", "<|im_end|>"}


def test_white_space_tokens_are_text():
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens(["\n\n"])
    assert "\n\n" not in control_tokens(tokenizer).values()


def test_python_tokenizers_are_served_too():
    tokenizer = Characters()
    tokenizer.add_tokens(["<call>"])
    assert len(encode_control(tokenizer, "a<call>b")) == 3
    encoded = encode_plain(tokenizer, "a<call>z")
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == list("a<call>?")
    assert (encoded.text, encoded.escaped) == ("a<call>?", 1)


def test_a_vocabulary_without_an_unknown_token_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    with pytest.raises(ModelError, match="no unknown token"):
        encode_plain(PreTrainedTokenizerFast(tokenizer_object=backend), "b")


WORD_PIECES = word_pieces()


def reading(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(texts, st.integers(1, 12))
@settings(deadline=None)
def test_a_beginning_is_the_text_s_and_reads_as_its_first_tokens(text, count):
    shown = beginning(BYTE_LEVEL, text, count)
    assert text.startswith(shown)
    ids, whole = reading(BYTE_LEVEL, shown), reading(BYTE_LEVEL, text)
    assert ids == whole[: len(ids)]
    assert min(count, len(whole)) - 3 <= len(ids) <= count + 3, "but for tokens within a character"
    if text.isascii():
        assert len(ids) == min(count, len(whole))


def test_beginnings():
    assert beginning(BYTE_LEVEL, "what   is", 3) == "what  "
    assert reading(BYTE_LEVEL, "what   is")[:3] == reading(BYTE_LEVEL, "what  ")
    assert beginning(BYTE_LEVEL, "is 🦊", 4) == "is ", "three bytes of four are no fox"
    assert beginning(WORDS, "12+34", 3) == "12+"
    assert beginning(WORDS, "12", 3) == "12"
    assert beginning(LLAMA, "ab cd ef", 4) == "ab c"
    assert beginning(Characters(), "bade", 2) == "ba"
    # Decoded, these read otherwise than they were written.
    assert beginning(WORD_PIECES, "The  Cat's  Mat", 3) == "The  Cat'"
    assert WORD_PIECES.decode(reading(WORD_PIECES, "The  Cat's")) == "the cat ' s"
    assert beginning(UNIGRAM, "sex  tax", 4) == "sex"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, WORDS, LLAMA, WORD_PIECES])
def test_a_beginning_has_so_many_tokens(tokenizer):
    text = "ab <b> ed? 12+34"
    lengths = [len(reading(tokenizer, beginning(tokenizer, text, count))) for count in range(1, 8)]
    assert lengths == [1, 2, 3, 4, 5, 6, 7]
    assert tokenizer.decode(reading(tokenizer, beginning(tokenizer, text, 7))) == tokenizer.decode(
        reading(tokenizer, text)[:7]
    )
