"""The classifier solved for the original's outputs, of the features that the converted network has now."""

from __future__ import annotations

from torch import Tensor, nn

from padfree.adapt.solve import Moments
from padfree.adapt.tape import Tape
from padfree.adapt.work import Outcome, Stream, Work

RIDGES = (1.0, 0.1, 0.01, 0.001)  # of which the held-back images choose
_PRODUCTS = {"addmm": 1, "mm": 0, "convolution": 0}  # and which argument is the features
_VIEWS = ("view", "_unsafe_view", "reshape", "squeeze", "alias", "detach", "clone", "flatten", "mean")


def solvable(work: Work) -> bool:
    """Whether one linear layer makes the outputs, so that it can be solved."""
    return _last_layer(work, work.stream()) is not None


def _last_layer(work: Work, stream: Stream) -> tuple[int, nn.Module, Tensor] | None:
    """The step of the linear layer that makes the outputs, the layer, and its weight."""
    tape = stream.tape(0)
    step = last_product(tape)
    layer = None if step is None else work.modules.get(tape.steps[step].path)
    weight = None if layer is None else layer._parameters.get("weight")
    if not work.expected or step is None or layer is None or weight is None or tape.steps[step].path in work.tied:
        return None
    if isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or layer.groups != 1):
        return None
    return step, layer, weight


def solve_classifier(work: Work) -> Outcome:
    """Let the last linear layer give the original's outputs, as nearly as ridge regression can."""
    assert work.original is not None
    stream = work.stream()
    last = _last_layer(work, stream)
    if last is None:
        return Outcome(notes=("no single linear layer makes the outputs: the classifier stays as it is",))
    step, layer, weight = last
    matrix = weight.detach().reshape(weight.shape[0], -1)
    bias = layer._parameters.get("bias")
    learnt, held = Moments(), Moments()
    for batch in range(work.first_held + len(work.expected)):
        (target,) = work.theirs.outputs(batch)
        rows = _channels_last(_features(stream, step, batch)).reshape(-1, matrix.shape[1]).double()
        target = _outputs(target, matrix.shape[0]).double()
        if target.shape != (len(rows), matrix.shape[0]):
            return Outcome(notes=("the outputs are no rows of one linear layer: the classifier stays as it is",))
        if bias is not None:
            target = target - bias.double()
        (learnt if batch < work.first_held else held).add(rows[None], target[None])
    before = held.error(matrix[None])
    solved, constant, after = learnt.best(held, matrix[None], RIDGES, centred=bias is not None)
    if after < before:
        weight.copy_(solved.reshape(weight.shape))
        if constant is not None and bias is not None:
            bias.add_(constant[0].to(bias))
    return Outcome.of([(before, min(before, after))])


def last_product(tape: Tape) -> int | None:
    """The step of the linear layer that makes a network's one output; None where there is none."""
    if len(tape.exits) != 1:
        return None
    slot = tape.exits[0]
    for index in range(len(tape.steps) - 1, -1, -1):
        step = tape.steps[index]
        if slot not in step.writes:
            continue
        if step.kind in _PRODUCTS:
            return index
        if step.kind not in _VIEWS or not step.reads:
            return None
        slot = step.reads[0]
    return None


def _features(stream: Stream, step: int, batch: int) -> Tensor:
    tape = stream.tape(batch)
    env = stream.fork(batch, step, step)
    return env[tape.source(step, _PRODUCTS[tape.steps[step].kind])]


def _outputs(target: Tensor, width: int) -> Tensor:
    """What the linear layer gives, as rows of `width`, where it can be told how it lies in what the network gives."""
    if target.dim() and target.numel() == len(target) * width:
        return target.reshape(-1, width)
    last = _channels_last(target)
    return last.reshape(-1, width) if last.dim() and last.shape[-1] == width else target


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x
