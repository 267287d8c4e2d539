"""The max-pools of a padding-free network: `F.max_pool2d`, by the C extension where that is at hand.

`shortcut_pool` stands beside a strided conv (3x3, stride 2, no padding in most families), `max_pool` in the stem tail
(3x3, stride 1 or 2, padding 1). Values, NaN and gradients are those of `F.max_pool2d`, which sends a gradient to the
first maximum of each window (where -0.0 and 0.0 tie, the sign may differ outside training).

Why not simply call it: on a CPU in contiguous layout it is a scalar loop that also writes 64-bit indices, often 20
times slower than the depthwise conv beside it, and training keeps those indices, 8 bytes an output. Here training
keeps the place of each maximum in its window, row * kernel + column: one byte an output.

The operators (float32, 3x3 and 5x5 windows, stride 1 or 2, dense maps on a CPU go to C, all others to torch):

    padfree::max_pool            differentiable; decomposes into the others
    padfree::max_pool_values     the maxima alone, for inference
    padfree::max_pool_taps       the maxima and their taps, uint8
    padfree::max_pool_backward   the gradient back to where the taps say
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from padfree.kernels import extension
from padfree.kernels.extension import empty_map, has_memory, has_tangent, is_dense_map, sizes, threads

__all__ = ["backward_meaning", "max_pool", "shortcut_pool", "taps_meaning", "values_meaning"]

LARGEST_TAPS = 16  # pixels of a window's side whose taps fit into a byte

LIBRARY: Any = torch.library.Library("padfree", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("max_pool(Tensor x, int kernel, int stride, int padding) -> Tensor")
LIBRARY.define("max_pool_values(Tensor x, int kernel, int stride, int padding) -> Tensor")
LIBRARY.define("max_pool_taps(Tensor x, int kernel, int stride, int padding) -> (Tensor, Tensor)")
LIBRARY.define(
    "max_pool_backward(Tensor grad, Tensor taps, SymInt height, SymInt width, bool channels_last, "
    "int kernel, int stride, int padding) -> Tensor"
)


def shortcut_pool(x: torch.Tensor, kernel: int = 3, padding: int = 0) -> torch.Tensor:
    """Max-pool with stride 2: (N, C, H, W) -> (N, C, floor((H + 2p - k) / 2) + 1, the same of W).

    Args:
        x: the strided conv's own input, any floating dtype, layout and device.
        kernel: k, pixels; 3, or (GhostNet) the conv's own.
        padding: p, pixels; 0, or (GhostNet) the conv's reduced padding.

    Raises:
        RuntimeError: the map is smaller than the kernel (as `F.max_pool2d`).
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return F.max_pool2d(x, kernel, 2, padding)
    else:  # the compiler of TorchScript skips this branch, which it could not read
        return _called(x, kernel, 2, padding)


def max_pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Max-pool: (N, C, H, W) -> (N, C, floor((H + 2p - k) / s) + 1, the same of W).

    Args:
        x: any floating dtype, layout and device.
        kernel: k, pixels.
        stride: s, pixels.
        padding: p, pixels.

    Raises:
        RuntimeError: the map is smaller than the kernel (as `F.max_pool2d`).
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return F.max_pool2d(x, kernel, stride, padding)
    else:
        return _called(x, kernel, stride, padding)


