"""`padfree::chain`: a strided chain of a padding-free network in inference, one call for up to eight operations.

A depthwise convolution (its norm folded in) and the max-pool beside it read the same map, their sum or concatenation
is read once by what follows, and each of torch's operations reads and writes the map anew. On float32 maps on a CPU the
C extension (`csrc/driver.c`) does all of it while a piece of the map lies in the caches; its results differ from
torch's by rounding. Everywhere else (other devices, dtypes, layouts and windows, no extension) the operator computes
`chain_meaning`, which also is its decomposition for exporters.

The operator is for inference: with gradients enabled and a tensor that requires one it raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from padfree.kernels import extension
from padfree.kernels.extension import empty_map, has_memory, has_tangent, is_dense_map, threads
from padfree.kernels.pool import LIBRARY
from padfree.kernels.pool import max_pool as _max_pool

__all__ = ["activation", "chain", "chain_meaning", "fused_chain"]

# A 1x1 convolution with more inputs, or more weights, is left to torch's product of matrices.
WIDEST, LARGEST = 512, 1 << 18

LIBRARY.define(
    "chain(Tensor x, str ahead, Tensor weight, Tensor? bias, int stride, int padding, Tensor? scale, Tensor? shift, "
    "str act, int pool, int pool_padding, str merge, Tensor? point_weight, Tensor? point_bias, str point_act, "
    "str residual) -> Tensor"
)

_Tensor = torch.Tensor
_Code = tuple[int, float, float]  # an activation's, as in `csrc/pass.h`, and its settings
_MERGES = {"": 0, "sum": 1, "norm": 2, "cat": -1}
_RESIDUALS = {"": 0, "input": 1, "maxima": 2}
_INFINITY = float("inf")
_NO_ACT: _Code = (0, -_INFINITY, _INFINITY)
_NOTHING_AHEAD: _Code = (-1, 0.0, 0.0)
_FUNCTIONS: dict[str, tuple[int, Callable[..., _Tensor], Callable[..., _Code]]] = {
    # name: number of settings, meaning, code
    "": (0, lambda x: x, lambda: _NO_ACT),
    "relu": (0, F.relu, lambda: (0, 0.0, _INFINITY)),
    "relu6": (0, F.relu6, lambda: (0, 0.0, 6.0)),
    "hardtanh": (2, F.hardtanh, lambda low, high: (0, low, high)),
    "hardswish": (0, F.hardswish, lambda: (1, 0.0, 0.0)),
    "silu": (0, F.silu, lambda: (2, 0.0, 0.0)),
    "gelu": (0, F.gelu, lambda: (3, 0.0, 0.0)),
    "gelu_tanh": (0, lambda x: F.gelu(x, approximate="tanh"), lambda: (4, 0.0, 0.0)),
    "leaky_relu": (1, F.leaky_relu, lambda slope: (5, slope, 0.0)),
}


def activation(name: str, *settings: float) -> str:
    """How `chain` is told an activation: `activation("hardtanh", 0, 6)` is "hardtanh(0.0,6.0)".

    Args:
        name: of "" (none), relu, relu6, hardtanh, hardswish, silu, gelu, gelu_tanh, leaky_relu.
        settings: hardtanh's lowest and highest value, leaky_relu's slope; none for the others.

    Raises:
        ValueError: it is none of these, or has other settings.
    """
    told = name + (f"({','.join(repr(float(value)) for value in settings)})" if settings else "")
    _read(told)
    return told


_READ: dict[str, tuple[Callable[[_Tensor], _Tensor], _Code]] = {}


def _read(told: str) -> tuple[Callable[[_Tensor], _Tensor], _Code]:
    """An activation's function and code."""
    found = _READ.get(told)
    if found is None:
        name, _, inside = told.partition("(")
        settings = [float(value) for value in inside.rstrip(")").split(",") if value]
        if name not in _FUNCTIONS or len(settings) != _FUNCTIONS[name][0]:
            known = ", ".join(f"{each!r} ({count} settings)" for each, (count, *_) in _FUNCTIONS.items())
            raise ValueError(f"padfree::chain: {told!r} is no activation; known are {known}")
        _, function, code = _FUNCTIONS[name]
        found = _READ[told] = ((lambda x: function(x, *settings)) if settings else function, code(*settings))
    return found


