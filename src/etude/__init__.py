"""Étude trains language models by reinforcement learning, tools included.

Public names load when first used, so `import etude` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that defines it. tests/test_exports.py holds this table against the modules.
_EXPORTS = {
    "AdapterReward": "etude.rewards.adapter",
    "AutoModelForCausalLMWithValueHead": "etude.models.value_head",
    "AutoModelForSeq2SeqLMWithValueHead": "etude.models.value_head",
    "average_models": "etude.models.averaging",
    "BestOfN": "etude.environments.best_of_n",
    "BestOfNSampler": "etude.sampling.best_of_n",
    "CharacterNoise": "etude.data.noise",
    "ChatEnvironment": "etude.environments.chat",
    "ChatProtocol": "etude.environments.chat_protocol",
    "ClassifierReward": "etude.rewards.classifier",
    "CPOConfig": "etude.trainers.preference_config",
    "CPOTrainer": "etude.trainers.cpo",
    "create_reference_model": "etude.models.reference",
    "Distraction": "etude.data.noise",
    "DPOConfig": "etude.trainers.dpo_config",
    "DPOTrainer": "etude.trainers.dpo",
    "duck_environments": "etude.environments.adapters.duck",
    "DuckEnvironment": "etude.environments.adapters.duck",
    "Episode": "etude.types",
    "EtudeError": "etude.errors",
    "evaluate": "etude.evaluation.evaluate",
    "Evaluation": "etude.evaluation.evaluate",
    "Experience": "etude.trainers.experience",
    "FunctionReward": "etude.rewards.function",
    "GenerationEnvironment": "etude.environments.generation",
    "GroupConfig": "etude.trainers.group_config",
    "GroupTrainer": "etude.trainers.group",
    "GRPOConfig": "etude.trainers.group_config",
    "GRPOTrainer": "etude.trainers.grpo",
    "GymnasiumEnvironment": "etude.environments.adapters.gymnasium",
    "Injection": "etude.data.noise",
    "IterativeSFTConfig": "etude.trainers.group_config",
    "IterativeSFTTrainer": "etude.trainers.iterative_sft",
    "KTOConfig": "etude.trainers.kto_config",
    "KTOTrainer": "etude.trainers.kto",
    "LengthSampler": "etude.sampling.lengths",
    "LocalSampler": "etude.sampling.local",
    "merge_adapters": "etude.models.merging",
    "metric_reward": "etude.rewards.metrics",
    "Minibatch": "etude.trainers.experience",
    "MixedEnvironment": "etude.environments.mixed",
    "ModelReward": "etude.rewards.model",
    "ModelUser": "etude.environments.model_user",
    "OpenEnvEnvironment": "etude.environments.adapters.openenv",
    "ORPOConfig": "etude.trainers.preference_config",
    "ORPOTrainer": "etude.trainers.orpo",
    "OverlongPenalty": "etude.rewards.overlong",
    "Paraphrase": "etude.data.noise",
    "PPOConfig": "etude.trainers.ppo_config",
    "PPOTrainer": "etude.trainers.ppo",
    "PRMConfig": "etude.trainers.reward_config",
    "PRMTrainer": "etude.trainers.prm",
    "ProcessReward": "etude.rewards.process",
    "ReinforceConfig": "etude.trainers.group_config",
    "ReinforcePlusPlusConfig": "etude.trainers.group_config",
    "ReinforcePlusPlusTrainer": "etude.trainers.reinforce_plus_plus",
    "ReinforceTrainer": "etude.trainers.reinforce",
    "reward": "etude.rewards.function",
    "RewardConfig": "etude.trainers.reward_config",
    "RewardTrainer": "etude.trainers.reward",
    "RLOOConfig": "etude.trainers.group_config",
    "RLOOTrainer": "etude.trainers.rloo",
    "RunDirectory": "etude.runtime.run",
    "sample_dataset": "etude.environments.rejection",
    "SamplingParams": "etude.types",
    "Scores": "etude.trainers.group",
    "ScriptedUser": "etude.environments.user",
    "Segment": "etude.types",
    "Selection": "etude.data.selection",
    "set_seed": "transformers.trainer_utils",
    "SFTConfig": "etude.trainers.sft_config",
    "SFTTrainer": "etude.trainers.sft",
    "SimPOConfig": "etude.trainers.preference_config",
    "SimPOTrainer": "etude.trainers.simpo",
    "SingleTurnEnvironment": "etude.environments.single_turn",
    "StopReason": "etude.types",
    "SummarizationEnvironment": "etude.environments.summarization",
    "TextEnvironment": "etude.environments.text",
    "TextHistory": "etude.environments.history",
    "ToolErrorPenalty": "etude.rewards.tool_errors",
    "TranslationEnvironment": "etude.environments.translation",
    "ValueModel": "etude.models.value_model",
    "VerifiersEnvironment": "etude.environments.adapters.verifiers",
    "WordDrop": "etude.data.noise",
}

__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from transformers.trainer_utils import set_seed as set_seed

    from etude.data.noise import CharacterNoise as CharacterNoise
    from etude.data.noise import Distraction as Distraction
    from etude.data.noise import Injection as Injection
    from etude.data.noise import Paraphrase as Paraphrase
    from etude.data.noise import WordDrop as WordDrop
    from etude.data.selection import Selection as Selection
    from etude.environments.adapters.duck import DuckEnvironment as DuckEnvironment
    from etude.environments.adapters.duck import duck_environments as duck_environments
    from etude.environments.adapters.gymnasium import GymnasiumEnvironment as GymnasiumEnvironment
    from etude.environments.adapters.openenv import OpenEnvEnvironment as OpenEnvEnvironment
    from etude.environments.adapters.verifiers import VerifiersEnvironment as VerifiersEnvironment
    from etude.environments.best_of_n import BestOfN as BestOfN
    from etude.environments.chat import ChatEnvironment as ChatEnvironment
    from etude.environments.chat_protocol import ChatProtocol as ChatProtocol
    from etude.environments.generation import GenerationEnvironment as GenerationEnvironment
    from etude.environments.history import TextHistory as TextHistory
    from etude.environments.mixed import MixedEnvironment as MixedEnvironment
    from etude.environments.model_user import ModelUser as ModelUser
    from etude.environments.rejection import sample_dataset as sample_dataset
    from etude.environments.single_turn import SingleTurnEnvironment as SingleTurnEnvironment
    from etude.environments.summarization import SummarizationEnvironment as SummarizationEnvironment
    from etude.environments.text import TextEnvironment as TextEnvironment
    from etude.environments.translation import TranslationEnvironment as TranslationEnvironment
    from etude.environments.user import ScriptedUser as ScriptedUser
    from etude.errors import EtudeError as EtudeError
    from etude.evaluation.evaluate import Evaluation as Evaluation
    from etude.evaluation.evaluate import evaluate as evaluate
    from etude.models.averaging import average_models as average_models
    from etude.models.merging import merge_adapters as merge_adapters
    from etude.models.reference import create_reference_model as create_reference_model
    from etude.models.value_head import AutoModelForCausalLMWithValueHead as AutoModelForCausalLMWithValueHead
    from etude.models.value_head import (
        AutoModelForSeq2SeqLMWithValueHead as AutoModelForSeq2SeqLMWithValueHead,
    )
    from etude.models.value_model import ValueModel as ValueModel
    from etude.rewards.adapter import AdapterReward as AdapterReward
    from etude.rewards.classifier import ClassifierReward as ClassifierReward
    from etude.rewards.function import FunctionReward as FunctionReward
    from etude.rewards.function import reward as reward
    from etude.rewards.metrics import metric_reward as metric_reward
    from etude.rewards.model import ModelReward as ModelReward
    from etude.rewards.overlong import OverlongPenalty as OverlongPenalty
    from etude.rewards.process import ProcessReward as ProcessReward
    from etude.rewards.tool_errors import ToolErrorPenalty as ToolErrorPenalty
    from etude.runtime.run import RunDirectory as RunDirectory
    from etude.sampling.best_of_n import BestOfNSampler as BestOfNSampler
    from etude.sampling.lengths import LengthSampler as LengthSampler
    from etude.sampling.local import LocalSampler as LocalSampler
    from etude.trainers.cpo import CPOTrainer as CPOTrainer
    from etude.trainers.dpo import DPOTrainer as DPOTrainer
    from etude.trainers.dpo_config import DPOConfig as DPOConfig
    from etude.trainers.experience import Experience as Experience
    from etude.trainers.experience import Minibatch as Minibatch
    from etude.trainers.group import GroupTrainer as GroupTrainer
    from etude.trainers.group import Scores as Scores
    from etude.trainers.group_config import GroupConfig as GroupConfig
    from etude.trainers.group_config import GRPOConfig as GRPOConfig
    from etude.trainers.group_config import IterativeSFTConfig as IterativeSFTConfig
    from etude.trainers.group_config import ReinforceConfig as ReinforceConfig
    from etude.trainers.group_config import ReinforcePlusPlusConfig as ReinforcePlusPlusConfig
    from etude.trainers.group_config import RLOOConfig as RLOOConfig
    from etude.trainers.grpo import GRPOTrainer as GRPOTrainer
    from etude.trainers.iterative_sft import IterativeSFTTrainer as IterativeSFTTrainer
    from etude.trainers.kto import KTOTrainer as KTOTrainer
    from etude.trainers.kto_config import KTOConfig as KTOConfig
    from etude.trainers.orpo import ORPOTrainer as ORPOTrainer
    from etude.trainers.ppo import PPOTrainer as PPOTrainer
    from etude.trainers.ppo_config import PPOConfig as PPOConfig
    from etude.trainers.preference_config import CPOConfig as CPOConfig
    from etude.trainers.preference_config import ORPOConfig as ORPOConfig
    from etude.trainers.preference_config import SimPOConfig as SimPOConfig
    from etude.trainers.prm import PRMTrainer as PRMTrainer
    from etude.trainers.reinforce import ReinforceTrainer as ReinforceTrainer
    from etude.trainers.reinforce_plus_plus import ReinforcePlusPlusTrainer as ReinforcePlusPlusTrainer
    from etude.trainers.reward import RewardTrainer as RewardTrainer
    from etude.trainers.reward_config import PRMConfig as PRMConfig
    from etude.trainers.reward_config import RewardConfig as RewardConfig
    from etude.trainers.rloo import RLOOTrainer as RLOOTrainer
    from etude.trainers.sft import SFTTrainer as SFTTrainer
    from etude.trainers.sft_config import SFTConfig as SFTConfig
    from etude.trainers.simpo import SimPOTrainer as SimPOTrainer
    from etude.types import Episode as Episode
    from etude.types import SamplingParams as SamplingParams
    from etude.types import Segment as Segment
    from etude.types import StopReason as StopReason


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'etude' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
