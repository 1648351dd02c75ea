"""A model written down so that it loads by itself: checked before it appears under its name.

The directory holds what `save_pretrained` of model and tokenizer write (weights in safetensors, generation
configuration, chat template), and the value head of what it was made of. It is written under another name,
loaded again, compared, and renamed. Not covered: what the model is made of (`merging`, `averaging`).
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from etude.errors import ModelError
from etude.models.head_files import save_head
from etude.models.places import explained, find_file
from etude.models.wrappers import trunk_of

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        directory: of the model.
        model: its class.
        dtype: of its weights.
        parameters: how many it has.
        files: names of what is in the directory.
        change: of the logits against what it was made of, at most, as a share of the largest logit; None
            where there is nothing to compare with.
    """

    directory: Path
    model: str
    dtype: str
    parameters: int
    files: tuple[str, ...]
    change: float | None


def export(
    model: PreTrainedModel,
    output_dir: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    value_head: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    max_shard_size: str,
    expected: Tensor | None,
) -> Exported:
    """Write a model, and see that it loads again as what it is.

    Args:
        model: what to write; its weights are cast in place.
        output_dir: must not exist, or be empty.
        tokenizer: to go with it.
        value_head: its tensors; none for a model without.
        dtype: of the weights in the files; None leaves them.
        max_shard_size: of a file, such as "5GB".
        expected: `probe_logits` of what the model was made of, if that can be run.

    Raises:
        ModelError: the directory is in use; the model that was loaded again isn't equal to the last bit; or
            its logits are not the expected ones to within half of the digits that its dtype has.
    """
    output_dir = check_output_dir(output_dir)
    for parameter in model.parameters():
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    with _appearing(output_dir) as directory:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        if value_head:
            save_head(value_head, directory)
        logits = _check_reload(model, directory)
        change = None if expected is None else _check_change(model, logits, expected)
    return Exported(
        directory=output_dir,
        model=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        files=tuple(sorted(path.name for path in output_dir.iterdir())),
        change=change,
    )


def check_output_dir(output_dir: str | os.PathLike[str]) -> Path:
    """The directory as a path; ModelError unless it can be made here."""
    directory = Path(output_dir).expanduser()
    if directory.is_dir() and any(directory.iterdir()):
        raise ModelError(f"{directory} holds something already; choose another output_dir, or empty it")
    if directory.exists() and not directory.is_dir():
        raise ModelError(f"{directory} is a file; expected a directory to write to")
    return directory


def find_tokenizer(places: Sequence[tuple[str, dict[str, Any]]]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first place, of (name, `revision` and the like), that has one; as it is."""
    for name, place in places:
        if any(find_file(name, file, **place) for file in _TOKENIZER_FILES):
            with explained("the tokenizer", name):
                return AutoTokenizer.from_pretrained(name, **place)
    return None


@torch.no_grad()
def probe_logits(model: nn.Module) -> Tensor:
    """The logits of a sequence of up to 32 tokens, in float32 or float64, in eval mode."""
    model.eval()
    config: Any = model.config
    text = config.get_text_config()
    length = min(32, getattr(text, "max_position_embeddings", None) or 32)
    ids = [(7 * i + 1) % text.vocab_size for i in range(length)]
    if isinstance(text.eos_token_id, int):
        # Some encoder-decoders score a text at its one end-of-sequence token.
        ids = [
            *(i if i != text.eos_token_id else (i + 1) % text.vocab_size for i in ids[:-1]),
            text.eos_token_id,
        ]
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    both_sides = "decoder_input_ids" in inspect.signature(trunk_of(model).forward).parameters
    inputs = {"decoder_input_ids": input_ids} if both_sides else {}
    logits: Tensor = model(input_ids=input_ids, **inputs).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_reload(model: PreTrainedModel, directory: Path) -> Tensor:
    """Logits of the model that is loaded from the directory: those of `model`, to the last bit."""
    loaded: Any = type(model).from_pretrained(directory, dtype=model.dtype, output_loading_info=True)
    again, info = loaded
    if info["missing_keys"]:
        raise ModelError(
            f"{sorted(info['missing_keys'])[0]!r} was not saved; the model can't be loaded again"
        )
    stored = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        # Some families keep some weights in float32 whatever is asked for.
        parameter.data = parameter.data.to(stored[name].dtype)
        if not torch.equal(stored[name], parameter.to(stored[name].device)):
            raise ModelError(f"{name!r} is not what it was after saving and loading")
    for tensor in (tensor for part in (model, again) for tensor in (*part.parameters(), *part.buffers())):
        # Weights that are mapped from a file begin anywhere, and products of matrices hang on it, by a bit.
        tensor.data = tensor.data.clone()
    logits = probe_logits(again)
    if not torch.equal(logits, probe_logits(model).to(logits.device)):
        raise ModelError("the model that is loaded again gives other logits, from the same weights")
    return logits


def _check_change(model: PreTrainedModel, logits: Tensor, expected: Tensor) -> float:
    expected = expected.to(logits.device, logits.dtype)
    change = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    bound = torch.finfo(model.dtype).eps ** 0.5
    if not change <= bound:
        raise ModelError(
            f"the logits differ by {change:.2g} of the largest from those of what was merged, and rounding "
            f"in {model.dtype} explains {bound:.2g} at most; nothing was written. An adapter on one of two "
            "tied embeddings can't be merged: it would change both"
        )
    return change


@contextmanager
def _appearing(output_dir: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name when the block ends without an error."""
    writing = output_dir.with_name(f".writing-{output_dir.name}")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
        if output_dir.is_dir():
            output_dir.rmdir()
        writing.rename(output_dir)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
