"""What `transformers.Trainer` does, in a run directory and on the terminal: configuration, metrics, report.

The directory is the one that the online trainers write (`runtime.run`), so that one report serves all of
training. Checkpoints stay transformers' own. Ctrl-C ends training with a checkpoint after the running step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from etude.errors import CheckpointError
from etude.reporting.report import write_report
from etude.reporting.terminal import TrainingDisplay
from etude.runtime.run import RunDirectory
from etude.trainers.interrupt import interrupt_after

# Metric → its name on the terminal.
FIELDS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "mean_token_accuracy": "token accuracy",
    "rewards/margins": "margin",
    "rewards/accuracies": "pairs right",
    "validation/loss": "validation loss",
    "validation/accuracy": "validation accuracy",
    "validation/rewards/accuracies": "validation pairs right",
}
TWIN = "validation/"  # the report draws validation/loss into the plot of loss
_ABOUT_THE_RUN = ("epoch", "total_flos", "train_", "num_input_tokens_seen")
_ABOUT_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class RunRecorder(TrainerCallback):
    """Keeps the run directory of `args.output_dir`, on the main process.

    Args:
        method: what is being trained, on the terminal.

    Raises:
        CheckpointError: as training begins, where the directory holds a run of another kind.
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self._interrupts: list[int] = []
        self._display: TrainingDisplay | None = None
        self._started = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While training goes on: Ctrl-C waits for a checkpoint, and the display ends with the block."""
        try:
            with interrupt_after() as self._interrupts:
                yield
        finally:
            if self._display is not None:
                self._display.__exit__(None, None, None)
                self._display = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        run = RunDirectory(args.output_dir)
        if run.read_episodes(limit=1):
            raise CheckpointError(
                f"{run.path} holds a run that played episodes; choose another output_dir for this one"
            )
        run.truncate_rows(state.global_step or -1)  # one history: what follows is written anew
        run.write_config(args.to_dict())
        self._started = time.monotonic()
        title = f"{self.method} {run.path.resolve().name}"
        enabled = not args.disable_tqdm
        self._display = TrainingDisplay(state.max_steps, title, fields=FIELDS, enabled=enabled)
        self._display.__enter__()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._interrupts:
            control.should_save = control.should_training_stop = True
            if args.save_strategy == SaveStrategy.BEST:  # an evaluation would decide whether to save
                control.should_evaluate = False
        self._log_where_saved(control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log_where_saved(control)

    def _log_where_saved(self, control: TrainerControl) -> None:
        """A row is a mean since the last one, and who resumes has none of the steps before the checkpoint."""
        if control.should_save or control.should_evaluate:  # which may find that it is the best so far
            control.should_log = True

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        metrics = {_curve(name): value for name, value in (logs or {}).items() if is_curve(name, value)}
        if not metrics or not state.is_world_process_zero:
            return
        run = RunDirectory(args.output_dir)
        run.append_metrics(state.global_step, metrics)
        if state.global_step == 0 and (results := evaluated_at(state, 0)):
            run.update_summary({"before": results})
        if self._display is not None:
            self._display.update(state.global_step, metrics)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            write_report(args.output_dir)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        run = RunDirectory(args.output_dir)
        values: dict[str, Any] = {"seed": args.seed, "seconds": time.monotonic() - self._started}
        goes_back = args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = state.best_global_step if goes_back else last_evaluated(state)
        if step:
            values["after"] = evaluated_at(state, step)
        run.update_summary(values)
        write_report(run.path)


def evaluated_at(state: TrainerState, step: int) -> dict[str, float]:
    """What was measured at a step, on all of the evaluation sets."""
    return {
        _curve(name).removeprefix(TWIN): value
        for entry in state.log_history
        for name, value in entry.items()
        if entry["step"] == step and name.startswith("eval_") and is_curve(name, value)
    }


def last_evaluated(state: TrainerState) -> int | None:
    """The step of the last evaluation; None before the first."""
    steps = [int(entry["step"]) for entry in state.log_history if any(n.startswith("eval_") for n in entry)]
    return max(steps, default=None)


def is_curve(name: str, value: Any) -> bool:
    """Whether a number that transformers logs is about learning, not about the run or its speed."""
    about_else = name.startswith(_ABOUT_THE_RUN) or name.endswith(_ABOUT_SPEED)
    return isinstance(value, int | float) and not about_else


def _curve(name: str) -> str:
    """transformers' name of a metric as the report's."""
    return f"{TWIN}{name.removeprefix('eval_')}" if name.startswith("eval_") else name
