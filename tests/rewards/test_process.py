"""A process reward model scores the steps of episodes: at their last tokens, per turn, or all together."""

import math

import pytest
import torch
from peft import LoraConfig
from scoring_models import encoder_tokenizer, make
from tests.rewards.test_model import episode
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from etude.environments.text import TextEnvironment
from etude.errors import ConfigError, ModelError, RewardError
from etude.models.reward_model import add_scoring_adapter, load_reward_model
from etude.protocols import Reward
from etude.rewards.process import ProcessReward
from etude.runtime.loop import run_sync


@pytest.fixture(params=["Llama", "Bloom"])
def model(request, tokenizer):
    return make(request.param, "TokenClassification", len(tokenizer))


def right(model, tokenizer, text):
    """The probability of the label 1 after the text's last token."""
    with torch.no_grad():
        return (
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].softmax(0)[1].item()
        )


def process(model, tokenizer, **settings):
    return ProcessReward(model, tokenizer, step_separator=".", **settings)


def test_each_step_is_scored_at_its_last_token(model, tokenizer):
    reward = process(model, tokenizer)
    assert isinstance(reward, Reward)
    assert reward.level == "token"
    played = episode(tokenizer, "how? ", ["ab.c. .de[eos]"])
    [scores] = run_sync(reward([played]))
    # One per sampled token; a blank step is none; the last one gets the separator it lacks, to be scored.
    found = {place: score for place, score in enumerate(scores) if score is not None}
    expected = {
        2: right(model, tokenizer, "how? ab."),
        4: right(model, tokenizer, "how? ab.c."),
        9: right(model, tokenizer, "how? ab.c. .de."),
    }
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(scores) == len(tokenizer("ab.c. .de[eos]")["input_ids"])


def test_each_turn_is_scored_by_its_last_step(model, tokenizer):
    reward = process(model, tokenizer, level="turn")
    played = [
        episode(tokenizer, "how? ", ["ab.cd", "e.", "f[eos]"], tool=" t. "),
        episode(tokenizer, "how? ", ["x. "]),
    ]
    expected = [
        [
            right(model, tokenizer, "how? ab.cd"),  # in the middle nothing is put that the model didn't say
            right(model, tokenizer, "how? ab.cd t. e."),
            right(model, tokenizer, "how? ab.cd t. e. t. f."),
        ],
        [right(model, tokenizer, "how? x.")],
    ]
    for found, wanted in zip(run_sync(reward(played)), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("reduce", "by_hand"),
    [
        (None, math.prod),
        ("product", math.prod),
        ("min", min),
        ("mean", lambda x: sum(x) / 3),
        ("last", lambda x: x[2]),
    ],
)
def test_an_episode_is_scored_by_all_of_its_steps(model, tokenizer, reduce, by_hand):
    reward = process(model, tokenizer, level="episode", reduce=reduce)
    texts = ["how? a.", "how? a.bc.", "how? a.bc.d."]
    expected = by_hand([right(model, tokenizer, text) for text in texts])
    played = [episode(tokenizer, "how? ", ["a.bc.d[eos]"]), episode(tokenizer, "how? ", ["[eos]"])]
    assert run_sync(reward(played)) == [pytest.approx(expected, abs=1e-5), None]


def test_rewards_sit_where_their_steps_end(tokenizer, make_llama):
    model = make("Llama", "TokenClassification", len(tokenizer))
    environment = TextEnvironment(
        make_llama(), tokenizer, rewards=[ProcessReward(model, tokenizer, step_separator="e", weight=0.5)],
        max_turns=1, generation_kwargs={"max_new_tokens": 100}, seed=0,
    )  # fmt: skip
    several = 0
    for history in environment.run([f"count to {n}" for n in range(6)])[-1]:
        played = history.episode
        for reward in played.rewards:
            assert played.sampled[reward.position]
            ids = played.token_ids[: reward.position + 1]
            if "e" not in tokenizer.decode(ids[-1]) or ids[-1] == tokenizer.eos_token_id:
                assert reward.position == len(played) - 1
                ids = [t for t in ids if t != tokenizer.eos_token_id] + tokenizer("e")["input_ids"]
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(0)[1].item()
            assert reward.value == pytest.approx(expected, abs=1e-5)
        several += len(played.rewards) > 1
    assert several


