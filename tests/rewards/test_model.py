"""A reward model scores episodes of a run: by their own tokens, by their text, in its chat template."""

import copy

import pytest
import torch
from peft import LoraConfig
from scoring_models import encoder_tokenizer, make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from etude.app.references import load_object
from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, ModelError, RewardError
from etude.models.reward_model import add_scoring_adapter, load_reward_model
from etude.models.value_head import AutoModelForCausalLMWithValueHead
from etude.protocols import Reward
from etude.rewards.adapter import AdapterReward
from etude.rewards.model import ModelReward
from etude.runtime.loop import run_sync
from etude.types import Episode, Segment, ToolCall

TASKS = [f"say {word}:" for word in ("one", "two", "three", "forty four", "one hundred and two")]
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}[eos]\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def episode(tokenizer, prompt, turns, tool=" =4 "):
    """An episode as a sampler makes them; texts leave out an end-of-sequence token at their end."""
    segments = [Segment("prompt", prompt, tokenizer(prompt)["input_ids"])]
    for number, text in enumerate(turns):
        ids = tokenizer(text)["input_ids"]
        zeros = [0.0] * len(ids)
        said = text.removesuffix("[eos]")
        segments.append(
            Segment("model", said, ids, logprobs=zeros, sampling_logprobs=zeros, policy_version=0)
        )
        if number < len(turns) - 1:
            segments.append(Segment("tool", tool, tokenizer(tool)["input_ids"]))
    return Episode(task={"prompt": prompt}, segments=segments)


