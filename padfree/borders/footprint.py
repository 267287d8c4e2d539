"""`padfree.footprint`: what padding a network reads, where, and how far it carries. Exact, and without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from padfree.analysis.kinds import plain_kind
from padfree.borders.field import Field, pixels_read
from padfree.borders.layers import Footprint, Layer, Reads
from padfree.borders.seen import Unknown
from padfree.borders.taps import ZERO, Window, window_of
from padfree.borders.walk import Walk
from padfree.errors import PadfreeError
from padfree.geometry import size_text
from padfree.record.copies import kept_random_state
from padfree.record.inputs import check_input_size, check_model, default_input_size
from padfree.record.recorder import Op
from padfree.record.recording import Recording, path_of, record

_MERGES = {"add": "sum", "cat": "concatenation"}


def footprint(model: nn.Module, input_size: tuple[int, ...] | None = None) -> Footprint:
    """What padding a network reads: by arithmetic on one recorded forward pass, no data and no weights.

    Of each convolution and pool (`Layer.reads`): the share of its positions and of its taps that lie outside the map
    in front of it, and on which side. A padded 3x3 stride-2 window on a map with even sides, for one, reads padding at
    the top and left only ("Mind the Pad", Alsallakh et al., ICLR 2021).

    Carried through the network, for each position of each later map:

    - `Layer.outside`: its theoretical receptive field is the rectangle of pixels that its windows span, windows of
      windows included, as in "Computing Receptive Fields of Convolutional Neural Networks" (Araujo et al., Distill,
      2019); this is the share of that rectangle's area that lies outside the image.
    - `Layer.padded`: go back from the position, at each operation to one of its taps (or operands of a sum, or channels
      of a concatenation), all alike likely; this is the probability to end at a zero of padding rather than at a pixel.
      It is what uniform kernels without activations would take from padding: the effective receptive field of
      "Understanding the Effective Receptive Field in Deep CNNs" (Luo et al., NeurIPS 2016), without weights.

    Branches that meet: paths spread evenly over them, and the receptive field is the rectangle around theirs. Taps that
    cannot be chosen (a max-pool's padding, `count_include_pad=False`) are no paths, but lie in the receptive field.
    Reflected, replicated and circular padding reads the map again. Means and linear layers over positions read all of
    them. What is left out or taken for granted is named in `notes`: squeeze-excitation gates, attention (taken to read
    the whole map). What is not understood is named (`Layer.unknown`) and not guessed.

    Args:
        model: a network of images (N, C, H, W), converted or not; it is left as it was.
        input_size: (C, H, W); default: `model.pretrained_cfg`'s, or that at which it was converted.

    Raises:
        PadfreeError: the model is none, or does not run at that size.
    """
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"footprint takes a torch.nn.Module, not {type(model).__name__}")
    check_model(model)
    size = default_input_size(model) if input_size is None else check_input_size(input_size)
    if len(size) != 3:
        raise PadfreeError(f"footprint is about images (C, H, W); {size_text(size)} is the size of a video")
    with kept_random_state():
        recording = record(model, size)
    with torch.inference_mode(False), torch.no_grad():
        return footprint_of(recording)


def footprint_of(recording: Recording) -> Footprint:
    """The footprint of a recorded pass over images."""
    walk = Walk(recording)
    layers = tuple(_numbered(_layers(recording, walk)))
    ends = [(name, walk.positions_of(value)) for name, value in zip(recording.names, recording.outputs, strict=True)]
    known = [end for _, end in ends if isinstance(end, Field)]
    outputs = {name: _padded_share(end) if isinstance(end, Field) else None for name, end in ends}
    whole = len(known) == len(ends) and bool(known)
    notes = dict.fromkeys(note for end in known for note in sorted(end.notes))
    notes |= dict.fromkeys(note for layer in layers for note in layer.notes)
    lost = dict.fromkeys(end.reason for _, end in ends if isinstance(end, Unknown))
    lost |= dict.fromkeys(layer.unknown for layer in layers if layer.unknown)
    return Footprint(
        model=type(recording.model).__name__,
        input_size=recording.input_size,
        layers=layers,
        outputs=outputs,
        read=pixels_read(walk.image, known) if whole else None,
        notes=(*notes, *(f"not followed past {reason}" for reason in lost)),
    )


def _padded_share(end: Field) -> float:
    return 1 - float(end.inside.nan_to_num(0.0).mean())


def _layers(recording: Recording, walk: Walk) -> Iterator[Layer]:
    for op in recording.ops:
        if not (op.inputs and op.outputs):
            continue
        window = window_of(op, recording.values)
        if window is not None and window.kind not in ("pad", "resize"):
            yield _layer(recording, walk, op, window.kind, window)
        elif plain_kind(op) in _MERGES and _merges(recording, walk, op):
            yield _layer(recording, walk, op, _MERGES[plain_kind(op)], None)


def _merges(recording: Recording, walk: Walk, op: Op) -> bool:
    """Whether different maps of one size meet."""
    shape = recording.values[op.outputs[0]].shape
    if len(shape) != 4 or len(set(op.inputs)) < 2:
        return False
    found = [walk.map_of(value) for value in dict.fromkeys(op.inputs) if recording.values[value].shape[2:] == shape[2:]]
    return len({id(each) for each in found}) > 1


def _layer(recording: Recording, walk: Walk, op: Op, kind: str, window: Window | None) -> Layer:
    out = recording.values[op.outputs[0]].shape
    before, reads = recording.values[op.inputs[0]].shape, None
    if window is not None:
        window = _with_pads(recording, op, window)
        before = (*before[:2], window.rows.size, window.columns.size)
        reads = _reads(window)
    found = walk.map_of(op.outputs[0])
    layer = Layer(path_of(recording, op), kind, (before[2], before[3]), (out[2], out[3]), reads)
    if isinstance(found, Unknown):
        return replace(layer, unknown=found.reason)
    height, width = walk.image.grid or (0, 0)
    spans = found.spans.view(4, *layer.size)
    middle = [float(edge[layer.size[0] // 2, layer.size[1] // 2]) for edge in spans]
    return replace(
        layer,
        padded=1 - found.map(found.inside.nan_to_num(1.0)),
        outside=_outside(spans, height, width),
        receptive_field=(middle[1] - middle[0], middle[3] - middle[2]),
        notes=tuple(sorted(found.notes)),
    )


def _outside(spans: Tensor, height: int, width: int) -> Tensor:
    """(4, H, W) rectangles to the share of their area that lies outside the image; 0 for those that read nothing."""
    top, bottom, left, right = spans
    area = (bottom - top) * (right - left)
    seen = (bottom.clamp(0, height) - top.clamp(0, height)) * (right.clamp(0, width) - left.clamp(0, width))
    return torch.where(area.isfinite() & (bottom > top), 1 - seen / area, 0.0)


def _with_pads(recording: Recording, op: Op, window: Window) -> Window:
    """The windows on the map before the pads in front of an operation."""
    producer = recording.values[op.inputs[0]].producer
    while producer >= 0:
        pad = window_of(recording.ops[producer], recording.values) if recording.ops[producer].inputs else None
        if pad is None or pad.kind != "pad":
            break
        own = any(bool((axis.before | axis.behind).any()) for axis in window.axes)
        fill = window.fill if own and pad.fill != ZERO else pad.fill
        rows, columns = window.rows.through(pad.rows), window.columns.through(pad.columns)
        window = replace(window, axes=(rows, columns), fill=fill)
        producer = recording.values[recording.ops[producer].inputs[0]].producer
    return window


def _reads(window: Window) -> Reads:
    total = [max(int(axis.read.sum()), 1) for axis in window.axes]
    whole, within = 1.0, 1.0
    for axis, taps in zip(window.axes, total, strict=True):
        whole *= float(((axis.before | axis.behind).sum(1) == 0).double().mean())
        within *= int(axis.inside.sum()) / taps
    (top, bottom), (left, right) = (
        (int(axis.before.sum()) / taps, int(axis.behind.sum()) / taps)
        for axis, taps in zip(window.axes, total, strict=True)
    )
    unread = (*window.rows.unread(), *window.columns.unread())
    shape = (window.kernel, window.stride, window.dilation)
    return Reads(*shape, window.fill, 1 - whole, 1 - within, (top, bottom, left, right), unread)


def _numbered(layers: Iterator[Layer]) -> Iterator[Layer]:
    """Names told apart: a module called twice, or a forward with several sums."""
    seen: Counter[str] = Counter()
    for layer in layers:
        seen[layer.name] += 1
        yield layer if seen[layer.name] == 1 else replace(layer, name=f"{layer.name}#{seen[layer.name]}")
