"""`etude merge`: adapters into their base model, or several models into their average.

The script behind the command: copy it and change what you like.
"""

from __future__ import annotations

from pathlib import Path

from etude.app.merge_arguments import MergeArguments
from etude.errors import ConfigError
from etude.models.averaging import average_models
from etude.models.export import Exported
from etude.models.merging import holds_adapter, merge_adapters
from etude.runtime.model_card import write_model_card

_OF_ADAPTERS = ("combination", "density", "base_model", "trust_remote_code")


def run(arguments: MergeArguments) -> None:
    """Write the model, with a card, and say how it was checked."""
    places = arguments.places
    adapters = [place for place in places if holds_adapter(place)]
    if adapters and len(adapters) < len(places):
        other = next(place for place in places if place not in adapters)
        raise ConfigError(
            f"{adapters[0]!r} holds an adapter and {other!r} doesn't; merge adapters first, then average"
        )
    exported = _merge(arguments) if adapters or len(places) == 1 else _average(arguments)
    _write_card(arguments, exported, "Merged" if adapters else "Averaged")
    print(
        f"model: {exported.directory} ({exported.model}, {exported.parameters:,} weights, {exported.dtype})"
    )
    print("loaded again: the same weights and logits, to the last bit")
    if exported.change is not None:
        print(f"against base and adapter: logits differ by {exported.change:.1e} of the largest at most")


def _merge(arguments: MergeArguments) -> Exported:
    return merge_adapters(
        arguments.places,
        arguments.output_dir,
        weights=arguments.weights,
        combination=arguments.combination,
        density=arguments.density,
        base_model=arguments.base_model,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        trust_remote_code=arguments.trust_remote_code,
    )


def _average(arguments: MergeArguments) -> Exported:
    for name in _OF_ADAPTERS:
        if getattr(arguments, name) != getattr(MergeArguments, name):
            raise ConfigError(f"{name} is about adapters and does nothing for full models; leave it out")
    return average_models(
        arguments.places,
        arguments.output_dir,
        weights=arguments.weights,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
    )


def _write_card(arguments: MergeArguments, exported: Exported, made: str) -> None:
    names = [Path(place).name for place in arguments.places]  # no path of this machine's
    settings = {
        "sources": ", ".join(names),
        "weights": arguments.weights,
        "combination": arguments.combination if len(names) > 1 and made == "Merged" else None,
        "density": arguments.density,
        "dtype": exported.dtype,
        "largest change of a logit": None if exported.change is None else f"{exported.change:.1e}",
    }
    write_model_card(
        exported.directory,
        model_name=exported.directory.name,
        trainer="etude merge",
        method="merge",
        base_model=arguments.base_model or arguments.places[0],
        config_summary={name: value for name, value in settings.items() if value is not None},
        made=made,
    )