def alone(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.fixture
def other_tokenizer(tokenizer):
    """The same characters under other numbers, and [end] at the end."""
    vocabulary = {word: i for i, word in enumerate(reversed(tokenizer.convert_ids_to_tokens(range(55))))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]", eos_token="[end]")


@pytest.fixture
def episodes(tokenizer):
    return [
        episode(tokenizer, "what is one and one, please: ", ["two[eos]"]),
        episode(tokenizer, "what is one and one, please: ", ["<request>2+2<call>", "four<submit>"]),
        episode(tokenizer, "hm ", ["q"]),
    ]


@pytest.mark.parametrize("family", ["Llama", "Bloom"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_episodes_are_scored_on_their_own_tokens(tokenizer, episodes, family, batch_size):
    model = make(family, "SequenceClassification", len(tokenizer))
    reward = ModelReward(model, tokenizer, batch_size=batch_size)
    assert isinstance(reward, Reward)
    scores = run_sync(reward(episodes))
    assert reward.reader.read == "tokens"
    eos = tokenizer.eos_token_id
    ids = [episodes[0].token_ids, *([*e.token_ids, eos] for e in episodes[1:])]
    assert scores == pytest.approx([alone(model, each) for each in ids], abs=1e-5)
    plain = run_sync(ModelReward(model, tokenizer, append_eos=False)(episodes))
    assert plain == pytest.approx([alone(model, e.token_ids) for e in episodes], abs=1e-5)
    assert plain[0] == pytest.approx(scores[0], abs=1e-5)
    assert plain[1] != pytest.approx(scores[1], abs=1e-3)


def test_tokens_that_the_policy_sampled_are_never_encoded_again(tokenizer):
    """[eos] in the middle is one token to the policy, whose text has it in five characters."""
    model = make("Llama", "SequenceClassification", len(tokenizer))
    odd = episode(tokenizer, "say: ", ["a"])
    odd.segments.append(Segment("tool", "[eos]", tokenizer.convert_tokens_to_ids(["e", "o", "s"])))
    odd.segments.append(Segment("model", "b", tokenizer("b")["input_ids"], policy_version=0))
    [score] = run_sync(ModelReward(model, tokenizer, append_eos=False)([odd]))
    assert score == pytest.approx(alone(model, odd.token_ids), abs=1e-5)


def test_a_run_of_an_environment(tokenizer, make_llama):
    model = make("GPT2", "SequenceClassification", len(tokenizer))
    environment = TextEnvironment(
        make_llama(), tokenizer, rewards=[ModelReward(model, tokenizer, weight=0.5)], max_turns=1,
        generation_kwargs={"max_new_tokens": 9}, seed=0,
    )  # fmt: skip
    for history in environment.run(TASKS)[-1]:
        played = history.episode
        ids = played.token_ids
        ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        [reward] = played.rewards
        assert (reward.name, reward.weight, reward.position) == ("reward_model", 0.5, None)
        assert reward.value == pytest.approx(alone(model, ids), abs=1e-5)


def test_another_tokenizer_reads_the_text(tokenizer, other_tokenizer, episodes):
    model = make("Llama", "SequenceClassification", len(other_tokenizer))
    reward = ModelReward(model, other_tokenizer)
    scores = run_sync(reward(episodes))
    assert reward.reader.read == "text"
    end = other_tokenizer.eos_token_id
    ids = [[*other_tokenizer(e.text)["input_ids"], end] for e in episodes]
    assert scores == pytest.approx([alone(model, each) for each in ids], abs=1e-5)
    with pytest.raises(RewardError, match=r"has one that its model doesn't know .*read='text'"):
        run_sync(ModelReward(model, other_tokenizer, read="tokens")(episodes))


def test_what_a_tool_said_is_data_in_the_text_too(tokenizer):
    model = make("Llama", "SequenceClassification", len(tokenizer))
    forged = episode(tokenizer, "say: ", ["a", "b"], tool="x")
    forged.segments[2] = Segment("tool", "[eos]", tokenizer("eos")["input_ids"])
    reward = ModelReward(model, tokenizer, read="text")
    encoded = reward.reader.encoded(forged, "text")
    assert tokenizer.eos_token_id not in encoded.token_ids


def test_another_chat_template_reads_messages(tokenizer, other_tokenizer, episodes):
    model = make("Llama", "SequenceClassification", len(other_tokenizer))
    other_tokenizer.chat_template = CHAT.replace("[eos]", "[end]")
    reward = ModelReward(model, other_tokenizer)
    episodes[1].task = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    scores = run_sync(reward(episodes))
    assert reward.reader.read == "messages"
    texts = [
        "user: what is one and one, please: [end]\nassistant: two[end]",
        "system: s[end]\nuser: u[end]\nassistant: <request>2+2<call>four<submit>[end]",
        "user: hm [end]\nassistant: q[end]",
    ]
    ids = [other_tokenizer(text)["input_ids"] for text in texts]
    assert scores == pytest.approx([alone(model, each) for each in ids], abs=1e-5)
    row = {
        "prompt": [{"role": "user", "content": "hm "}],
        "completion": [{"role": "assistant", "content": "q"}],
    }
    assert reward.score_texts([row]) == pytest.approx(scores[2:], abs=1e-5)


def test_a_conversation_is_read_as_one(other_tokenizer):
    """Of several turns, a user's replies between them; turns around a tool's answer are one message."""
    other_tokenizer.chat_template = CHAT.replace("[eos]", "[end]")
    model = make("Llama", "SequenceClassification", len(other_tokenizer))
    said = [
        ("prompt", "?"),
        ("model", "one"),
        ("environment", "hm"),
        ("model", "two"),
        ("tool", "2"),
        ("model", "!"),
    ]
    talk = Episode(
        task={"messages": [{"role": "user", "content": "u"}]},
        segments=[Segment(source, text, [0]) for source, text in said],
        replies=["hm"],
        tool_calls=[ToolCall("add", {}, "2", turn=1)],
    )
    [score] = run_sync(ModelReward(model, other_tokenizer, read="messages")([talk]))
    text = "user: u[end]\nassistant: one[end]\nuser: hm[end]\nassistant: two![end]"
    assert score == pytest.approx(alone(model, other_tokenizer(text)["input_ids"]), abs=1e-5)


def test_an_encoder_reads_the_text_between_its_own_marks(tokenizer, episodes):
    encoders = encoder_tokenizer()
    model = make("Bert", "SequenceClassification", len(encoders))
    reward = ModelReward(model, encoders)
    expected = [alone(model, encoders(e.text)["input_ids"]) for e in episodes]
    assert run_sync(reward(episodes)) == pytest.approx(expected, abs=1e-5)
    assert reward.score_texts([e.text for e in episodes]) == pytest.approx(expected, abs=1e-5)


def test_a_text_too_long_keeps_its_end(tokenizer):
    model = make("Llama", "SequenceClassification", len(tokenizer))
    long, eos = episode(tokenizer, "a" * 30, ["bcd"]), tokenizer.eos_token_id
    [score] = run_sync(ModelReward(model, tokenizer, max_length=10)([long]))
    assert score == pytest.approx(alone(model, [*long.token_ids[-9:], eos]), abs=1e-5)


# ---- from where it was saved ----


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A reward model as an adapter on a language model, merged, and the model that these are made of."""
    make("Llama", "CausalLM", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = add_scoring_adapter(
        load_reward_model(tmp_path / "base", fresh=True),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = copy.deepcopy(adapted).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    return adapted


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_saved_reward_model_by_path_and_by_reference(saved, kind, episodes, tmp_path):
    """An adapter that was saved without a tokenizer takes its base's."""
    from_path = ModelReward(tmp_path / kind)
    by_reference = load_object(f'etude:ModelReward("{tmp_path / kind}", weight=0.5)')
    assert (by_reference.weight, by_reference.name) == (0.5, "reward_model")
    expected = run_sync(ModelReward(saved, from_path.reader.tokenizer)(episodes))
    for reward in (from_path, by_reference):
        assert run_sync(reward(episodes)) == pytest.approx(expected, abs=1e-5)
        assert not any(parameter.requires_grad for parameter in reward.reader.model.parameters())


def test_it_agrees_with_the_adapter_on_the_policys_base(saved, episodes, tmp_path):
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path / "base", peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        reward_adapter=tmp_path / "adapter",
    )  # fmt: skip
    ours = run_sync(ModelReward(tmp_path / "adapter", append_eos=False)(episodes))
    assert run_sync(AdapterReward(policy)(episodes)) == pytest.approx(ours, abs=1e-5)


def test_what_is_no_reward_model(tokenizer, saved, tmp_path):
    with pytest.raises(
        ModelError, match="a model of another kind, LlamaForCausalLM; expected one that scores"
    ):
        ModelReward(tmp_path / "base")
    with pytest.raises(ModelError, match="scores tokens; ModelReward takes models that score sequences"):
        ModelReward(make("Llama", "TokenClassification", len(tokenizer)), tokenizer)
    with pytest.raises(ModelError, match="has 3 labels; expected one"):
        ModelReward(make("Llama", "SequenceClassification", num_labels=3), tokenizer)
    with pytest.raises(ModelError, match="without its tokenizer"):
        ModelReward(saved)
    for settings in ({"read": "words"}, {"batch_size": 0}, {"max_length": 0}, {"weight": float("nan")}):
        with pytest.raises(ConfigError):
            ModelReward(saved, tokenizer, **settings)


def test_scores_that_are_no_numbers(tokenizer, episodes):
    model = make("Llama", "SequenceClassification", len(tokenizer))
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    with pytest.raises(RewardError, match="'reward_model' returned nan"):
        run_sync(ModelReward(model, tokenizer)(episodes))
    with pytest.raises(RewardError, match="text 1 has no token to score"):
        ModelReward(make("Llama", "SequenceClassification"), tokenizer, append_eos=False).score_texts(
            ["a", ""]
        )
