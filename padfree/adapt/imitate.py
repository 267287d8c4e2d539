"""The layers that write the last map imitate what the original's wrote there, resampled to the smaller map.

What a conversion costs a trained network lies in the last map, which loses a row and a column. Layer by layer, from the
last strided one on, a convolution's weights are solved for so that it gives of the converted network's map what the
original's gave, resampled by area: each new pixel is the mean of the part that it covers, so that the mean of the map
is kept.
"""

from __future__ import annotations

from padfree.adapt.follow import follow
from padfree.adapt.places import Layer, Places
from padfree.adapt.steps import conv_step
from padfree.adapt.work import Outcome, Work, named
from padfree.layers.new import new_layers
from padfree.record.recording import record


def imitate(work: Work) -> Outcome:
    """Solve the convolutions that write the last map for what the original writes there."""
    layers = _last(work)
    mine, new = work.stream(), new_layers(work.model)
    merged = {place.conv for place in work.places.found if place.merge != "activation"}
    errors, left = [], {}
    for path in sorted(layers, key=lambda path: conv_step(mine.tape(0), path)):
        if path in new:
            continue
        conv = work.conv(path)
        if conv is None or path in merged:
            why = "a pool is added to what it writes" if conv is not None else "its weight is computed, or shared"
            left[path] = f"does not imitate the original: {why}"
            continue
        found = follow(work, mine, conv, (layers[path], work.layers[path]))
        if isinstance(found, str):
            left[path] = f"does not imitate the original: {found}"
        else:
            errors.append(found)
    return Outcome.of(errors, list(named(left)))


def _last(work: Work) -> dict[str, Layer]:
    """The original's layers that write its smallest map of those that the conversion made smaller."""
    assert work.original is not None
    before = Places(record(work.original, work.places.recording.input_size))
    layers = {path: layer for path, layer in before.layers().items() if path in work.layers}
    sizes = (before.size_of(path) for path in layers if before.size_of(path) != work.places.size_of(path))
    last = min((size for size in sizes if size != (1, 1)), default=None)
    return {path: layer for path, layer in layers.items() if before.size_of(path) == last}
