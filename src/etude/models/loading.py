"""Tokenizers and causal language models: from a directory or the hub, and out of their wrappers again.

Covers plain checkpoints, LoRA adapters (the base is found through the adapter's own configuration) and
the mistakes people make on the way: a typo in a path, a model of the wrong kind, an option nobody knows.
Not covered: value heads (`value_head`), frozen copies (`reference`), encoder-decoder models.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from etude.errors import ModelError

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")

# The options that say where a checkpoint's files are, as every loader of the ecosystem spells them.
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")

# TRL 0.7.4 wrote the value head into the trunk's own file, under these names.
VALUE_HEAD_KEY = re.compile(r"(?:^|\.)v_head\.")

_ANY, _NONE = re.compile(""), re.compile("(?!)")

# What a wrapper calls the model in it: our value-head and value models, DDP/FSDP/DeepSpeed, torch.compile.
_INNER = ("pretrained_model", "model", "module", "_orig_mod")


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


def load_chat_template(name_or_path: str | os.PathLike[str]) -> str:
    """The chat template in a Jinja file, or of the tokenizer of a directory or hub id.

    Raises:
        ModelError: there is no such place, or no template in it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
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
            f"{name!r} is an adapter already, and peft_config asks for a new one. Leave peft_config out to "
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


def lora_config(
    r: int, alpha: float, dropout: float = 0.0, target_modules: str | Sequence[str] | None = None
) -> LoraConfig:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer but the output head, or on those named.

    The update is `alpha / r · B A`, with `A` of shape [r, in] and `B` of shape [out, r].
    """
    modules = (
        target_modules if target_modules is None or isinstance(target_modules, str) else [*target_modules]
    )
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int; a fraction is as good
        lora_dropout=dropout,
        target_modules=modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def quantization_config(bits: Literal[4, 8]) -> BitsAndBytesConfig:
    """Weights in 4 bits as in QLoRA (Dettmers et al. 2023, NF4 and double quantization), or in 8."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def add_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig) -> PeftModel:
    """Put a fresh adapter on a model and freeze the rest; `peft_config` itself stays as it is.

    Raises:
        ModelError: the model carries adapters already, `peft_config` is not a PEFT configuration, or peft
            can't put it on this model (a family whose layers it doesn't know by name, say).
    """
    if not isinstance(peft_config, PeftConfig):
        raise ModelError(
            f"peft_config is a {type(peft_config).__name__}; expected a peft.PeftConfig, e.g. a LoraConfig"
        )
    if isinstance(model, PeftModel):
        raise ModelError(
            "the model carries an adapter already: leave peft_config out, or pass the base model"
        )
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model)
    peft_config = copy.deepcopy(peft_config)  # peft writes the base model's name and its targets into it
    if model.config.is_encoder_decoder and peft_config.task_type == TaskType.CAUSAL_LM:
        peft_config.task_type = TaskType.SEQ_2_SEQ_LM
    if isinstance(peft_config, LoraConfig) and any(isinstance(module, Conv1D) for module in model.modules()):
        peft_config.fan_in_fan_out = True  # GPT-2 stores its weights transposed; peft would warn and set this
    if isinstance(peft_config, LoraConfig) and peft_config.target_modules == "all-linear":
        peft_config.exclude_modules = peft_config.exclude_modules or _beyond_lora(model) or None
    try:
        with current_peft():
            return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(
            f"peft can't put this adapter on {type(model).__name__}: {str(error).rstrip('.')}. For LoRA on "
            "every linear layer, give target_modules='all-linear'; else name some of model.named_modules()"
        ) from error


def _beyond_lora(model: nn.Module) -> list[str]:
    """Linear layers that an adapter can't stand in for.

    State-space layers (Mamba and its hybrids) hand these two layers' weights to a kernel, past an adapter;
    and some routers (Llama 4's) are linear layers whose forward gives more than a product.
    """
    spared = []
    for name, module in model.named_modules():
        if hasattr(module, "A_log") and hasattr(module, "D"):
            spared += [f"{name}.{layer}" for layer in ("dt_proj", "out_proj") if hasattr(module, layer)]
        elif isinstance(module, nn.Linear) and type(module).__name__.endswith("Router"):
            spared.append(name)
    return spared


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it wraps, from the outside in; the last is the `PreTrainedModel`."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        if isinstance(inner, PreTrainedModel):
            return
        if isinstance(inner, PeftModel):
            inner = inner.get_base_model()
        else:
            found = (getattr(inner, name, None) for name in _INNER)
            inner = next((module for module in found if isinstance(module, nn.Module)), None)


