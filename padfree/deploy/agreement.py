"""Whether a fused network computes what the network does that it was made from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError
from padfree.record.copies import bare_copy, kept_random_state
from padfree.record.inputs import example_inputs
from padfree.record.trees import first_line, tensors

# Of the largest output. A difference within the first is accepted; rounding in a deep network may reach the second, and
# then the same steps in double precision, where hardly anything is rounded, must agree to the third.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5}
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-2}
_ROUNDING_LOW = 0.3
_EXACT = 1e-9
_LARGER = 32  # pixels a side of a second image: what looks at the size may do something else there

ASKED = "Hint: its forward asks a part that was fused for more than to be called; use the unfused model"

Form = Callable[[nn.Module, tuple[int, ...]], nn.Module]
"""Makes a fused network of one that was looked at with (C, H, W)."""


def check_same(model: nn.Module, fused: nn.Module, size: tuple[int, ...], form: Form) -> None:
    """Compare both on random images; the hooks of neither fire.

    Args:
        model: the network before.
        fused: what was made of it.
        size: (C, H, W) that it was looked at with.
        form: what made it.

    Raises:
        PadfreeError: they differ, or the fused copy fails, or the model's outputs are not finite.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with kept_random_state(), torch.no_grad():
        found, limit = _difference(model, fused, size), _ROUNDING.get(dtype, _ROUNDING_LOW)
        if found <= _CLOSE.get(dtype, 0.0):
            return
        if found <= limit and dtype != torch.float64:  # nor NaN
            found, limit = _in_double(model, size, form), _EXACT
    if not found <= limit:
        raise PadfreeError(
            f"the fused {type(model).__name__} differs by {found:.3g} of the largest output, and at most {limit:.3g} "
            "is rounding; use the unfused model, and please report this one"
        )


def _in_double(model: nn.Module, size: tuple[int, ...], form: Form) -> float:
    """The difference where all is done in double precision; 0 where the network cannot be run so."""
    double = bare_copy(model).double()
    if not any(_outputs(double, example) for example in example_inputs(double, size, meta=False)):
        return 0.0
    return _difference(double, form(double, size), size)


def _difference(model: nn.Module, fused: nn.Module, size: tuple[int, ...]) -> float:
    """The largest difference between outputs of both, of the largest of each output; NaN where there is one.

    Raises:
        PadfreeError: the fused copy fails, or outputs of the model are not finite.
    """
    before, after = bare_copy(model), bare_copy(fused)
    worst = torch.zeros((), dtype=torch.float64)
    for sides in (size, (*size[:-2], size[-2] + _LARGER, size[-1] + _LARGER)):
        expected, example = None, ()
        for example in example_inputs(before, sides, meta=False):
            expected = _outputs(before, example)
            if expected is not None:
                break
        if expected is None:  # it does not take another size
            continue
        if not all(bool(tensor.isfinite().all()) for tensor in expected):
            raise PadfreeError(
                f"the outputs of {type(model).__name__} itself are not finite; there is nothing to check"
            )
        try:
            found = _floating(after(*example))
        except Exception as error:
            raise PadfreeError(
                f"the fused {type(model).__name__} fails: {type(error).__name__}: {first_line(error)}. {ASKED}"
            ) from error
        for mine, theirs in zip(expected, found, strict=True):
            if mine.numel():
                difference = (mine.double() - theirs.double()).abs().max().cpu()
                largest = mine.double().abs().max().cpu().clamp_min(torch.finfo(torch.float32).tiny)
                worst = torch.maximum(worst, difference / largest)  # NaN stays NaN
    return float(worst)


def _outputs(model: nn.Module, example: tuple[object, ...]) -> list[Tensor] | None:
    """The floating-point tensors that a model gives, None where it takes no such example."""
    try:
        return _floating(model(*example))
    except Exception:  # the model's own code, which may raise anything
        return None


def _floating(tree: object) -> list[Tensor]:
    return [tensor for tensor in tensors(tree) if tensor.is_floating_point()]
