"""A value head, and what language models with one have in common: construction, loading, saving, forward.

A saved model is a plain transformers checkpoint (or PEFT adapter) that anything can load, with
`value_head.safetensors` beside it; TRL 0.7.4's own checkpoints, with the head inside the trunk's file, are
read too. Not covered: which kinds of models there are (`value_head`), and the trainers' forward
(log-probabilities without whole logits), which is a module of its own.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import CommitInfo, HfApi
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from etude.errors import ModelError
from etude.models.adapters import add_adapter
from etude.models.encoder_decoder import is_encoder_decoder
from etude.models.head_files import load_head, save_head
from etude.models.loading import holds_encoder_decoder, load_language_model
from etude.models.places import HUB_OPTIONS, explained, locate
from etude.models.reward_adapter import DEFAULT_NAME, RewardAdapter, policy_adapters
from etude.models.wrappers import trunk_of


class ValueHead(nn.Module):
    """One value per token: dropout, then a linear map from the hidden state.

    Args:
        hidden_size: of what enters it.
        summary_dropout_prob: of the dropout.
    """

    def __init__(self, hidden_size: int, *, summary_dropout_prob: float = 0.1) -> None:
        super().__init__()
        self.dropout = nn.Dropout(summary_dropout_prob) if summary_dropout_prob else nn.Identity()
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Values [B, T, 1] in float32 (or float64), computed in the head's own dtype, under autocast too."""
        weight = self.summary.weight
        with torch.autocast(weight.device.type, enabled=False):
            hidden_BTD = self.dropout(hidden_BTD).to(weight.device, weight.dtype)
            return _at_least_float32(self.summary(hidden_BTD))


