"""What a calibration takes: networks, steps, and images and outputs that tell something."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from padfree.adapt.work import rows
from padfree.convert import is_converted
from padfree.deploy.frozen import is_fused
from padfree.errors import PadfreeError
from padfree.record.inputs import check_model

_SAME = 1e-6  # of what outputs are; what differs by less is rounding


def chosen_steps(steps: Any, names: Sequence[str], from_original: Sequence[str], given: bool) -> tuple[str, ...]:
    """The steps that are asked for, in their order.

    Args:
        steps: one name, names, or None for all that can be done.
        names: all there are, in order.
        from_original: those that take the original network.
        given: whether there is one.

    Raises:
        PadfreeError: there is no such step, or it takes the original.
    """
    if steps is None:
        return tuple(name for name in names if given or name not in from_original)
    if not isinstance(steps, Iterable):
        raise PadfreeError(f"steps is {steps!r}; it takes names of steps: {', '.join(names)}")
    wanted = (steps,) if isinstance(steps, str) else tuple(steps)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise PadfreeError(f"unknown step {unknown[0]!r}; there are {', '.join(names)}")
    for name in wanted:
        if name in from_original and not given:
            raise PadfreeError(f"step {name!r} takes the network before conversion: pass original=")
    return tuple(name for name in names if name in wanted)


def check_networks(converted: nn.Module, original: nn.Module | None) -> None:
    """Refuse what is no converted network, or no original of one.

    Raises:
        PadfreeError: with what to pass instead.
    """
    for what, model in (("calibrate", converted), ("original", original)):
        if model is None and what == "original":
            continue
        if not isinstance(model, nn.Module):
            raise PadfreeError(f"{what} takes a torch.nn.Module, not {type(model).__name__}")
        if is_fused(model):
            raise PadfreeError(
                f"this {type(model).__name__} is fused, and its weights are frozen; calibrate the converted network, "
                "and fuse it then"
                if what == "calibrate"
                else f"original is a fused {type(model).__name__}, whose layers are merged; pass the network that was "
                "converted, as it was before conversion and fusing"
            )
        check_model(model)
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise PadfreeError(f"this {type(model).__name__} is on the meta device and has no weights")
    if not is_converted(converted):
        raise PadfreeError(
            f"this {type(converted).__name__} is not converted; calibrate what padfree.convert returned: "
            "padfree.calibrate(padfree.convert(model), batches, original=model)"
        )
    if original is not None and is_converted(original):
        raise PadfreeError(
            "original is a converted network; pass the one before conversion (padfree.convert returns a copy, unless "
            "inplace=True)"
        )
    frozen = (*converted.named_parameters(), *converted.named_buffers())
    name = next((name for name, tensor in frozen if tensor.is_inference()), None)
    if name is not None:
        raise PadfreeError(
            f"`{name}` was made under torch.inference_mode, and cannot be given other values; make, load and convert "
            "the network outside of it (torch.no_grad is fine), or pass copy.deepcopy of it, made outside"
        )


def check_images(held: list[Tensor]) -> None:
    """Refuse held-back images on which nothing can be measured.

    Raises:
        PadfreeError: they are all the same.
    """
    first = held[0][:1]
    if all(batch.shape[1:] == first.shape[1:] and bool((batch == first).all()) for batch in held):
        raise PadfreeError(
            f"the {sum(map(len, held))} held-back images are all the same, and nothing can be measured on them; pass "
            "images such as the network will see"
        )


def check_outputs(name: str, expected: list[list[Tensor]], found: list[list[Tensor]]) -> None:
    """Refuse outputs that cannot be compared with the original's.

    Args:
        name: of the network's class.
        expected: the original's floating-point outputs, by batch.
        found: the converted network's.

    Raises:
        PadfreeError: it is another network, or its outputs tell nothing.
    """
    mine, theirs = ([tuple(tensor.shape[1:]) for tensor in batches[0]] for batches in (found, expected))
    if [len(shape) for shape in mine] != [len(shape) for shape in theirs] or any(
        a[:1] != b[:1] for a, b in zip(mine, theirs, strict=True)
    ):
        raise PadfreeError(f"original returns {theirs}, and the converted network {mine}: it is another network")
    if not theirs:
        raise PadfreeError(
            f"{name} returns no floating-point numbers, and classes or boxes alone do not tell how near it is to the "
            "original; convert and calibrate the network that gives the numbers behind them, or leave original= out"
        )
    for batches in (expected, found):
        sides = sorted({tuple(tensor.dim() for tensor in batch) for batch in batches})
        if len(sides) > 1:
            found_sides = " and ".join(", ".join(map(str, each)) for each in sides)
            raise PadfreeError(
                f"{name} returns tensors of {found_sides} dimensions, depending on the batch; pass batches of one shape"
            )
    if not all(bool(tensor.isfinite().all()) for batch in expected for tensor in batch):
        raise PadfreeError("the outputs of original on these images are not finite")
    whole = [rows(column).double() for column in zip(*expected, strict=True)]
    spread = sum(float((y - y.mean(0)).square().sum()) for y in whole)
    if spread <= _SAME**2 * sum(float(y.square().sum()) for y in whole):
        raise PadfreeError(
            "the outputs of original are the same for all held-back images, and no step can be judged by them; pass "
            "images such as the network will see"
        )
