"""`etude eval`: how well a model does on tasks, clean and under noise, perhaps beside another model.

The script behind the command: copy it and change what you like.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from etude.app.arguments import EnvironmentArguments, FixedModelArguments
from etude.app.environment import EnvironmentCode
from etude.app.eval_arguments import EvalTaskArguments, EvaluationArguments
from etude.app.references import load_object
from etude.data.noise import SHIPPED, Noise, Paraphrase, as_noise
from etude.errors import ConfigError
from etude.evaluation.evaluate import Evaluation, evaluate
from etude.evaluation.record import write_evaluation
from etude.models.loading import best_device, holds_encoder_decoder, load_language_model, load_tokenizer
from etude.reporting.terminal import TrainingDisplay
from etude.runtime.run import RunDirectory
from etude.sampling.local import LocalSampler

_FOR_TOOLS = [name for name in SHIPPED if name != "paraphrase"]  # a reply is no request


def run(
    model_arguments: FixedModelArguments,
    tasks: EvalTaskArguments,
    episodes: EnvironmentArguments,
    config: EvaluationArguments,
) -> None:
    """Play, print a table, and leave numbers, episodes and a report in `config.output_dir`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("etude eval runs in one process; start it without accelerate launch")
    directory = _checked(config)
    code = EnvironmentCode.load(episodes)
    rows = tasks.rows()
    noises = {
        "noise": load_noises(config.noise, list(SHIPPED), config.paraphrases),
        "tool_noise": load_noises(config.tool_noise, _FOR_TOOLS),
    }
    models = [model_arguments]
    if config.compare_to is not None:
        other = replace(model_arguments, model_name_or_path=config.compare_to)
        models.append(replace(other, model_revision=config.compare_revision))
    # Both are looked at before the first plays: that may take long.
    tokenizers = [load_tokenizer(**arguments.tokenizer_place) for arguments in models]
    for arguments in models:
        holds_encoder_decoder(arguments.model_name_or_path, **arguments.loading)
    settings = {**asdict(model_arguments), **asdict(tasks), **asdict(episodes), **asdict(config)}
    found: list[Evaluation] = []
    for arguments, tokenizer in zip(models, tokenizers, strict=True):
        found.append(_evaluate(arguments, tokenizer, code, rows, config, noises))
        directory.reset()  # an earlier evaluation, or that of the first model alone
        directory.write_config(settings)
        spelt = tokenizers[: len(found)]
        report = write_evaluation(directory, found, spelt, episodes_to_log=config.episodes_to_log)
    found[0].show(*found[1:])
    print(f"report: {report}")


def load_noises(
    references: Sequence[str] | Mapping[str, str],
    everything: Sequence[str],
    paraphrases: Sequence[str] = (),
) -> dict[str, Noise]:
    """Noises under the names that were given to them, or else as they were written.

    Args:
        references: names of shipped noises, perhaps with arguments, or code references.
        everything: what "all" stands for in a list.
        paraphrases: templates of the noise paraphrase, instead of its own.

    Raises:
        ConfigError: one leads nowhere, is no noise, or is there twice.
    """
    if not isinstance(references, Mapping):
        each = [name for given in references for name in (everything if given == "all" else [given])]
        if repeated := [name for name in each if each.count(name) > 1]:
            raise ConfigError(f"the noise {repeated[0]} is there twice; name it once")
        references = {name: name for name in each}
    return {
        name: Paraphrase(list(paraphrases))
        if reference == "paraphrase" and paraphrases
        else as_noise(_load(reference))
        for name, reference in references.items()
    }


def _load(reference: str) -> Any:
    head, arguments = re.fullmatch(r"(\w*)(.*)", reference, re.DOTALL).groups()  # type: ignore[union-attr]
    if head in SHIPPED and arguments[:1] in ("", "("):
        if arguments and not arguments.endswith(")"):
            raise ConfigError(f"the noise {reference!r} has no closing parenthesis; quote it in a shell")
        try:
            return load_object(f"etude.data.noise:{SHIPPED[head].__name__}{arguments or '()'}")
        except ConfigError as error:
            known = ", ".join(each.name for each in fields(SHIPPED[head]))
            message = str(error).removeprefix("etude.data.noise:")
            raise ConfigError(f"the noise {reference!r}: {message}; its arguments are {known}") from error
    if ":" not in reference:
        raise ConfigError(
            f"there is no noise {reference!r}; expected one of {', '.join(SHIPPED)}, perhaps with arguments "
            "in parentheses, or for your own code file.py:name or package.module:name"
        )
    return load_object(reference)


def _checked(config: EvaluationArguments) -> RunDirectory:
    """Where results go; nothing that is there is touched before there are some."""
    directory = RunDirectory(config.output_dir)
    if directory.read_metrics():
        raise ConfigError(f"{directory.path} holds a training run; choose another output_dir")
    if directory.read_evaluation() and not config.overwrite_output_dir:
        raise ConfigError(
            f"{directory.path} holds an earlier evaluation; choose another output_dir, or replace it with "
            "overwrite_output_dir"
        )
    return directory


def _evaluate(
    arguments: FixedModelArguments,
    tokenizer: Any,
    code: EnvironmentCode,
    rows: Any,
    config: EvaluationArguments,
    noises: dict[str, dict[str, Noise]],
) -> Evaluation:
    """One model's evaluation."""
    name = arguments.model_name_or_path
    model = load_language_model(name, device=best_device(), is_trainable=False, **arguments.loading)
    sampler = LocalSampler(
        model,
        tokenizer,
        slots=config.slots,
        max_length=code.settings.max_length,
        cache_bytes=config.cache_bytes,
        deterministic=config.deterministic,
    )
    conditions = 1 + sum(map(len, noises.values()))
    display = TrainingDisplay(conditions * len(rows) * config.samples, title=Path(name).name)
    display.message(sampler.describe())
    played = 0

    def count(condition: str, _: Any) -> None:
        nonlocal played
        played += 1
        display.title = f"{Path(name).name} {condition}"
        display.update(played, {})

    with display:
        return evaluate(
            code.environment(model, tokenizer, sampler=sampler, seed=config.seed),
            rows,
            **noises,
            samples=config.samples,
            greedy=config.greedy,
            pass_at=config.pass_at,
            distinct=config.distinct,
            success_reward=config.success_reward,
            confidence=config.confidence,
            seed=config.seed,
            columns=config.noise_columns,
            name=name if arguments.model_revision is None else f"{name} ({arguments.model_revision})",
            on_episode=count,
        )
