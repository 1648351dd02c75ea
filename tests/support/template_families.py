"""Chat templates of the families in use, in our own words, with tokenizers that have their control tokens."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
TOOL = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "5"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Are you sure?"},
    {"role": "assistant", "content": "Yes."},
]
TOOLS = [
    {"role": "user", "content": "What is 2+3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    TOOL,
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome."},
]
REASONING = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "reasoning_content": "Two and two.", "content": "It is 4."},
    {"role": "user", "content": "Are you sure?"},
    {"role": "assistant", "reasoning_content": "I am.", "content": "Yes."},
]
CONVERSATIONS = {"chat": [SYSTEM, *CHAT], "tools": TOOLS, "reasoning": REASONING}


@dataclass(frozen=True)
class Family:
    """A template and what is expected of it.

    Attributes:
        special: its special tokens; a "~" in front swallows white space that follows.
        plain: tokens of the vocabulary's own that control something, but count as text.
        turns: per conversation, the rows, each with the turns that are learned in it.
        spaces: its tokenizer puts a space before a text and after every added token, as Llama's old ones do.
        tools: what the template is given.
        conversations: those of `turns`.
    """

    special: str
    turns: dict[str, list[list[str]]]
    plain: str = ""
    bos: str | None = None
    eos: str = "</s>"
    spaces: bool = False
    tools: list[dict] | None = None
    conversations: dict[str, list[dict]] = field(default_factory=lambda: CONVERSATIONS)


IM = "<|im_start|> <|im_end|> <|endoftext|>"
HERMES_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def ended(end: str, *turns: str) -> list[str]:
    return [turn + end for turn in turns]


PLAIN = ("It is 4.", "Yes.")
DEEPSEEK = "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
DEEPSEEK_TOOLS = (
    " <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜>"
    " <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>"
)
NO_SYSTEM = {"chat": CHAT, "tools": TOOLS, "reasoning": REASONING}
THINKING = [
    {"role": m["role"], "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}"}
    if "reasoning_content" in m
    else m
    for m in REASONING
]

FAMILIES = {
    "chatml": Family(IM, {"chat": [ended("<|im_end|>", *PLAIN)]}, eos="<|im_end|>"),
    "zephyr": Family(
        "<s> </s>", {"chat": [ended("</s>", *PLAIN)]}, bos="<s>", spaces=True
    ),
    "tulu": Family("<|endoftext|>", {"chat": [ended("<|endoftext|>", *PLAIN)]}, eos="<|endoftext|>"),
    "llama-2": Family(
        "<s> </s>", {"chat": [[" It is 4. </s>", " Yes. </s>"]]}, bos="<s>", spaces=True
    ),
    "llama-3": Family(
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        {"chat": [ended("<|eot_id|>", *PLAIN)]},
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "llama-3.1": Family(
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>",
        {
            "chat": [ended("<|eot_id|>", *PLAIN)],
            "tools": [
                ended("<|eot_id|>", '{"name": "add", "parameters": {"a": 2, "b": 3}}', "It is 5.", "Welcome.")
            ],
        },
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        tools=[ADD],
    ),
    "mistral": Family(
        "<s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]"
        " [TOOL_RESULTS] [/TOOL_RESULTS]",
        {
            "chat": [[" It is 4.</s>"], [" Yes.</s>"]],
            "tools": [
                [
                    '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": 3}, "id": "abcdefghi"}]</s>',
                    " It is 5.</s>",
                ],
                [" Welcome.</s>"],
            ],
        },
        bos="<s>",
        spaces=True,
        tools=[ADD],
    ),
    "gemma": Family(
        "<bos> <eos> <start_of_turn> <end_of_turn>",
        {"chat": [ended("<end_of_turn>", *PLAIN)]},
        bos="<bos>",
        eos="<eos>",
        conversations=NO_SYSTEM,
    ),
    "phi-3": Family(
        "<s> ~<|endoftext|> ~<|end|> ~<|user|> ~<|assistant|> ~<|system|>",
        {"chat": [["It is 4.<|end|>\n", "Yes.<|end|>\n"]]},
        bos="<s>",
        eos="<|endoftext|>",
        spaces=True,
    ),
    "command-r": Family(
        "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|>"
        " <|CHATBOT_TOKEN|>",
        {"chat": [ended("<|END_OF_TURN_TOKEN|>", *PLAIN)]},
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "qwen2.5": Family(
        IM,
        {
            "chat": [ended("<|im_end|>", *PLAIN)],
            "tools": [ended("<|im_end|>", HERMES_CALL, "It is 5.", "Welcome.")],
        },
        plain="<tool_call> </tool_call>",
        eos="<|im_end|>",
        tools=[ADD],
    ),
    "qwen3": Family(
        IM,
        {
            "chat": [[f"<think>\n\n</think>\n\n{turn}<|im_end|>"] for turn in PLAIN],
            "tools": [
                [f"<think>\n\n</think>\n\n{turn}<|im_end|>"] for turn in (HERMES_CALL, "It is 5.", "Welcome.")
            ],
            "reasoning": [
                ["<think>\nTwo and two.\n</think>\n\nIt is 4.<|im_end|>"],
                ["<think>\nI am.\n</think>\n\nYes.<|im_end|>"],
            ],
        },
        plain="<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>",
        eos="<|im_end|>",
        tools=[ADD],
    ),
    "hermes": Family(
        IM,
        {
            "chat": [ended("<|im_end|>", *PLAIN)],
            "tools": [ended("<|im_end|>", "It is 5."), ended("<|im_end|>", HERMES_CALL, "Welcome.")],
        },
        plain="<tool_call> </tool_call>",
        eos="<|im_end|>",
        tools=[ADD],
    ),
    "deepseek-v3": Family(
        DEEPSEEK + DEEPSEEK_TOOLS,
        {
            "chat": [ended("<｜end▁of▁sentence｜>", *PLAIN)],
            "tools": [
                ended(
                    "<｜end▁of▁sentence｜>",
                    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
                    '```json\n{"a": 2, "b": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
                    "It is 5.",
                    "Welcome.",
                )
            ],
        },
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "deepseek-r1": Family(DEEPSEEK, {}, plain="<think> </think>", bos="<｜begin▁of▁sentence｜>"),
    "deepseek-r1-marked": Family(
        DEEPSEEK,
        {"reasoning": [
            [f"{m['content']}<｜end▁of▁sentence｜>" for m in THINKING if m["role"] == "assistant"]
        ]},
        plain="<think> </think>",
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        conversations={"reasoning": THINKING},
    ),
    "gpt-oss": Family(
        "<|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>",
        {
            "chat": [[f"<|channel|>final<|message|>{turn}<|return|>"] for turn in PLAIN],
            "tools": [
                ["<|channel|>final<|message|>It is 5.<|return|>"],
                [
                    ' to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 3}<|call|>',
                    "<|channel|>final<|message|>Welcome.<|return|>",
                ],
            ],
            "reasoning": [
                ["<|channel|>analysis<|message|>Two and two.<|end|>"
                 "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"],
                ["<|channel|>analysis<|message|>I am.<|end|>"
                 "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>"],
            ],
        },
        eos="<|return|>",
    ),
    "glm-4.5": Family(
        "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        {
            "chat": [["\n<think></think>\nIt is 4.", "\n<think></think>\nYes."]],
            "tools": [
                [
                    "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n"
                    "<arg_key>b</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
                    "\n<think></think>\nIt is 5.",
                    "\n<think></think>\nWelcome.",
                ]
            ],
            "reasoning": [["\n<think>Two and two.</think>\nIt is 4."], ["\n<think>I am.</think>\nYes."]],
        },
        plain="<think> </think> <tool_call> </tool_call>",
        eos="<|endoftext|>",
    ),
}  # fmt: skip


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    family = FAMILIES[name]
    backend = llama_like() if family.spaces else byte_level()
    special = [
        AddedToken(word.removeprefix("~"), rstrip=word.startswith("~"), special=True, normalized=False)
        for word in family.special.split()
    ]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(family.plain.split())
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    learn_merges(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return backend


def llama_like() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learn_merges(backend)
    model = json.loads(backend.to_str())["model"]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    backend.model = models.BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def learn_merges(backend: Tokenizer, **options) -> None:
    """From what the templates write, so that tokens reach across every seam."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))]
    texts += [message["content"] for message in [*CHAT, *TOOLS, *REASONING]] * 4
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, show_progress=False, **options))
