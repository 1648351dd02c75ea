import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import ConfigError, DataError
from etude.math.kl import AdaptiveKLController, FixedKLController, best_of_n_kl, kl_estimate, kl_full

VOCABULARY = 5
LOGITS = st.lists(st.floats(-8, 8), min_size=VOCABULARY, max_size=VOCABULARY)


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_estimates_by_hand():
    # π = 1/2, π_ref = 1/8: d = log 4, r = π_ref/π = 1/4. Swapped: d = −log 4, r = 4.
    logprobs, ref = f64([1 / 2, 1 / 8]).log(), f64([1 / 8, 1 / 2]).log()
    d = math.log(4)
    expected = {"k1": [d, -d], "k2": [d * d / 2] * 2, "k3": [1 / 4 - 1 + d, 4 - 1 - d], "abs": [d, d]}
    for kind, values in expected.items():
        torch.testing.assert_close(kl_estimate(logprobs, ref, kind), f64(values))
    for old_name, kind in (("kl", "k1"), ("mse", "k2")):
        assert kl_estimate(logprobs, ref, old_name).equal(kl_estimate(logprobs, ref, kind))


@settings(deadline=None)
@given(LOGITS, LOGITS)
def test_expectations_by_enumeration(logits, ref_logits):
    # E over all tokens of the vocabulary, weighted by π: no sampling, so no noise.
    logprobs, ref = f64(logits).log_softmax(-1), f64(ref_logits).log_softmax(-1)
    p = logprobs.exp()
    exact = kl_full(f64(logits), f64(ref_logits)).item()
    assert exact == pytest.approx(math.fsum((p * (logprobs - ref)).tolist()), abs=1e-9)
    for kind in ("k1", "k3"):
        assert (p * kl_estimate(logprobs, ref, kind)).sum().item() == pytest.approx(exact, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(LOGITS, LOGITS)
def test_expected_gradients_by_enumeration(logits, ref_logits):
    ref = f64(ref_logits).log_softmax(-1)

    def gradient(loss_of):
        leaf = f64(logits).requires_grad_()
        loss_of(leaf).backward()
        return leaf.grad

    def expected_loss(kind):
        # Tokens are drawn from π, and the draw has no gradient: its weights are detached.
        def loss(leaf):
            logprobs = leaf.log_softmax(-1)
            return (logprobs.exp().detach() * kl_estimate(logprobs, ref, kind)).sum()

        return loss

    forward = gradient(lambda leaf: kl_full(leaf, ref))
    reverse = gradient(lambda leaf: kl_full(ref, leaf))
    close = {"atol": 1e-9, "rtol": 1e-7}
    torch.testing.assert_close(gradient(expected_loss("k1")), torch.zeros(VOCABULARY).double(), **close)
    torch.testing.assert_close(gradient(expected_loss("k2")), forward, **close)
    torch.testing.assert_close(gradient(expected_loss("k3")), reverse, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative(dtype):
    # exp(−d) − 1 + d, as the formula stands, is negative for 30 % of these in float32.
    size = torch.logspace(-12, 2, 20_001, dtype=torch.float64)
    difference = torch.cat([size, -size, torch.zeros(1)]).to(dtype)
    k3 = kl_estimate(difference, torch.zeros_like(difference), "k3")
    assert (k3 >= 0).all()
    assert ((torch.exp(-difference) - 1 + difference) < 0).any()
    small = torch.tensor([1e-3, -1e-3], dtype=dtype)  # d²/2 ∓ d³/6
    expected = torch.tensor([5e-7 - 1e-9 / 6, 5e-7 + 1e-9 / 6], dtype=dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(
        kl_estimate(small, torch.zeros(2, dtype=dtype), "k3"), expected, atol=0, rtol=tolerance
    )


def test_k3_gradient_by_hand():
    # d k3 / d log π = 1 − exp(−d): 1 − 1/4 at d = log 4, 0 at d = 0, 1 − 4 at d = −log 4.
    logprobs = f64([math.log(4), 0.0, -math.log(4)]).requires_grad_()
    kl_estimate(logprobs, torch.zeros(3).double(), "k3").sum().backward()
    torch.testing.assert_close(logprobs.grad, f64([0.75, 0.0, -3.0]))


def test_full_by_hand():
    # π = (1/2, 1/2), π_ref = (1/4, 3/4): ½ log 2 + ½ log(2/3).
    logits_TV = f64([[1.0, 1.0], [1.0, 3.0]]).log()
    ref_TV = f64([[1.0, 3.0], [1.0, 3.0]]).log()
    expected = f64([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0])
    torch.testing.assert_close(kl_full(logits_TV, ref_TV), expected)
    # At temperature 1/2 the reference is (1, 9)/10: ½ log 5 + ½ log(5/9).
    expected = f64([0.5 * math.log(5) + 0.5 * math.log(5 / 9), 0.0])
    torch.testing.assert_close(kl_full(logits_TV, ref_TV, temperature=0.5), expected)


@settings(deadline=None)
@given(LOGITS, LOGITS, st.floats(-1e-6, 1e-6))
def test_full_is_never_negative(logits, ref_logits, nudge):
    logits, ref_logits = torch.tensor(logits), torch.tensor(ref_logits)
    assert kl_full(logits, ref_logits).item() >= 0
    assert kl_full(logits, logits + nudge * ref_logits).item() >= 0


def test_full_of_excluded_tokens():
    excluded = f64([0.0, 0.0, -math.inf]).requires_grad_()
    everything = f64([0.0, 0.0, 0.0])
    kl = kl_full(excluded, everything)
    assert kl.item() == pytest.approx(math.log(3 / 2))
    kl.backward()
    assert excluded.grad.isfinite().all()
    assert kl_full(excluded, excluded).item() == 0
    assert kl_full(everything, excluded).item() == math.inf


def test_full_is_computed_in_float32():
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    kl = kl_full(logits, logits.flip(-1))
    assert kl.dtype == torch.float32
    torch.testing.assert_close(
        kl.double(), kl_full(logits.double(), logits.double().flip(-1)), atol=1e-6, rtol=0
    )


def test_errors():
    x, shorter = torch.zeros(3), torch.zeros(2)
    with pytest.raises(ConfigError, match="use kl_full"):
        kl_estimate(x, x, "full")
    with pytest.raises(DataError, match="shapes differ"):
        kl_estimate(x, shorter, "k1")
    with pytest.raises(DataError, match="shapes differ"):
        kl_full(x, shorter)
    with pytest.raises(ConfigError, match="temperature is 0"):
        kl_full(x, x, temperature=0)


def test_fixed_controller():
    controller = FixedKLController(0.1)
    controller.update(current=100.0, n_samples=256)
    assert controller.value == 0.1


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 50 / 100)),  # a tenth above: e = .1
        (60.0, 0.2 * (1 + 0.2 * 50 / 100)),  # far above: clipped to .2
        (0.0, 0.2 * (1 - 0.2 * 50 / 100)),  # far below: clipped to −.2
        (-3.0, 0.2 * (1 - 0.2 * 50 / 100)),  # k1 can be negative
    ],
)
def test_adaptive_controller_by_hand(kl, expected):
    controller = AdaptiveKLController(0.2, target=6.0, horizon=100)
    controller.update(kl, n_samples=50)
    assert controller.value == pytest.approx(expected)


