import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.errors import ConfigError, DataError
from etude.math.preference import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    discopop_loss,
    divergence_score,
    exo_loss,
    hinge_loss,
    ipo_loss,
    nca_loss,
    power_score,
    robust_loss,
    sigmoid_loss,
    sppo_loss,
)

NUMBERS = st.floats(-20, 20)
BETAS = st.floats(0.05, 3)

# β m = 0.5 · 2 log 3 = log 3, so σ = 3/4: every number below can be worked out with a pencil.
MARGIN, BETA = 2 * math.log(3), 0.5
LOG = math.log


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(loss, *inputs):
    leaves = [f64(value).requires_grad_() for value in inputs]
    made = loss(*leaves)
    return made.item(), [gradient.item() for gradient in torch.autograd.grad(made, leaves)]


# ---- of the margin ----


@pytest.mark.parametrize(
    ("loss", "expected", "slope"),
    [
        # −log ¾; its slope is −β (1 − σ) = −½ · ¼.
        (lambda m: sigmoid_loss(m, BETA), -LOG(3 / 4), -1 / 8),
        # .9 and .1 of −log ¾ and −log ¼; slope β (σ − .9).
        (
            lambda m: sigmoid_loss(m, BETA, label_smoothing=0.1),
            -0.9 * LOG(3 / 4) - 0.1 * LOG(1 / 4),
            0.5 * (0.75 - 0.9),
        ),
        # (.9 · −log ¾ − .1 · −log ¼) / .8; slope β (−.9 · ¼ − .1 · ¾)/.8.
        (
            lambda m: robust_loss(m, BETA, label_smoothing=0.1),
            (-0.9 * LOG(3 / 4) + 0.1 * LOG(1 / 4)) / 0.8,
            0.5 * (-0.9 * 0.25 - 0.1 * 0.75) / 0.8,
        ),
        # 1 − log 3 is below 0; at β = ¼ it is 1 − ½ log 3, with slope −β.
        (lambda m: hinge_loss(m, BETA), 0.0, 0.0),
        (lambda m: hinge_loss(m, 0.25), 1 - LOG(3) / 2, -0.25),
        # 1/(2β) = 1; slope 2 (m − 1).
        (lambda m: ipo_loss(m, BETA), (2 * LOG(3) - 1) ** 2, 2 * (2 * LOG(3) - 1)),
        # KL of (¾, ¼) from (½, ½) is log 2 − H(¾). Slope: β σ (1 − σ) times the difference of the log-ratios,
        # log 3.
        (
            lambda m: exo_loss(m, BETA, label_smoothing=0.5),
            0.75 * LOG(0.75 / 0.5) + 0.25 * LOG(0.25 / 0.5),
            0.5 * 0.75 * 0.25 * LOG(3),
        ),
        # τ = 1: w = ¾, so ¼ · −log ¾ + ¾ · ⅓. Slope, times β: w′ (e^−x + log σ) − (1 − w)² − w e^−x, w′ =
        # 3/16.
        (
            lambda m: discopop_loss(m, BETA, tau=1.0),
            -LOG(3 / 4) / 4 + 1 / 4,
            0.5 * (3 / 16 * (1 / 3 + LOG(3 / 4)) - 1 / 16 - 1 / 4),
        ),
    ],
    ids=["dpo", "cdpo", "robust", "hinge past it", "hinge", "ipo", "exo", "discopop"],
)
def test_losses_of_the_margin_by_hand(loss, expected, slope):
    made, (gradient,) = value_and_gradient(loss, MARGIN)
    assert made == pytest.approx(expected, rel=1e-12)
    assert gradient == pytest.approx(slope, rel=1e-12)


def test_at_the_start_the_policy_is_its_reference():
    zero = torch.zeros(3)
    for loss in (sigmoid_loss(zero, 0.1), robust_loss(zero, 0.1, 0.2), sigmoid_loss(zero, 0.1, 0.3)):
        torch.testing.assert_close(loss, torch.full((3,), math.log(2)))
    torch.testing.assert_close(hinge_loss(zero, 0.1), torch.ones(3))
    torch.testing.assert_close(ipo_loss(zero, 0.1), torch.full((3,), 25.0))
    torch.testing.assert_close(apo_zero_loss(zero, zero, 0.1), torch.ones(3))
    torch.testing.assert_close(sppo_loss(zero, zero, 0.1), torch.full((3,), 50.0))


