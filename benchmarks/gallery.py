"""docs/gallery.md: the footprint and the border effect of known networks, before and after conversion.

    python -m benchmarks.gallery
    python -m benchmarks.gallery --networks timm:resnet18 --output /tmp/gallery

Weights are random (seed 0) and scenes are smooth noise (seed 0): the footprint needs neither, and the border effect
shows the mechanism alone. For your own network and images: `padfree-convert --report page.html --images FOLDER`.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import padfree
from benchmarks.clock import progress
from padfree.borders.effect import scene_size
from padfree.borders.layers import Footprint, Layer
from padfree.borders.results import BorderEffect
from padfree.errors import NothingToConvertError
from padfree.files.sources import Source
from padfree.geometry import share_text, size_text

DOCS = Path(__file__).parent.parent / "docs"
NETWORKS = (
    "timm:mobilenetv3_large_100",
    "timm:efficientnet_b0",
    "timm:resnet18",
    "timm:resnet50",
    "timm:convnext_tiny",
    "timm:regnety_004",
    "timm:ghostnet_100",
    "torchvision:shufflenet_v2_x1_0",
    "timm:repvit_m1",
    "timm:mobilenetv4_conv_small",
)
SIZE = (3, 224, 224)
_SCENES = 2
_HEADING = """# Gallery: padding in known networks

Made by `python -m benchmarks.gallery`, at {size}; the words are those of [padding.md](padding.md). Pictures: the share
of each position's paths that end in padding, from 0 (dark) to 100% (bright), on the last map of each size. Strided
taps: the mean over strided windows of the shares of taps in padding at the top, bottom, left and right. Border effect:
the mean over the four sides, and the centre, of the last map, in units of the features' root mean square, for random
weights and {scenes} scenes of smooth noise (ConvNeXt's untrained blocks are scaled by 1e-6, so they do next to
nothing). What it costs a trained network, only images show.

| network | output's paths in padding | strided taps in padding | pixels not read | border effect: sides, centre |
|---|---|---|---|---|
"""


def main() -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="LIBRARY:NAME")
    parser.add_argument("--output", type=Path, default=DOCS, metavar="FOLDER", help="holds gallery.md and images/")
    arguments = parser.parse_args()
    (arguments.output / "images").mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    rows, pictures = [], []
    for name in arguments.networks:
        progress(name)
        row, text = entry(name, arguments.output / "images")
        rows.append(row)
        pictures.append(text)
    text = _HEADING.format(size=size_text(SIZE), scenes=_SCENES) + "\n".join(rows) + "\n\n" + "\n".join(pictures)
    (arguments.output / "gallery.md").write_text(text, encoding="utf-8")


def entry(name: str, images: Path) -> tuple[str, str]:
    """The row of the table and the part with the picture of one network."""
    torch.manual_seed(0)
    source = Source.from_dict(name)
    model = source.create().eval()
    forms: list[tuple[str, nn.Module]] = [("before", model)]
    try:
        forms.append(("after", padfree.convert(model, input_size=SIZE)))
        said = ""
    except NothingToConvertError as error:
        said = f"\n{str(error)[:1].upper()}{str(error)[1:]}.\n"
    footprints = [(title, padfree.footprint(form, SIZE)) for title, form in forms]
    effects = [padfree.border_effect(form, scenes(scene_size(form, SIZE)), SIZE, shifts=()) for _, form in forms]
    file = images / f"{source.name}.png"
    draw(footprints, file)
    found = [footprint for _, footprint in footprints]
    cells = [
        _arrow([share_text(next(iter(each.outputs.values()))) for each in found]),
        _arrow([_taps(each) for each in found]),
        _arrow([each.unread_text() for each in found]),
        _arrow([_effect(each) for each in effects]),
    ]
    alternative = f"Heat maps of {source.name}: paths that end in padding, {' and '.join(title for title, _ in forms)}"
    part = f"## {source.name}\n{said}\n![{alternative}](images/{file.name})\n"
    return f"| {source.name} | {' | '.join(cells)} |", part


def scenes(size: tuple[int, ...]) -> Tensor:
    """(N, C, H, W) of smooth noise with a standard deviation of about one, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(_SCENES, size[0], side, side, generator=generator) for side in (4, 16, 64)]
    sides = (size[1], size[2])
    return torch.stack([F.interpolate(part, size=sides, mode="bicubic") for part in parts]).sum(0) / len(parts) ** 0.5


def last_maps(found: Footprint) -> list[Layer]:
    """The last map of each size, from large to small."""
    last = {layer.size: layer for layer in found.layers if layer.padded is not None and not layer.small}
    return sorted(last.values(), key=lambda layer: -layer.size[0])


def draw(footprints: list[tuple[str, Footprint]], file: Path) -> None:
    """Heat maps, one row a network and one column a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(title, last_maps(found)) for title, found in footprints]
    count = max(len(maps) for _, maps in rows)
    figure, axes = pyplot.subplots(
        len(rows), count, figsize=(1.7 * count, 2.0 * len(rows)), squeeze=False, layout="compressed"
    )
    shown = None
    for (title, maps), line in zip(rows, axes, strict=True):
        for axis in line:
            axis.set_axis_off()
        line[0].text(-0.08, 0.5, title, rotation=90, va="center", ha="right", transform=line[0].transAxes)
        for layer, axis in zip(maps, line, strict=False):
            assert layer.padded is not None
            shown = axis.imshow(layer.padded.numpy(), vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"{size_text(layer.size)}\nmean {float(layer.padded.mean()):.1%}", fontsize=9)
    if shown is not None:
        figure.colorbar(shown, ax=axes, label="paths that end in padding", shrink=0.8)
    figure.savefig(file, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def _taps(found: Footprint) -> str:
    """Mean over the strided operations of the shares of taps by side."""
    strided = [layer.reads for layer in found.layers if layer.reads is not None and max(layer.reads.stride) > 1]
    windows = [reads for reads in strided if max(reads.kernel) > 1]
    if not windows:
        return "none"
    by_side = zip(*(reads.sides for reads in windows), strict=True)
    return " ".join(share_text(sum(side) / len(windows)) for side in by_side)


def _effect(found: BorderEffect) -> str:
    layer = found.layers[-1]
    return f"{sum(layer.sides) / 4:.2f}, {layer.centre:.2f}"


def _arrow(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " → ".join(values)


if __name__ == "__main__":
    main()
