"""A tiny model learns Gymnasium's frozen lake from nothing, by its reward at the goal, in half a minute.

    python examples/frozen_lake.py --seed 0

The model's turn is one token, a direction; the environment's answer is another, the square where one stands
now. Needs the extra `gymnasium`.
"""

from __future__ import annotations

import argparse
import time

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from etude import GRPOConfig, GRPOTrainer, GymnasiumEnvironment, TextEnvironment, set_seed
from etude.environments.tags import TagProtocol

SQUARES = "0123456789abcdef"  # of a lake of four by four, row by row
MOVES = "LDRU"
EPISODES = 256  # to measure success by


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {character: i for i, character in enumerate(SQUARES + MOVES + "?")}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("[eos]", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="[eos]")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def make_environment(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> GymnasiumEnvironment:
    inner = TextEnvironment(
        model,
        tokenizer,
        max_turns=20,
        protocol=TagProtocol(response=""),  # nothing between a square and the next direction
        generation_kwargs={
            "max_new_tokens": 2,
            "stop_strings": list(MOVES),  # a direction ends the turn
            "allowed_token_ids": tokenizer.encode(MOVES),
        },
    )
    return GymnasiumEnvironment(
        "FrozenLake-v1", inner, actions=list(MOVES), render=SQUARES.__getitem__, is_slippery=False
    )


def success(environment: GymnasiumEnvironment) -> float:
    """The share of episodes that reach the goal, sampled as in training."""
    histories = environment.run([{"prompt": ""}] * EPISODES)[-1]
    return sum(history.episode.reward > 0 for history in histories) / EPISODES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--output_dir", default="runs/frozen_lake", help="for metrics, episodes and the report"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=30, help="of 64 episodes")
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    torch.set_num_threads(1)  # such small tensors gain nothing from more

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    environment = make_environment(model, tokenizer)
    before, started = success(environment), time.monotonic()
    config = GRPOConfig(
        output_dir=options.output_dir,
        overwrite_output_dir=True,
        seed=options.seed,
        learning_rate=3e-3,
        max_steps=options.iterations,
        num_generations=64,
        per_device_train_batch_size=64,
    )
    GRPOTrainer(model, config, environment=environment, train_dataset=[{"prompt": ""}]).train()
    seconds = time.monotonic() - started
    print(f"reached the goal: {before:.1%} before, {success(environment):.1%} after {seconds:.0f} s")


if __name__ == "__main__":
    main()
