"""Source models of the recipes, as library models or networks of our own.

Networks that no library has are in networks/.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.files.sources import Source

from . import networks
from .losses import orthonormal_loss
from .parc import ParCMobileNetV2
from .schema import ModelSpec
from .small import small_network


def build_model(spec: ModelSpec) -> nn.Module:
    """The source model with fresh values from torch's current random state.

    Raises:
        PadfreeError: its package is not installed, does not know the name or an argument, or would load weights.
    """
    try:
        model = _BUILDERS[spec.builder](spec)
    except ImportError as error:
        raise PadfreeError(
            f"builder {spec.builder} needs the package {error.name}: "
            'pip install ".[recipes]" in the source folder of padfree'
        ) from error
    except Exception as error:  # builders raise kinds of their own
        named = f" {spec.name}" if spec.name else ""
        given = f" with {spec.arguments}" if spec.arguments else ""
        raise PadfreeError(f"builder {spec.builder} cannot make{named}{given}: {error}") from error
    for path, stride in spec.strides.items():
        _set_stride(model, path, stride)
    return model


def check_images(model: nn.Module, spec: ModelSpec) -> None:
    """Run two empty images through a copy of a network, as training would.

    Raises:
        PadfreeError: it does not take them, or does not give a logit for each class.
    """
    side, name = spec.input_side, type(model).__name__
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = copy.deepcopy(model).train()(torch.zeros(2, 3, side, side))
    except Exception as error:  # a network raises what its layers raise
        raise PadfreeError(f"{name} does not take images of {side} pixels (model.input_side): {error}") from error
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (2, spec.num_classes):
        raise PadfreeError(
            f"{name} makes {shape or type(logits).__name__} of two images and must make {(2, spec.num_classes)}"
        )


def ghostnet_rows(stage2_stride: int = 2) -> list[list[list[float]]]:
    """GhostNet's rows (kernel, expanded, out, SE ratio, stride), grouped in timm's stages.

    Args:
        stage2_stride: stride of the second stage: 2, and 1 for CIFAR.
    """
    return [
        [[3, 16, 16, 0, 1]],
        [[3, 48, 24, 0, stage2_stride]],
        [[3, 72, 24, 0, 1]],
        [[5, 72, 40, 0.25, 2]],
        [[5, 120, 40, 0.25, 1]],
        [[3, 240, 80, 0, 2]],
        [
            [3, 200, 80, 0, 1],
            [3, 184, 80, 0, 1],
            [3, 184, 80, 0, 1],
            [3, 480, 112, 0.25, 1],
            [3, 672, 112, 0.25, 1],
        ],
        [[5, 672, 160, 0.25, 2]],
        [
            [5, 960, 160, 0, 1],
            [5, 960, 160, 0.25, 1],
            [5, 960, 160, 0, 1],
            [5, 960, 160, 0.25, 1],
        ],
    ]


def _named(spec: ModelSpec) -> nn.Module:
    return Source(spec.builder, str(spec.name), dict(num_classes=spec.num_classes, **spec.arguments)).create()


def _bsconv(spec: ModelSpec) -> nn.Module:
    made: Any = _named(spec)
    if hasattr(made, "reg_loss"):
        made.reg_loss = types.MethodType(orthonormal_loss, made)  # the package's own may read another copy
    model: nn.Module = made
    return model


def _bsconv_mobilenetv3(spec: ModelSpec) -> nn.Module:
    from bsconv.pytorch.mobilenet import build_mobilenet_v3

    model: nn.Module = build_mobilenet_v3(num_classes=spec.num_classes, **spec.arguments)
    return model


def _timm_ghostnet(spec: ModelSpec) -> nn.Module:
    from timm.models.ghostnet import GhostNet

    arguments: dict[str, Any] = {"drop_rate": 0.2, **spec.arguments}
    rows = ghostnet_rows(arguments.pop("stage2_stride", 2))
    model: nn.Module = GhostNet(rows, num_classes=spec.num_classes, **arguments)
    return model


def _networks(spec: ModelSpec) -> nn.Module:
    return networks.create(str(spec.name), spec.num_classes, **spec.arguments)


def _parc_mobilenetv2(spec: ModelSpec) -> nn.Module:
    return ParCMobileNetV2(spec.num_classes, spec.input_side, **spec.arguments)


def _small(spec: ModelSpec) -> nn.Module:
    return small_network(str(spec.name), spec.num_classes, **spec.arguments)


_BUILDERS: dict[str, Callable[[ModelSpec], nn.Module]] = {
    "bsconv": _bsconv,
    "bsconv-mobilenetv3": _bsconv_mobilenetv3,
    "torchvision": _named,
    "timm": _named,
    "timm-ghostnet": _timm_ghostnet,
    "networks": _networks,
    "parc-mobilenetv2": _parc_mobilenetv2,
    "small": _small,
}


def _set_stride(model: nn.Module, path: str, stride: int) -> None:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise PadfreeError(f"model.strides: {type(model).__name__} has no module {path!r}") from error
    if isinstance(module, nn.Conv2d):
        module.stride = (stride, stride)
    elif isinstance(module, nn.MaxPool2d):
        module.stride = stride
    else:
        raise PadfreeError(f"model.strides: {path!r} is a {type(module).__name__}, not a conv or max-pool")
