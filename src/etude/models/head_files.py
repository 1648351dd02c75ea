"""Where value heads are kept: in a file of their own, or, as TRL has them, inside the trunk's files."""

from __future__ import annotations

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from etude.errors import ModelError
from etude.models.loading import VALUE_HEAD_KEY
from etude.models.places import find_file

logger = logging.getLogger(__name__)

VALUE_HEAD_FILE = "value_head.safetensors"

# Where else a head may be. The first of these that exists holds the trunk: no need to look further.
_TRUNK_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def load_head(head: nn.Module, name: str, place: Mapping[str, Any]) -> None:
    """Fill `head` from a directory or hub repository; where that holds no value head, it stays as it is.

    Raises:
        ModelError: the value head there is of another shape, or can't be read.
    """
    state = read_head(name, place)
    if not state:
        logger.info("%s has no value head; a new one was initialised", name)
        return
    expected = head.state_dict()
    if {key: tensor.shape for key, tensor in state.items()} != {
        key: tensor.shape for key, tensor in expected.items()
    }:
        raise ModelError(
            f"the value head in {name!r} has {_shapes(state)}; the model's takes {_shapes(expected)}. "
            "Was it saved with another model?"
        )
    head.load_state_dict(state)


def average_heads(names: Sequence[str], shares: Sequence[float]) -> dict[str, Tensor]:
    """The heads of several directories or hub repositories, times their shares; empty where none has one.

    Raises:
        ModelError: some have none, or they are of different shapes.
    """
    heads = {name: read_head(name, {}) for name in names}
    if not any(heads.values()):
        return {}
    if without := [name for name, head in heads.items() if not head]:
        raise ModelError(
            f"{without[0]!r} has no value head and others have; expected one in each of them, or in none"
        )
    first, *others = heads.values()
    if wrong := [name for name, head in heads.items() if _shapes(head) != _shapes(first)]:
        raise ModelError(f"the value heads in {names[0]!r} and {wrong[0]!r} are of different shapes")
    if not others:
        return first
    weights = torch.tensor(list(shares))
    return {key: _weighted(torch.stack([head[key] for head in heads.values()]), weights) for key in first}


def save_head(state: Mapping[str, Tensor], directory: str | os.PathLike[str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, os.path.join(directory, VALUE_HEAD_FILE), metadata={"format": "pt"})


def read_head(name: str, place: Mapping[str, Any]) -> dict[str, Tensor]:
    """The head's tensors in a directory or hub repository: in a file of its own, or inside the trunk's."""
    path = find_file(name, VALUE_HEAD_FILE, **place)
    if path is not None:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    for trunk_file in _TRUNK_FILES:
        path = find_file(name, trunk_file, **place)
        if path is not None:
            return _read_head_in_trunk(name, path, place)
    return {}


def _read_head_in_trunk(name: str, path: str, place: Mapping[str, Any]) -> dict[str, Tensor]:
    files = [path]
    if path.endswith(".index.json"):
        with open(path, encoding="utf-8") as index:
            weight_map = json.load(index)["weight_map"]
        shards = {file for key, file in weight_map.items() if VALUE_HEAD_KEY.search(key)}
        found = {shard: find_file(name, shard, **place) for shard in sorted(shards)}
        missing = [shard for shard, file in found.items() if file is None]
        if missing:
            raise ModelError(
                f"{name!r} lacks {', '.join(missing)}, which its index says holds the value head"
            )
        files = [file for file in found.values() if file is not None]
    return {
        VALUE_HEAD_KEY.split(key)[-1]: tensor for file in files for key, tensor in _head_tensors(file).items()
    }


def _head_tensors(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if VALUE_HEAD_KEY.search(key)}  # noqa: SIM118
    try:
        # Never a general pickle: that would run whatever code the file holds. Only zip files can be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path!r} holds more than tensors, or is damaged; it was not loaded. Convert it to safetensors "
            "where you trust it"
        ) from error
    return {key: tensor for key, tensor in state.items() if VALUE_HEAD_KEY.search(key)}


def _weighted(tensors: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over the first dimension."""
    return torch.tensordot(weights.to(tensors.dtype), tensors, dims=1)


def _shapes(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(state.items()))
