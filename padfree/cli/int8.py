"""`padfree-convert --onnx FILE --int8 FOLDER`: the file in int8, calibrated on a folder's images."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from padfree.cli.folder import batches, check_readable, image_files
from padfree.deploy.int8 import Int8
from padfree.errors import PadfreeError
from padfree.types import PlanData

IMAGES = 640  # what ranges are read off; more of them take longer and say little more


def add_flag(group: argparse._ArgumentGroup) -> None:
    """`--int8 FOLDER`."""
    group.add_argument("--int8", metavar="FOLDER", help="--onnx in int8, calibrated on a folder's images, unlabelled")


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be quantized before any work is done.

    Raises:
        PadfreeError: there is no --onnx; the folder has no images; or a file of it is no image that can be read.
    """
    if arguments.int8 is None:
        return
    if arguments.onnx is None:
        raise PadfreeError("--int8 is about --onnx, which is not asked for")
    check_readable(_files(arguments))


def write(arguments: argparse.Namespace, original: nn.Module, converted: nn.Module, made: PlanData, path: Path) -> Int8:
    """Write the file, and say how far it is from the network.

    Args:
        arguments: the flags.
        original: whose configuration says how images are read.
        converted: what is exported; in eval mode after it.
        made: the plan.
        path: the file.

    Raises:
        PadfreeError: see `padfree.export.to_int8_onnx`.
    """
    from padfree.export import to_int8_onnx

    images = batches(original, made.input_size, _files(arguments), flag="--int8")
    return to_int8_onnx(
        converted.eval(), path, images, dynamic_sides=not arguments.fixed_sides, time_limit=arguments.time_limit
    )


def _files(arguments: argparse.Namespace) -> list[Path]:
    return image_files(arguments.int8, IMAGES, flag="--int8")