def _called(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """The operator; `F.max_pool2d` itself for compilers, exporters and tracers."""
    if (
        extension.native is None
        or type(x) is not torch.Tensor
        or torch.compiler.is_compiling()  # so it is while `torch.export` runs
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    ):
        return F.max_pool2d(x, kernel, stride, padding)
    return _differentiable(x, kernel, stride, padding)


def _differentiable(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """`padfree::max_pool`: by its parts where C knows the map, and by `F.max_pool2d`."""
    known = x.dtype is torch.float32 and (kernel == 3 or kernel == 5) and (stride == 1 or stride == 2)
    if not known or not x.is_cpu or not has_memory(x) or has_tangent(x):
        return F.max_pool2d(x, kernel, stride, padding)
    if x.requires_grad and torch.is_grad_enabled():
        pooled: torch.Tensor = _MaxPool.apply(x, kernel, stride, padding)[0]
        return pooled
    values: torch.Tensor = VALUES(x, kernel, stride, padding)
    return values


# -- what the operators compute, in torch's own -----------------------------------------------------------------------


def values_meaning(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """`padfree::max_pool_values`: (N, C, H, W) -> (N, C, h, w)."""
    return F.max_pool2d(x, kernel, stride, padding)


def taps_meaning(x: torch.Tensor, kernel: int, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`padfree::max_pool_taps`: (N, C, H, W) -> the maxima and row * kernel + column of each, both (N, C, h, w)."""
    if kernel > LARGEST_TAPS:
        raise ValueError(
            f"taps of {kernel}x{kernel} windows do not fit into a byte; {LARGEST_TAPS} pixels are the most"
        )
    pooled, indices = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
    width = x.shape[-1]
    rows, columns = _corners(pooled, stride, padding)
    row, column = indices.div(width, rounding_mode="floor") - rows, indices % width - columns
    return pooled, (row * kernel + column).to(torch.uint8)


def backward_meaning(
    grad: torch.Tensor,
    taps: torch.Tensor,
    height: int,
    width: int,
    channels_last: bool,
    kernel: int,
    stride: int,
    padding: int,
) -> torch.Tensor:
    """`padfree::max_pool_backward`: (N, C, h, w) -> (N, C, H, W), each gradient added where its tap was."""
    flat = grad.new_zeros((*grad.shape[:-2], height * width))
    flat = flat.scatter_add(-1, _indices(taps, width, kernel, stride, padding).flatten(-2), grad.flatten(-2))
    layout = torch.channels_last if channels_last and grad.dim() == 4 else torch.contiguous_format
    return flat.view(*grad.shape[:-2], height, width).contiguous(memory_format=layout)


def _corners(pooled: torch.Tensor, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row (h, 1) and column (w,) of each window's first corner; negative where it lies in the padding."""
    rows, columns = (torch.arange(side, device=pooled.device) * stride - padding for side in pooled.shape[-2:])
    return rows[:, None], columns


def _indices(taps: torch.Tensor, width: int, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Where in its plane each maximum lay, as `F.max_pool2d` counts."""
    places = taps.long()
    rows, columns = _corners(taps, stride, padding)
    return (places.div(kernel, rounding_mode="floor") + rows) * width + places % kernel + columns


def _gathered(x: torch.Tensor, taps: torch.Tensor, width: int, *window: int) -> torch.Tensor:
    """What lies under the taps: (N, C, H, W) -> (N, C, h, w)."""
    return x.flatten(-2).gather(-1, _indices(taps, width, *window).flatten(-2)).view_as(taps)


# -- by C -------------------------------------------------------------------------------------------------------------


def _result_sides(x: torch.Tensor, kernel: int, stride: int, padding: int) -> tuple[int, int] | None:
    """Height and width of a map's maxima; None where C does not know such a map, or such windows."""
    if extension.native is None or not is_dense_map(x) or 2 * padding >= kernel or padding < 0:
        return None
    _, _, height, width = x.shape
    if height < kernel or width < kernel or not ((kernel == 3 or kernel == 5) and (stride == 1 or stride == 2)):
        return None
    return (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1


def _refuse_gradients(x: torch.Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "padfree::max_pool_values and padfree::max_pool_taps have no gradients, and their input requires one; "
            "call padfree.kernels.max_pool or torch.ops.padfree.max_pool, which is made of them"
        )


def _values_cpu(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    _refuse_gradients(x)
    sides = _result_sides(x, kernel, stride, padding)
    if sides is None:
        return values_meaning(x, kernel, stride, padding)
    pooled = empty_map(x, x.shape[1], *sides, torch.float32)
    extension.native.max_pool(x.data_ptr(), pooled.data_ptr(), *sizes(x), kernel, stride, padding, threads(x))
    return pooled


def _taps_cpu(x: torch.Tensor, kernel: int, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    _refuse_gradients(x)
    sides = _result_sides(x, kernel, stride, padding)
    if sides is None:
        return taps_meaning(x, kernel, stride, padding)
    pooled, taps = (empty_map(x, x.shape[1], *sides, dtype) for dtype in (torch.float32, torch.uint8))
    addresses = x.data_ptr(), pooled.data_ptr(), taps.data_ptr()
    extension.native.max_pool_taps(*addresses, *sizes(x), kernel, stride, padding, threads(x))
    return pooled, taps


def _backward_cpu(
    grad: torch.Tensor,
    taps: torch.Tensor,
    height: int,
    width: int,
    channels_last: bool,
    kernel: int,
    stride: int,
    padding: int,
) -> torch.Tensor:
    _refuse_gradients(grad)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    known = grad.dtype is torch.float32 and taps.dtype is torch.uint8 and grad.shape == taps.shape and grad.dim() == 4
    if known and extension.native is not None and grad.numel() and kernel in (3, 5) and stride in (1, 2):
        grad, taps = grad.contiguous(memory_format=layout), taps.contiguous(memory_format=layout)
        out = torch.empty((*grad.shape[:2], height, width), memory_format=layout, device="cpu")
        if _fits(grad, height, width, kernel, stride, padding):
            count, channels = grad.shape[:2]
            planes, unit = (count, channels) if channels_last else (count * channels, 1)
            addresses = grad.data_ptr(), taps.data_ptr(), out.data_ptr()
            shape = planes, height, width, unit, kernel, stride, padding
            extension.native.max_pool_backward(*addresses, *shape, threads(out))
            return out
    return backward_meaning(grad, taps, height, width, channels_last, kernel, stride, padding)


def _fits(grad: torch.Tensor, height: int, width: int, kernel: int, stride: int, padding: int) -> bool:
    """Whether a map of these sides has this result: C goes by the map's."""
    sides = [(side + 2 * padding - kernel) // stride + 1 for side in (height, width)]
    return min(height, width) >= kernel and 0 <= 2 * padding < kernel and list(grad.shape[2:]) == sides


# -- gradients --------------------------------------------------------------------------------------------------------


class _MaxPool(torch.autograd.Function):
    """(N, C, H, W) -> the maxima and their taps, of which the second is all that is kept."""

    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        results: tuple[torch.Tensor, torch.Tensor] = TAPS(*args)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        x, *window = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.settings = (*x.shape[-2:], not x.is_contiguous(), *window)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (taps,), grad = ctx.saved_tensors, grads[0]
        return (None if grad is None else _Scatter.apply(grad, taps, *ctx.settings), None, None, None)


class _Scatter(torch.autograd.Function):
    """`padfree::max_pool_backward`, which is linear in the gradient: so is what it sends back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> torch.Tensor:
        scattered: torch.Tensor = BACKWARD(*args)
        return scattered

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])
        ctx.settings = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (taps,), (_, width, _, *window) = ctx.saved_tensors, ctx.settings
        return _gathered(grads[0], taps, width, *window), *(None,) * (1 + len(ctx.settings))

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:
        found: torch.Tensor = _Scatter.apply(tangent, *ctx.saved_tensors, *ctx.settings)
        return found


# -- registered -------------------------------------------------------------------------------------------------------

LIBRARY.impl("max_pool", _differentiable, "CompositeImplicitAutograd")
for _name, _cpu, _meaning in (
    ("max_pool_values", _values_cpu, values_meaning),
    ("max_pool_taps", _taps_cpu, taps_meaning),
    ("max_pool_backward", _backward_cpu, backward_meaning),
):
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _meaning, "CompositeExplicitAutograd")
    # No layer between who calls and the kernel: gradients are `_MaxPool`'s, and asking for others is refused.
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"padfree::{_name}", _meaning, lib=LIBRARY)

VALUES = torch.ops.padfree.max_pool_values.default
TAPS = torch.ops.padfree.max_pool_taps.default
BACKWARD = torch.ops.padfree.max_pool_backward.default


def _folded(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The batch of `torch.vmap` first; part of N where there is one."""
    x = x.movedim(axis, 0)
    return x.flatten(0, 1) if x.dim() > 4 else x


def _unfolded(info: Any, x: torch.Tensor) -> torch.Tensor:
    return x.view(info.batch_size, x.shape[0] // info.batch_size, *x.shape[1:])


def _batched_values(info: Any, axes: Any, x: torch.Tensor, *window: int) -> tuple[torch.Tensor, int]:
    pooled = _differentiable(_folded(x, axes[0]), *window)
    return _unfolded(info, pooled) if x.dim() > 4 else pooled, 0


def _batched_taps(
    info: Any, axes: Any, x: torch.Tensor, *window: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
    results = TAPS(_folded(x, axes[0]), *window)
    pooled, taps = (_unfolded(info, each) if x.dim() > 4 else each for each in results)
    return (pooled, taps), (0, 0)


def _batched_backward(
    info: Any, axes: Any, grad: torch.Tensor, taps: torch.Tensor, *settings: Any
) -> tuple[torch.Tensor, int]:
    grad, taps = (
        tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
        for tensor, axis in zip((grad, taps), axes[:2], strict=True)
    )
    if grad.dim() <= 4:
        return BACKWARD(grad, taps, *settings), 0
    out = _Scatter.apply(grad.flatten(0, 1), taps.flatten(0, 1), *settings)
    return _unfolded(info, out), 0


torch.library.register_vmap("padfree::max_pool", _batched_values, lib=LIBRARY)
torch.library.register_vmap("padfree::max_pool_values", _batched_values, lib=LIBRARY)
torch.library.register_vmap("padfree::max_pool_taps", _batched_taps, lib=LIBRARY)
torch.library.register_vmap("padfree::max_pool_backward", _batched_backward, lib=LIBRARY)