class ModelWithValueHead(nn.Module, ABC):
    """A language model, `pretrained_model`, and a value head, `v_head`, on its last hidden states.

    It starts in the mode (train or eval) that the model is in.

    Args:
        pretrained_model: a transformers model with a language-model head, or a `PeftModel` around one.
        summary_dropout_prob: dropout before the head; None takes the configuration's value, else 0.1.
        v_head_init_strategy: None leaves `nn.Linear`'s initialisation; "normal" draws the weight from
            N(0, v_head_initializer_range²) and zeroes the bias.
        v_head_initializer_range: the standard deviation for "normal".

    Raises:
        ModelError: the model has no language-model head, is of the other kind, has prompt-learning adapters
            (their virtual tokens have no place among the values), or is partly offloaded.
    """

    is_encoder_decoder: ClassVar[bool]
    other_kind: ClassVar[str]  # what to say of a model that isn't of this kind

    def __init__(
        self,
        pretrained_model: PreTrainedModel | PeftModel,
        *,
        summary_dropout_prob: float | None = None,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: str | None = None,
    ) -> None:
        super().__init__()
        self._check_can_carry_values(pretrained_model)
        self.pretrained_model = pretrained_model
        self.reward_adapter: RewardAdapter | None = None
        lm_head = self._lm_head()
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(self.config, "summary_dropout_prob", 0.1)
        self.v_head = ValueHead(self._width(), summary_dropout_prob=summary_dropout_prob)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.v_head.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.v_head.summary.bias)
        elif v_head_init_strategy is not None:
            raise ModelError(f"v_head_init_strategy is {v_head_init_strategy!r}; expected None or 'normal'")
        # A critic in half precision can't take small steps: the head stays in float32 on a bfloat16 trunk.
        dtype = torch.float64 if lm_head.weight.dtype == torch.float64 else torch.float32
        self.v_head.to(lm_head.weight.device, dtype)
        self.train(pretrained_model.training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | PreTrainedModel | PeftModel,
        *,
        peft_config: PeftConfig | None = None,
        is_trainable: bool = True,
        summary_dropout_prob: float | None = None,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: str | None = None,
        reward_adapter: str | os.PathLike[str] | None = None,
        reward_adapter_name: str = DEFAULT_NAME,
        **options: Any,
    ) -> Self:
        """Wrap a model, or load one from a directory or hub id together with its value head, if it has one.

        Args:
            pretrained_model_name_or_path: a checkpoint, a LoRA adapter, a value-head checkpoint of ours or of
                TRL 0.7.4; or a model that is loaded already.
            peft_config: put a fresh adapter on the model.
            is_trainable: False freezes all parameters, a loaded adapter and the head included.
            summary_dropout_prob, v_head_initializer_range, v_head_init_strategy: see the class.
            reward_adapter: directory or hub id of a LoRA adapter that peft saved for sequence classification:
                a reward model on the same base, see `compute_reward_score`. The model needs adapters itself.
            reward_adapter_name: what that adapter is called on this model.
            options: see `load_causal_lm`. `dtype` (or its old name `torch_dtype`) is float32 unless given.

        Raises:
            ModelError: the model can't be found or can't carry a head, or an option is unknown.
        """
        head_options: dict[str, Any] = {
            "summary_dropout_prob": summary_dropout_prob,
            "v_head_initializer_range": v_head_initializer_range,
            "v_head_init_strategy": v_head_init_strategy,
        }
        source = pretrained_model_name_or_path
        if isinstance(source, (PreTrainedModel, PeftModel)):
            unused = sorted(key for key, value in options.items() if value)
            if unused:
                raise ModelError(
                    f"{', '.join(unused)}: no option for a model that is loaded already; give it where the "
                    "model is loaded, or pass a directory or hub id here"
                )
            trunk = source if peft_config is None else add_adapter(source, peft_config)
            model = cls(trunk, **head_options)
        elif isinstance(source, (str, os.PathLike)):
            options = _with_dtype(options)
            if holds_encoder_decoder(source, **options) != cls.is_encoder_decoder:
                raise ModelError(f"{os.fspath(source)!r} {cls.other_kind}")
            trunk = load_language_model(source, peft_config=peft_config, is_trainable=is_trainable, **options)
            model = cls(trunk, **head_options)
            name = locate(source, "a model")
            place = {key: options[key] for key in HUB_OPTIONS if key in options}
            with explained("the value head", name):
                load_head(model.v_head, name, place)
        else:
            raise ModelError(
                f"from_pretrained got a {type(source).__name__}; expected a directory, a hub id, a "
                "transformers model or a PeftModel"
            )
        if reward_adapter is not None:
            place = {key: options[key] for key in ("cache_dir", "token") if key in options}
            model.reward_adapter = RewardAdapter.load(model, reward_adapter, reward_adapter_name, **place)
        return model if is_trainable else model.requires_grad_(False)

    def add_and_load_reward_modeling_adapter(
        self,
        adapter_model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT_NAME,
        token: str | bool | None = None,
    ) -> None:
        """What `from_pretrained` does with `reward_adapter`, afterwards."""
        place = {} if token is None else {"token": token}
        self.reward_adapter = RewardAdapter.load(self, adapter_model_id, adapter_name, **place)

    def compute_reward_score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        ppo_adapter_name: str = "default",
        **kwargs: Any,
    ) -> Tensor:
        """The reward adapter's scores [B, T, L] of L labels after each token, without gradient.

        The text's score is that of its last token. Afterwards the adapters that were active are active
        again, and whatever was trainable is.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for tokens and 0 for padding.
            ppo_adapter_name: taken for compatibility.
            kwargs: for the decoder's forward.

        Raises:
            ModelError: the model has no reward adapter.
        """
        if self.reward_adapter is None:
            raise ModelError("the model has no reward adapter; load it with reward_adapter=, a place of one")
        return self.reward_adapter.scores(input_ids, attention_mask, **kwargs)

    @property
    def is_peft_model(self) -> bool:
        """Whether the trunk carries adapters."""
        return isinstance(self.pretrained_model, PeftModel)

    @property
    def config(self) -> PreTrainedConfig:
        """The trunk's configuration."""
        return trunk_of(self.pretrained_model).config

    @property
    def device(self) -> torch.device:
        """Where the trunk takes its inputs."""
        return self.pretrained_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the trunk's weights; the head has its own."""
        return trunk_of(self.pretrained_model).dtype

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits, loss and values.

        Args:
            input_ids: [B, T]; of an encoder-decoder, what its encoder reads [B, S].
            attention_mask: of the same shape, 1 for tokens and 0 for padding.
            kwargs: for the trunk's forward. With `logits_to_keep` both logits and values are of the kept
                positions only. An encoder-decoder takes `decoder_input_ids` [B, T], or makes them of
                `labels`; and it takes `encoder_outputs` in place of `input_ids`.

        Returns:
            logits [B, T, V], the trunk's loss (None without `labels`), values [B, T]. Half precision is
            returned as float32.
        """
        with self._last_states() as states:
            output = self.pretrained_model(
                input_ids=input_ids, attention_mask=attention_mask, **{**kwargs, "return_dict": True}
            )
        width = self.v_head.summary.in_features
        if [hidden.shape[-1] for hidden in states] != [width]:
            raise ModelError(
                f"{type(trunk_of(self)).__name__} gave last hidden states {len(states)} times in a forward, "
                f"{[hidden.shape[-1] for hidden in states]} wide; expected them once, {width} wide, since "
                "values are computed from them (a fused loss skips the output layer)"
            )
        values_BT = self.v_head(states[0]).squeeze(-1)
        return _at_least_float32(output.logits), output.loss, values_BT.to(output.logits.device)

    @abstractmethod
    def _width(self) -> int:
        """Of the last hidden states."""

    @abstractmethod
    def _last_states(self) -> AbstractContextManager[list[Tensor]]:
        """Inside, each forward of the trunk leaves its last hidden states [B, T, D] in the list."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The trunk's `generate`."""
        trunk: Any = self.pretrained_model
        return trunk.generate(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute the trunk's activations in the backward pass instead of keeping them."""
        trunk: Any = self.pretrained_model
        # transformers 5.23 renamed both methods and warns about the old names, which 5.20 knows only.
        enable = getattr(trunk, "activation_checkpointing_enable", trunk.gradient_checkpointing_enable)
        enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        trunk: Any = self.pretrained_model
        getattr(trunk, "activation_checkpointing_disable", trunk.gradient_checkpointing_disable)()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        **options: Any,
    ) -> None:
        """Save so that `from_pretrained` gives equal logits and values.

        The directory is the trunk's own, as transformers or PEFT saves it (a LoRA model's has the adapter
        only), so transformers loads it too; the head is in `value_head.safetensors` beside it.

        Args:
            save_directory: created if need be.
            state_dict: of this module, gathered, where the weights are spread over processes.
            is_main_process: whether to write; the others only take part.
            options: for the trunk's `save_pretrained`, e.g. `max_shard_size="2GB"`.
        """
        if "push_to_hub" in options:
            raise ModelError(
                "save_pretrained only writes a directory; push_to_hub(repo_id) sends model and head"
            )
        if os.path.isfile(save_directory):
            raise ModelError(f"{os.fspath(save_directory)!r} is a file; expected a directory to save to")
        head_state = self.v_head.state_dict() if state_dict is None else _under("v_head.", state_dict)
        if state_dict is not None:
            options["state_dict"] = _under("pretrained_model.", state_dict)
        os.makedirs(save_directory, exist_ok=True)
        if isinstance(self.pretrained_model, PeftModel):
            options.setdefault("selected_adapters", policy_adapters(self.pretrained_model))
        self.pretrained_model.save_pretrained(
            os.fspath(save_directory), is_main_process=is_main_process, **options
        )
        if is_main_process:
            save_head(head_state, save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model with value head",
        create_pr: bool = False,
        **options: Any,
    ) -> CommitInfo:
        """Upload what `save_pretrained(**options)` writes, creating the repository if need be."""
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def _lm_head(self) -> Any:
        # Looked up each time: resizing the vocabulary and FSDP put another module there.
        return trunk_of(self.pretrained_model).get_output_embeddings()

    @classmethod
    def _check_can_carry_values(cls, model: PreTrainedModel | PeftModel) -> None:
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"{model.active_peft_config.peft_type} adapters put virtual tokens before the text, which "
                "have no place among the values; use LoRA or another adapter of weights"
            )
        trunk = trunk_of(model)
        name = type(trunk).__name__
        if is_encoder_decoder(trunk) != cls.is_encoder_decoder:
            raise ModelError(f"{name} {cls.other_kind}")
        if trunk.get_output_embeddings() is None:
            kind = "ForConditionalGeneration" if cls.is_encoder_decoder else "ForCausalLM"
            auto = "AutoModelForSeq2SeqLM" if cls.is_encoder_decoder else "AutoModelForCausalLM"
            raise ModelError(
                f"{name} has no language-model head; expected a …{kind} model, as {auto} loads it"
            )
        if any(parameter.is_meta for parameter in trunk.parameters()):
            raise ModelError(
                "parts of the model are offloaded to CPU or disk, where they can't be trained; give a "
                "device_map that holds the whole model, a smaller dtype, or quantize it and train an adapter"
            )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _with_dtype(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with `torch_dtype` under its present name; a dtype of None is as good as none."""
    options = dict(options)
    old, new = options.pop("torch_dtype", None), options.pop("dtype", None)
    if old is not None and new is not None:
        raise ModelError("dtype and torch_dtype are two names for one option; give dtype only")
    dtype = new if new is not None else old
    return options if dtype is None else {**options, "dtype": dtype}


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if not found:
        raise ModelError(
            f"the state_dict has no {prefix}* keys; expected this module's own, gathered (for instance "
            "accelerator.get_state_dict(model)), or none"
        )
    return found
