"""Zeros in huge pages are zeros like any others."""

import psutil
import pytest
import torch

from etude.models import hugepages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 1024, 128)])
def test_zeros(dtype, shape):
    like = torch.ones(2, dtype=dtype)
    tensor = hugepages.zeros(like, *shape)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert not tensor.any()
    tensor += 1
    assert tensor.sum() == tensor.numel()
    assert not hugepages.zeros(like, *shape).any(), "the next one has memory of its own"


def test_memory_goes_when_the_tensor_goes():
    process, like = psutil.Process(), torch.ones(1)
    before = process.memory_info().rss
    for _ in range(8):
        hugepages.zeros(like, 1 << 25).fill_(1)  # 128 MiB each
    assert process.memory_info().rss - before < 3 << 27
