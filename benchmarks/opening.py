"""docs/images/before-after.svg: what the windows of one strided convolution read, before and after conversion.

    python -m benchmarks.opening

A toy network is converted, and the picture is drawn from its convolution as it is then: kernel, stride, padding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

import padfree

TARGET = Path(__file__).parent.parent / "docs" / "images" / "before-after.svg"
SIDE = 8  # of the map that the windows read
_CELL, _GAP, _TOP = 26, 60, 64
_ZERO, _READ, _UNREAD, _INK, _SOFT = "#d55e00", "#d6e6f2", "#ffffff", "#1b1f24", "#57606a"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=TARGET, metavar="FILE.svg")
    parser.parse_args().output.write_text(draw(), encoding="utf-8")


def networks() -> tuple[nn.Module, nn.Module]:
    """A network with one strided depthwise convolution, and its padding-free form."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU()
    )
    return model, padfree.convert(model, input_size=(3, SIDE, SIDE), init="fresh")


def taps(model: nn.Module) -> list[int]:
    """Where the windows of the model's strided convolution read on one axis: 0 is the first pixel, -1 padding."""
    (conv,) = [each for each in model.modules() if isinstance(each, nn.Conv2d) and each.stride == (2, 2)]
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    count = (SIDE + 2 * padding - kernel) // stride + 1
    return sorted({at * stride - padding + tap for at in range(count) for tap in range(kernel)})


def draw() -> str:
    """The picture as SVG text."""
    before, after = (taps(model) for model in networks())
    panels = [
        (before, "before: stride 2, padded", "reads zeros above and at the left,", "never below or at the right"),
        (
            after,
            "after: padding-free",
            "reads pixels only; a max-pool",
            "runs beside it and is added",
        ),
    ]
    width = (SIDE + 1) * _CELL
    parts: list[str] = []
    for at, (read, title, *lines) in enumerate(panels):
        left = 24 + at * (width + _GAP)
        parts.append(_text(left, 28, title, 17, _INK, "600"))
        for row in range(-1, SIDE):
            for column in range(-1, SIDE):
                inside = min(row, column) >= 0
                if row in read and column in read:
                    colour = _READ if inside else _ZERO
                elif inside:
                    colour = _UNREAD
                else:
                    continue
                parts.append(_cell(left + (column + 1) * _CELL, _TOP + (row + 1) * _CELL, colour, inside))
        for number, line in enumerate(lines):
            parts.append(_text(left, _TOP + width + 24 + 19 * number, line, 14, _SOFT))
    total, height = 48 + 2 * width + _GAP, _TOP + width + 88
    key = [(_ZERO, "made-up zero"), (_READ, "pixel that is read"), (_UNREAD, "pixel that nothing reads")]
    for at, (colour, word) in enumerate(key):
        left = 24 + at * 170
        parts.append(_cell(left, height - 30, colour, True, 14))
        parts.append(_text(left + 22, height - 18, word, 13, _SOFT))
    label = f"Windows of a 3x3 convolution with stride 2 on a map of {SIDE}x{SIDE} pixels, before and after conversion"
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" role="img">',
            f"<title>{label}</title>",
            f'<rect width="{total}" height="{height}" rx="10" fill="#f6f8fa"/>',
            *parts,
            "</svg>\n",
        )
    )


def _cell(left: int, top: int, colour: str, solid: bool, side: int = _CELL) -> str:
    inner = side - 2
    zero = "" if solid else _text(left + side / 2 - 4, top + side / 2 + 5, "0", 13, "#ffffff", "600")
    return (
        f'<rect x="{left + 1}" y="{top + 1}" width="{inner}" height="{inner}" rx="2" fill="{colour}" '
        f'stroke="#afb8c1" stroke-width=".7"/>{zero}'
    )


def _text(left: float, base: float, text: str, size: int, colour: str, weight: str = "400") -> str:
    return (
        f'<text x="{left:g}" y="{base:g}" font-family="system-ui, sans-serif" font-size="{size}" '
        f'font-weight="{weight}" fill="{colour}">{text}</text>'
    )


if __name__ == "__main__":
    main()
