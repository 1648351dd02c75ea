import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import ConfigError, DataError
from etude.math.losses import (
    aggregate,
    cispo_loss,
    clipped_policy_loss,
    clipped_value_loss,
    reinforce_loss,
    sequence_policy_loss,
)

NUMBERS = st.floats(-5, 5)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_policy_loss_by_hand():
    # Ratios 1.5 and .5 with advantages of both signs, clip .2:
    #   A = +2, ρ = 1.5: max(−3, −2·1.2 = −2.4) = −2.4, clipped     A = +2, ρ = .5: max(−1, −1.6) = −1
    #   A = −2, ρ = 1.5: max(3, 2.4) = 3                            A = −2, ρ = .5: max(1, 1.6) = 1.6, clipped
    ratios, advantages = f64([1.5, 0.5, 1.5, 0.5]), f64([2, 2, -2, -2])
    old = f64([-1.0, -2.0, -3.0, -4.0])
    logprobs = (old + ratios.log()).requires_grad_()
    loss, ratio, clipped = clipped_policy_loss(logprobs, old, advantages)
    torch.testing.assert_close(ratio, ratios)
    torch.testing.assert_close(loss.detach(), f64([-2.4, -1.0, 3.0, 1.6]))
    assert clipped.tolist() == [True, False, False, True]
    # d loss / d log π = −A ρ where nothing is clipped, else 0.
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, f64([0.0, -1.0, 3.0, 0.0]))


def test_policy_loss_on_policy_is_the_policy_gradient():
    logprobs = f64([-0.3, -2.0]).requires_grad_()
    loss, ratio, clipped = clipped_policy_loss(logprobs, logprobs, f64([1.5, -0.5]))
    assert ratio.tolist() == [1.0, 1.0]
    assert not clipped.any()
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-1.5, 0.5]


def test_policy_loss_with_two_ends():
    old = f64([0.0, 0.0, 0.0])
    logprobs = f64([1.25, 1.35, 0.75]).log()
    # Range [1 − .1, 1 + .3]: 1.25 is inside, 1.35 counts as 1.3; .75 only matters for A < 0.
    loss, _, clipped = clipped_policy_loss(logprobs, old, f64([1, 1, -1]), clip_low=0.1, clip_high=0.3)
    torch.testing.assert_close(loss, f64([-1.25, -1.3, 0.9]))
    assert clipped.tolist() == [False, True, True]


@settings(deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), NUMBERS, st.floats(0, 0.9), st.none() | st.floats(0, 2))
def test_policy_loss_against_plain_python(logprob, old, advantage, low, high):
    loss, ratio, clipped = clipped_policy_loss(
        f64([logprob]), f64([old]), f64([advantage]), clip_low=low, clip_high=high
    )
    r = math.exp(logprob - old)
    kept = min(max(r, 1 - low), 1 + (low if high is None else high))
    assert ratio.item() == pytest.approx(r)
    assert loss.item() == pytest.approx(-min(advantage * r, advantage * kept))
    assert loss.item() >= -advantage * r - 1e-9  # a pessimistic bound: never better than unclipped
    if abs(advantage * (r - kept)) > 1e-6:
        assert clipped.item() is (advantage * kept < advantage * r)


def test_value_loss_by_hand():
    # Old 1, clip .5. Towards the return but too far: V = 2, R = 3: max(1, (1.5 − 3)² = 2.25)/2, clipped.
    # Inside: V = 1.2, R = 2: .64/2. Away from the return: V = 2, R = 0: max(4, 2.25)/2, not clipped.
    values = f64([2.0, 1.2, 2.0]).requires_grad_()
    loss, clipped = clipped_value_loss(values, f64([1, 1, 1]), f64([3, 2, 0]), clip=0.5)
    torch.testing.assert_close(loss.detach(), f64([2.25 / 2, 0.64 / 2, 4 / 2]))
    assert clipped.tolist() == [True, False, False]
    loss.sum().backward()
    torch.testing.assert_close(values.grad, f64([0.0, 1.2 - 2, 2.0]))  # V − R