def test_adaptive_controller_finds_the_coefficient():
    # A policy whose KL is 1/β: the only rest point is β = 1/target.
    controller = AdaptiveKLController(1.0, target=5.0, horizon=100)
    for _ in range(200):
        controller.update(1 / controller.value, n_samples=20)
    assert controller.value == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(
    "make", [lambda value: FixedKLController(value), lambda value: AdaptiveKLController(value, 6.0, 100)]
)
def test_controller_state_round_trip(make):
    controller = make(0.25)
    controller.update(9.0, n_samples=10)
    resumed = make(1.0)
    resumed.load_state_dict(controller.state_dict())
    for each in (controller, resumed):
        each.update(3.0, n_samples=10)
    assert resumed.value == controller.value


def test_adaptive_controller_errors():
    for target, horizon in ((0, 100), (6, 0), (-1, 100), (math.nan, 100)):
        with pytest.raises(ConfigError, match="expected a number > 0"):
            AdaptiveKLController(0.2, target, horizon)
    controller = AdaptiveKLController(0.2, target=6.0, horizon=100)
    with pytest.raises(DataError, match="NaN"):
        controller.update(math.nan, n_samples=10)
    with pytest.raises(ConfigError, match="horizon is 100 for batches of 500"):
        controller.update(0.0, n_samples=500)
    assert controller.value == 0.2


def test_best_of_n_by_hand():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(0.6931472 - 1 / 2)
    assert best_of_n_kl(4) == pytest.approx(1.3862944 - 3 / 4)
    with pytest.raises(ConfigError, match="n is 0"):
        best_of_n_kl(0)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.integers(1, 8))
def test_best_of_n_bounds_the_exact_kl(weights, n):
    """Answers in order of their score: the best of n is answer i or worse with probability F(i)^n."""
    p = f64(weights) / math.fsum(weights)
    below = p.cumsum(0)
    best = below**n - (below - p) ** n
    exact = (best * (best / p).log()).nan_to_num(0.0).sum().item()
    assert exact <= best_of_n_kl(n) + 1e-9


def test_best_of_n_is_reached_where_answers_are_rare():
    p = torch.full((100_000,), 1e-5, dtype=torch.float64)
    below = p.cumsum(0)
    best = below**4 - (below - p) ** 4
    assert (best * (best / p).log()).sum().item() == pytest.approx(best_of_n_kl(4), abs=1e-3)