def chain_meaning(
    x: _Tensor,
    ahead: str,
    weight: _Tensor,
    bias: _Tensor | None,
    stride: int,
    padding: int,
    scale: _Tensor | None,
    shift: _Tensor | None,
    act: str,
    pool: int,
    pool_padding: int,
    merge: str,
    point_weight: _Tensor | None,
    point_bias: _Tensor | None,
    point_act: str,
    residual: str,
) -> _Tensor:
    """What `padfree::chain` computes, in torch's operations: (N, C, H, W) -> (N, C', h, w).

    Args:
        x: (N, C, H, W).
        ahead: an activation (see `activation`) that is applied to `x` first; "" for none.
        weight: of the depthwise convolution, (C, 1, k, k).
        bias: its bias, (C,).
        stride: of the convolution and of the pool, pixels.
        padding: the convolution's, pixels.
        scale: (C,), multiplies what the convolution made (and, merge "norm", the maxima); given together with `shift`.
        shift: (C,), is added to that.
        act: the activation that follows.
        pool: the window of the max-pool beside the convolution, pixels; 0 where there is none.
        pool_padding: its padding, pixels.
        merge: where the maxima go: "sum", added behind the activation; "norm", before the scale; "cat", concatenated
            behind the convolution's channels; "", nowhere.
        point_weight: of a 1x1 convolution of that, (C', C, 1, 1), or (C', 2C, 1, 1) behind "cat".
        point_bias: its bias, (C',).
        point_act: the activation that follows it.
        residual: what is added last: "input" (`x` behind its activation), "maxima", or "".

    Raises:
        ValueError: an activation, merge or residual that is none of these.
        RuntimeError: sizes that do not fit together (as torch's own operations).
    """
    if merge not in _MERGES or residual not in _RESIDUALS or (pool == 0 and (merge or residual == "maxima")):
        raise ValueError(
            f"padfree::chain: merge {merge!r} and residual {residual!r} with a pool of {pool} pixels; known are "
            f"the merges {list(_MERGES)} and the residuals {list(_RESIDUALS)}, and maxima need a pool"
        )
    if (scale is None) != (shift is None):
        raise ValueError("padfree::chain: scale and shift are given together, or neither")
    x = _read(ahead)[0](x)
    maxima = F.max_pool2d(x, pool, stride, pool_padding) if pool else x
    y = F.conv2d(x, weight, bias, stride, padding, groups=weight.shape[0])
    if merge == "norm":
        y = y + maxima
    if scale is not None and shift is not None:
        y = y * scale[:, None, None] + shift[:, None, None]
    y = _read(act)[0](y)
    if merge == "sum":
        y = y + maxima
    if merge == "cat":
        y = torch.cat((y, maxima), -3)
    if point_weight is not None:
        y = _read(point_act)[0](F.conv2d(y, point_weight, point_bias))
    return y + (x if residual == "input" else maxima) if residual else y


def _chain_cpu(
    x: _Tensor,
    ahead: str,
    weight: _Tensor,
    bias: _Tensor | None,
    stride: int,
    padding: int,
    scale: _Tensor | None,
    shift: _Tensor | None,
    act: str,
    pool: int,
    pool_padding: int,
    merge: str,
    point_weight: _Tensor | None,
    point_bias: _Tensor | None,
    point_act: str,
    residual: str,
) -> _Tensor:
    """The same by C as far as it goes: the 1x1 convolution and the residual may be left to torch."""
    matrix, vector, code, extra = point_weight, point_bias, _read(point_act)[1], _RESIDUALS.get(residual, 0)
    whole = _is_whole(x.shape[-3], merge, point_weight, residual)
    if not whole:
        matrix, vector, code, extra = None, None, _NO_ACT, 0
    out = None
    if extension.native is not None and is_dense_map(x) and residual in _RESIDUALS:
        beside = (pool, pool_padding) if merge else (0, 0)
        out = _by_c(
            x, ahead, (weight, bias, scale, shift), (stride, padding), act, beside, merge, matrix, vector, code, extra
        )
    if out is None:
        told = (x, ahead, weight, bias, stride, padding, scale, shift, act, pool, pool_padding, merge)
        return chain_meaning(*told, point_weight, point_bias, point_act, residual)
    if whole:
        return out
    # What C made of the map may be worked on in place, but for maxima that are yet to be added.
    x = _read(ahead)[0](x)
    if residual == "maxima":
        x = out[:, x.shape[1] :] if merge == "cat" else _max_pool(x, pool, stride, pool_padding)
    if point_weight is not None:
        out = _read(point_act)[0](F.conv2d(out, point_weight, point_bias))
    return out.add_(x) if residual else out


