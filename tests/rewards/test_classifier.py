import asyncio

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from etude.errors import ConfigError, ModelError
from etude.protocols import Reward
from etude.rewards.classifier import ClassifierReward
from etude.types import Episode, Segment

torch.set_num_threads(1)

WORDS = ["the", "film", "was", "good", "bad", "dull", "long", "short", "and", "not", "very", "i", "loved"]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


def word_tokenizer(limit=1000, brackets=True, **special):
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if brackets:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    special = {"pad_token": "[PAD]", "eos_token": "[SEP]", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=limit, **special
    )


def tiny_bert(labels=2, **config):
    torch.manual_seed(labels)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"vocab_size": 32, "max_position_embeddings": 40, "initializer_range": 0.5, **size, **config}
    return BertForSequenceClassification(BertConfig(num_labels=labels, **config)).eval()


def tiny_gpt2(**config):
    torch.manual_seed(0)
    config = {"vocab_size": 32, "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, **config}
    return GPT2ForSequenceClassification(GPT2Config(num_labels=1, initializer_range=0.5, **config)).eval()


def reviews(count=11):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator).tolist())
        for n in lengths
    ]


def episodes_of(texts, prompt="the film was "):
    segments = [
        [Segment("prompt", prompt, []), Segment("model", text, []), Segment("tool", " very good", [])]
        for text in texts
    ]
    return [Episode(segments=made) for made in segments]


@pytest.mark.parametrize("function", ["none", "sigmoid", "softmax"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_the_pipelines(function, batch_size):
    model, tokenizer, texts = tiny_bert(labels=3), word_tokenizer(), reviews()
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    expected = [
        next(row["score"] for row in rows if row["label"] == "LABEL_2")
        for rows in pipe(texts, top_k=None, function_to_apply=function)
    ]
    reward = ClassifierReward(
        model, tokenizer, label="LABEL_2", function_to_apply=function, batch_size=batch_size
    )
    assert isinstance(reward, Reward)
    scores = asyncio.run(reward(episodes_of(texts)))
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert max(scores) - min(scores) > 0.01


@pytest.mark.parametrize("pad_token", ["[PAD]", "[SEP]"])
def test_a_decoder_is_scored_at_its_last_token(pad_token):
    tokenizer = word_tokenizer(brackets=False, pad_token=pad_token)
    model, texts = tiny_gpt2(pad_token_id=tokenizer.pad_token_id), reviews()
    alone = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0].item() for text in texts]
    batched = ClassifierReward(model, tokenizer, batch_size=4).score_texts(texts)
    assert batched == pytest.approx(alone, abs=1e-5)


def test_an_empty_text_is_an_end_of_sequence():
    tokenizer = word_tokenizer(brackets=False)
    model = tiny_gpt2(pad_token_id=tokenizer.pad_token_id)
    alone = model(torch.tensor([[tokenizer.eos_token_id]])).logits[0, 0].item()
    assert ClassifierReward(model, tokenizer).score_texts(["", "good film"])[0] == pytest.approx(
        alone, abs=1e-5
    )
    with pytest.raises(ModelError, match="an empty text has no tokens"):
        ClassifierReward(model, word_tokenizer(brackets=False, eos_token=None))


def test_the_text_is_the_models_with_or_without_the_prompt():
    model, tokenizer, texts = tiny_bert(), word_tokenizer(), reviews(5)
    completion, everything = (ClassifierReward(model, tokenizer, text=text) for text in ("completion", "all"))
    assert asyncio.run(completion(episodes_of(texts))) == completion.score_texts(texts)
    prompted = ["the film was " + text for text in texts]
    assert asyncio.run(everything(episodes_of(texts))) == completion.score_texts(prompted)


