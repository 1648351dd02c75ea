import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import ConfigError, DataError
from etude.math.logprobs import entropy, token_logprobs

LOGITS = st.lists(st.lists(st.floats(-50, 50), min_size=4, max_size=4), min_size=1, max_size=5)
TEMPERATURES = st.floats(0.2, 5.0)


def softmax_by_hand(row, temperature=1.0):
    exponentials = [math.exp(logit / temperature) for logit in row]
    return [x / math.fsum(exponentials) for x in exponentials]


def test_token_logprobs_by_hand():
    # Logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8.
    logits_TV = torch.tensor([[1.0, 2.0, 5.0]] * 3, dtype=torch.float64).log()
    expected = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64).log()
    torch.testing.assert_close(token_logprobs(logits_TV, torch.arange(3)), expected)
    # At temperature 1/2 the weights are squared: 1, 4, 25 out of 30.
    expected = torch.tensor([1 / 30, 4 / 30, 25 / 30], dtype=torch.float64).log()
    torch.testing.assert_close(token_logprobs(logits_TV, torch.arange(3), temperature=0.5), expected)


@settings(deadline=None)
@given(rows=LOGITS, temperature=TEMPERATURES, data=st.data())
def test_token_logprobs_against_plain_python(rows, temperature, data):
    tokens = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    ours = token_logprobs(torch.tensor(rows, dtype=torch.float64), torch.tensor(tokens), temperature)
    for row, token, logprob in zip(rows, tokens, ours.tolist(), strict=True):
        expected = row[token] / temperature - math.log(math.fsum(math.exp(x / temperature) for x in row))
        assert logprob == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert logprob <= 0


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_any_leading_shape(shape):
    torch.manual_seed(0)
    logits, ids = torch.randn(*shape, 7, dtype=torch.float64), torch.randint(7, shape)
    ours = token_logprobs(logits, ids)
    assert ours.shape == entropy(logits).shape == torch.Size(shape)
    flat = logits.reshape(-1, 7).log_softmax(-1)[torch.arange(ids.numel()), ids.flatten()]
    torch.testing.assert_close(ours.flatten(), flat)


@pytest.mark.parametrize(
    ("dtype", "computed_in"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_of_the_computation(dtype, computed_in):
    torch.manual_seed(0)
    logits_TV, ids_T = (5 * torch.randn(4, 1000)).to(dtype), torch.randint(1000, (4,))
    exact = token_logprobs(logits_TV.double(), ids_T)
    ours = token_logprobs(logits_TV, ids_T)
    assert ours.dtype == entropy(logits_TV).dtype == computed_in
    # Rounding the input is not our doing: given the same numbers we are within float32 of float64.
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy(logits_TV).double(), entropy(logits_TV.double()), atol=1e-5, rtol=0)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 1e4, -1e4]])
    assert token_logprobs(logits, torch.tensor([0])).item() == pytest.approx(-math.log(2), abs=1e-3)
    assert token_logprobs(logits, torch.tensor([2])).item() == pytest.approx(-2e4 - math.log(2), rel=1e-6)
    assert entropy(logits).item() == pytest.approx(math.log(2), abs=1e-3)


def test_gradient_is_one_hot_minus_softmax():
    # d log π(i) / d logit_j = (1[i = j] − π(j)) / temperature, π = (1, 4, 25)/30 at temperature 1/2.
    logits_TV = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log().requires_grad_()
    token_logprobs(logits_TV, torch.tensor([1]), temperature=0.5).sum().backward()
    expected = torch.tensor([[-1 / 30, 1 - 4 / 30, -25 / 30]], dtype=torch.float64) / 0.5
    torch.testing.assert_close(logits_TV.grad, expected)


def test_entropy_by_hand():
    logits = torch.tensor([[1.0, 1.0, 2.0], [3.0, 3.0, 3.0]], dtype=torch.float64).log()
    # (1/4, 1/4, 1/2): 2 · ¼ log 4 + ½ log 2 = 1.5 log 2. Uniform over three: log 3.
    expected = torch.tensor([1.5 * math.log(2), math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(entropy(logits), expected)


@settings(deadline=None)
@given(rows=LOGITS, temperature=TEMPERATURES)
def test_entropy_against_plain_python(rows, temperature):
    ours = entropy(torch.tensor(rows, dtype=torch.float64), temperature)
    for row, value in zip(rows, ours.tolist(), strict=True):
        expected = -math.fsum(p * math.log(p) for p in softmax_by_hand(row, temperature) if p > 0)
        assert value == pytest.approx(expected, abs=1e-9)


def test_entropy_of_excluded_tokens():
    logits = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    entropy(logits).backward()
    assert entropy(logits).item() == pytest.approx(math.log(2))
    # Two equal tokens are the maximum of the entropy over two: its gradient is 0, and not NaN.
    torch.testing.assert_close(logits.grad, torch.zeros(3, dtype=torch.float64))


def test_entropy_gradient_by_hand():
    # dH/d logit_j = −π_j (log π_j + H), and H = 1.5 log 2 for (1/4, 1/4, 1/2).
    logits = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64).log().requires_grad_()
    entropy(logits).backward()
    ln2 = math.log(2)
    expected = [-0.25 * (-2 * ln2 + 1.5 * ln2)] * 2 + [-0.5 * (-ln2 + 1.5 * ln2)]
    torch.testing.assert_close(logits.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperature_must_be_positive_and_finite(temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        token_logprobs(torch.zeros(1, 3), torch.tensor([0]), temperature)
    with pytest.raises(ConfigError, match="temperature is"):
        entropy(torch.zeros(1, 3), temperature)


def test_shapes_must_fit():
    # `gather` alone would take the first two rows and say nothing.
    with pytest.raises(DataError, match=r"\(3, 5\).*\(2,\)"):
        token_logprobs(torch.zeros(3, 5), torch.tensor([0, 1]))
