"""Text to token ids: control text, data, and prompts.

Two kinds of text reach a model. *Control* text is written by us or by the prompt's author: an added token in
it ("<|im_start|>", "<call>") is meant as that token. *Data* is written by tools and strangers: the same
characters in it are only characters, whatever the tokenizer would make of them.

Control and data are encoded as continuations: no BOS, and none of the leading space that SentencePiece
tokenizers put before a text. Only `encode_prompt` writes the start of a sequence.

Not covered: chat templates (`templates`), decoding (the tokenizer's own).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Any
from weakref import WeakKeyDictionary

import tokenizers
from tokenizers.models import WordLevel, WordPiece
from transformers import PreTrainedTokenizerBase

from etude.errors import ModelError

logger = logging.getLogger(__name__)

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: no tokenizer takes it
_Span = tuple[str, list[int]]  # characters and the tokens that spell them


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Data as the model sees it.

    Attributes:
        ids: its tokens.
        text: its text, after escaping.
        escaped: how many characters the vocabulary could not spell; each became "?", or nothing where the
            vocabulary has no "?".
    """

    ids: list[int]
    text: str
    escaped: int


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens, every one of them, with no white space tidied away."""
    text = tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one sequence has one text"
    return text


def encode_control(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode framework or prompt text in the middle of a sequence: added tokens stay whole."""
    continuing = _codec(tokenizer).continuing
    if continuing is None:
        return _encode(tokenizer, text)
    return list(continuing.encode(text, add_special_tokens=False).ids)


def encode_after(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Encode a later part of a text as the tokenizer would within the whole: `before` is what precedes it.

    Unlike a continuation it has the space that Llama's old tokenizers put after every added token.
    """
    codec = _codec(tokenizer)
    if codec.continuing is None or not text:
        return _encode(tokenizer, text)
    added = codec.added
    for index, token in added.items():
        if (before.rstrip() if token.rstrip else before).endswith(token.content):
            ids = _encode(tokenizer, token.content + text)
            if ids[:1] == [index]:
                return ids[1:]
    ids, continued = _encode(tokenizer, text), codec.continuing.encode(text, add_special_tokens=False).ids
    if [i for i in ids if i in added] != [i for i in continued if i in added]:
        return list(continued)  # the space hides added tokens that are normalized; they are meant
    to_token = next((at for at, index in enumerate(continued) if index in added), len(continued))
    from_token = next((at for at, index in enumerate(ids) if index in added), len(ids))
    return list(continued[:to_token]) + ids[from_token:]


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    """Encode tool text or other data in the middle of a sequence: no added token comes out, special or not.

    `split_special_tokens` alone would leave non-special added tokens whole. Characters that the vocabulary
    can't spell without an added or unknown token are escaped and counted; the first time, it is logged.

    Raises:
        ModelError: the tokenizer can't encode unknown words at all.
    """
    codec = _codec(tokenizer)
    ids: list[int] = []
    shown: list[str] = []
    escaped = 0
    for piece, piece_ids in _spans(tokenizer, codec, text):
        if codec.spells(piece, piece_ids):
            ids += piece_ids
            shown.append(piece)
            continue
        for character in piece:  # on their own, characters may still be spelled
            spelled = _alone(tokenizer, codec, character)
            if not codec.spells(character, spelled):
                escaped += 1
                character, spelled = _replace(tokenizer, codec)
            ids += spelled
            shown.append(character)
    if escaped and not codec.warned:
        codec.warned = True
        logger.warning(
            "%s can't spell %d of the %d characters of %r; they were escaped (said once per tokenizer)",
            type(tokenizer).__name__,
            escaped,
            len(text),
            text[:80],
        )
    return EncodedText(ids, "".join(shown), escaped)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, add_bos: bool = True) -> list[int]:
    """Encode the start of a sequence: what the tokenizer's own call adds before it (BOS), nothing after it.

    A text that already starts with the BOS doesn't get a second one. `add_bos=False` is for rendered chat
    templates, which write the BOS themselves where they want one.
    """
    ids, added = _encode(tokenizer, text), bos_ids(tokenizer) if add_bos else []
    bos = bos_ids(tokenizer) or ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])
    while bos and ids[: len(bos)] == bos:
        ids, added = ids[len(bos) :], bos
    return added + ids


def beginning(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """What a text's first `count` tokens spell, without one that ends in the middle of a character."""
    ids = _encode(tokenizer, text)
    if len(ids) <= count:
        return text
    if not tokenizer.is_fast:  # a Python tokenizer doesn't say which token covers what
        lengths = (len(_encode(tokenizer, text[:end])) for end in range(1, len(text)))
        return text[: sum(1 for _ in takewhile(lambda length: length <= count, lengths))]
    if text.startswith(spelled := decode(tokenizer, ids[:count])):
        return spelled
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = encoding["offset_mapping"]
    while count > 1 and places[count][0] < places[count - 1][1]:  # both are bytes of one character
        count -= 1
    # Decoded, a text can look different (lower case, white space); places leave white space out.
    spelled = decode(tokenizer, ids[:count])
    return spelled if text.startswith(spelled) else text[: places[count - 1][1]]


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer's own call puts before a text: usually the BOS or nothing."""
    return list(_frame(tokenizer)[0])


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer's own call puts after a text: nothing, or what encoders want there ([SEP])."""
    return list(_frame(tokenizer)[1])


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    codec = _codec(tokenizer)
    if codec.frame is None:
        # Any ordinary word shows what comes around it; the two ends of an empty text can't be told apart.
        words = (word for word, index in tokenizer.get_vocab().items() if index not in codec.forbidden)
        word, bare = next(((word, ids) for word in words if (ids := _encode(tokenizer, word))), ("", []))
        full = _encode(tokenizer, word, add_special_tokens=True)
        starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        start = next(starts, 0)
        codec.frame = full[:start], full[start + len(bare) :] if bare else []
    return codec.frame


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that `decode(skip_special_tokens=True)` leaves out."""
    return _codec(tokenizer).special


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of these tokens, as far as they stand beside the vocabulary."""
    codec = _codec(tokenizer)
    return tuple(codec.control[index] for index in codec.special if index in codec.control)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    """The added tokens, special or not, that data must never produce: id to text.

    Not among them: tokens of white space only (Gemma adds its newlines), which control nothing.
    """
    return _codec(tokenizer).control


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    add_special_tokens: bool = False,
    split_special_tokens: bool = False,
) -> list[int]:
    """Encode the same way whatever padding, truncation or splitting the tokenizer is set to."""
    encoding = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        split_special_tokens=split_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoding["input_ids"])


