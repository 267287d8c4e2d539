"""What the page says, gathered from two networks and their plan: plain data for the template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from padfree.borders.effect import border_effect
from padfree.borders.footprint import footprint
from padfree.borders.layers import Footprint, FootprintChange, Layer, made_by
from padfree.files.sources import Source
from padfree.geometry import share_text, size_text
from padfree.page.effects import effects_content
from padfree.page.pictures import picture
from padfree.report.comparison import Comparison
from padfree.report.places import Place
from padfree.types import PlanData

_STRIP = 150  # pixels that the image's longer side has in the strip
_MOST = 60  # maps with pictures


@dataclass(frozen=True)
class Request:
    """What a page is about.

    Attributes:
        original, converted: the networks.
        plan: what was done. comparison: what it cost.
        source: where the original comes from.
        command: the command line that makes the page, "" if there was none.
        weights: in words, what the weights are, and which layers are new.
        images: batches (N, C, H, W) for `padfree.border_effect`, or None.
    """

    original: nn.Module
    converted: nn.Module
    plan: PlanData
    comparison: Comparison
    source: Source
    command: str = ""
    weights: str = ""
    images: Tensor | Iterable[Tensor] | None = None


def content(request: Request) -> dict[str, Any]:
    """Everything that the template shows: strings, numbers, lists and dictionaries of them.

    Raises:
        PadfreeError: a network does not run at the plan's size, or `border_effect` refuses the images.
    """
    size = request.plan.input_size
    models = (request.original, request.converted)
    before, after = (footprint(model, size) for model in models)
    effects = None
    if request.images is not None:
        images = request.images if isinstance(request.images, Tensor) else list(request.images)
        effects = (border_effect(models[0], images, size), border_effect(models[1], images, size))
    change = before.compare(after)
    return {
        "title": f"{request.source.name}: padding before and after",
        "library": request.source.library,
        "size": size_text(size),
        "figures": _figures(request.comparison, change),
        "weights": request.weights,
        "strip": [_strip("before", before, request.comparison, 0), _strip("after", after, request.comparison, 1)],
        "stages": [(size_text(stage.before), size_text(stage.after)) for stage in request.comparison.maps],
        "places": _places(request),
        "costs": _costs(request.comparison),
        "maps": [_pair(*pair) for pair in _shown(change.pairs())],
        "tables": [("before", before.rows()), ("after", after.rows())],
        "notes": list(dict.fromkeys((*before.notes, *after.notes, *request.comparison.notes))),
        "unread": [before.unread_text(), after.unread_text()],
        "effect": None if effects is None else effects_content(list(zip(("before", "after"), effects, strict=True))),
        "code": _code(request),
        "command": request.command,
        "plan": json.dumps(request.plan.to_dict(), indent=1),
    }


def _figures(comparison: Comparison, change: FootprintChange) -> list[tuple[str, str, str]]:
    """(what, before, after), the main numbers."""
    params, macs = comparison.params, comparison.macs
    share = [next(iter(each.outputs.values()), None) for each in (change.before, change.after)]
    least = comparison.minimum_input
    rows: list[tuple[str, str, str]] = [
        ("parameters", _number(params.original), _number(params.converted)),
        ("multiply-adds (fvcore)", _number(macs.original), _number(macs.converted)),
        ("output's paths that end in padding", share_text(share[0]), share_text(share[1])),
        ("pixels that nothing reads", _number(change.before.unread), _number(change.after.unread)),
    ]
    shown = "unknown" if least is None else f"{least} x {least}"
    return [*rows, ("smallest image both take", shown, shown)]


def _strip(title: str, found: Footprint, comparison: Comparison, which: int) -> dict[str, Any]:
    """Squares to scale: the image, then each stage's map with the footprint of its last layer."""
    image = found.input_size[1:]
    sizes = [(stage.before, stage.after)[which] for stage in comparison.maps]
    scale = _STRIP / max(image)
    boxes: list[dict[str, Any]] = []
    left = 0.0
    for size in (image, *sizes):
        last = [layer for layer in found.layers if layer.size == tuple(size) and layer.padded is not None]
        shown = last[-1].padded if last and boxes else None
        width, height = size[1] * scale, size[0] * scale
        share = None if shown is None else float(shown.mean())
        text = "the image" if not boxes else f"{share_text(share)} of the paths end in padding"
        boxes.append(
            {
                "x": round(left, 1),
                "width": round(width, 1),
                "height": round(height, 1),
                "label": size_text(size),
                "text": text,
                "picture": None if shown is None else picture(shown),
            }
        )
        left += max(width, 44) + 10
    return {"title": title, "boxes": boxes, "width": round(left), "height": round(image[0] * scale + 22)}