@settings(deadline=None)
@given(NUMBERS, NUMBERS, NUMBERS, st.none() | st.floats(0, 3))
def test_value_loss_against_plain_python(value, old, target, clip):
    loss, clipped = clipped_value_loss(f64([value]), f64([old]), f64([target]), clip=clip)
    square = (value - target) ** 2
    kept = value if clip is None else min(max(value, old - clip), old + clip)
    assert loss.item() == pytest.approx(max(square, (kept - target) ** 2) / 2, abs=1e-12)
    if abs((kept - target) ** 2 - square) > 1e-6:
        assert clipped.item() is ((kept - target) ** 2 > square)
    assert clip is not None or not clipped.item()


def test_only_the_new_policy_and_value_take_part_in_the_gradient():
    new, old, other = (torch.zeros(2, requires_grad=True) for _ in range(3))
    clipped_policy_loss(new, old, other + 1)[0].sum().backward()
    clipped_value_loss(new, old, other + 1, clip=0.2)[0].sum().backward()
    assert new.grad is not None
    assert old.grad is other.grad is None


MASK_BT = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
LOSS_BT = [[1.0, 2.0, 6.0, math.nan], [math.nan, math.inf, 5.0, 0.0], [9.0, 9.0, 9.0, 9.0]]


def test_aggregate_by_hand():
    loss_BT = f64(LOSS_BT).requires_grad_()
    token = aggregate(loss_BT, MASK_BT, mode="token")
    assert token.item() == (1 + 2 + 6 + 5) / 4
    assert aggregate(loss_BT, MASK_BT, mode="sequence").item() == ((1 + 2 + 6) / 3 + 5) / 2
    assert aggregate(loss_BT, MASK_BT, mode="constant", denominator=3 * 4).item() == 14 / 12
    assert aggregate(loss_BT, MASK_BT, mode="token", denominator=8).item() == 14 / 8
    assert aggregate(loss_BT, MASK_BT, mode="sequence", denominator=torch.tensor(4)).item() == (3 + 5) / 4
    token.backward()
    assert loss_BT.grad.tolist() == (MASK_BT / 4).tolist()


def test_sequences_weigh_the_same_and_tokens_do_not():
    loss_BT = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    aggregate(loss_BT, MASK_BT, mode="sequence").backward()
    assert loss_BT.grad.sum(-1).tolist() == pytest.approx([0.5, 0.5, 0.0])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.tuples(NUMBERS, st.booleans()), min_size=3, max_size=3), min_size=8, max_size=8
    ).filter(lambda rows: any(m for row in rows for _, m in row)),
    st.sampled_from(["token", "sequence", "constant"]),
)
def test_one_by_eight_equals_eight_by_one(rows, mode):
    loss_BT = f64([[x for x, _ in row] for row in rows])
    mask_BT = torch.tensor([[m for _, m in row] for row in rows])
    tokens_B = mask_BT.sum(-1)
    denominator = {"token": tokens_B.sum(), "sequence": (tokens_B > 0).sum(), "constant": 8 * 3}[mode]

    def loss_and_gradient(rows_per_part, denominator):
        leaf = loss_BT.clone().requires_grad_()
        parts = zip(leaf.split(rows_per_part), mask_BT.split(rows_per_part), strict=True)
        total = sum(aggregate(loss, mask, mode=mode, denominator=denominator) for loss, mask in parts)
        total.backward()
        return total.detach(), leaf.grad

    whole = loss_and_gradient(8, 24 if mode == "constant" else None)
    for rows_per_part in (1, 2, 5):
        parts = loss_and_gradient(rows_per_part, denominator)
        torch.testing.assert_close(parts, whole)


def test_a_part_without_tokens_is_zero_with_a_graph():
    # DDP waits for every parameter's gradient on every rank: 0 must come with a backward.
    loss_BT = torch.full((2, 3), math.nan, requires_grad=True)
    for mode in ("token", "sequence", "constant"):
        loss = aggregate(loss_BT, torch.zeros(2, 3), mode=mode, denominator=5)
        assert loss.item() == 0
        loss.backward()
        assert loss_BT.grad.tolist() == [[0.0] * 3] * 2


