"""Drawing from whole distributions on CUDA, in two passes of Triton over the logits and no copy of them.

The vocabulary is cut into tiles. Each tile gives its largest logit and the sum of exponentials; their running
sum says which tile a row's random number falls into, and a second look at that tile alone says which token.
Not covered: distributions that are edited or cut (`draw` computes these).

Needs Triton, as `models.token_attention` does.
"""

# Kernels are no Python to a type checker.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # tokens


@triton.jit
def _sum_tiles(
    logits, temperatures, tops, totals, bests, vocabulary, stride, count, TILE: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperatures + r).to(tl.float32)
    temperature = tl.where(temperature == 0, 1.0, temperature)
    i = tile * TILE + tl.arange(0, TILE)
    x = (
        tl.load(logits + r * stride + i, mask=i < vocabulary, other=float("-inf")).to(tl.float32)
        / temperature
    )
    top = tl.max(x, 0)
    total = tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)), 0)
    tl.store(tops + r * count + tile, top)
    tl.store(totals + r * count + tile, total)
    tl.store(bests + r * count + tile, tile * TILE + tl.argmax(x, 0))


@triton.jit
def _pick(
    logits, temperatures, uniforms, tops, totals, bests, numbers, tokens, vocabulary, stride, count,
    TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + r).to(tl.float32)
    greedy = temperature == 0
    temperature = tl.where(greedy, 1.0, temperature)
    b = tl.arange(0, TILES)
    top = tl.load(tops + r * count + b, mask=b < count, other=float("-inf"))
    highest = tl.max(top, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    mass = tl.load(totals + r * count + b, mask=b < count, other=0.0) * tl.exp(top - highest)
    upto = tl.cumsum(mass, 0)
    whole = tl.max(upto, 0)
    # The first that steps over the threshold and has any mass: sums may round past it, or up and down again.
    threshold = tl.minimum(tl.load(uniforms + r).to(tl.float32), 1 - 2.0**-24) * whole
    tile = tl.min(tl.where((upto > threshold) & (mass > 0), b, TILES), 0)
    tile = tl.where(tile == TILES, tl.max(tl.where(mass > 0, b, 0), 0), tile)
    rest = threshold - tl.max(tl.where(b < tile, upto, 0.0), 0)
    i = tile * TILE + tl.arange(0, TILE)
    x = (
        tl.load(logits + r * stride + i, mask=i < vocabulary, other=float("-inf")).to(tl.float32)
        / temperature
    )
    mass_here = tl.exp(x - highest)
    within = tl.cumsum(mass_here, 0)
    token = tl.min(tl.where((within > rest) & (mass_here > 0), i, vocabulary), 0)
    token = tl.where(token == vocabulary, tl.max(tl.where(mass_here > 0, i, 0), 0), token)
    token = tl.minimum(
        tl.where(greedy, tl.load(bests + r * count + tl.argmax(top, 0)), token), vocabulary - 1
    )
    logit = tl.load(logits + r * stride + token).to(tl.float32) / temperature
    # Not by the largest sum but by all of them, which a NaN anywhere makes one.
    logprob = logit - highest - tl.log(tl.sum(mass, 0))
    tl.store(numbers + 3 * r, token.to(tl.float64))
    tl.store(numbers + 3 * r + 1, logprob.to(tl.float64))
    tl.store(numbers + 3 * r + 2, logprob.to(tl.float64))
    tl.store(tokens + r, token.to(tl.int64))


def draw(logits_RV: Tensor, u_R: Tensor, temperature_R: Tensor, numbers_R3: Tensor, tokens_R: Tensor) -> None:
    """Write a token per row to `tokens_R`, and it and its log-probability twice to `numbers_R3`.

    Args:
        logits_RV: half or single precision, the vocabulary contiguous.
        u_R: random numbers in (0, 1), float64.
        temperature_R: float64; 0 takes the likeliest token.
    """
    rows, vocabulary = logits_RV.shape
    count = triton.cdiv(vocabulary, TILE)
    tops, totals = logits_RV.new_empty(2, rows, count, dtype=torch.float32)
    bests = logits_RV.new_empty(rows, count, dtype=torch.int32)
    shape = vocabulary, logits_RV.stride(0), count
    _sum_tiles[(rows, count)](logits_RV, temperature_R, tops, totals, bests, *shape, TILE=TILE, num_warps=4)
    _pick[(rows,)](
        logits_RV, temperature_R, u_R, tops, totals, bests, numbers_R3, tokens_R, *shape,
        TILES=triton.next_power_of_2(count), TILE=TILE, num_warps=4,
    )  # fmt: skip
