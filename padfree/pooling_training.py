"""Max-pool for training on a CPU: keeps the place of each maximum in its window, one byte an output.

A place is row * pitch + column: the pitch is the window's with the C extension, and without it the map's, so that a
place is an offset in the map (and takes two bytes on maps wider than 126 pixels). The built-in keeps the input and
64-bit indices. Values, ties, NaN and gradients are the built-in's, and the backward
pass can itself be differentiated.
"""

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from padfree import native

__all__ = ["MaxPool", "cacheful", "out_side", "watched"]

CHUNK_BYTES = 4 << 20  # input worked on at a time, so that it stays in the cache with what is made of it


class MaxPool(torch.autograd.Function):
    """(N, C, H, W) -> (N, C, h, w) of a dense map, contiguous or channels_last but not both."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
        """Pool, and keep the place of each maximum."""
        ctx.window, ctx.shape = (kernel, stride, padding), x.shape
        ctx.layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        quick = native.takes(x, kernel, stride)
        ctx.pitch = kernel if quick else x.shape[3]
        pooled, places = (native.max_pool_taps if quick else _offsets)(x, kernel, stride, padding)
        ctx.save_for_backward(places)
        return pooled

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scatter (N, C, h, w) to (N, C, H, W): here, or where somebody looks on by the built-in's own operator."""
        (places,), window = ctx.saved_tensors, ctx.window
        grad = grads[0]
        if torch._C._has_storage(grad):  # a batch of gradients has no layout
            grad = grad.contiguous(memory_format=ctx.layout)
        # The operator asks this stand-in only for its shape and layout.
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout)
        taps = ctx.pitch == window[0] and native.takes(grad, *window[:2])
        if taps and _plainly(grad, places, ctx.layout):
            return native.max_pool_backward(grad, places, like, *window), None, None, None
        indices = _indices(places, ctx.pitch, ctx.shape[3], *window)
        kernel, stride, padding = ([side, side] for side in window)
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return backward(grad, like, kernel, stride, padding, [1, 1], False, indices), None, None, None


def watched() -> bool:
    """Whether a tracer, a functional transform, forward-mode AD or a mode sees this call."""
    return (
        torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and _has_function_mode())
        or forward_ad._current_level >= 0
    )


def _has_function_mode() -> bool:
    """Whether a mode sees functions; a default device, which torch makes a mode of, does not concern this."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)


def out_side(side: int, kernel: int, stride: int, padding: int) -> int:
    """Side of the result, pixels."""
    return (side + 2 * padding - kernel) // stride + 1


def cacheful(planes: torch.Tensor) -> int:
    """How many of the first axis to work on at a time."""
    return max(1, CHUNK_BYTES // (planes[0].numel() * planes.element_size()))


def _plainly(grad: torch.Tensor, taps: torch.Tensor, layout: torch.memory_format) -> bool:
    """Whether this is a first-order gradient, and both tensors are ordinary (hooks may have replaced the taps)."""
    if watched() or (torch.is_grad_enabled() and grad.requires_grad):
        return False
    if not all(type(t) is torch.Tensor and t.is_cpu and torch._C._has_storage(t) for t in (grad, taps)):
        return False
    dense = all(t.is_contiguous(memory_format=layout) for t in (grad, taps))
    return dense and taps.dtype is torch.uint8 and taps.shape == grad.shape


def _offsets(x: torch.Tensor, kernel: int, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maxima and their offsets by the built-in's channels_last kernel, a cacheful of images at a time."""
    count, channels, height, width = x.shape
    h, w = out_side(height, kernel, stride, padding), out_side(width, kernel, stride, padding)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    pooled = torch.empty((count, channels, h, w), dtype=x.dtype, device=x.device, memory_format=layout)
    offsets = torch.empty_like(pooled, dtype=_offset_dtype(kernel, width))
    origins, step = _window_origins(h, w, width, stride, padding), cacheful(x)
    for start in range(0, count, step):
        part = x[start : start + step].contiguous(memory_format=torch.channels_last)
        values, indices = torch.ops.aten.max_pool2d_with_indices(
            part, [kernel, kernel], [stride, stride], [padding, padding]
        )
        pooled[start : start + step] = values
        offsets[start : start + step] = indices.sub_(origins)
    return pooled, offsets


def _offset_dtype(kernel: int, width: int) -> torch.dtype:
    """The smallest integer type for row * width + column inside a window."""
    largest = (kernel - 1) * (width + 1)
    return torch.uint8 if largest < 1 << 8 else torch.int16 if largest < 1 << 15 else torch.int32


def _indices(places: torch.Tensor, pitch: int, width: int, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Where in its plane each maximum lay, as the built-in's indices."""
    offsets = places.to(torch.int64)
    if pitch != width:
        offsets.add_(offsets.div(pitch, rounding_mode="floor").mul_(width - pitch))
    h, w = places.shape[2:]
    return offsets.add_(_window_origins(h, w, width, stride, padding))


def _window_origins(h: int, w: int, width: int, stride: int, padding: int) -> torch.Tensor:
    """The flat index of each window's first corner, (h, w) int64; negative where it lies in the padding."""
    rows = torch.arange(h, device="cpu").mul_(stride).sub_(padding).mul_(width)
    return rows[:, None] + torch.arange(w, device="cpu").mul_(stride).sub_(padding)