def test_default_labels():
    tokenizer, texts = word_tokenizer(), reviews(3)
    for labels, index in ((1, 0), (2, 1)):
        model = tiny_bert(labels)
        given, default = ClassifierReward(model, tokenizer, label=index), ClassifierReward(model, tokenizer)
        assert default.score_texts(texts) == given.score_texts(texts)
    with pytest.raises(
        ConfigError, match="label is None; expected one of LABEL_0, LABEL_1, LABEL_2, or an index"
    ):
        ClassifierReward(tiny_bert(3), tokenizer)
    with pytest.raises(ConfigError, match="label is 'POSITIVE'"):
        ClassifierReward(tiny_bert(2), tokenizer, label="POSITIVE")
    with pytest.raises(ConfigError, match="label is 2"):
        ClassifierReward(tiny_bert(2), tokenizer, label=2)


def test_long_texts_keep_their_end():
    model, tokenizer = tiny_bert(), word_tokenizer()
    reward = ClassifierReward(model, tokenizer)  # 40 positions, less two for [CLS] and [SEP]
    end = " ".join(["good"] * 20 + ["bad"] * 18)
    assert reward.score_texts(["long " * 30 + end]) == reward.score_texts([end])
    short = ClassifierReward(model, tokenizer, max_length=5)
    assert short.score_texts([end]) == reward.score_texts(["bad bad bad"])


def test_bfloat16_models_give_float32_scores():
    model, tokenizer, texts = tiny_bert().bfloat16(), word_tokenizer(), reviews(3)
    logits = [model(**tokenizer(text, return_tensors="pt")).logits[0].float() for text in texts]
    reward = ClassifierReward(model, tokenizer, function_to_apply="softmax", batch_size=1)
    assert reward.score_texts(texts) == [row.softmax(-1)[1].item() for row in logits]


def test_nothing_of_the_callers_changes():
    model, tokenizer = tiny_bert(hidden_dropout_prob=0.5), word_tokenizer(limit=8)
    tokenizer.padding_side = "left"
    before = tokenizer.backend_tokenizer.to_str()
    model.train()
    reward = ClassifierReward(model, tokenizer)
    scores = asyncio.run(reward(episodes_of(reviews(4))))
    assert asyncio.run(reward(episodes_of(reviews(4)))) == scores  # no dropout
    assert tokenizer.backend_tokenizer.to_str() == before
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "right")
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_concurrent_scores():
    reward, texts = ClassifierReward(tiny_bert(), word_tokenizer(), batch_size=2), reviews()

    async def main():
        return await asyncio.gather(*(reward(episodes_of(texts)) for _ in range(4)))

    assert asyncio.run(main()) == [reward.score_texts(texts)] * 4
    assert asyncio.run(reward([])) == []


def test_from_a_folder(tmp_path):
    model, tokenizer, texts = tiny_bert(), word_tokenizer(), reviews(3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = ClassifierReward(tmp_path, device="cpu", name="sentiment", weight=2)
    assert (loaded.name, loaded.weight) == ("sentiment", 2.0)
    assert loaded.score_texts(texts) == ClassifierReward(model, tokenizer).score_texts(texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"function_to_apply": "tanh"},
            "function_to_apply is 'tanh'; expected one of none, sigmoid, softmax",
        ),
        ({"text": "prompt"}, "text is 'prompt'; expected one of completion, all"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"weight": float("nan")}, "weight of reward 'classifier'"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        ClassifierReward(tiny_bert(), word_tokenizer(), **settings)


def test_softmax_of_one_label_says_nothing():
    with pytest.raises(ConfigError, match="whose share is always 1"):
        ClassifierReward(tiny_bert(1), word_tokenizer(), function_to_apply="softmax")


def test_models_that_cannot_be_used():
    with pytest.raises(ModelError, match="without its tokenizer"):
        ClassifierReward(tiny_bert())
    with pytest.raises(ModelError, match="the model is Linear; expected a sequence-classification model"):
        ClassifierReward(torch.nn.Linear(2, 2), word_tokenizer())
    unpadded, tokenizer = tiny_gpt2(pad_token_id=None), word_tokenizer()
    with pytest.raises(
        ModelError, match="padding token is 0 in the tokenizer and None in the model's config"
    ):
        ClassifierReward(unpadded, tokenizer)
    without = word_tokenizer(pad_token=None)
    assert len(ClassifierReward(unpadded, without, batch_size=1).score_texts(reviews(3))) == 3
