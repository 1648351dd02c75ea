"""Training on data, whatever the loss: what SFT, reward models and preferences have in common.

`transformers.Trainer` does the loop, the optimizer, checkpoints and trackers. Added here: a loss that is a
mean over the items of a whole optimizer step, whoever computes them; metrics that are means over whatever was
computed since the last log, or over a whole evaluation; the model card.

A trainer is three functions:

    tokenize(rows)          → the dataset that is trained on
    collate(rows)           → a batch; "labels" has one entry for each item that the loss is a mean over
    losses(model, batch)    → the sum of the losses of its items, and metrics as sums and counts

Not covered: data that streams, several devices in one process without a launcher.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from etude.data.files import Rows
from etude.errors import ConfigError
from etude.models.adapters import add_adapter
from etude.models.loading import load_chat_template, load_language_model
from etude.models.onednn import onednn_linears
from etude.models.tied import quiet_about_tied
from etude.models.wrappers import trunk_of
from etude.runtime.model_card import write_model_card
from etude.runtime.processes import leave_group
from etude.runtime.run import RunDirectory
from etude.trainers.best import BestSoFar
from etude.trainers.data_checks import check_evaluation, check_origin, settings_explained, within_positions
from etude.trainers.data_config import DataConfig
from etude.trainers.each_row_once import EachRowOnce
from etude.trainers.means import Means, Sums
from etude.trainers.resuming import check_weights, checkpoint_to_resume
from etude.trainers.run_recorder import RunRecorder
from etude.trainers.setup import check_fits, check_precision, disable_dropout

Model = PreTrainedModel | PeftModel

_ON_THE_CARD = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "max_length", "seed",
)  # fmt: skip


class DataTrainer(EachRowOnce):
    """Base of the trainers on data.

    Args:
        model: a model, or the name or path of one.
        args: settings; by default those of the class, for a run in `<model>-<method>`.
        train_dataset: anything `load_rows` takes: a file, a folder, a hub id, a list, a `Dataset`.
        eval_dataset: the same, or a dict of several by name.
        processing_class: the tokenizer; default: the model's own.
        compute_metrics, callbacks, optimizers, preprocess_logits_for_metrics: as in `transformers.Trainer`.
        peft_config: train an adapter of this kind, not the model itself.

    Raises:
        DataError: a dataset can't be read, has the wrong columns, or leaves nothing to learn.
        ModelError: the model doesn't fit the tokenizer or isn't of a kind that this trains.
        ConfigError: `args` are another trainer's, or contradict each other.
    """

    method: ClassVar[str]  # as in `etude METHOD`
    config_class: ClassVar[type[DataConfig]]
    on_the_card: ClassVar[tuple[str, ...]] = ()  # settings of its own that the model card names

    args: Any  # of `config_class`
    loss_is_scaled_for_ga = True  # over the whole optimizer step, in `compute_loss`

    def __init__(
        self,
        model: str | Model,
        args: DataConfig | None = None,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        name = model if isinstance(model, str) else str(trunk_of(model).config.name_or_path or "")
        if args is None:
            args = self.config_class(output_dir=f"{Path(name).name or 'model'}-{self.method}")
        check_origin(args, self.config_class, name, processing_class)
        check_evaluation(args, eval_dataset)
        self.base_model_name = name
        self.tokenizer = AutoTokenizer.from_pretrained(name) if processing_class is None else processing_class
        if args.chat_template_path is not None:
            self.tokenizer.chat_template = load_chat_template(args.chat_template_path)
        set_seed(args.seed)  # before a head or an adapter draws its weights
        model = self._prepared(model, args, peft_config)
        check_precision([p for p in model.parameters() if p.requires_grad], optimizers[0], "bf16=True")
        args = within_positions(args, trunk_of(model))
        self.args = args  # which tokenising reads
        self.prepare(model)
        evaluated: Any = eval_dataset
        if isinstance(eval_dataset, Mapping):
            evaluated = {key: self.tokenize(rows) for key, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            evaluated = self.tokenize(eval_dataset)
        trained = None if train_dataset is None else self.tokenize_for_training(train_dataset)
        with settings_explained():
            super().__init__(
                model=model,
                args=args,
                data_collator=self.collate,
                train_dataset=trained,
                eval_dataset=evaluated,
                processing_class=self.tokenizer,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        if args.n_gpu > 1:
            raise ConfigError(
                f"this process sees {args.n_gpu} GPUs; start one process for each by `accelerate launch`, or "
                "hide all but one (CUDA_VISIBLE_DEVICES)"
            )
        self.label_smoother = None  # the loss is ours
        for shown in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown)
        self.recorder = RunRecorder(self.method)
        self.add_callback(self.recorder)
        if args.load_best_model_at_end:
            self.add_callback(BestSoFar(args.early_stopping_patience))
        self._means = {"train": Means(), "eval": Means()}
        self._found_a_run = bool(RunDirectory(str(args.output_dir)).read_metrics())

    # ---- what a trainer is ----

    @abstractmethod
    def tokenize(self, rows: Rows) -> Any:
        """The dataset that `collate` takes rows of."""

    def tokenize_for_training(self, rows: Rows) -> Any:
        """The same for the rows that are trained on."""
        return self.tokenize(rows)

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """A batch; "labels" has one entry, not -100, for each item that the loss is a mean over."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Sums]:
        """The sum of the items' losses, and metrics. `model` is what is to be called, in its wrappers."""

    def load_model(self, name: str, **options: Any) -> Model:
        return load_language_model(name, **options)

    def adopt(self, model: Any) -> Model:
        """What is trained, made of a model that is loaded already."""
        return model

    def add_adapter_to(self, model: Model, peft_config: PeftConfig) -> Model:
        return add_adapter(model, peft_config)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of the metrics' means."""
        return means

    def prepare(self, model: Model) -> None:
        """Look at the model before data is tokenised and anything is wrapped."""

    # ---- what transformers' loop calls ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any
    ) -> TrainOutput:
        """As transformers'. Ctrl-C ends it after the step that runs, with a checkpoint.

        Raises:
            CheckpointError: there is none to go on from, or it isn't this model's.
            ConfigError: `output_dir` holds an earlier run, and `overwrite_output_dir` isn't set.
            KeyboardInterrupt: after that checkpoint.
        """
        assert isinstance(self.model, nn.Module)
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        if checkpoint is not None:
            check_weights(checkpoint, self.model)
        elif self._found_a_run:
            self._start_anew()
        with self.recorder.watching(), quiet_about_tied(trunk_of(self.model)):
            return super().train(checkpoint, *args, **options)

    def _start_anew(self) -> None:
        run = RunDirectory(str(self.args.output_dir))
        if run.is_taken(self.args.overwrite_output_dir) and self.is_world_process_zero():
            run.reset()
        self._found_a_run = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with settings_explained():
            return super().create_optimizer(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The batches of an optimizer step, and the number of their items over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        items = torch.tensor(sum(_items(batch) for batch in batches), device=device)
        return batches, self.accelerator.reduce(items, "sum")

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        with onednn_linears(model):
            return super().training_step(model, *args, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch as its part of the mean over the whole optimizer step."""
        items = _items(inputs)
        total, sums = self.losses(model, inputs)
        if model.training:
            self._means["train"].add(sums)
        else:
            self._means["eval"].add({"loss": (total.detach(), items), **sums})
        if num_items_in_batch is None:
            loss = total / max(items, 1)
        else:  # gradients are averaged over processes
            loss = total * self.accelerator.num_processes / max(int(num_items_in_batch), 1)
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of a batch, and predictions and labels where `compute_metrics` needs them."""
        batch, counts = self.own_batch(inputs)
        if counts:
            loss = self.compute_loss(model, batch)
        else:
            total, sums = self.losses(model, batch)
            self._means["eval"].add({"loss": (0, 0), **dict.fromkeys(sums, (0, 0))})
            loss = 0 * total
        if prediction_loss_only:
            return loss, None, None
        whole: Any = self._prepare_inputs(self.collate(inputs["rows"].rows))
        return (loss, *self.predictions(model, whole))

    def predictions(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """What `compute_metrics` is given of a batch: predictions and labels."""
        raise ConfigError(f"{type(self).__name__} computes its own metrics; leave compute_metrics out")

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """As transformers', with a loss and metrics that are means over all items of the dataset."""
        self._means["eval"] = Means()
        prefix = options.get("metric_key_prefix", "eval")
        output = super().evaluation_loop(*args, **options)
        if output.metrics is not None:
            means = self.summary(self._means["eval"].take(self.accelerator))
            output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        self._unprepare()
        return output

    def _unprepare(self) -> None:
        """After an evaluation before training, let the model be prepared again.

        accelerate takes a model that it has prepared for evaluation for one that is ready to train: several
        processes would never average their gradients.
        """
        kinds = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.model_wrapped is self.model and self.accelerator.distributed_type in kinds:
            model: Any = self.model
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            self.accelerator._models.clear()
            model._is_accelerate_prepared = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with a training loss the means of the metrics since the last one."""
        if "loss" in logs:
            logs = {**logs, **self.summary(self._means["train"].take(self.accelerator))}
        super().log(logs, start_time)

    # ---- what is left behind ----

    def end_training(self) -> None:
        """Wait for the other processes, finish the trackers and leave the group: a script's last call."""
        self.model_wrapped = self.accelerator.unwrap_model(self.model_wrapped)
        leave_group(self.accelerator)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, the tokenizer and a model card."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self._write_card(output_dir or str(self.args.output_dir))

    def create_model_card(  # type: ignore[override]  # without the arguments that the card has no place for
        self,
        *,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tags: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        license: str | None = None,
        language: str | None = None,
    ) -> None:
        """Write the model card of `args.output_dir`, as `push_to_hub` does, which passes its arguments on."""
        if self.is_world_process_zero():
            self._write_card(
                str(self.args.output_dir),
                model_name,
                finetuned_from,
                tags=_as_list(tags),
                datasets=_as_list(dataset_tags),
                license=license,
                language=language,
            )

    def _write_card(
        self, directory: str, model_name: str | None = None, base_model: str | None = None, **more: Any
    ) -> None:
        write_model_card(
            directory,
            model_name=model_name or Path(self.args.hub_model_id or str(self.args.output_dir)).resolve().name,
            trainer=type(self).__name__,
            method=self.method,
            base_model=base_model or self.base_model_name,
            config_summary=self._settings_on_the_card(),
            library_name="peft" if hasattr(self.model, "peft_config") else "transformers",
            **more,
        )

    def _settings_on_the_card(self) -> dict[str, Any]:
        unused = "num_train_epochs" if self.args.max_steps > 0 else "max_steps"
        values = {n: getattr(self.args, n) for n in (*_ON_THE_CARD, *self.on_the_card) if n != unused}
        return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}

    # ---- before it begins ----

    def _prepared(self, model: str | Model, args: DataConfig, peft_config: PeftConfig | None) -> Model:
        if isinstance(model, str):
            model = self.load_model(model, **(args.model_init_kwargs or {}))
        elif args.model_init_kwargs:
            raise ConfigError("model_init_kwargs are for a model given by name; this one is already loaded")
        else:
            model = self.adopt(model)
        check_fits(model, self.tokenizer)
        if args.disable_dropout:
            disable_dropout(model)
        if peft_config is None:
            return model
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "the model already has an adapter; leave peft_config (use_peft) out to go on training it"
            )
        return self.add_adapter_to(model, peft_config)


def _items(batch: Mapping[str, Any]) -> int:
    return int((batch["labels"] != -100).sum())


def _as_list(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