def test_aggregate_errors():
    loss_BT, nothing_BT = torch.ones(2, 3), torch.zeros(2, 3)
    with pytest.raises(ConfigError, match="mode is 'mean'; expected one of token, sequence, constant"):
        aggregate(loss_BT, loss_BT, mode="mean")
    with pytest.raises(ConfigError, match="'constant' has no denominator"):
        aggregate(loss_BT, loss_BT, mode="constant")
    for mode in ("token", "sequence"):
        with pytest.raises(DataError, match="nothing to average over"):
            aggregate(loss_BT, nothing_BT, mode=mode)
    for denominator in (0, -1.0, torch.tensor(0)):
        with pytest.raises(DataError, match="the denominator is"):
            aggregate(loss_BT, loss_BT, mode="token", denominator=denominator)
    with pytest.raises(DataError, match="shapes differ"):
        aggregate(loss_BT, torch.ones(3), mode="token")


def test_clip_ranges_and_shapes():
    x = torch.zeros(2)
    with pytest.raises(ConfigError, match=r"clip_low is -0\.1"):
        clipped_policy_loss(x, x, x, clip_low=-0.1)
    with pytest.raises(ConfigError, match=r"clip_high is -0\.1"):
        clipped_policy_loss(x, x, x, clip_high=-0.1)
    with pytest.raises(ConfigError, match="clip is -1"):
        clipped_value_loss(x, x, x, clip=-1)
    with pytest.raises(DataError, match="shapes differ"):
        clipped_policy_loss(x, x, torch.zeros(2, 2))
    with pytest.raises(DataError, match="shapes differ"):
        clipped_value_loss(x, torch.zeros(1), x, clip=None)


def test_sequence_loss_by_hand():
    # Row 0 has ratios 2 and 8: geometric mean 4, product 16. Row 1 has one token of ratio .5, then padding.
    old = f64([[-3.0, -4.0], [-2.0, float("nan")]])
    mask = torch.tensor([[1, 1], [1, 0]])
    start = f64([[2.0, 8.0], [0.5, 1.0]]).log() + old.nan_to_num()
    advantages = f64([[1.0, 1.0], [-2.0, -2.0]])
    logprobs = start.clone().requires_grad_()
    loss, ratio, clipped = sequence_policy_loss(logprobs, old, advantages, mask, clip_low=0.6, clip_high=9.0)
    torch.testing.assert_close(ratio, f64([[4.0, 4.0], [0.5, 0.5]]))
    torch.testing.assert_close(loss.detach(), f64([[-4.0, -4.0], [1.0, 1.0]]))
    assert not clipped.any()
    # d(−A ρ) / d log π_t = −A ρ / n, from each of the n tokens that the loss is given to: −A ρ of the mean.
    aggregate(loss, mask, mode="sequence").backward()
    torch.testing.assert_close(logprobs.grad, f64([[-4 / 2 / 2, -4 / 2 / 2], [1 / 2, 0]]))

    loss, ratio, clipped = sequence_policy_loss(start, old, advantages, mask, normalise=False)
    torch.testing.assert_close(ratio, f64([[16.0, 16.0], [0.5, 0.5]]))
    torch.testing.assert_close(loss, f64([[-1.2, -1.2], [1.6, 1.6]]))  # kept within 1 ± .2
    assert clipped.all()


def test_reinforce_loss_is_the_policy_gradient():
    logprobs = f64([-0.5, -2.0]).requires_grad_()
    advantages = f64([3.0, -1.0]).requires_grad_()
    loss = reinforce_loss(logprobs, advantages)
    assert loss.tolist() == [1.5, -2.0]
    loss.sum().backward()
    assert logprobs.grad.tolist() == [-3.0, 1.0]
    assert advantages.grad is None


def test_cispo_by_hand():
    # Ratios 1.5, 1.1 and .5, weights within [.8, 1.2]: the clipped tokens keep a gradient, −weight · A.
    old = f64([-1.0, -2.0, -3.0])
    logprobs = (old + f64([1.5, 1.1, 0.5]).log()).requires_grad_()
    advantages = f64([2.0, 1.0, -1.0])
    loss, ratio, clipped = cispo_loss(logprobs, old, advantages, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(ratio, f64([1.5, 1.1, 0.5]))
    weights = f64([1.2, 1.1, 0.8])
    torch.testing.assert_close(loss.detach(), -weights * advantages * logprobs.detach())
    assert clipped.tolist() == [True, False, True]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, f64([-2.4, -1.1, 0.8]))
    _, _, clipped = cispo_loss(logprobs, old, advantages)
    assert clipped.tolist() == [True, False, False], "without a lower bound"
    with pytest.raises(ConfigError, match="clip_high is -1"):
        cispo_loss(logprobs, old, advantages, clip_high=-1)