def _places(request: Request) -> list[dict[str, Any]]:
    """Matches and skips in the order of the network's modules."""
    order = {name: at for at, (name, _) in enumerate(request.original.named_modules())}
    rows = [
        {
            "name": match.name,
            "rule": match.rule,
            "sizes": f"{size_text(match.size)} to {size_text(match.out_before)}, now {size_text(match.out_after)}"
            if match.rule != "stem"
            else f"a hybrid tail on {size_text(match.out_before)}",
            "reason": "",
            "kind": "converted",
        }
        for match in request.plan.matches
    ]
    rows += [
        {
            "name": skip.name,
            "rule": skip.rule,
            "sizes": "",
            "reason": skip.reason,
            "kind": "left alone" if skip.in_scope else "not for the method",
        }
        for skip in request.plan.skips
    ]
    return sorted(rows, key=lambda row: order.get(row["name"], len(order)))


def _costs(comparison: Comparison) -> list[dict[str, Any]]:
    """By place, what it cost and costs; the sum last."""
    rows = [_cost_row(place.name or "elsewhere", place) for place in comparison.places]
    if rows:
        rows.append(_cost_row("sum", comparison.total()))
    return rows


def _cost_row(name: str, place: Place) -> dict[str, Any]:
    cells = []
    for key in ("params", "macs", "elements"):
        old, new = getattr(place.before, key), getattr(place.after, key)
        cells.append({"before": _number(old), "after": _number(new), "change": new - old})
    return {"name": name, "cells": cells, "maps": place.maps.macs, "layers": place.layers.macs}


Pair = tuple[Layer | None, Layer | None]


def _shown(pairs: list[Pair]) -> list[Pair]:
    """Those with pictures: every map that gets smaller, and the last of each size."""
    last = {layer.size: at for at, (_, layer) in enumerate(pairs) if layer is not None and not layer.small}
    chosen = []
    for at, (old, new) in enumerate(pairs):
        layer = new or old
        assert layer is not None
        shrinks = layer.reads is not None and layer.size != layer.before and not layer.small
        if shrinks or last.get(layer.size) == at:
            chosen.append((old, new))
    return chosen[:_MOST]


def _pair(old: Layer | None, new: Layer | None) -> dict[str, Any]:
    either = new or old
    assert either is not None
    sides = []
    for title, layer in (("before", old), ("after", new)):
        if layer is None:
            sides.append({"title": title, "absent": True})
            continue
        reads = layer.reads
        sides.append(
            {
                "title": title,
                "absent": False,
                "size": size_text(layer.size),
                "unknown": layer.unknown,
                "padded": _map(layer.padded),
                "outside": _map(layer.outside),
                "taps": "" if reads is None else share_text(reads.taps),
                "sides": [] if reads is None else [share_text(side) for side in reads.sides],
            }
        )
    return {"name": either.name or "the model's own forward", "kind": made_by(either), "sides": sides}


def _map(values: Tensor | None) -> dict[str, str] | None:
    if values is None:
        return None
    mean, worst = float(values.mean()), float(values.max())
    return {"picture": picture(values), "mean": share_text(mean), "worst": share_text(worst)}


def _code(request: Request) -> str:
    """Python that makes the converted network from the plan that the page holds."""
    source = request.source
    return "\n".join(
        (
            "import json",
            "import padfree",
            "from padfree.files.sources import Source",
            "",
            f"model = Source({source.library!r}, {source.name!r}, {dict(source.kwargs)!r}).create()",
            "# the library's initial weights: load yours here; layers that were calibrated begin as the plan says",
            'plan = padfree.Plan.from_dict(json.load(open("plan.json")))  # the text under "The plan"',
            "converted = plan.apply(model)",
            f"print(padfree.footprint(model, {request.plan.input_size!r}).compare(padfree.footprint(converted)))",
        )
    )


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
