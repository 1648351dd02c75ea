"""Episodes as trajectories, and trajectories end to end."""

import pytest
import torch

from etude.data.batch import PackedBatch, Trajectory
from etude.errors import DataError
from etude.types import Episode, NamedReward, Segment, StopReason


def episode(stop: StopReason) -> Episode:
    built = Episode()
    built.append(Segment("prompt", "p", [10, 11]))
    built.append(Segment("model", "m", [12, 13], logprobs=[-1.0, -2.0], policy_version=0))
    built.append(Segment("tool", "t", [14]))
    built.append(Segment("model", "m", [15], logprobs=[-3.0], policy_version=0))
    built.rewards.append(NamedReward("r", 2.0))
    built.stop = stop
    return built


def test_an_episode_by_its_stop_reason():
    done = Trajectory.of_episode(episode(StopReason.SUBMITTED))
    assert done.sampled.tolist() == [2, 3, 5]
    assert (done.score, done.bootstrap, done.prompt_length) == (2.0, False, 2)
    assert done.sampler_logprobs.tolist() == [-1.0, -2.0, -3.0]

    interrupted = Trajectory.of_episode(episode(StopReason.WALL_CLOCK))
    assert interrupted.bootstrap
    assert interrupted.sampled.tolist() == [2, 3, 5]

    failed = Trajectory.of_episode(episode(StopReason.INFRASTRUCTURE))
    assert failed.score == 0.0
    assert len(failed.sampled) == 0


def test_a_response_with_a_mask():
    trajectory = Trajectory.of_response(
        torch.tensor([1, 2]), torch.tensor([3, 4, 5]), 1.0, torch.tensor([1, 0, 1])
    )
    assert trajectory.sampled.tolist() == [2, 4]
    with pytest.raises(DataError, match="3 tokens and its mask 2"):
        Trajectory.of_response(torch.tensor([1]), torch.tensor([3, 4, 5]), 1.0, torch.tensor([1, 0]))
    with pytest.raises(DataError, match="give the model a prompt"):
        Trajectory.of_response(torch.tensor([], dtype=torch.long), torch.tensor([3]), 1.0)


def test_packing_by_hand():
    a = Trajectory.of_episode(episode(StopReason.SUBMITTED))  # tokens 10 … 15, sampled at 2, 3, 5
    b = Trajectory(torch.tensor([20, 21, 22]), torch.tensor([2]), 0.0, bootstrap=True)
    c = Trajectory(torch.tensor([30]), torch.tensor([], dtype=torch.long), 0.0)
    batch = PackedBatch.of([a, b, c])
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 14, 15, 20, 21, 22, 30]
    assert batch.lengths == [6, 3, 1]
    assert batch.states.tolist() == [1, 2, 4, 6 + 1]
    assert batch.targets.tolist() == [12, 13, 15, 22]
    assert batch.last_states.tolist() == [6 + 2]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert batch.unpack(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]


def test_a_batch_without_a_sampled_token():
    batch = PackedBatch.of([Trajectory(torch.tensor([1, 2]), torch.tensor([], dtype=torch.long), 0.0)])
    assert batch.mask.shape == (1, 0)
    assert batch.unpack(torch.zeros(0)).shape == (1, 0)


def test_a_common_beginning_lies_there_once():
    prompt = torch.arange(100, 120)
    a = Trajectory(torch.cat([prompt, torch.tensor([1, 2])]), torch.tensor([20, 21]), 0.0, bootstrap=True)
    b = Trajectory(torch.cat([prompt, torch.tensor([3])]), torch.tensor([19, 20]), 0.0)
    c = Trajectory(torch.tensor([8, 9]), torch.tensor([1]), 0.0)
    batch = PackedBatch.of([a, c, b], share=True)
    plain = PackedBatch.of([a, c, b])
    assert sorted(batch.lengths) == [1, 2, 2, 20]
    assert plain.lengths == [22, 2, 21]
    before = {"states": [119, 1, 8, 118, 119], "last_states": [2]}  # the tokens that lie there
    for name, tokens in before.items():
        assert batch.input_ids[getattr(batch, name)].tolist() == tokens
        assert plain.input_ids[getattr(plain, name)].tolist() == tokens
    assert batch.states[0] == batch.states[-1], "asked for by both"
    assert batch.targets.tolist() == [1, 2, 9, 119, 3]
    assert torch.equal(batch.mask, plain.mask)