# ---- what is worked out once per tokenizer ----


@dataclass(slots=True, eq=False)
class _Codec:
    """A tokenizer's variants and its sets of ids.

    Attributes:
        stamp: what shows that the tokenizer was changed since. A word of the vocabulary that is made an
            added token after first use goes unnoticed; a new token doesn't.
        added: all tokens beside the vocabulary, by id.
        control, special: see `control_tokens`, `special_token_ids`.
        forbidden: tokens that data must not produce: control and unknown.
        continuing: the tokenizer without its leading space; None where it puts none (or isn't a fast one).
        plain: the same without added tokens; None for tokenizers written in Python.
        frame: see `bos_ids` and `end_ids`; None until asked for.
        characters: the tokens of single characters, as they come up.
        warned: an escape was logged.
    """

    stamp: tuple[Any, ...]
    added: dict[int, tokenizers.AddedToken]
    control: dict[int, str]
    special: frozenset[int]
    forbidden: frozenset[int]
    continuing: tokenizers.Tokenizer | None = None
    plain: tokenizers.Tokenizer | None = None
    frame: tuple[list[int], list[int]] | None = None
    characters: dict[str, list[int]] = field(default_factory=dict)
    warned: bool = False

    def spells(self, text: str, ids: list[int]) -> bool:
        """Do these tokens stand for the text? White space may have none: word-level tokenizers drop it."""
        return self.forbidden.isdisjoint(ids) if ids else not text.strip()


_codecs: WeakKeyDictionary[PreTrainedTokenizerBase, _Codec] = WeakKeyDictionary()


def _codec(tokenizer: PreTrainedTokenizerBase) -> _Codec:
    stamp = (len(tokenizer), tokenizer.bos_token_id, getattr(tokenizer, "add_bos_token", None))
    codec = _codecs.get(tokenizer)
    if codec is None or codec.stamp != stamp:
        codec = _codecs[tokenizer] = _build_codec(tokenizer, stamp)
    return codec


