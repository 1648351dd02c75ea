"""Episodes as trajectories, and trajectories end to end."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from etude.data.batch import PackedBatch, Trajectory, within_tokens
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


@given(lengths=st.lists(st.integers(1, 40), max_size=12), limit=st.none() | st.integers(1, 60))
def test_groups_within_a_budget_of_tokens(lengths, limit):
    trajectories = [Trajectory(torch.zeros(n, dtype=torch.long), torch.tensor([]), 0.0) for n in lengths]
    indices = list(reversed(range(len(lengths))))
    groups = within_tokens(trajectories, indices, limit)
    assert [i for group in groups for i in group] == indices
    assert all(groups)
    if limit is None:
        assert len(groups) <= 1
        return
    tokens = [sum(lengths[i] for i in group) for group in groups]
    assert all(n <= limit or len(group) == 1 for n, group in zip(tokens, groups, strict=True))
    following = [lengths[group[0]] for group in groups[1:]]
    assert all(n + more > limit for n, more in zip(tokens, following, strict=False)), "no group ends early"
