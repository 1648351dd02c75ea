"""What doesn't go together in a run on data: settings, model, tokenizer, what to evaluate on.

Not covered: the settings of one method, which check themselves (`…Config`); the model and its tokenizer
(`setup.check_fits`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from torch import nn

from etude.errors import ConfigError, EtudeError
from etude.models.positions import position_limit

logger = logging.getLogger(__name__)


def check_origin(args: Any, config_class: type, name: str, processing_class: Any) -> None:
    """Whether the settings are the trainer's own, and where the tokenizer comes from.

    Raises:
        ConfigError: they aren't, or there is no telling.
    """
    if not isinstance(args, config_class):
        raise ConfigError(f"args are of {type(args).__name__}; expected {config_class.__name__}")
    if processing_class is None and not name:
        raise ConfigError("the model doesn't say where it came from; pass its tokenizer as processing_class")


def check_trackers(names: Sequence[str]) -> None:
    """Whether transformers knows these trackers and they are installed.

    Raises:
        ConfigError: one isn't.
    """
    if not names:
        return
    from transformers.integrations import integration_utils as known  # here, as few runs need it

    for name in names:
        if name not in known.INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"report_to names {name!r}; expected none, all, or some of "
                f"{', '.join(known.INTEGRATION_TO_CALLBACK)}"
            )
        if name not in (*known.get_available_reporting_integrations(), "flyte"):
            raise ConfigError(
                f"report_to names {name!r}, which isn't installed; install it, or leave report_to out: the "
                "run directory has metrics and a report without a tracker"
            )


def check_evaluation(args: Any, eval_dataset: Any) -> None:
    """Whether there is something to evaluate on, and one measure of what is best.

    Raises:
        ConfigError: there isn't.
    """
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if eval_dataset is None and strategy != "no":
        raise ConfigError(
            f"eval_strategy is {strategy}, and there is nothing to evaluate on; give an eval_dataset, or set "
            "eval_strategy to no"
        )
    if not isinstance(eval_dataset, Mapping) or not args.load_best_model_at_end:
        return
    metric = args.metric_for_best_model.removeprefix("eval_")
    if not any(metric.startswith(f"{name}_") for name in eval_dataset):
        raise ConfigError(
            f"metric_for_best_model is {metric!r}, and eval_dataset is several: say which one counts, as in "
            f"{f'{next(iter(eval_dataset))}_loss'!r}"
        )


@contextmanager
def settings_explained() -> Iterator[None]:
    """What transformers says of settings when it builds from them, as our errors.

    These are packages that aren't installed, values out of range, an `output_dir` that can't be made, and the
    hub, where `push_to_hub` makes a repository before training begins.
    """
    try:
        yield
    except EtudeError:
        raise
    except (HfHubHTTPError, LocalTokenNotFoundError, ConnectionError) as error:
        raise ConfigError(
            f"push_to_hub can't make the model's repository on the hub: {error} Leave push_to_hub out to "
            "train without it, and upload the directory later"
        ) from error
    except OSError as error:
        raise ConfigError(f"output_dir can't be made: {error}") from error
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error


def within_positions(args: Any, model: nn.Module) -> Any:
    """The settings with a `max_length` that the model can read, which is said where it is another one."""
    limit = position_limit(model)
    if limit is None or (args.max_length is not None and args.max_length <= limit):
        return args
    logger.warning("the model has %d positions: max_length is that, not %s", limit, args.max_length)
    args = copy(args)
    args.max_length = limit
    return args
