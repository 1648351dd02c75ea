"""What many tests share: a tokenizer of single characters with TRL's tags, and small random models."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# A shell that runs the tests in the background has them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHARACTERS = "0123456789+-*=?.<>_ abcdefghijklmnopqrstuvwxyzEKQRTUW:"
TAGS = ("<request>", "<call>", "<response>", "<submit>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, TRL's tags as non-special added tokens, and an end-of-sequence token."""
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    backend = Tokenizer(models.WordLevel({**vocabulary, "[unk]": len(vocabulary)}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    backend.add_special_tokens([AddedToken("[eos]", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[unk]", eos_token="[eos]", pad_token="[eos]"
    )


@pytest.fixture(scope="session")
def make_llama(tokenizer):
    """Makes small Llamas: untied, with weights large enough that outputs vary."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_gpt2(tokenizer):
    """Makes small GPT-2s with their usual dropout of 0.1."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        settings = {
            "vocab_size": len(tokenizer),
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        }
        return GPT2LMHeadModel(GPT2Config(**{**settings, **config})).to(dtype).eval()

    return make


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run side by side with other work, and small tensors gain nothing from more threads."""
    torch.set_num_threads(1)