def _build_codec(tokenizer: PreTrainedTokenizerBase, stamp: tuple[Any, ...]) -> _Codec:
    added = tokenizer.added_tokens_decoder
    control = {i: token.content for i, token in added.items() if token.special or not token.content.isspace()}
    special = frozenset(tokenizer.all_special_ids).union(i for i, token in added.items() if token.special)
    if not tokenizer.is_fast:
        return _Codec(stamp, added, control, special, frozenset({*control, tokenizer.unk_token_id} - {None}))
    backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    continuing = _without_leading_space(backend)
    base = continuing or backend
    # A fresh tokenizer around the same model knows no added tokens. The model is shared, not copied.
    plain = tokenizers.Tokenizer(base.model)
    plain.normalizer, plain.pre_tokenizer = base.normalizer, base.pre_tokenizer
    forbidden = frozenset({*control, tokenizer.unk_token_id, _unknown_id(backend)} - {None})
    return _Codec(stamp, added, control, special, forbidden, continuing, plain)


def _unknown_id(backend: tokenizers.Tokenizer) -> int | None:
    """The model's own unknown token, which the tokenizer around it need not know of."""
    name = getattr(backend.model, "unk_token", None)
    index: int | None = None if name is None else backend.token_to_id(name)
    if index is None and isinstance(backend.model, WordLevel | WordPiece):
        raise ModelError(
            f"the tokenizer's vocabulary has no unknown token ({name!r}), so it can't encode words it "
            "doesn't know; add one to the vocabulary and pass it as `unk_token`"
        )
    return index


def _without_leading_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    before = {name: part and json.loads(part.__getstate__()) for name, part in parts.items()}
    after = {name: part and _drop_prefix(part) for name, part in before.items()}
    if before == after:
        return None  # and the vocabulary, tens of megabytes for some models, need not be copied
    spec = json.loads(backend.to_str()) | after | {"truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _drop_prefix(part: dict[str, Any]) -> dict[str, Any] | None:
    """A normalizer's or pre-tokenizer's JSON without the space it puts before a text."""
    match part["type"]:
        case "Prepend":
            return None
        case "Metaspace":
            return {**part, "prepend_scheme": "never"}
        case "ByteLevel" if "add_prefix_space" in part:  # the normalizer of that name has no such option
            return {**part, "add_prefix_space": False}
        case "Sequence":
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            return {**part, key: [kept for child in part[key] if (kept := _drop_prefix(child)) is not None]}
    return part


# ---- data ----


def _spans(tokenizer: PreTrainedTokenizerBase, codec: _Codec, text: str) -> Iterator[_Span]:
    """Cut a text into runs of characters with the tokens that spell them; no tokens for what none covers."""

    def vanishes(character: str) -> bool:
        return not (character.isspace() or _alone(tokenizer, codec, character))

    # What vanishes goes first: next to it, tokenizers report which token covers what wrongly.
    for gone, characters in groupby(text, key=vanishes):
        run = "".join(characters)
        if gone:
            yield run, []
        elif codec.plain is None:  # a Python tokenizer doesn't say which token covers what
            yield run, _encode(tokenizer, run, split_special_tokens=True)
        else:
            encoding = codec.plain.encode(run, add_special_tokens=False)
            yield from _align(run, encoding.ids, encoding.offsets)


def _align(text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Iterator[_Span]:
    """Group tokens that share a character (the bytes of one emoji) and yield the gaps between groups too."""
    start = end = 0
    group: list[int] = []
    for index, (left, right) in zip(ids, offsets, strict=True):
        if left >= end:
            yield text[start:end], group
            yield text[end:left], []
            start, group = left, []
        group.append(index)
        end = max(end, right)
    yield text[start:end], group
    yield text[end:], []


def _alone(tokenizer: PreTrainedTokenizerBase, codec: _Codec, character: str) -> list[int]:
    """The tokens of a character on its own; none where the tokenizer would drop it."""
    if (ids := codec.characters.get(character)) is None:
        if _SURROGATE.match(character):
            ids = []
        elif codec.plain is None:
            ids = _encode(tokenizer, character, split_special_tokens=True)
        else:
            ids = list(codec.plain.encode(character, add_special_tokens=False).ids)
        codec.characters[character] = ids
    return ids


def _replace(tokenizer: PreTrainedTokenizerBase, codec: _Codec) -> _Span:
    """What stands for a character that can't be spelled."""
    ids = _alone(tokenizer, codec, "?")
    return ("?", ids) if ids and codec.spells("?", ids) else ("", [])