@settings(deadline=None)
@given(NUMBERS, BETAS, st.floats(0.01, 0.49))
def test_losses_of_the_margin_against_plain_python(m, beta, e):
    p, q = 1 / (1 + math.exp(-beta * m)), 1 / (1 + math.exp(beta * m))
    margin = f64(m)
    assert sigmoid_loss(margin, beta).item() == pytest.approx(-math.log(p))
    smooth = -(1 - e) * math.log(p) - e * math.log(q)
    assert sigmoid_loss(margin, beta, e).item() == pytest.approx(smooth)
    kl = p * math.log(p / (1 - e)) + q * math.log(q / e)
    assert exo_loss(margin, beta, e).item() == pytest.approx(kl, abs=1e-9)
    assert exo_loss(margin, beta, e).item() >= -1e-12
    assert hinge_loss(margin, beta).item() == pytest.approx(max(0, 1 - beta * m))
    w = 1 / (1 + math.exp(-beta * m / 0.5))
    blend = -(1 - w) * math.log(p) + w * math.exp(-beta * m)
    assert discopop_loss(margin, beta, tau=0.5).item() == pytest.approx(blend)


@settings(deadline=None)
@given(NUMBERS, BETAS, st.floats(0, 0.45))
def test_robust_dpo_is_unbiased_under_flipped_labels(m, beta, e):
    """What it is for: its mean over pairs of which a share ε is flipped is DPO's over right ones."""
    right, flipped = robust_loss(f64(m), beta, e), robust_loss(f64(-m), beta, e)
    mean = ((1 - e) * right + e * flipped).item()
    assert mean == pytest.approx(sigmoid_loss(f64(m), beta).item(), abs=1e-9)


def test_exo_is_smallest_where_the_policy_has_the_labels_probabilities():
    best = math.log(0.9 / 0.1) / BETA
    made, (gradient,) = value_and_gradient(lambda m: exo_loss(m, BETA, 0.1), best)
    assert made == pytest.approx(0, abs=1e-12)
    assert gradient == pytest.approx(0, abs=1e-12)


def test_discopop_stays_finite_where_its_exponential_overflows():
    for margin in (-1e4, 1e4):
        made, (gradient,) = value_and_gradient(lambda m: discopop_loss(m, 1.0), margin)
        assert math.isfinite(made)
        assert math.isfinite(gradient)


# ---- divergences ----


def test_divergence_scores_by_hand():
    """At u = π/π_ref = 4."""
    log_ratio = f64(LOG(4))
    assert divergence_score(log_ratio).item() == pytest.approx(LOG(4))
    assert divergence_score(log_ratio, "forward_kl").item() == pytest.approx(1 - 1 / 4)
    assert divergence_score(log_ratio, "js_divergence").item() == pytest.approx(LOG(8 / 5))
    # α = ½: (4^−½ − 1)/(−½) = (½ − 1)/(−½) = 1
    assert divergence_score(log_ratio, "alpha_divergence", 0.5).item() == pytest.approx(1.0)


@settings(deadline=None)
@given(st.floats(-5, 5), st.floats(-1, 2))
def test_divergence_scores_are_the_derivatives_of_the_divergences(log_u, alpha):
    """f′(u) by differentiating f, up to the constant that the margin loses."""
    functions = {
        "reverse_kl": lambda u: u * u.log() - u,
        "forward_kl": lambda u: u - u.log(),
        "js_divergence": lambda u: u * (2 * u / (u + 1)).log() + (2 / (u + 1)).log(),
    }
    if min(abs(alpha), abs(alpha - 1)) > 0.05:
        functions["alpha_divergence"] = lambda u: (u**alpha / alpha - u) / (alpha - 1)
    u = f64(math.exp(log_u)).requires_grad_()
    for kind, function in functions.items():
        (slope,) = torch.autograd.grad(function(u), u)
        assert divergence_score(f64(log_u), kind, alpha).item() == pytest.approx(slope.item(), abs=1e-9)


def test_the_alpha_divergence_has_both_kls_as_its_ends():
    log_ratio = f64([-2.0, 0.0, 3.0])
    torch.testing.assert_close(divergence_score(log_ratio, "alpha_divergence", 1.0), log_ratio)
    torch.testing.assert_close(
        divergence_score(log_ratio, "alpha_divergence", 0.0), divergence_score(log_ratio, "forward_kl")
    )
    near = divergence_score(log_ratio, "alpha_divergence", 1 - 1e-5)
    torch.testing.assert_close(near, log_ratio, atol=1e-4, rtol=0)


def test_a_large_exponent_is_bounded():
    log_ratio = torch.tensor([-500.0, 0.0], requires_grad=True)
    score = divergence_score(log_ratio, "forward_kl")
    assert score.isfinite().all()
    score.sum().backward()
    assert log_ratio.grad.tolist() == [0.0, 1.0]


def test_an_unknown_divergence():
    with pytest.raises(ConfigError, match="expected one of reverse_kl, forward_kl"):
        divergence_score(torch.zeros(2), "jensen")


def test_power_score_is_alphapos_reward():
    # p = ½, α = 2: (1 − ½^−2)/2 = −3/2
    assert power_score(f64(LOG(1 / 2)), 2.0).item() == pytest.approx(-1.5)


# ---- of both log-ratios ----

# β h_w = log 3 and β h_l = −log 4: σ = ¾ and 1/5.
CHOSEN, REJECTED = 2 * math.log(3), -2 * math.log(4)


