"""Kinds of ATen operations that the rules tell apart."""

from __future__ import annotations

from typing import Any

from padfree.indices import ValueId
from padfree.record.recorder import Op
from padfree.record.trees import Ref

NORMS = frozenset(
    {
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_with_update",
        "_batch_norm_no_update",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "native_group_norm",
        "native_layer_norm",
        "_fused_rms_norm",
    }
)


VIEWS = frozenset(
    {"view", "_unsafe_view", "permute", "transpose", "alias", "detach", "clone", "_to_copy", "contiguous", "reshape",
     "squeeze", "unsqueeze", "_reshape_alias", "expand", "lift_fresh"}
)  # fmt: skip


AFFINE = frozenset({"mul", "add", "sub", "div", "rsub", "neg"})


NONLINEAR = frozenset(
    {"relu", "hardtanh", "silu", "hardswish", "gelu", "sigmoid", "hardsigmoid", "tanh", "leaky_relu", "elu", "celu",
     "selu", "softplus", "clamp", "clamp_min", "clamp_max", "_prelu_kernel", "mish", "threshold", "hardshrink",
     "softshrink", "log_sigmoid_forward", "exp", "pow", "abs", "maximum", "minimum", "rrelu_with_noise", "square",
     "log1p", "sqrt", "reciprocal", "where", "gt", "lt", "ge", "le", "erf", "sin", "cos", "_softmax", "sign", "rsqrt"}
)  # fmt: skip


# Constants of a map's size, such as an activation compares with.
LIKE = frozenset({"empty_like", "zeros_like", "ones_like", "full_like"})


ATTENTION = frozenset({"bmm", "baddbmm", "_scaled_dot_product_flash_attention", "_fused_sdp_choice",
     "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu",
     "_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention"})  # fmt: skip


# What a norm knows its map by.
STATISTICS = frozenset({"mean", "var", "var_mean", "std", "std_mean", "sum", "linalg_vector_norm", "norm"})


# Operations whose output's length depends on values.
COUNTING = frozenset({"nonzero", "nonzero_numpy", "masked_select", "nms", "unique", "_unique2"})


PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "dot"})


MAX_POOLS = frozenset({"max_pool2d_with_indices", "max_pool2d"})


AVG_POOLS = frozenset({"avg_pool2d"})


def plain_kind(op: Op) -> str:
    """The kind of an operation without the mark of an in-place variant."""
    return op.kind[:-1] if op.kind.endswith("_") else op.kind


def data_input(op: Op) -> ValueId:
    """The map a convolution or pool reads."""
    first = op.args[0][0]
    assert isinstance(first, Ref)
    return first.value


def pair(value: Any) -> tuple[int, int]:
    """A setting of a convolution or pool for both axes: (2, 2) from 2, (2,) or (2, 2)."""
    return (value[0], value[-1]) if isinstance(value, tuple) else (value, value)


def strides(op: Op) -> tuple[int, ...]:
    """The strides of a convolution or pool."""
    stride = op.args[0][3] if op.kind == "convolution" else (op.args[0][2] if len(op.args[0]) > 2 else op.args[0][1])
    return tuple(stride) or (2,)