def read_episode() -> Episode:
    """An encoder read 30 … 32; its decoder began with 2, 3, said 12, 13, was told 14 and said 15."""
    built = Episode()
    built.append(Segment("prompt", "p", [30, 31, 32], encoder=True))
    built.append(Segment("environment", "", [2, 3]))
    built.append(Segment("model", "m", [12, 13], logprobs=[-1.0, -2.0], policy_version=0))
    built.append(Segment("tool", "t", [14]))
    built.append(Segment("model", "m", [15], logprobs=[-3.0], policy_version=0))
    built.rewards += [NamedReward("early", 0.5, position=6), NamedReward("late", 2.0)]
    built.stop = StopReason.SUBMITTED
    return built


def test_an_encoder_decoder_s_episode():
    """Its source lies apart; positions, of rewards too, count what its decoder read and wrote."""
    played = read_episode()
    assert played.token_ids[6] == 13
    trajectory = Trajectory.of_episode(played)
    assert trajectory.source_ids.tolist() == [30, 31, 32]
    assert trajectory.token_ids.tolist() == [2, 3, 12, 13, 14, 15]
    assert trajectory.sampled.tolist() == [2, 3, 5]
    assert trajectory.sampler_logprobs.tolist() == [-1.0, -2.0, -3.0]
    assert [reward.position for reward in trajectory.rewards] == [3, None]
    assert [reward.position for reward in played.rewards] == [6, None], "the episode's own are as they were"
    assert trajectory.early_rewards == {1: 0.5}
    assert (trajectory.query_length, trajectory.response_length, trajectory.score) == (3, 6, 2.5)


def test_an_encoder_decoder_s_response():
    query, response = torch.tensor([30, 31]), torch.tensor([2, 3, 12, 13])
    plain = Trajectory.of_response(query, response, 1.0, starts=[(2,)])
    assert plain.source_ids.tolist() == [30, 31]
    assert plain.token_ids.tolist() == [2, 3, 12, 13]
    assert plain.sampled.tolist() == [1, 2, 3]
    assert (plain.query_length, plain.response_length) == (2, 4)
    # Neither is what was forced after the start token, unless a mask says that it was sampled.
    assert Trajectory.of_response(query, response, 1.0, starts=[(7,), (2, 3)]).sampled.tolist() == [2, 3]
    assert Trajectory.of_response(query, response, 1.0, starts=[(2, 5)]).sampled.tolist() == [1, 2, 3]
    masked = Trajectory.of_response(query, response, 1.0, torch.tensor([1, 1, 0, 1]), [(2, 3)])
    assert masked.sampled.tolist() == [1, 3]
    assert Trajectory.of_response(query, response[:1], 1.0, starts=[(2, 3)]).sampled.tolist() == []


@pytest.mark.parametrize("response", [[12, 13], []])
def test_a_response_without_its_start_token(response):
    found = "token 12" if response else "nothing"
    with pytest.raises(DataError, match=f"begins with {found}; expected the decoder's start token, 2 or 7"):
        Trajectory.of_response(
            torch.tensor([30]), torch.tensor(response, dtype=torch.long), 1.0, starts=[(2, 3), (7,)]
        )


def test_each_source_once_and_nothing_of_what_follows_it_shared():
    start = torch.arange(40)  # long enough to be shared, if it were a decoder's

    def answer(source, *tokens):
        ids = torch.cat([start, torch.tensor(tokens)])
        return Trajectory(ids, torch.tensor([40]), 0.0, source_ids=torch.tensor(source))

    batch = PackedBatch.of([answer([5, 6], 1), answer([7], 2, 3), answer([5, 6], 1)], share=True)
    assert batch.sources.ids.tolist() == [5, 6, 7]
    assert batch.sources.lengths == [2, 1]
    assert batch.sources.rows.tolist() == [0, 1, 0]
    assert batch.lengths == [41, 42, 41]
    assert batch.prefixes == [None] * 3
    assert batch.states.tolist() == [39, 41 + 39, 83 + 39]
    assert PackedBatch.of([Trajectory(start, torch.tensor([3]), 0.0)]).sources is None


def test_sources_for_some_only():
    one = Trajectory(torch.tensor([2, 3]), torch.tensor([1]), 0.0, source_ids=torch.tensor([9]))
    other = Trajectory(torch.tensor([2, 3]), torch.tensor([1]), 0.0)
    with pytest.raises(DataError, match="1 of 2 trajectories have source_ids"):
        PackedBatch.of([one, other])
    with pytest.raises(DataError, match="an encoder was given no token to read"):
        Trajectory(torch.tensor([2, 3]), torch.tensor([1]), 0.0, source_ids=torch.tensor([]))
