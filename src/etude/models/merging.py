"""LoRA adapters merged into their base model.

    merge_adapters("runs/sft", "runs/sft-merged")

One adapter, or a weighted combination of several of the same base, as peft's `add_weighted_adapter` makes it.
Covered: language models, decoders and encoder-decoders; reward models and other classifiers, whose head is
saved with the adapter; value heads beside it. Not covered: adapters of no weights (prompt tuning), quantized
bases, averages of whole models (`averaging`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from peft import PeftConfig, PeftModel, PeftType, load_peft_weights
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from etude.errors import ConfigError, ModelError
from etude.models.adapters import base_of, current_peft, find_adapter
from etude.models.export import Exported, check_output_dir, export, find_tokenizer, probe_logits
from etude.models.head_files import average_heads
from etude.models.loading import as_dtype, checked_dtype, load_language_model, quiet_about
from etude.models.places import explained, locate

Combination = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_CLASSIFIERS: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


def merge_adapters(
    sources: Sources,
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    combination: Combination = "cat",
    density: float | None = None,
    base_model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> Exported:
    """Write a model that loads without peft: the base with the adapters' updates in its weights.

    Args:
        sources: directory or hub id of an adapter, or several.
        output_dir: for the model; must not exist, or be empty.
        weights: of the adapters' updates; 1 each by default. Value heads are averaged evenly.
        combination: how peft combines them: "cat" is the weighted sum of the updates, exactly; the others are
            approximations (see `LoraModel.add_weighted_adapter`).
        density: share of an update's values that "ties", "dare_…" and "magnitude_prune" leave.
        base_model: instead of the base that the adapters name, such as its new place.
        dtype: of the weights that are written. "auto" takes the base's and merges in it; else the sum is
            computed in float32 at least.
        max_shard_size: of a file.
        trust_remote_code: run Python code that comes with the base.

    Returns:
        What was written, and how far its logits are from those of base and adapter.

    Raises:
        ModelError: a source holds no adapter, they don't belong together or can't be merged, or what was
            written doesn't load as what was merged.
        ConfigError: settings that contradict each other.
    """
    names = [locate(source, "an adapter") for source in _listed(sources)]
    if weights is not None and len(weights) != len(names):
        raise ConfigError(
            f"there are {len(weights)} weights for {len(names)} adapters; expected one for each"
        )
    _check_combination(combination, density, mixes=len(names) > 1)
    check_output_dir(output_dir)
    adapters = [_mergeable(name) for name in names]
    _check_same("task_type", adapters, names)
    if base_model is None:
        _check_same("base_model_name_or_path", adapters, names)
    base = base_of(adapters[0], names[0]) if base_model is None else locate(base_model, "the base model")
    place = {"revision": adapters[0].revision, "trust_remote_code": trust_remote_code}
    tokenizer = find_tokenizer([*((name, {}) for name in names), (base, place)])

    dtype = checked_dtype(dtype)
    wide = dtype if dtype in ("auto", "float64", torch.float64) else "float32"
    model = _load_base(adapters[0], base, names[0], {**place, "dtype": wide})
    combined = _combined(model, adapters, names, weights, combination, density)
    expected = probe_logits(combined)
    with current_peft():
        merged: Any = combined.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    _tell_padding(merged, tokenizer)
    return export(
        merged,
        output_dir,
        tokenizer=tokenizer,
        value_head=average_heads(names, [1 / len(names)] * len(names)),
        dtype=None if dtype == "auto" else as_dtype(dtype),
        max_shard_size=max_shard_size,
        expected=expected,
    )


def holds_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether a directory or hub repository holds an adapter."""
    return find_adapter(locate(source, "a model or an adapter"), {}) is not None


def _listed(sources: Sources) -> list[str | os.PathLike[str]]:
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not listed:
        raise ConfigError("there is nothing to merge; name at least one adapter")
    return listed


def _check_combination(combination: str, density: float | None, mixes: bool) -> None:
    if combination not in get_args(Combination):
        raise ConfigError(
            f"combination is {combination!r}; expected one of {', '.join(get_args(Combination))}"
        )
    if combination != "cat" and not mixes:
        raise ConfigError(
            f"combination {combination!r} is about several adapters, and there is one; leave it out"
        )
    prunes = combination.startswith(("ties", "dare", "magnitude"))
    if prunes and (density is None or not 0 < density <= 1):
        raise ConfigError(f"combination {combination!r} leaves a share of the values; set density, 0 to 1")
    if density is not None and not prunes:
        raise ConfigError(f"density does nothing for {combination!r}; leave it out")


