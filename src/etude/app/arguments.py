"""What a command needs besides a trainer's configuration: model, data, environment, the run itself.

Plain dataclasses that import nothing heavy: the command line checks them before torch is loaded. The `help`
of each field is what it shows.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from etude.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig


def default_of(setting: Field[Any]) -> Any:
    """What a field is where nobody says; `MISSING` for one that must be given."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


@dataclass
class FixedModelArguments:
    """A model that stays as it is, and its tokenizer."""

    model_name_or_path: str = field(metadata={"help": "directory or hub id of the model"})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "directory or hub id of the tokenizer; the model's by default"}
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64", "auto"] = field(
        default="float32", metadata={"help": "of the weights; auto: as the checkpoint has them"}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the model on the hub"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the model; pin model_revision if you do"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention, as transformers names it: sdpa, eager, …"}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "keep the weights in 4 bits (NF4, as in QLoRA), by bitsandbytes; dtype computes"},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "keep the weights in 8 bits, by bitsandbytes"}
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit are two ways to keep weights; give one of them")
        if self.quantized and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{self.quantized} needs bitsandbytes, which isn't installed; install etude[quantization]"
            )

    @property
    def quantized(self) -> str | None:
        """The option that asks for fewer bits, if one does."""
        return next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name)), None)

    @property
    def tokenizer_place(self) -> dict[str, Any]:
        """Keywords of `load_tokenizer`. The revision is the model's and says nothing about another place."""
        return {
            "name_or_path": self.tokenizer_name or self.model_name_or_path,
            "trust_remote_code": self.trust_remote_code,
            "revision": self.model_revision if self.tokenizer_name is None else None,
        }

    @property
    def loading(self) -> dict[str, Any]:
        """Keywords of `load_causal_lm` and of the value-head model, besides the name and the adapter."""
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "revision": self.model_revision,
            "attn_implementation": self.attn_implementation,
        }
        if self.quantized:
            from etude.models.adapters import quantization_config  # loads torch

            options["quantization_config"] = quantization_config(bits=4 if self.load_in_4bit else 8)
        return options

    def peft_config(self) -> LoraConfig | None:
        """The fresh adapter that is asked for, if one is."""
        return None


