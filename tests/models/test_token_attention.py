"""Each token over its own slot, against plain attention; the kernels themselves where there is a GPU."""

import pytest
import torch

from etude.models.cached_attention import _attend_tokens, token_kernels
from etude.models.single_attention import Scores

CASES = {
    "plain": ((4, 2, 16), Scores(), None),
    "window": ((4, 4, 24), Scores(), 9),
    "softcap": ((4, 2, 16), Scores(scaling=0.3, softcap=2.0), None),
    "sinks": ((8, 2, 32), Scores(sinks_H=torch.linspace(-1, 2, 8)), 20),
}


def expected(q, keys, values, slots_T, positions_T, scores, window):
    """Token by token, in float64."""
    out = torch.empty(*q.shape[:2], values.shape[-1], dtype=torch.float64)
    for t, (slot, position) in enumerate(zip(slots_T.tolist(), positions_T.tolist(), strict=True)):
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        groups = q.shape[0] // keys.shape[1]
        k, v = (x[slot, :, seen].double().repeat_interleave(groups, 0) for x in (keys, values))
        logits = (k @ q[:, t].double()[:, :, None])[:, :, 0] * (scores.scaling or q.shape[-1] ** -0.5)
        if scores.softcap:
            logits = scores.softcap * torch.tanh(logits / scores.softcap)
        if scores.sinks_H is not None:
            logits = torch.cat([logits, scores.sinks_H.double()[:, None]], dim=1)
        weights = logits.softmax(-1)[:, : k.shape[1]]
        out[:, t] = (weights[:, None] @ v)[:, 0]
    return out


def inputs(heads, kv_heads, dim, tokens):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, heads, dim, generator=generator).transpose(0, 1)
    keys, values = torch.randn(2, 6, kv_heads, 90, dim, generator=generator)
    slots_T, positions_T = (torch.randint(0, n, (tokens,), generator=generator) for n in (6, 90))
    return q, keys, values, slots_T, positions_T


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("case", CASES)
def test_each_token_sees_its_slot_up_to_itself(case, tokens):
    shape, scores, window = CASES[case]
    q, keys, values, slots_T, positions_T = inputs(*shape, tokens)
    out = _attend_tokens(q, keys, values, slots_T, positions_T, scores, window)
    reference = expected(q, keys, values, slots_T, positions_T, scores, window)
    torch.testing.assert_close(out.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 600])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compute_the_same(case, tokens, dtype):
    shape, scores, window = CASES[case]
    q, keys, values, slots_T, positions_T = inputs(*shape, tokens)
    there = [x.to("cuda", dtype) for x in (q, keys, values)] + [slots_T.cuda(), positions_T.cuda()]
    assert token_kernels(there[0].device, dtype) is not None
    sinks = None if scores.sinks_H is None else scores.sinks_H.cuda()
    out = _attend_tokens(*there, Scores(scores.scaling, scores.softcap, sinks), window).double().cpu()
    reference = expected(q, keys, values, slots_T, positions_T, scores, window)
    assert (out - reference).norm() / reference.norm() < (1e-5 if dtype == torch.float32 else 1e-2)
