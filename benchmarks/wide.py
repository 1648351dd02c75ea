"""What the memory benchmarks learn from: a Llama with a vocabulary of 150,000, and a batch of random tokens.

Runs under every side's interpreter.
"""

from __future__ import annotations

import resource
import sys

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

# glibc's own: what the other benchmarks set keeps freed memory for ever, and would be measured instead.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

# As small as a model with such a vocabulary may be: it is the logits that are measured.
WIDE_VOCABULARY = LlamaConfig(
    vocab_size=150_000,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=1,
)


def random_episodes(count: int, tokens: int) -> list[torch.Tensor]:
    """Token ids, [tokens] each, whose second half counts as sampled."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = WIDE_VOCABULARY.vocab_size
    return [torch.randint(2, vocabulary, (tokens,), generator=generator) for _ in range(count)]


def scores(count: int) -> list[float]:
    return torch.linspace(-1, 1, count).tolist()


def any_tokenizer() -> PreTrainedTokenizerFast:
    """For trainers that ask for one; nothing is tokenized."""
    words = models.WordLevel({"<end>": 0, "<pad>": 1, "?": 2}, unk_token="?")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<end>", pad_token="<pad>")


def peak_bytes() -> int:
    """The most that this process has had in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
