import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.errors import ConfigError, DataError
from etude.math.off_policy import importance_weights

# Ratios by token: 2, 4, 1/2 (product 4) and 1, 1/2 (product 1/2), then no token.
RATIOS = torch.tensor([[2.0, 4.0, 0.5], [1.0, 0.5, 77.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
SAMPLER = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.5, -2.5]])
NOW = SAMPLER + RATIOS.log()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
        ("token_truncate", [[2.0, 3.0, 0.5], [1.0, 0.5, 1.0]]),
        ("token_mask", [[2.0, 0.0, 0.5], [1.0, 0.5, 1.0]]),
        ("sequence_truncate", [[3.0, 3.0, 3.0], [0.5, 0.5, 1.0]]),
        ("sequence_mask", [[0.0, 0.0, 0.0], [0.5, 0.5, 1.0]]),
    ],
)
def test_weights_by_hand(mode: str, expected: list[list[float]]) -> None:
    weights = importance_weights(NOW, SAMPLER, MASK, mode=mode, cap=3.0)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_on_policy_all_weights_are_one(mode: str) -> None:
    assert torch.equal(importance_weights(NOW, NOW, MASK, mode=mode, cap=1.0), torch.ones(2, 3))


def test_what_is_masked_may_hold_anything() -> None:
    now = NOW.clone()
    now[1, 2] = math.nan
    weights = importance_weights(now, SAMPLER, MASK, mode="sequence_truncate", cap=3.0)
    assert weights[1].tolist() == pytest.approx([0.5, 0.5, 1.0])


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(1, 5))
def test_weights_never_pass_the_cap(moved: list[float], cap: float) -> None:
    now = torch.tensor([moved], dtype=torch.float64)
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        weights = importance_weights(now, torch.zeros_like(now), torch.ones_like(now), mode=mode, cap=cap)
        assert weights.max() <= cap
        assert weights.min() >= 0


def test_unbiased_estimate_under_the_policy() -> None:
    # E_sampler[w f] = E_policy[f] while nothing is bounded.
    policy, sampler = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    worth = torch.tensor([1.0, -2.0, 3.0])
    weights = importance_weights(
        policy.log()[:, None], sampler.log()[:, None], torch.ones(3, 1), mode="token_truncate", cap=10.0
    )[:, 0]
    assert (sampler * weights * worth).sum().item() == pytest.approx((policy * worth).sum().item())


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"cap is 0\.5; expected a number >= 1"):
        importance_weights(NOW, SAMPLER, MASK, mode="token_mask", cap=0.5)
    with pytest.raises(ConfigError, match="mode is 'both'; expected one of none, token_truncate"):
        importance_weights(NOW, SAMPLER, MASK, mode="both", cap=2.0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="shapes differ"):
        importance_weights(NOW, SAMPLER[:1], MASK, mode="token_mask", cap=2.0)