@pytest.fixture
def other_tokenizer(tokenizer):
    vocabulary = {word: i for i, word in enumerate(reversed(tokenizer.convert_ids_to_tokens(range(55))))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]", eos_token="[end]")


def test_another_tokenizer_reads_steps_in_the_text(tokenizer, other_tokenizer):
    model = make("Llama", "TokenClassification", len(other_tokenizer))
    played = [episode(tokenizer, "how? ", ["ab.cd", "e.f[eos]"], tool=" t ")]
    reward = process(model, other_tokenizer, level="turn")
    expected = [
        right(model, other_tokenizer, "how? ab.cd."),
        right(model, other_tokenizer, "how? ab.cd. t e.f."),
    ]
    assert run_sync(reward(played))[0] == pytest.approx(expected, abs=1e-5)
    assert reward.reader.read == "text"
    with pytest.raises(RewardError, match="can't say at which of the policy's tokens a step ends"):
        run_sync(process(model, other_tokenizer)(played))


def test_steps_of_messages(tokenizer, other_tokenizer):
    other_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model = make("Llama", "TokenClassification", len(other_tokenizer))
    reward = process(model, other_tokenizer, level="episode", reduce="last")
    [score] = run_sync(reward([episode(tokenizer, "how?", ["a.b"])]))
    assert reward.reader.read == "messages"
    text = "user: how?[end]\nassistant: a.b."
    assert score == pytest.approx(right(model, other_tokenizer, text), abs=1e-5)


def test_an_encoder_sees_what_follows_a_step(tokenizer):
    encoders = encoder_tokenizer()
    model = make("Bert", "TokenClassification", len(encoders))
    [score] = run_sync(
        process(model, encoders, level="episode", reduce="min")([episode(tokenizer, "h ", ["a.b"])])
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoders("h a.b.")["input_ids"]])).logits[0, [4, 6]]
    assert score == pytest.approx(logits.softmax(1)[:, 1].min().item(), abs=1e-5)


def test_steps_that_max_length_cuts_off_have_no_score(tokenizer):
    model = make("Llama", "TokenClassification", len(tokenizer))
    [scores] = run_sync(process(model, tokenizer, max_length=4)([episode(tokenizer, "h", ["a.bcd."])]))
    assert scores == [None, None, None, None, None, pytest.approx(right(model, tokenizer, "bcd."), abs=1e-5)]


def test_a_saved_adapter(tokenizer, tmp_path):
    make("GPT2", "CausalLM", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = add_scoring_adapter(
        load_reward_model(tmp_path / "base", "token", fresh=True),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    played = [episode(tokenizer, "h ", ["a.b"])]
    ours, theirs = (
        run_sync(reward(played))[0]
        for reward in (process(tmp_path / "adapter", None), process(adapted, tokenizer))
    )
    assert [s is None for s in ours] == [True, False, False]
    assert ours[1:] == pytest.approx(theirs[1:], abs=1e-5)


def test_settings_that_do_not_fit(tokenizer):
    model = make("Llama", "TokenClassification", len(tokenizer))
    with pytest.raises(ConfigError, match="reduce does nothing at level 'turn'"):
        process(model, tokenizer, level="turn", reduce="min")
    with pytest.raises(ConfigError, match="reduce is 'max'; expected one of product, min, mean, last"):
        process(model, tokenizer, level="episode", reduce="max")
    with pytest.raises(ConfigError, match="step_separator is empty"):
        ProcessReward(model, tokenizer, step_separator="")
    with pytest.raises(ConfigError, match="level"):
        process(model, tokenizer, level="step")
    with pytest.raises(ModelError, match="scores sequences; ModelReward takes"):
        process(make("Llama", "SequenceClassification", len(tokenizer)), tokenizer)
