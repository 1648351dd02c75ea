"""`PolicyTrainer`: what every online algorithm stands on, and nothing of any one of them.

Policy, reference, optimizer, schedule, the learner over them, and the model's ways out: generation, the
directory it is saved in, the hub. An algorithm is a subclass with its `learn`.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, get_scheduler

from etude.environments.mixed import check_success
from etude.environments.traits import check_environment, starts_of, tokenizer_of
from etude.errors import ConfigError, DataError, ModelError
from etude.math.counters import mix
from etude.math.kl import KLKind
from etude.math.losses import aggregate
from etude.math.masked import masked_mean
from etude.math.off_policy import importance_weights
from etude.models.encoder_decoder import decoder_start_ids, is_encoder_decoder
from etude.models.forward import PolicyForward
from etude.models.reference import create_reference_model, reference_by_disabled_adapters
from etude.models.value_model import ValueModel
from etude.models.wrappers import trunk_of, unwrapped
from etude.protocols import Environment
from etude.runtime.model_card import write_model_card
from etude.runtime.processes import leave_group
from etude.sampling.generate import continue_all
from etude.sampling.local import LocalSampler
from etude.sampling.params import decoder_start, sampling_params
from etude.trainers.checkpoints import save_models
from etude.trainers.experience import Experience, Minibatch
from etude.trainers.learner import Learner
from etude.trainers.online import OnlineTrainer
from etude.trainers.online_config import OnlineConfig
from etude.trainers.setup import (
    Policy,
    changed_settings,
    check_precision,
    enable_gradient_checkpointing,
    flat_settings,
    make_accelerator,
)

_GENERATE, _ORDER = 4, 5  # names of random streams


class PolicyTrainer(OnlineTrainer):
    """A policy that is trained, beside the reference it may be held close to.

    Args:
        config: the settings.
        model: what is trained.
        tokenizer: of the model; the environment's by default.
        value_model: what gives the values, trained with the model; by default its value head, if it has one.
        ref_model: what the KL is measured to. By default a frozen copy of `model`; for a model with
            adapters, the same model with them switched off.
        num_shared_layers: layers that the default reference shares with the model, frozen in both.
        optimizer: Adam over what requires a gradient, by default.
        lr_scheduler: stepped once per iteration; by default made from the config.
        environment, train_dataset, eval_dataset, test_dataset: what `train()` plays, see `OnlineTrainer`.
        epochs: times a batch is gone through.
        kl_kind: how the KL per token is estimated.
        uses_reference: False where no KL is measured: there is no reference then.
    """

    method: ClassVar[str]  # in one word, for the model card

    def __init__(
        self,
        config: OnlineConfig,
        model: Policy,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        value_model: ValueModel | None = None,
        ref_model: nn.Module | None = None,
        num_shared_layers: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        environment: Environment | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        test_dataset: Any = None,
        epochs: int,
        kl_kind: KLKind | str,
        uses_reference: bool = True,
    ) -> None:
        if environment is not None:
            check_environment(environment)
            check_success(config.success_reward, environment)
        if tokenizer is None:
            tokenizer = tokenizer_of(environment)
        if tokenizer is None:
            raise ConfigError(
                f"{type(self).__name__} needs the model's tokenizer; pass it, or an environment that has it"
            )
        self.config = config
        self.model = model
        self.value_model = value_model
        self.tokenizer = tokenizer
        self.environment = environment
        self.train_dataset, self.eval_dataset, self.test_dataset = train_dataset, eval_dataset, test_dataset
        self.accelerator = make_accelerator(config)
        self.current_device = self.accelerator.device
        self.current_step = 0
        self._generated = 0
        config.world_size = self.accelerator.num_processes

        self.is_peft_model = any(isinstance(module, PeftModel) for module in unwrapped(model))
        self.is_encoder_decoder = is_encoder_decoder(trunk_of(model))
        self._starts: dict[tuple[int, ...], None] = {}  # that responses were begun with
        self.ref_model = self._reference(ref_model, num_shared_layers) if uses_reference else None
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(model)
            if value_model is not None:
                enable_gradient_checkpointing(value_model.model)
        optimizer = self._optimizer(optimizer)
        self.lr_scheduler = lr_scheduler or self._default_scheduler(optimizer)
        self.learner = self._learner(optimizer, epochs, kl_kind, uses_reference)
        self.optimizer = self.learner.optimizer
        if config.report_to:
            self.accelerator.init_trackers(
                config.tracker_project_name,
                flat_settings(config.to_dict()),
                init_kwargs=config.tracker_kwargs,
            )

    def _optimizer(self, given: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trainable:
            raise ModelError("no parameter of the model requires a gradient; load it with is_trainable=True")
        check_precision(trainable, given)
        fused = self.accelerator.device.type == "cuda"
        return given or torch.optim.Adam(trainable, lr=self.config.learning_rate, fused=fused or None)

    def _learner(
        self, optimizer: torch.optim.Optimizer, epochs: int, kl_kind: KLKind | str, uses_reference: bool
    ) -> Learner:
        """What updates the policy, with models and optimizer prepared for devices and processes."""
        config = self.config
        forward = PolicyForward(self.model, value_model=self.value_model)
        if config.compile:
            forward.compile_parts()
        policy, prepared = self.accelerator.prepare(forward, optimizer)
        reference = None
        if self.ref_model is not None:
            reference = self.accelerator.prepare_model(PolicyForward(self.ref_model), evaluation_mode=True)
        return Learner(
            self.accelerator,
            policy,
            reference,
            prepared,
            mini_batch_size=config.mini_batch_size,
            accumulation=config.gradient_accumulation_steps,
            epochs=epochs,
            max_grad_norm=config.max_grad_norm,
            temperature=config.temperature,
            kl_kind=kl_kind,
            uses_reference=uses_reference,
            max_tokens_per_pass=config.max_tokens_per_pass,
            entropy_gradient=config.entropy_coef != 0,
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    # What algorithms have in common.

    def describe_batches(self) -> str:
        """One line: what an iteration plays, and how it is gone through."""
        config, processes = self.config, self.accelerator.num_processes
        episodes, step_size = config.batch_size * processes, config.backward_batch_size * processes
        steps = math.ceil(config.batch_size / config.backward_batch_size) * self.learner.epochs
        played = f"{episodes // self.plays} tasks × {self.plays} = " if self.plays > 1 else ""
        factors = [f"{config.mini_batch_size} per pass"]
        if config.gradient_accumulation_steps > 1:
            factors.append(f"{config.gradient_accumulation_steps} passes")
        if processes > 1:
            factors.append(f"{processes} processes")
        epochs = f", {self.learner.epochs} times over" if self.learner.epochs > 1 else ""
        iterations = self.total_iterations
        times = f"{iterations} iteration{'s' * (iterations != 1)}"
        return (
            f"batches: {played}{episodes} episodes an iteration, in steps of {step_size} "
            f"({' × '.join(factors)}){epochs}: {steps} optimizer steps; "
            f"× {times} = {steps * iterations} steps, {episodes * iterations} episodes"
        )

    def corrected(self, advantages_BN: Tensor, experience: Experience) -> tuple[Tensor, dict[str, float]]:
        """Advantages times the importance weights of tokens that another policy sampled, and statistics.

        The sampler's computation differs a little from the trainer's. What it means that a weight is on the
        advantage: it scales the policy's loss, whatever the algorithm's, and neither value nor KL terms.
        """
        stats = {} if experience.pending else experience.sampler_gap()
        mode = self.config.importance_sampling_correction
        if mode == "none" or not experience.mask.any():
            return advantages_BN, stats
        weights_BN = importance_weights(
            experience.logprobs,
            experience.sampler_logprobs(),
            experience.mask,
            mode=mode,
            cap=self.config.importance_sampling_cap,
        )
        stats["sampler/weight_mean"] = masked_mean(weights_BN, experience.mask).item()
        stats["sampler/weight_min"] = weights_BN[experience.mask].min().item()
        stats["sampler/weight_max"] = weights_BN[experience.mask].max().item()
        return advantages_BN * weights_BN, stats

    def advance_schedule(self) -> None:
        """One iteration further; also where a first batch taught nothing, of which torch would warn."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.lr_scheduler.step()

    def entropy_bonus(self, minibatch: Minibatch) -> Tensor | float:
        """This mini-batch's part of `entropy_coef` × mean entropy per sampled token, to be maximised."""
        if not self.config.entropy_coef:
            return 0.0
        entropy = aggregate(
            minibatch.entropies, minibatch.observed.mask, mode="token", denominator=minibatch.denominator
        )
        return self.config.entropy_coef * entropy

    def _shuffles(self) -> torch.Generator:
        """What orders this iteration's episodes into mini-batches."""
        seed = mix(self.config.seed, _ORDER, self.current_step, self.accelerator.process_index)
        return torch.Generator().manual_seed(seed)

    def _reference(self, ref_model: nn.Module | None, num_shared_layers: int | None) -> nn.Module | None:
        if ref_model is not None:
            if num_shared_layers is not None:
                raise ConfigError("num_shared_layers only works without ref_model; leave one of them out")
            return ref_model.requires_grad_(False).eval()
        if self.is_peft_model:
            return None
        return create_reference_model(self.model, num_shared_layers)

    def _default_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(
            self.config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=self.config.warmup_steps,
            num_training_steps=self.total_iterations,
        )

    # Generation.

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Continue queries with the current policy.

        Args:
            query_tensor: token ids [q], or a list of such. An encoder–decoder's encoder reads them, and its
                response begins with its decoder's start tokens.
            length_sampler: gives `max_new_tokens`, anew for each query.
            batch_size: taken for compatibility; the sampler batches by itself.
            return_prompt: put the query before each response; not an encoder–decoder's.
            generate_ref_response: also continue with the reference policy.
            generation_kwargs: as for `transformers`' `generate`: greedy unless `do_sample=True`. A
                `forced_prefix` begins each response; for `step`, mask its tokens with 0 in
                `response_masks`.

        Returns:
            A list of token ids [n] for a list of queries, [1, n] for a single one; a pair of these with
            `generate_ref_response`.
        """
        queries = query_tensor if isinstance(query_tensor, list) else [query_tensor]
        for query in queries:
            if query.dim() != 1:
                raise DataError(f"a query has shape {tuple(query.shape)}; expected token ids [q]")
        settings = []
        for _ in queries:
            limit = {} if length_sampler is None else {"max_new_tokens": int(length_sampler())}
            settings.append(sampling_params({**generation_kwargs, **limit}, self.tokenizer, do_sample=False))

        first = self._generated
        self._generated += len(queries)
        seeds = [mix(self.config.seed, _GENERATE, first + i) for i in range(len(queries))]

        def continued(sampler: LocalSampler) -> Any:
            start = decoder_start(generation_kwargs, sampler.decoder_start)
            self._starts[start] = None
            turns = continue_all(sampler, [query.tolist() for query in queries], settings, seeds, start)
            said = [[*start, *turn.token_ids] for turn in turns]
            responses = [query.new_tensor(ids) for query, ids in zip(queries, said, strict=True)]
            if return_prompt and not start:
                responses = [torch.cat([q, r]) for q, r in zip(queries, responses, strict=True)]
            return responses if isinstance(query_tensor, list) else responses[0][None]

        result = continued(self.sampler)
        if not generate_ref_response:
            return result
        with self._reference_sampler() as sampler:
            return result, continued(sampler)

    @property
    def starts(self) -> list[tuple[int, ...]]:
        """What an encoder–decoder's responses may begin with: its own, its environment's, `generate`'s."""
        if not self.is_encoder_decoder:
            return []
        own = decoder_start_ids(trunk_of(self.model))
        return list(dict.fromkeys([own, *starts_of(self.environment, own), *self._starts]))

    @contextmanager
    def _reference_sampler(self) -> Iterator[LocalSampler]:
        if self.ref_model is not None:
            yield self._sampler_of_reference
        elif not self.is_peft_model:
            raise ConfigError(
                "there is no reference to generate with, since no KL is measured; pass ref_model="
            )
        else:
            with reference_by_disabled_adapters(self.model):
                yield self._sampler_over(self.model)

    @cached_property
    def _sampler_of_reference(self) -> LocalSampler:
        assert self.ref_model is not None
        return self._sampler_over(self.ref_model)

    # The model's ways out.

    def end_training(self) -> None:
        """Wait for the other processes, finish the trackers and leave the group: a script's last call.

        `train` makes it; a loop of one's own around `step` does so itself.
        """
        if self.accelerator.num_processes > 1:
            self.learner.unwrap()
        leave_group(self.accelerator)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write model, tokenizer and a model card to `output_dir` (the config's by default)."""
        directory = output_dir if output_dir is not None else self.config.output_dir
        if directory is None:
            raise ConfigError("nowhere to save the model; pass a directory or set output_dir")
        if self.accelerator.is_main_process:
            self._write_model(directory, Path(directory).resolve().name)

    def push_to_hub(self) -> None:
        """Upload model, tokenizer and model card to `hub_model_id` (by default named as `output_dir`)."""
        if not self.accelerator.is_main_process:
            return
        api = HfApi()
        name = self.config.hub_model_id or Path(self.config.output_dir or "model").resolve().name
        repo = api.create_repo(name, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self._write_model(folder, name.rpartition("/")[2])
            message = f"Trained with {self.method.upper()}"
            api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message)

    def _write_model(self, directory: str | Path, name: str) -> None:
        save_models(self, Path(directory))
        self.tokenizer.save_pretrained(directory)
        write_model_card(
            directory,
            model_name=name,
            base_model=trunk_of(self.model).config.name_or_path or None,
            trainer=type(self).__name__,
            method=self.method,
            config_summary=changed_settings(self.config),
        )