def _mergeable(name: str) -> PeftConfig:
    config = find_adapter(name, {})
    if config is None:
        where = "" if os.path.isdir(name) else f", nor is there a directory of that name in {os.getcwd()!r}"
        raise ModelError(
            f"{name!r} holds no adapter (there is no adapter_config.json{where}); expected one that peft "
            "saved. Full models can be averaged, two or more of them"
        )
    if config.is_prompt_learning:
        raise ModelError(
            f"{name!r} is a {config.peft_type} adapter, virtual tokens before the text, which no weights can "
            "take in; expected LoRA or another adapter of weights"
        )
    return config


def _check_same(what: str, adapters: Sequence[PeftConfig], names: Sequence[str]) -> None:
    first = getattr(adapters[0], what)
    for adapter, name in zip(adapters, names, strict=True):
        if getattr(adapter, what) != first:
            raise ModelError(
                f"{names[0]!r} has {what} {first!r} and {name!r} {getattr(adapter, what)!r}; expected "
                "adapters of one model. If it is one model in two places, name one of these as base_model"
            )


def _load_base(adapter: PeftConfig, base: str, name: str, options: dict[str, Any]) -> PreTrainedModel:
    auto = _CLASSIFIERS.get(str(adapter.task_type))
    if auto is None:
        model: Any = load_language_model(base, **options)
    else:
        head, labels = _saved_head(name)
        with explained("the base model", base), quiet_about(re.compile(""), head) as seen:
            loaded: Any = auto.from_pretrained(base, num_labels=labels, output_loading_info=True, **options)
            model, seen["info"] = loaded
        if missing := sorted(key for key in seen["info"]["missing_keys"] if not head.search(key)):
            raise ModelError(
                f"the base model {base!r} lacks {missing[0]!r}, which {type(model).__name__} needs"
            )
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"the base model {base!r} is quantized, and merging would round the adapter away; name the model "
            "that it was quantized from as base_model"
        )
    return model.eval()


def _saved_head(name: str) -> tuple[re.Pattern[str], int]:
    """What is saved whole with a classifier's adapter, as a pattern of names; and how many labels it has."""
    with explained("the adapter", name):
        weights = load_peft_weights(name, device="cpu")
    whole = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in weights.items()
        if ".lora_" not in key
    }
    labels = [tensor.shape[0] for tensor in whole.values() if tensor.dim() == 2]
    if not labels:
        raise ModelError(
            f"the adapter in {name!r} was trained for classification and saved without its head; expected "
            "one that was trained with it (modules_to_save)"
        )
    return re.compile("|".join(map(re.escape, whole))), min(labels)


def _combined(
    model: PreTrainedModel,
    adapters: Sequence[PeftConfig],
    names: Sequence[str],
    weights: Sequence[float] | None,
    combination: Combination,
    density: float | None,
) -> PeftModel:
    """The base with one active adapter: the only one, or the combination of all."""
    labels = [f"source_{i}" for i in range(len(names))]
    with explained("the adapter", names[0]), current_peft():
        combined = PeftModel.from_pretrained(model, names[0], adapter_name=labels[0])
        for label, name in zip(labels[1:], names[1:], strict=True):
            combined.load_adapter(name, adapter_name=label)
    if len(names) == 1 and weights is None:
        return combined
    for adapter, name in zip(adapters, names, strict=True):
        _check_can_be_weighted(adapter, name)
    tuner: Any = combined.base_model
    try:
        tuner.add_weighted_adapter(
            labels, list(weights or [1.0] * len(names)), "combination", combination, density=density
        )
    except ValueError as error:
        raise ModelError(f"peft can't combine {', '.join(map(repr, names))}: {error}") from error
    for module in combined.modules():
        if isinstance(module, LoraLayer) and "combination" in module.scaling:
            # The updates are scaled already. Rank-stabilised LoRA would scale their sum once more.
            module.scaling["combination"] = 1.0
    combined.set_adapter("combination")
    return combined


def _check_can_be_weighted(adapter: PeftConfig, name: str) -> None:
    """Raise for what `add_weighted_adapter` doesn't know, or would pass over in silence."""
    if adapter.peft_type != PeftType.LORA:
        raise ModelError(
            f"the adapter in {name!r} is a {adapter.peft_type} adapter, and only LoRA can be weighted; merge "
            "it alone and without weights"
        )
    for setting, what in (
        ("modules_to_save", "whole modules, such as a score head"),
        ("use_dora", "magnitudes (DoRA)"),
        ("lora_bias", "biases"),
    ):
        if getattr(adapter, setting, None):
            raise ModelError(
                f"the adapter in {name!r} has {what} ({setting}), which can't be weighted; merge it alone "
                "and without weights"
            )


def _tell_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """A classifier finds the end of a text by its padding token, which adapters don't save."""
    config: Any = model.config
    if tokenizer is not None and config.pad_token_id is None and hasattr(model, "num_labels"):
        config.pad_token_id = tokenizer.pad_token_id
