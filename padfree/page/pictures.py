"""Maps as small pictures inside the page, and the colours that they are in."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor
from torch.nn import functional as F

# Viridis (matplotlib, CC0) at equal steps: as light in grey as in colour, and told apart by colour-blind people.
_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_LARGEST = 128  # pixels a side; larger maps are averaged down


def palette() -> list[tuple[int, int, int]]:
    """256 colours from 0 to 1."""
    colours = []
    for at in range(256):
        place = at / 255 * (len(_STOPS) - 1)
        low = min(int(place), len(_STOPS) - 2)
        pairs = zip(_STOPS[low], _STOPS[low + 1], strict=True)
        red, green, blue = (round(a + (b - a) * (place - low)) for a, b in pairs)
        colours.append((red, green, blue))
    return colours


def gradient() -> str:
    """The colours as a CSS gradient."""
    return f"linear-gradient(to right, {', '.join(f'rgb{stop}' for stop in _STOPS)})"


def picture(values: Tensor, top: float = 1.0) -> str:
    """(H, W) numbers from 0 to `top` as a `data:` address of a PNG with a pixel a position."""
    from PIL import Image

    rows, columns = values.shape
    if max(rows, columns) > _LARGEST:
        sides = (min(rows, _LARGEST), min(columns, _LARGEST))
        values = F.adaptive_avg_pool2d(values[None, None].double(), sides)[0, 0]
    levels = (values.double() / (top or 1.0) * 255).round().clamp(0, 255).to(torch.uint8)
    image = Image.frombytes("P", (levels.shape[1], levels.shape[0]), bytes(levels.flatten().tolist()))
    image.putpalette([part for colour in palette() for part in colour])
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
