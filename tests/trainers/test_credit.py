"""Rewards at turns and tokens, by hand: where they land and what each algorithm's credit makes of them."""

import pytest
import torch
from accelerate import Accelerator

from etude.data.batch import Trajectory
from etude.math.group import process_advantages
from etude.trainers.credit import early_rewards, gae_credit, token_rewards, where_rewarded
from etude.trainers.experience import Experience
from etude.types import Episode, NamedReward, Segment, StopPolicy, StopReason


def played(rewards, stop=StopReason.SUBMITTED):
    """Prompt of 2, a turn of 2 tokens (2, 3), a tool's 2 (4, 5), a turn of 3 tokens (6, 7, 8)."""
    segments = [
        Segment("prompt", "", [1, 1]),
        Segment("model", "", [5, 6], logprobs=[-1.0, -1.5], policy_version=0),
        Segment("tool", "", [9, 9]),
        Segment("model", "", [7, 8, 9], logprobs=[-0.5, -0.7, -0.1], policy_version=0),
    ]
    return Episode(segments=segments, rewards=[NamedReward(*reward) for reward in rewards], stop=stop)


def observed(trajectories, values=None):
    longest = max(len(t.sampled) for t in trajectories)
    mask = torch.tensor([[i < len(t.sampled) for i in range(longest)] for t in trajectories])
    zeros = torch.zeros(mask.shape)
    values = zeros if values is None else torch.tensor(values)
    return Experience(
        trajectories, mask, zeros, values, zeros, zeros, torch.zeros(len(mask)), entropies=zeros.clone()
    )


# Name, value, weight, position: the turn's last token, a token of the tool's, the end.
REWARDS = [("turn", -1.0, 0.5, 3), ("tool", 0.2, 1.0, 5), ("tool", None, 1.0, 2), ("answer", 1.0, 2.0, None)]


def test_rewards_land_on_sampled_tokens() -> None:
    trajectory = Trajectory.of_episode(played(REWARDS))
    assert trajectory.score == pytest.approx(-0.5 + 0.2 + 2.0)
    assert trajectory.early_rewards == {1: pytest.approx(-0.5 + 0.2)}
    rewards = token_rewards(observed([trajectory]), torch.tensor([trajectory.score]))
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.3, 0.0, 0.0, 2.0]]))
    assert early_rewards(observed([trajectory])).tolist() == [pytest.approx([0.0, -0.3, 0.0, 0.0, 0.0])]
    assert where_rewarded(observed([trajectory])).tolist() == [[False, True, False, False, True]]


def test_without_a_terminal_reward_the_end_has_none() -> None:
    trajectory = Trajectory.of_episode(played([*REWARDS[:2], ("answer", None, 1.0, None)]))
    assert where_rewarded(observed([trajectory])).tolist() == [[False, True, False, False, False]]
    rewards = token_rewards(observed([trajectory]), torch.tensor([trajectory.score]))
    assert rewards[0, -1] == pytest.approx(0.0)


def test_stop_policies_of_a_run() -> None:
    clamped = Trajectory.of_episode(played(REWARDS), {StopReason.SUBMITTED: StopPolicy(reward="clamp")})
    assert clamped.score == 0.0
    rewards = token_rewards(observed([clamped]), torch.tensor([clamped.score]))
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.3, 0.0, 0.0, 0.3]]))
    dropped = Trajectory.of_episode(played(REWARDS), {StopReason.SUBMITTED: StopPolicy(reward="drop")})
    assert (dropped.score, dropped.rewards, dropped.compared) == (0.0, (), False)
    silent = Trajectory.of_episode(played(REWARDS), {StopReason.SUBMITTED: StopPolicy(train=False)})
    assert (len(silent.sampled), silent.compared) == (0, True)
    assert silent.score == pytest.approx(1.7)
    lost = Trajectory.of_episode(played(REWARDS, StopReason.INFRASTRUCTURE))
    assert (len(lost.sampled), lost.compared, lost.score) == (0, False, 0.0)


def test_gae_with_a_turn_reward_by_hand() -> None:
    """γ = 1, λ = 0.5, V = (.5, .4, .3, .2, .1), r = (0, −.3, 0, 0, 2) in units of the score's own."""
    trajectory = Trajectory.of_episode(played(REWARDS))
    credit = gae_credit(
        observed([trajectory], [[0.5, 0.4, 0.3, 0.2, 0.1]]),
        torch.tensor([trajectory.score / 2]),
        score_scale=2.0,
        kl_coef=0.0,
        gamma=1.0,
        lam=0.5,
        whiten_rewards=False,
        accelerator=Accelerator(cpu=True),
    )
    # δ = r_t + V_{t+1} − V_t, with r = (0, −.15, 0, 0, 1): (−.1, −.25, −.1, −.1, .9).
    a4 = 0.9
    a3 = -0.1 + 0.5 * a4
    a2 = -0.1 + 0.5 * a3
    a1 = -0.25 + 0.5 * a2
    a0 = -0.1 + 0.5 * a1
    expected = torch.tensor([[a0 + 0.5, a1 + 0.4, a2 + 0.3, a3 + 0.2, a4 + 0.1]])
    torch.testing.assert_close(credit.returns, expected)


def test_process_supervision_by_hand() -> None:
    """A group's rewards 1, 3 | 2 have mean 2 and deviation 1; the other group's are equal."""
    rewards = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 9.0], [5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    given = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    groups = torch.tensor([0, 0, 1, 1])
    advantages = process_advantages(rewards, given, groups)
    scaled = 1 / (1 + 1e-4)
    expected = [[0.0, scaled, scaled], [0.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=1e-6, rtol=0)
    plain = process_advantages(rewards, given, groups, scale="none")
    torch.testing.assert_close(plain[0], torch.tensor([0.0, 1.0, 1.0]), atol=1e-6, rtol=0)
    assert not process_advantages(rewards, torch.zeros_like(given), groups).any()