@pytest.mark.parametrize(
    ("loss", "expected", "slopes"),
    [
        # −log ¾ − ½ log ¼ − ½ log ⅘
        (nca_loss, -LOG(3 / 4) - LOG(1 / 4) / 2 - LOG(4 / 5) / 2, (-0.25 / 2 + 0.75 / 4, 0.2 / 4)),
        (bco_loss, -LOG(3 / 4) - LOG(4 / 5), (-0.25 / 2, 0.2 / 2)),
        # 1/(2β) = 1
        (sppo_loss, (CHOSEN - 1) ** 2 + (REJECTED + 1) ** 2, (2 * (CHOSEN - 1), 2 * (REJECTED + 1))),
        # ¼ + 1/5; slopes ∓ β σ (1 − σ)
        (apo_zero_loss, 1 / 4 + 1 / 5, (-0.5 * 3 / 16, 0.5 * 4 / 25)),
        # ¾ + (1 − σ(log 12)) = ¾ + 1/13
        (apo_down_loss, 3 / 4 + 1 / 13, (0.5 * 3 / 16 - 0.5 * 12 / 169, 0.5 * 12 / 169)),
    ],
    ids=["nca", "bco", "sppo", "apo_zero", "apo_down"],
)
def test_losses_of_both_log_ratios_by_hand(loss, expected, slopes):
    made, gradients = value_and_gradient(lambda w, y: loss(w, y, BETA), CHOSEN, REJECTED)
    assert made == pytest.approx(expected, rel=1e-12)
    assert gradients == pytest.approx(slopes, rel=1e-12)


@settings(deadline=None)
@given(NUMBERS, NUMBERS, BETAS)
def test_losses_of_both_log_ratios_against_plain_python(w, y, beta):
    def s(x):
        return 1 / (1 + math.exp(-x))

    a, b = f64(w), f64(y)
    bco = -math.log(s(beta * w)) - math.log(s(-beta * y))
    assert bco_loss(a, b, beta).item() == pytest.approx(bco)
    nca = -math.log(s(beta * w)) - (math.log(s(-beta * w)) + math.log(s(-beta * y))) / 2
    assert nca_loss(a, b, beta).item() == pytest.approx(nca)
    assert apo_zero_loss(a, b, beta).item() == pytest.approx(1 - s(beta * w) + s(beta * y))
    down = s(beta * w) + 1 - s(beta * (w - y))
    assert apo_down_loss(a, b, beta).item() == pytest.approx(down)


# ---- of a batch ----


def test_aot_by_hand():
    """Policy margins (2, 0) against reference margins (1, 3): sorted, 0 − 1 and 2 − 3."""
    losses = aot_loss(f64([2.0, 0.0]), f64([1.0, 3.0]), 1.0)
    torch.testing.assert_close(losses, f64([math.log(1 + math.e)] * 2))


def test_aot_unpaired_by_hand():
    """Chosen (3, 1) against rejected (0, 4): sorted, 1 − 0 and 3 − 4."""
    chosen, rejected = f64([3.0, 1.0]).requires_grad_(), f64([0.0, 4.0])
    losses = aot_unpaired_loss(chosen, rejected, 1.0)
    torch.testing.assert_close(losses.detach(), f64([math.log(1 + 1 / math.e), math.log(1 + math.e)]))
    losses.sum().backward()  # −(1 − σ): each at the place of its own answer
    torch.testing.assert_close(chosen.grad, f64([-1 / (1 + 1 / math.e), -1 / (1 + math.e)]))


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6), st.randoms())
def test_aot_pairs_by_rank_whatever_the_order(pairs, random):
    """Sorting pairs so that the sum of a convex loss is least: no permutation does better."""
    chosen, rejected = map(f64, zip(*pairs, strict=True))
    least = aot_unpaired_loss(chosen, rejected, 0.5).sum().item()
    shuffled = random.sample(range(len(pairs)), len(pairs))
    assert aot_unpaired_loss(chosen[shuffled], rejected, 0.5).sum().item() == pytest.approx(least)
    assert sigmoid_loss(chosen[shuffled] - rejected, 0.5).sum().item() >= least - 1e-9


def test_one_pair_has_nothing_to_sort():
    chosen, rejected = f64([0.7]), f64([-0.4])
    expected = sigmoid_loss(chosen - rejected, 0.3, 0.1)
    torch.testing.assert_close(aot_unpaired_loss(chosen, rejected, 0.3, 0.1), expected)
    torch.testing.assert_close(aot_loss(chosen, rejected, 0.3, 0.1), expected)


@pytest.mark.parametrize(
    "loss", [nca_loss, bco_loss, sppo_loss, apo_zero_loss, apo_down_loss, aot_loss, aot_unpaired_loss]
)
def test_shapes_that_would_broadcast_are_refused(loss):
    with pytest.raises(DataError, match="shapes differ"):
        loss(torch.zeros(3), torch.zeros(1), 0.1)