def _is_whole(channels: int, merge: str, point_weight: _Tensor | None, residual: str) -> bool:
    """Whether C takes the whole chain: the 1x1 convolution, where there is one, and what is added last."""
    if point_weight is None:
        return not residual
    inputs = 2 * channels if merge == "cat" else channels
    return (
        extension.native is not None
        and bool(extension.native.POINTWISE)
        and inputs <= WIDEST
        and point_weight.numel() <= LARGEST
        and point_weight.shape == (point_weight.shape[0], inputs, 1, 1)
        and (residual != "maxima" or merge == "cat")
    )


def _by_c(
    x: _Tensor,
    ahead: str,
    weights: tuple[_Tensor, _Tensor | None, _Tensor | None, _Tensor | None],
    window: tuple[int, int],
    act: str,
    pool: tuple[int, int],
    merge: str,
    matrix: _Tensor | None,
    vector: _Tensor | None,
    point_act: _Code,
    residual: int,
) -> _Tensor | None:
    """A dense map's chain; None where C has no way to compute it, or an argument is wrong (the meaning tells how)."""
    weight, bias, scale, shift = weights
    stride, padding = window
    count, channels, height, width = x.shape
    kernel = weight.shape[-1]
    place, outputs = _MERGES.get(merge), channels if matrix is None else matrix.shape[0]
    if (
        place is None
        or stride < 1
        or (scale is None) != (shift is None)
        or weight.shape != (channels, 1, kernel, kernel)
        or not _is_read(weight, weight.numel())
        or not (bias is None or _is_read(bias, channels))
        or not (scale is None or shift is None or (_is_read(scale, channels) and _is_read(shift, channels)))
        or not (matrix is None or _is_read(matrix, matrix.numel()))
        or not (vector is None or _is_read(vector, outputs))
    ):
        return None
    rows, columns = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
    if rows < 1 or columns < 1:
        return None
    made = outputs if matrix is not None or merge != "cat" else 2 * channels
    out = empty_map(x, made, rows, columns, torch.float32)
    found = extension.native.chain(
        x.data_ptr(),
        out.data_ptr(),
        (not x.is_contiguous(), count, channels, height, width),
        _read(ahead)[1] if ahead else _NOTHING_AHEAD,
        (weight.data_ptr(), _at(bias), _at(scale), _at(shift), kernel, stride, padding),
        _read(act)[1],
        (*pool, place),
        (_at(matrix), _at(vector), 0 if matrix is None else outputs, *point_act),
        residual,
        threads(x),
    )
    return out if found else None


def _at(tensor: _Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_read(tensor: _Tensor, numel: int) -> bool:
    """Whether C can read a weight: so many float32 numbers, one after another."""
    return tensor.dtype is torch.float32 and tensor.numel() == numel and tensor.is_contiguous()


def _refuse_gradients(ctx: Any, inputs: tuple[Any, ...], output: _Tensor) -> None:
    raise RuntimeError(
        "padfree::chain is for inference, and gradients are enabled while one of its tensors requires one; train the "
        "network that was not fused, or call this one under torch.inference_mode() (or requires_grad_(False))"
    )


def _batched(info: Any, axes: tuple[int | None, ...], x: _Tensor, *settings: Any) -> tuple[_Tensor, int]:
    """`torch.vmap` over maps: more of them. Over weights: one after another."""
    if axes[0] is not None and all(axis is None for axis in axes[1:]) and x.dim() == 5:
        return chain(x.movedim(axes[0], 0).flatten(0, 1), *settings).unflatten(0, (info.batch_size, -1)), 0
    given = (x, *settings)
    each = (
        (a if axis is None else a.select(axis, i) for a, axis in zip(given, axes, strict=True))
        for i in range(info.batch_size)
    )
    return torch.stack([chain(*arguments) for arguments in each]), 0


def fused_chain(x: _Tensor, *settings: Any) -> _Tensor:
    """`padfree::chain`, or its meaning where `torch.func` or forward-mode AD follow `x`: it has no rule for them.

    Args:
        x: (N, C, H, W).
        settings: the operator's other arguments, in their order.
    """
    if not torch.compiler.is_compiling() and (not has_memory(x) or has_tangent(x)):
        return chain_meaning(x, *settings)
    result: _Tensor = chain(x, *settings)
    return result


LIBRARY.impl("chain", _chain_cpu, "CPU")
LIBRARY.impl("chain", chain_meaning, "CompositeExplicitAutograd")
torch.library.register_fake("padfree::chain", chain_meaning, lib=LIBRARY)
torch.library.register_autograd("padfree::chain", lambda ctx, grad: None, setup_context=_refuse_gradients, lib=LIBRARY)
torch.library.register_vmap("padfree::chain", _batched, lib=LIBRARY)

chain = torch.ops.padfree.chain.default