def trunk_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside value-head, PEFT, DDP, FSDP and compile wrappers.

    Injected adapter layers stay in it and stay active: its forward gives the same logits.
    """
    *_, innermost = unwrapped(model)
    if not isinstance(innermost, PreTrainedModel):
        raise ModelError(
            f"there is no transformers model inside {type(model).__name__} (innermost: "
            f"{type(innermost).__name__}); expected a PreTrainedModel or a value-head, PEFT or DDP wrapper"
        )
    return innermost


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The decoder inside `trunk_of(model)`, without a head: its forward gives the last hidden states."""
    decoder = trunk_of(model).base_model
    assert isinstance(decoder, PreTrainedModel)
    return decoder


def locate(name_or_path: str | os.PathLike[str], holding: str) -> str:
    """A directory (`~` expanded) or something that can be a hub id; a path that leads nowhere ends here.

    Raises:
        ModelError: it is a file, or neither a directory nor a well-formed hub id.
    """
    name = os.path.expanduser(os.fspath(name_or_path))
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise ModelError(f"{name!r} is a file; expected the directory with {holding}, or a hub id")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelError(
            f"there is no directory {name!r}; expected one with {holding}, or a hub id such as 'org/name'. "
            f"Check the path: a relative one starts at {os.getcwd()!r}"
        ) from None
    return name


def find_file(name: str, file: str, **place: Any) -> str | None:
    """The local path of one file of a directory or hub repository, fetched if need be; None if not there."""
    return cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **place,
    )


def _load_trunk(
    name: str, options: Mapping[str, Any], headless: bool = False, seq2seq: bool = False
) -> PreTrainedModel:
    place = {key: options[key] for key in HUB_OPTIONS if key in options}
    if os.path.isdir(name) and find_file(name, "config.json", **place) is None:
        raise ModelError(
            f"the directory {name!r} has no config.json; expected a checkpoint as save_pretrained writes it. "
            f"It holds {_listing(name)}"
        )
    with explained("the model", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=options["trust_remote_code"], **place)
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
    with explained("the model", name), quiet_about(unexpected=harmless) as seen:
        loaded: Any = auto.from_pretrained(name, output_loading_info=True, **options)
        model, seen["info"] = loaded
    return model


def _is_decoder(config: PreTrainedConfig) -> bool:
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or has_own_code


def _without_head(config: PreTrainedConfig) -> Any:
    """The class that loads a checkpoint without its language-model head, but with a score head it has."""
    scored = any("ForSequenceClassification" in name for name in config.architectures or ())
    return AutoModelForSequenceClassification if scored else AutoModel


def find_adapter(name: str, place: Mapping[str, Any]) -> PeftConfig | None:
    """The configuration of the adapter that a directory or hub repository holds; None if it holds none."""
    with explained("the adapter", name):
        given = {key: value for key, value in place.items() if value is not None}
        if find_adapter_config_file(name, **given) is None:
            return None
        return PeftConfig.from_pretrained(name, **given)


def base_of(adapter: PeftConfig, name: str) -> str:
    """Where the base model of the adapter in `name` is.

    Raises:
        ModelError: the adapter doesn't say, or nothing is there.
    """
    if not adapter.base_model_name_or_path:
        raise ModelError(
            f"the adapter in {name!r} doesn't say which model it belongs to: write the model's directory or "
            "hub id into its adapter_config.json, under base_model_name_or_path"
        )
    return locate(adapter.base_model_name_or_path, f"the base model of the adapter in {name!r}")


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype by its name, or as it is."""
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if not isinstance(dtype, torch.dtype) and dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}; expected a torch.dtype or one of {', '.join(DTYPES)}")
    return dtype


@contextmanager
def explained(what: str, name: str) -> Iterator[None]:
    """Turn what transformers and the hub raise into one message that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise
        option = unknown[1]
        advice = (
            "pass quantization_config=transformers.BitsAndBytesConfig(...) instead"
            if option.startswith("load_in_")
            else "check its spelling"
        )
        raise ModelError(f"{option!r} is not an option for loading {what} from {name!r}; {advice}") from None
    except (OSError, ValueError, SafetensorError) as error:
        if os.path.isdir(name):
            raise ModelError(f"{what} can't be loaded from the directory {name!r}: {error}") from error
        if isinstance(error, OSError):
            raise ModelError(
                f"{name!r} is neither a directory (in {os.getcwd()!r}) nor found on the hub: {error}\n"
                "If you mean a directory, check the path. If you mean a hub id, check its spelling, the "
                "network, HF_HUB_OFFLINE, and for a private or gated model your token"
            ) from None
        raise ModelError(f"{what} can't be loaded from {name!r}: {error}") from error


@contextmanager
def current_peft() -> Iterator[None]:
    """Silence what no user could act on.

    Peft uses an attribute that transformers has renamed; and it misses modules for the ranks that it sets
    for experts, which are parameters, and get their adapters.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        for pattern in ("rank", "alpha"):
            warnings.filterwarnings(
                "ignore", f"The following {pattern}_pattern keys.*gate_up_proj", RuntimeWarning
            )
        yield


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
