"""Where checkpoints are: directories and the hub, and what to say where nothing is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers.utils import cached_file

from etude.errors import ModelError

# The options that say where a checkpoint's files are, as every loader of the ecosystem spells them.
HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


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