@dataclass
class ModelArguments(FixedModelArguments):
    """A model to train, and its tokenizer."""

    use_peft: bool = field(
        default=False, metadata={"help": "train a LoRA adapter and leave the model's own weights as they are"}
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: float = field(
        default=32.0, metadata={"help": "the adapter's update is scaled by lora_alpha / lora_r"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout of what enters the adapter"})
    lora_target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "layers that get an adapter: names or a pattern; by default all linear ones but the head"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantized and not self.use_peft:
            raise ConfigError(
                f"weights of few bits can't be trained themselves; with {self.quantized} set use_peft, too"
            )
        for setting in fields(self):
            is_set = getattr(self, setting.name) != setting.default
            if setting.name.startswith("lora_") and is_set and not self.use_peft:
                raise ConfigError(f"{setting.name} does nothing without use_peft; set use_peft too")
        if self.lora_r < 1:
            raise ConfigError(f"lora_r is {self.lora_r}; expected at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}; expected 0 <= lora_dropout < 1")

    def peft_config(self) -> LoraConfig | None:
        """The fresh adapter that is asked for, if one is."""
        from etude.models.adapters import lora_config  # loads torch

        if not self.use_peft:
            return None
        return lora_config(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_target_modules)


@dataclass
class ActorCriticArguments(ModelArguments):
    """The same where values are learned, too."""

    value_model: str | None = field(
        default=None,
        metadata={
            "help": "directory or hub id of a value model beside the policy: a language model, or a reward "
            "model to start from; by default a value head on the policy's trunk"
        },
    )


@dataclass
class DataArguments:
    """Where the rows are: files, folders, or data sets of the hub."""

    train_dataset: str = field(metadata={"help": "file, folder or hub id of the training rows"})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "file, folder or hub id of the validation rows"}
    )
    train_split: str | None = field(
        default=None, metadata={"help": "split of train_dataset, if it has several"}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "split of eval_dataset, if it has several"}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of the hub's data sets, such as gsm8k's main"}
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            part = setting.name.removesuffix("_split")
            if part != setting.name and getattr(self, setting.name) and not getattr(self, f"{part}_dataset"):
                raise ConfigError(f"{setting.name} does nothing without {part}_dataset; set that too")

    def rows(self, part: str) -> Dataset | None:
        """The rows of "train", "eval" or "test"; None where none are named.

        Raises:
            DataError: they can't be found or read.
        """
        from etude.data.files import load_rows  # loads the data set library

        place = getattr(self, f"{part}_dataset")
        if place is None:
            return None
        return load_rows(place, split=getattr(self, f"{part}_split"), name=self.dataset_config)


@dataclass
class TaskArguments(DataArguments):
    """The same for tasks that a model plays, some of them held out."""

    train_dataset: str | None = field(  # type: ignore[assignment]  # one of several environments can do without
        default=None, metadata={"help": "file, folder or hub id of the training rows"}
    )
    test_dataset: str | None = field(
        default=None, metadata={"help": "file, folder or hub id of held-out rows: played before and after"}
    )
    test_split: str | None = field(
        default=None, metadata={"help": "split of test_dataset, if it has several"}
    )


# Environments that ship, by their short names.
ENVIRONMENTS = {
    "text": "etude.environments.text:TextEnvironment",
    "chat": "etude.environments.chat:ChatEnvironment",
    "generation": "etude.environments.generation:GenerationEnvironment",
    "translation": "etude.environments.translation:TranslationEnvironment",
    "summarization": "etude.environments.summarization:SummarizationEnvironment",
}
_UNSCORED = ("text", "chat", "generation")  # they have no rewards of their own


@dataclass
class EnvironmentArguments:
    """The environment: its tools, rewards and limits, as `TextEnvironment` names them.

    Code is named by reference, see `references`.
    """

    environment: str = field(
        default="text",
        metadata={
            "help": f"what the model plays in: {', '.join(ENVIRONMENTS)}, or the code reference of your own "
            "class"
        },
    )
    environment_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "what it takes besides the options here, such as {source: en, target: de}"},
    )
    tools: list[str] = field(
        default_factory=list,
        metadata={"help": "code references of the tools, such as examples/tools.py:search or calculator"},
    )
    reward: str | list[str] = field(
        default_factory=list,
        metadata={"help": "code references of rewards, f(prompts, completions, **columns)"},
    )
    reward_fn: str | None = field(
        default=None,
        metadata={"help": "code reference of a reward in TRL's form, f(last_segments, **columns)"},
    )
    reward_adapter: str | None = field(
        default=None,
        metadata={
            "help": "directory or hub id of a reward model that is a LoRA adapter on the policy's own base; "
            "the policy has an adapter then, too (use_peft)"
        },
    )
    reward_model: str | list[str] = field(
        default_factory=list,
        metadata={
            "help": "directories or hub ids of reward models and process reward models, whole or LoRA "
            "adapters, that score episodes with weights of their own"
        },
    )
    prompt: str | None = field(default=None, metadata={"help": "text put before each task"})
    prompt_file: str | None = field(default=None, metadata={"help": "the same, read from a file"})
    max_turns: int | None = field(
        default=None,
        metadata={"help": "turns of the model per episode at most; by default the environment's own, 4"},
    )
    max_tool_response: int | None = field(
        default=100, metadata={"help": "characters of a tool's answer that the model is shown; none: all"}
    )
    max_tool_response_tokens: int | None = field(default=None, metadata={"help": "the same limit in tokens"})
    max_tool_calls: int | None = field(default=None, metadata={"help": "tool calls per episode at most"})
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of an episode at most; the model's own limit by default"}
    )
    tool_timeout: float | None = field(
        default=None, metadata={"help": "seconds that a tool may take; by default the environment's own, 10"}
    )
    generation: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "how to sample a turn: max_new_tokens, temperature, top_k, top_p, …"},
    )

    def __post_init__(self) -> None:
        scored = any((self.reward, self.reward_fn, self.reward_adapter, self.reward_model))
        if not scored and self.environment in _UNSCORED:
            raise ConfigError(
                "an episode needs a score; name code that gives one with reward or reward_fn, or a "
                "reward_model or reward_adapter"
            )
        if self.prompt is not None and self.prompt_file is not None:
            raise ConfigError("prompt and prompt_file are two ways to say the same; give one of them")

    @property
    def rewards(self) -> list[str]:
        return [self.reward] if isinstance(self.reward, str) else self.reward

    @property
    def reward_models(self) -> list[str]:
        return [self.reward_model] if isinstance(self.reward_model, str) else self.reward_model

    def prompt_text(self) -> str | None:
        """The prompt itself, or what its file holds, to the character.

        Raises:
            ConfigError: the file can't be read.
        """
        if self.prompt_file is None:
            return self.prompt
        try:
            return Path(self.prompt_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompt_file can't be read ({error}); expected text in UTF-8") from error


@dataclass
class RunArguments:
    """How the run starts."""

    resume_from_checkpoint: bool | str | None = field(
        default=None,
        metadata={"help": "go on from the newest checkpoint in output_dir (true), or from the one at a path"},
    )
