import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import ConfigError, DataError, RewardError
from etude.math.advantages import gae

NUMBERS = st.floats(-10, 10)
FACTORS = st.floats(0, 1)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def padded_rows(draw):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 7))

    def table(element):
        row = st.lists(element, min_size=length, max_size=length)
        return draw(st.lists(row, min_size=rows, max_size=rows))

    mask = table(st.booleans())
    rewards = [[r * m for r, m in zip(*pair, strict=True)] for pair in zip(table(NUMBERS), mask, strict=True)]
    bootstrap = draw(st.none() | st.lists(NUMBERS, min_size=rows, max_size=rows))
    return rewards, table(NUMBERS), mask, bootstrap


def gae_by_definition(rewards, values, mask, gamma, lam, bootstrap):
    """The double sum of eq. 16 over one row's sampled tokens, after cutting out all others."""
    sampled = [t for t, m in enumerate(mask) if m]
    following = [values[t] for t in sampled[1:]] + [bootstrap]
    deltas = [rewards[t] + gamma * v - values[t] for t, v in zip(sampled, following, strict=False)]
    advantages = [0.0] * len(mask)
    for k, t in enumerate(sampled):
        advantages[t] = sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas[k:]))
    return advantages


def test_unsampled_tokens_are_skipped():
    # Sampled: V = .5, .2 and r = 0, 1. δ_1 = 1 − .2 = .8; δ_0 = 0 + .2 − .5 = −.3; A_0 = −.3 + .95·.8 = .46.
    # Running through the two tokens between them would give .3664.
    advantages_BT, returns_BT = gae(
        f64([[0, 0, 0, 1]]), f64([[0.5, 0.4, 0.3, 0.2]]), torch.tensor([[1, 0, 0, 1]]), gamma=1.0, lam=0.95
    )
    torch.testing.assert_close(advantages_BT, f64([[0.46, 0, 0, 0.8]]))
    torch.testing.assert_close(returns_BT, f64([[0.46 + 0.5, 0, 0, 0.8 + 0.2]]))


def test_discount_and_bootstrap_by_hand():
    # γ = .5, λ = .5, V = 1, 2 and 4 after the end; r = 3, 1.
    # δ_1 = 1 + .5·4 − 2 = 1; δ_0 = 3 + .5·2 − 1 = 3; A_0 = 3 + .25·1 = 3.25. Padding comes after.
    advantages_BT, returns_BT = gae(
        f64([[3, 1, 0]]),
        f64([[1, 2, 9]]),
        torch.tensor([[True, True, False]]),
        gamma=0.5,
        lam=0.5,
        bootstrap_B=f64([4]),
    )
    torch.testing.assert_close(advantages_BT, f64([[3.25, 1, 0]]))
    torch.testing.assert_close(returns_BT, f64([[4.25, 3, 0]]))


@settings(deadline=None)
@given(rows=padded_rows(), gamma=FACTORS, lam=FACTORS)
def test_against_the_definition(rows, gamma, lam):
    rewards, values, mask, bootstrap = rows
    bootstrap_B = None if bootstrap is None else f64(bootstrap)
    advantages_BT, returns_BT = gae(
        f64(rewards), f64(values), torch.tensor(mask), gamma=gamma, lam=lam, bootstrap_B=bootstrap_B
    )
    after = bootstrap or [0.0] * len(mask)
    for b in range(len(mask)):
        expected = gae_by_definition(rewards[b], values[b], mask[b], gamma, lam, after[b])
        assert advantages_BT[b].tolist() == pytest.approx(expected, abs=1e-9)
        returns = [(a + v) * m for a, v, m in zip(expected, values[b], mask[b], strict=True)]
        assert returns_BT[b].tolist() == pytest.approx(returns, abs=1e-9)


@settings(deadline=None)
@given(rows=padded_rows(), gamma=FACTORS)
def test_lambda_one_is_the_discounted_return(rows, gamma):
    rewards, values, mask, bootstrap = rows
    after = bootstrap or [0.0] * len(mask)
    _, returns_BT = gae(
        f64(rewards), f64(values), torch.tensor(mask), gamma=gamma, lam=1.0, bootstrap_B=f64(after)
    )
    for b in range(len(mask)):
        expected, tail = [0.0] * len(mask[b]), after[b]
        for t in reversed(range(len(mask[b]))):
            if mask[b][t]:
                expected[t] = tail = rewards[b][t] + gamma * tail
        assert returns_BT[b].tolist() == pytest.approx(expected, abs=1e-9)


def test_what_is_not_sampled_does_not_matter():
    mask_BT = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    rewards_BT = f64([[0, 0.5, 0, 1, 0], [0, 0, 0, 0, 0]])
    values_BT = torch.where(mask_BT.bool(), 0.3, float("nan")).double()
    bootstrap_B = f64([0.0, 7.0])
    for tensor in gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.9, bootstrap_B=bootstrap_B):
        assert tensor.isfinite().all()
        assert (tensor[~mask_BT.bool()] == 0).all()
        assert (tensor[0, [1, 3]] != 0).all()


def test_no_gradient_and_at_least_float32():
    values_BT = torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16, requires_grad=True)
    for tensor in gae(torch.ones(1, 2), values_BT, torch.ones(1, 2), gamma=0.99, lam=0.95):
        assert not tensor.requires_grad
        assert tensor.dtype == torch.float32


def test_a_reward_that_would_be_lost_is_an_error():
    rewards_BT = torch.tensor([[0.0, 0, 0], [0, 0, 2]])
    with pytest.raises(RewardError, match="row 1 has a reward of 2 at position 2"):
        gae(rewards_BT, torch.zeros(2, 3), torch.tensor([[1, 1, 1], [1, 1, 0]]), gamma=1.0, lam=1.0)


@pytest.mark.parametrize(("gamma", "lam"), [(1.1, 0.9), (-0.1, 0.9), (0.9, 1.1), (0.9, float("nan"))])
def test_factors_lie_between_zero_and_one(gamma, lam):
    with pytest.raises(ConfigError, match=r"expected a number in \[0, 1\]"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), gamma=gamma, lam=lam)


def test_shapes_must_fit():
    ones = torch.ones(2, 3)
    with pytest.raises(DataError, match="shapes differ"):
        gae(ones, ones[:, :2], ones, gamma=1.0, lam=1.0)
    with pytest.raises(DataError, match=r"\[rows, tokens\]"):
        gae(ones[0], ones[0], ones[0], gamma=1.0, lam=1.0)
    with pytest.raises(DataError, match=r"bootstrap has shape \(3,\)"):
        gae(ones, ones, ones, gamma=1.0, lam=1.0, bootstrap_B=torch.ones(3))
