"""The flags of `padfree-convert`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import padfree
from padfree import kernels
from padfree.cli import advise, int8
from padfree.cli.parser import Parser
from padfree.cli.replacing import HELP as REPLACE_HELP
from padfree.types import Options

_EPILOG = "NAME of --timm may carry a tag (resnet50.a1_in1k). No weights are downloaded without --pretrained."


class _Parser(Parser):
    """One whose help goes where it is told to, or fails: argparse would keep quiet about a full disk."""

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)


def parser() -> argparse.ArgumentParser:
    """All flags of `padfree-convert`, in the groups of its help."""
    made = _Parser(
        prog="padfree-convert",
        description="`padfree-convert`: convert a network by name and report what changed.",
        epilog=_EPILOG,
    )
    # in one line however narrow the terminal is: reports of faults quote it
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--version", action="version", version=f"padfree {padfree.__version__}; {kernels.describe()}")
    model = made.add_argument_group("model (exactly one)").add_mutually_exclusive_group(required=True)
    model.add_argument("--timm", metavar="NAME", help="a timm model")
    model.add_argument("--torchvision", metavar="NAME", help="a torchvision model")
    model.add_argument("--bsconv", metavar="NAME", help="an architecture of the bsconv package")
    model.add_argument("--model", metavar="MODULE:FACTORY", help="a function of yours that returns a model")
    built = made.add_argument_group("how it is built")
    built.add_argument("--num-classes", type=int, metavar="N", help="passed to the builder")
    built.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"))
    built.add_argument("--pretrained", action="store_true", help="download the library's weights")
    built.add_argument("--checkpoint", metavar="FILE", help="unconverted weights: safetensors or torch")
    rewrite = made.add_argument_group("what is converted, and how")
    rewrite.add_argument(
        "--rules", nargs="+", action="extend", metavar="RULE", help="of depthwise dense projection stem"
    )
    rewrite.add_argument("--include", nargs="+", action="extend", metavar="PATTERN", help="convert only these")
    rewrite.add_argument("--exclude", nargs="+", action="extend", metavar="PATTERN", help="leave these alone")
    defaults = Options()
    rewrite.add_argument("--merge", default=defaults.merge, help="activation (default), norm or conv")
    rewrite.add_argument("--pool", default=defaults.pool, help="3x3 (default) or kernel")
    rewrite.add_argument("--projection", default=defaults.projection, help="depthwise (default) or dense")
    rewrite.add_argument("--stem-residual", action="store_true", help="add the stem's output back after its tail")
    rewrite.add_argument("--init", default="auto", help="of new layers: auto (default), preserve or fresh")
    rewrite.add_argument("--calibrate", metavar="FOLDER", help="fit a trained network on a folder's images, unlabelled")
    rewrite.add_argument("--allow-resize", action="store_true", help="also where the output would get smaller sides")
    rewrite.add_argument("--no-check", action="store_true", help="without the real forward pass of the converted copy")
    rewrite.add_argument("--replace", nargs="+", action="append", metavar=("KIND", "KEY=VALUE"), help=REPLACE_HELP)
    rewrite.add_argument("--replace-only", action="store_true", help="replace, and do not convert")
    result = made.add_argument_group("results")
    result.add_argument("--plan-only", action="store_true", help="show what would be converted, and stop")
    advise.add_flag(result)
    result.add_argument("--json", metavar="PATH", help="the report as JSON; - is stdout, with nothing else")
    result.add_argument("--report", metavar="FILE", help="an .html page on what padding does before and after")
    result.add_argument("--images", metavar="FOLDER", help="images for --report to measure the border effect on")
    result.add_argument("--output", metavar="FILE", help="a .safetensors file for padfree.load")
    result.add_argument("--onnx", metavar="FILE", help="export the converted model to ONNX")
    int8.add_flag(result)
    result.add_argument("--exported-program", metavar="FILE", help="export it as a torch.export program (.pt2)")
    result.add_argument("--fixed-sides", action="store_true", help="export for this input size only; the batch is free")
    limit = "end an export that takes longer (default: %(default)g; 0 for no limit)"
    result.add_argument("--time-limit", type=float, default=3600.0, metavar="SECONDS", help=limit)
    return made
