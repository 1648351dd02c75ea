"""Tokenizers and language models: from a directory or the hub.

Covers plain checkpoints, LoRA adapters (the base is found through the adapter's own configuration) and
the mistakes people make on the way: a typo in a path, a model of the wrong kind, an option nobody knows.
Not covered: value heads (`value_head`), frozen copies (`reference`), fresh adapters (`adapters`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from etude.errors import ModelError
from etude.models.adapters import add_adapter, base_of, current_peft, find_adapter, said_of_base
from etude.models.places import HUB_OPTIONS, explained, find_file, locate

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")

# TRL 0.7.4 wrote the value head into the trunk's own file, under these names.
VALUE_HEAD_KEY = re.compile(r"(?:^|\.)v_head\.")

_ANY, _NONE = re.compile(""), re.compile("(?!)")


def best_device() -> str:
    """The fastest kind of device here: "cuda", else "mps", else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_tokenizer(
    name_or_path: str | os.PathLike[str], trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id, with a pad token.

    A pad token that is there is kept; where none is, the end-of-sequence token stands in. Nothing else
    is changed.

    Raises:
        ModelError: there is no such place, or no tokenizer in it.
    """
    name = locate(name_or_path, "a tokenizer")
    if os.path.isdir(name) and not any(_OF_A_TOKENIZER.search(file) for file in os.listdir(name)):
        raise ModelError(
            f"the directory {name!r} holds no tokenizer; expected one as save_pretrained writes it. "
            f"It holds {_listing(name)}"
        )
    with explained("the tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, revision=revision
        )
        # Given a config.json alone, transformers builds a tokenizer without a vocabulary and says nothing.
        vocabulary = set(getattr(tokenizer, "vocab_files_names", {}).values())
        if vocabulary and not any(
            find_file(name, file, revision=revision) for file in sorted(vocabulary | {"tokenizer.json"})
        ):
            raise ModelError(
                f"{name!r} holds no tokenizer: none of {', '.join(sorted(vocabulary | {'tokenizer.json'}))} "
                "is there. Save one beside the model (tokenizer.save_pretrained), or name the place it is in"
            )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# One of these is in every directory that transformers finds a tokenizer in.
_OF_A_TOKENIZER = re.compile(r"^config\.json$|token|vocab|merges|spiece|sentencepiece|\.(model|bpe|spm)$")


def load_chat_template(name_or_path: str | os.PathLike[str]) -> str:
    """The chat template in a Jinja file, or of the tokenizer of a directory or hub id.

    Raises:
        ModelError: there is no such place, or no template in it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix in (".jinja", ".jinja2", ".j2", ".txt"):
        raise ModelError(f"there is no chat template {str(path)!r}; relative paths start at {os.getcwd()!r}")
    template = load_tokenizer(name_or_path).chat_template
    if not isinstance(template, str):
        raise ModelError(f"the tokenizer of {str(name_or_path)!r} has no chat template; give a Jinja file")
    return template


def load_causal_lm(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    peft_config: PeftConfig | None = None,
    is_trainable: bool = True,
    seq2seq: bool = False,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """A decoder with a language-model head, from a directory or hub id.

    Args:
        name_or_path: a checkpoint, or a LoRA adapter whose configuration names its base model.
        dtype: of the weights; "auto" takes the checkpoint's. Of a quantized model, what is not quantized.
        device: where to; None leaves the model where transformers puts it (the CPU, or `device_map`).
        trust_remote_code: run Python code that comes with the checkpoint; pin `revision` if you do.
        peft_config: put a fresh adapter on the model.
        is_trainable: False freezes all parameters, a loaded adapter's included.
        seq2seq: where there is an encoder-decoder, take that.
        options: anything else that transformers' `from_pretrained` knows.

    Returns:
        The model, or a `PeftModel` around it, in eval mode.

    Raises:
        ModelError: there is no such place, no decoder in it, or an option is unknown.
    """
    name = locate(name_or_path, "a model")
    place = {"revision": revision, **{key: options[key] for key in HUB_OPTIONS if key in options}}
    adapter = find_adapter(name, place)
    if adapter is not None and peft_config is not None:
        raise ModelError(
            f"{name!r} is an adapter already, and peft_config (use_peft) asks for a new one. Leave it out to "
            f"go on with this one, or load its base model {adapter.base_model_name_or_path!r} to start afresh"
        )
    options = {**options, "dtype": checked_dtype(dtype), "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation

    model: PreTrainedModel | PeftModel
    if adapter is None:
        model = _load_trunk(name, {**options, **place}, seq2seq=seq2seq)
    else:
        options = {**_without(options, "subfolder"), "revision": adapter.revision}
        with said_of_base(name):
            model = _load_trunk(base_of(adapter, name), options, seq2seq=seq2seq)
        with explained("the adapter", name), current_peft():
            model = PeftModel.from_pretrained(model, name, is_trainable=is_trainable, **place)
    if peft_config is not None:
        model = add_adapter(model, peft_config)
    if not is_trainable:
        model.requires_grad_(False)
    return model.eval() if device is None else model.eval().to(device)


def load_language_model(name_or_path: str | os.PathLike[str], **options: Any) -> PreTrainedModel | PeftModel:
    """A decoder with a language-model head, or an encoder-decoder with one: whichever is there.

    The options are those of `load_causal_lm`.

    Raises:
        ModelError: there is no such place, neither of them in it, or an option is unknown.
    """
    return load_causal_lm(name_or_path, seq2seq=True, **options)


def holds_encoder_decoder(name_or_path: str | os.PathLike[str], **options: Any) -> bool:
    """Whether the model in a directory or hub repository, or the base of the adapter in it, is one.

    The options are those of `load_causal_lm`.

    Raises:
        ModelError: there is no such place, or no model in it.
    """
    name = locate(name_or_path, "a model")
    adapter = find_adapter(name, {key: options[key] for key in HUB_OPTIONS if key in options})
    if adapter is not None:
        name, options = (
            base_of(adapter, name),
            {**_without(options, "subfolder"), "revision": adapter.revision},
        )
    return bool(getattr(_config_in(name, options), "is_encoder_decoder", False))


def load_decoder(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A decoder without its language-model head, from a directory or hub id, in eval mode.

    A sequence-classification checkpoint gives the classifier. The options are those of `load_causal_lm`.

    Raises:
        ModelError: there is no such place, no decoder in it, or an option is unknown.
    """
    given = {name: value for name, value in options.items() if value is not None}
    options = {**given, "dtype": checked_dtype(dtype), "trust_remote_code": trust_remote_code}
    return _load_trunk(locate(name_or_path, "a model"), options, headless=True).eval()


def _load_trunk(
    name: str, options: Mapping[str, Any], headless: bool = False, seq2seq: bool = False
) -> PreTrainedModel:
    config = _config_in(name, options)
    auto: Any
    auto, harmless = AutoModelForCausalLM, VALUE_HEAD_KEY
    if headless:
        auto, harmless = _without_head(config), _ANY
    if getattr(config, "is_encoder_decoder", False):
        if not seq2seq:
            raise ModelError(
                f"{name!r} is an encoder-decoder model ({config.model_type}); expected a decoder"
            )
        auto = AutoModelForSeq2SeqLM
    elif not _is_decoder(config):
        raise ModelError(
            f"{name!r} is a {config.model_type} model, of which transformers knows no causal language model; "
            "expected a decoder with a language-model head"
        )
    elif not headless and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder:
        raise ModelError(
            f"{name!r} is an encoder ({config.model_type}), which reads the tokens that it would have to "
            "foretell; expected a decoder or an encoder-decoder"
        )
    with explained("the model", name), quiet_about(unexpected=harmless) as seen:
        loaded: Any = auto.from_pretrained(name, output_loading_info=True, **options)
        model, info = loaded
        weights = {key for key, _ in model.named_parameters(remove_duplicate=False)}
        missing = [] if headless else sorted(weights & set(info["missing_keys"]))  # a buffer may be made anew
        seen["info"] = {} if missing else info  # an error says it instead of a report
    if missing:
        raise ModelError(
            f"the checkpoint in {name!r} lacks {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + f", which {type(model).__name__} needs; it would be random. It was saved from "
            f"{', '.join(config.architectures or ()) or 'another model'}; expected a language model, whole"
        )
    return model


def _config_in(name: str, options: Mapping[str, Any]) -> PreTrainedConfig:
    place = {key: options[key] for key in HUB_OPTIONS if key in options}
    if os.path.isdir(name) and find_file(name, "config.json", **place) is None:
        raise ModelError(
            f"the directory {name!r} has no config.json; expected a checkpoint as save_pretrained writes it. "
            f"It holds {_listing(name)}"
        )
    with explained("the model", name):
        trusted = options.get("trust_remote_code", False)
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trusted, **place)
    return config


def _is_decoder(config: PreTrainedConfig) -> bool:
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or has_own_code


def _without_head(config: PreTrainedConfig) -> Any:
    """The class that loads a checkpoint without its language-model head, but with a score head it has."""
    scored = any("ForSequenceClassification" in name for name in config.architectures or ())
    return AutoModelForSequenceClassification if scored else AutoModel


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its name, or as it is."""
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if not isinstance(dtype, torch.dtype) and dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}; expected a torch.dtype or one of {', '.join(DTYPES)}")
    return dtype


@contextmanager
def quiet_about(
    unexpected: re.Pattern[str] = _NONE, missing: re.Pattern[str] = _NONE
) -> Iterator[dict[str, Any]]:
    """Hold back transformers' report on the weights it loaded if these names are all that it reports.

    The caller puts the loading info under "info". A report on anything else is passed on, and so is one
    that precedes an error.
    """
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in str(record.msg)
        if is_report:
            held.append(record)
        return not is_report

    seen: dict[str, Any] = {}
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(hold)
    try:
        yield seen
    finally:
        logger.removeFilter(hold)
        info = seen.get("info", {"error_msgs": ["not loaded"]})
        strange = [
            key
            for kind, harmless in (("unexpected_keys", unexpected), ("missing_keys", missing))
            for key in info.get(kind, ())
            if not harmless.search(key)
        ]
        if strange or any(info.get(key) for key in ("mismatched_keys", "error_msgs")):
            for record in held:
                logger.handle(record)


def _without(options: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != key}


def _listing(directory: str) -> str:
    names = sorted(path.name for path in Path(directory).iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
