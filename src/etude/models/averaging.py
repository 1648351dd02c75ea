"""Checkpoints of one architecture, averaged weight by weight: model soups, and the last checkpoints of a run.

    average_models(["runs/sft/checkpoint-800", "runs/sft/checkpoint-900"], "runs/sft-average")

Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time". Value heads beside the models are averaged, too. Not covered: adapters
(`merging`), models with code of their own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from etude.errors import ConfigError, ModelError
from etude.models.adapters import find_adapter
from etude.models.export import Exported, check_output_dir, export, find_tokenizer
from etude.models.head_files import average_heads
from etude.models.loading import VALUE_HEAD_KEY, as_dtype, checked_dtype, quiet_about
from etude.models.places import explained, locate


def average_models(
    sources: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: str = "5GB",
) -> Exported:
    """Write the average of several models. Tokenizer and configuration are the first one's.

    Args:
        sources: directories or hub ids of two models or more.
        output_dir: for the average; must not exist, or be empty.
        weights: of the models, which add up to 1; equal by default.
        dtype: of the weights that are written; "auto" takes the first model's. They are summed in float32.
        max_shard_size: of a file.

    Raises:
        ModelError: a source is no full model, or they are not of one architecture.
        ConfigError: the weights don't fit.
    """
    names = [locate(source, "a model") for source in sources]
    shares = _shares(weights, len(names))
    check_output_dir(output_dir)
    for name in names:
        if find_adapter(name, {}) is not None:
            raise ModelError(f"{name!r} holds an adapter; merge it into its base model first")
    dtype = checked_dtype(dtype)
    tokenizer = find_tokenizer([(names[0], {})])
    _check_vocabularies(names)

    model, stored = _load(names[0])
    average = _tensors(model)
    for tensor in average.values():
        if tensor.is_floating_point():
            tensor.mul_(shares[0])
    for name, share in zip(names[1:], shares[1:], strict=True):
        _add(average, _tensors(_load(name)[0]), share, names[0], name)
    return export(
        model,
        output_dir,
        tokenizer=tokenizer,
        value_head=average_heads(names, shares),
        dtype=stored if dtype == "auto" else as_dtype(dtype),
        max_shard_size=max_shard_size,
        expected=None,
    )


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise ConfigError(f"there are {count} models to average; name two or more")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ConfigError(f"there are {len(weights)} weights for {count} models; expected one for each")
    if not math.isclose(math.fsum(weights), 1.0, abs_tol=1e-6):
        raise ConfigError(f"the weights add up to {math.fsum(weights):.6g}; an average's add up to 1")
    return list(weights)


def _check_vocabularies(names: Sequence[str]) -> None:
    """Tokens mean the same in all of them, as far as they come with a tokenizer."""
    found = {name: tokenizer for name in names if (tokenizer := find_tokenizer([(name, {})])) is not None}
    vocabularies = {name: tokenizer.get_vocab() for name, tokenizer in found.items()}
    if other := [name for name in found if vocabularies[name] != vocabularies[next(iter(found))]]:
        raise ModelError(
            f"the tokenizers of {next(iter(found))!r} and {other[0]!r} have different vocabularies; models "
            "that read different tokens have no average"
        )


def _load(name: str) -> tuple[PreTrainedModel, torch.dtype]:
    """The model in float32 at least, in its own class, and the dtype it is stored in."""
    with explained("the model", name):
        config = AutoConfig.from_pretrained(name)
        architectures = config.architectures or [config.model_type]
        cls: Any = getattr(transformers, architectures[0], None)
        if cls is None:
            raise ModelError(f"{name!r} is a {architectures[0]}, which transformers doesn't have")
        with quiet_about(VALUE_HEAD_KEY) as seen:
            loaded: Any = cls.from_pretrained(name, dtype="auto", output_loading_info=True)
            model, seen["info"] = loaded
    stored: torch.dtype = model.dtype
    if missing := sorted(seen["info"]["missing_keys"]):
        raise ModelError(f"the checkpoint in {name!r} lacks {missing[0]!r}; expected a whole model")
    if getattr(model, "is_quantized", False):
        raise ModelError(f"{name!r} is quantized; average the models that it was quantized from")
    if stored.itemsize < 4:
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    return model.requires_grad_(False), stored


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint holds, tied weights once."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {**{name: parameter.data for name, parameter in model.named_parameters()}, **buffers}


def _add(
    average: Mapping[str, Tensor], tensors: Mapping[str, Tensor], share: float, first: str, name: str
) -> None:
    shapes, others = ({key: tensor.shape for key, tensor in each.items()} for each in (average, tensors))
    if shapes != others:
        different = sorted(key for key in {*shapes, *others} if shapes.get(key) != others.get(key))[0]
        raise ModelError(
            f"{different!r} is {_shape(shapes.get(different))} in {first!r} and "
            f"{_shape(others.get(different))} in {name!r}; expected models of one architecture"
        )
    for key, tensor in average.items():
        if tensor.is_floating_point():
            tensor.add_(tensors[key], alpha=share)
        elif not tensor.equal(tensors[key]):
            raise ModelError(f"{key!r} holds whole numbers, and others in {first!r} than in {name!r}")


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
