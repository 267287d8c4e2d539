"""Size arithmetic against torch itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from padfree.geometry import effective_kernel, out_size, padfree_padding, padfree_size


@given(
    size=st.integers(1, 40),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 5),
    dilation=st.integers(1, 3),
)
def test_out_size_is_that_of_a_convolution(size: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    if size + 2 * padding < effective_kernel(kernel, dilation):
        return
    weight = torch.zeros(1, 1, kernel, kernel, device="meta")
    x = torch.zeros(1, 1, size, size, device="meta")
    out = F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation)
    assert out.shape[-1] == out_size(size, kernel, stride, padding, dilation)


@given(size=st.integers(3, 60), kernel=st.integers(2, 5), stride=st.integers(1, 3), ceil=st.booleans(), data=st.data())
def test_out_size_is_that_of_a_pool(size: int, kernel: int, stride: int, ceil: bool, data: st.DataObject) -> None:
    padding = data.draw(st.integers(0, kernel // 2))
    if size + 2 * padding < kernel:
        return
    pooled = F.max_pool2d(torch.zeros(1, 1, size, size), kernel, stride, padding, ceil_mode=ceil)
    assert pooled.shape[-1] == out_size(size, kernel, stride, padding, ceil_mode=ceil)


@given(size=st.integers(8, 60), half=st.integers(1, 5), dilation=st.integers(1, 2))
def test_the_reduced_padding_gives_the_padding_free_size(size: int, half: int, dilation: int) -> None:
    kernel = 2 * half + 1
    padding = padfree_padding(kernel, dilation)
    if size + 2 * padding < effective_kernel(kernel, dilation):
        return
    assert out_size(size, kernel, 2, padding, dilation) == padfree_size(size) == out_size(size, 3, 2, 0)
    if size % 2 == 0:
        assert padfree_size(size) == size // 2 - 1


@pytest.mark.parametrize("kernel", [1, 2, 4, 6])
def test_even_and_small_kernels_have_no_padding_free_form(kernel: int) -> None:
    with pytest.raises(ValueError, match=f"not {kernel}"):
        padfree_padding(kernel)
