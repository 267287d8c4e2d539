"""`fuse`: the form of a network for inference.

    model = padfree.fuse(padfree.convert(model).eval())

Batch norms are folded (`fold`), every strided chain that `padfree::chain` can take becomes one call of it (`chains`,
`carry`), the result is frozen (`frozen`) and compared with what it was made from (`agreement`). Everything is read off
recorded forward passes instead of a trace of the whole model: the result keeps the model's classes and methods, and
models that torch.fx cannot trace are fused as well.
"""

from __future__ import annotations

from torch import nn

from padfree.deploy.agreement import ASKED, check_same
from padfree.deploy.branches import Sums
from padfree.deploy.carry import Carrier
from padfree.deploy.chains import Chains
from padfree.deploy.fold import fold
from padfree.deploy.frozen import freeze, is_fused
from padfree.errors import PadfreeError
from padfree.files.weights import FORMS
from padfree.record.copies import full_copy, kept_random_state
from padfree.record.recording import Recording, record
from padfree.types import FUSED

__all__ = ["fuse"]


def fuse(model: nn.Module, *, input_size: tuple[int, ...] | None = None) -> nn.Module:
    """The deployment form of an eval-mode model: a frozen copy with fewer and larger operations.

    Batch norms are folded into the convolutions before them. In a converted network each strided chain (activation,
    depthwise convolution, max-pool, their sum, the 1x1 convolution behind; the tail of a hybrid stem; the reduction of
    a projection shortcut) becomes one `padfree.layers.fused.FusedChain`, where its parts run exactly once, share no
    weights, carry no hooks, and nothing else reads what they pass on. Everything else stays as it is.

    The result is frozen: `.train()` raises, no parameter requires a gradient, and weights of the unfused network do not
    load. Keep the unfused network for training. Copying, pickling, `padfree.save`, `padfree.export`, other devices and
    dtypes work.

    Args:
        model: any network in eval mode, converted or not; it stays untouched.
        input_size: (C, H, W) to look at it with; default: the size it was converted at,
            else that of its `pretrained_cfg`, else (3, 224, 224).

    Returns:
        the fused copy; in float32 its outputs equal the model's to 1e-5 of the largest, or in float64 to 1e-9.

    Raises:
        PadfreeError: part of the model is in training mode, it does not run at that size, it cannot be
            copied, its outputs are not finite, or it does not compute the same when fused.
    """
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"fuse takes a torch.nn.Module, not {type(model).__name__}")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise PadfreeError(
            f"fuse needs the statistics of eval mode, and `{training[0]}` is in training mode"
            f"{f' (and {len(training) - 1} more)' if len(training) > 1 else ''}; call model.eval() first"
        )
    if is_fused(model):
        return full_copy(model)
    fused = fused_form(model, input_size)
    check_same(model, fused, fused.__dict__[FUSED], fused_form)
    return fused


def fused_form(model: nn.Module, input_size: tuple[int, ...] | None = None) -> nn.Module:
    """A fused copy, which nothing has compared with the model yet.

    Raises:
        PadfreeError: the model does not run at that size, or cannot be copied.
    """
    with kept_random_state():
        recording = record(model, input_size)
        fused = full_copy(model)
        merged = Carrier(fused, recording).carry(Sums(recording).forms())
        current = _again(fused, recording) if merged else recording
        fold(fused, current)
        current = _again(fused, current)
        Carrier(fused, current).carry(Chains(current).forms())
    freeze(fused, recording.input_size)
    return fused


def _again(model: nn.Module, before: Recording) -> Recording:
    """Another recording, of what became of the model."""
    try:
        return record(model, before.input_size)
    except PadfreeError as error:
        raise PadfreeError(f"with its norms folded, {error} {ASKED}") from error


FORMS["fused"] = (lambda model: model.__dict__.get(FUSED), fused_form)
