"""The paper's base networks, as its tables name them, from timm, torchvision and bsconv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision
from bsconv.pytorch import get_model
from bsconv.pytorch.mobilenet import build_mobilenet_v3
from timm.models.ghostnet import GhostNet
from torch import nn

from padfree import Options


def mobilenetv3(classes: int, cifar: bool) -> nn.Module:
    model = torchvision.models.mobilenet_v3_large(num_classes=classes)
    if cifar:
        model.features[0][0].stride = (1, 1)
        model.features[2].block[1][0].stride = (1, 1)
    return model


def shufflenetv2(classes: int, cifar: bool) -> nn.Module:
    model = torchvision.models.shufflenet_v2_x1_0(num_classes=classes)
    if cifar:
        model.conv1[0].stride = (1, 1)
        model.maxpool.stride = 1
    return model


def ghostnet(classes: int, cifar: bool) -> nn.Module:
    """Timm's GhostNet v1; each row (kernel, expansion, channels, squeeze ratio, stride)."""
    rows: list[list[list[Any]]] = [
        [[3, 16, 16, 0, 1]],
        [[3, 48, 24, 0, 1 if cifar else 2]],
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
        [[5, 960, 160, 0, 1], [5, 960, 160, 0.25, 1], [5, 960, 160, 0, 1], [5, 960, 160, 0.25, 1]],
    ]
    model = GhostNet(rows, num_classes=classes, drop_rate=0.2)
    if cifar:
        model.conv_stem.stride = (1, 1)
    return model


def _bsconv(architecture: str, classes: int = 100) -> Callable[[], nn.Module]:
    return lambda: get_model(architecture, num_classes=classes)


RESIDUAL = Options(stem_residual=True)
NETWORKS: dict[tuple[str, str], tuple[Callable[[], nn.Module], Options]] = {
    ("cifar100-first", "mobilenetv3-large"): (_bsconv("cifar_mobilenetv3_large_w1"), Options()),
    ("cifar100-first", "mobilenetv3-large-bsconvs"): (
        _bsconv("cifar_mobilenetv3_large_w1_bsconvs_p1d6"),
        Options(),
    ),
    ("cifar100-first", "resnet20"): (_bsconv("cifar_resnet20"), RESIDUAL),
    ("cifar100-first", "resnet110-bsconvu"): (_bsconv("cifar_resnet110_bsconvu"), RESIDUAL),
    ("cifar100-first", "wrn40-3"): (
        _bsconv("cifar_wrn40_3"),
        Options(stem_residual=True, projection="dense"),
    ),
    ("cifar100-first", "wrn40-8-bsconvu"): (_bsconv("cifar_wrn40_8_bsconvu"), RESIDUAL),
    ("cifar100-second", "mobilenetv3-large"): (lambda: mobilenetv3(100, cifar=True), Options()),
    ("cifar100-second", "ghostnet"): (lambda: ghostnet(100, cifar=True), Options(pool="kernel")),
    ("cifar100-second", "shufflenetv2-x1.0"): (lambda: shufflenetv2(100, cifar=True), Options(merge="conv")),
    ("stanford-dogs", "mobilenetv3-large"): (_bsconv("mobilenetv3_large_w1", 120), Options()),
    ("stanford-dogs", "mobilenetv3-large-bsconvs"): (
        _bsconv("mobilenetv3_large_w1_bsconvs_p1d6", 120),
        Options(),
    ),
    ("imagenet", "mobilenetv3-large"): (
        lambda: build_mobilenet_v3(num_classes=1000, version="large", use_lightweight_head=False),
        Options(),
    ),
    ("vegfru-292", "mobilenetv3-large"): (lambda: mobilenetv3(292, cifar=False), Options()),
    ("vegfru-292", "ghostnet"): (lambda: ghostnet(292, cifar=False), Options(pool="kernel")),
    ("vegfru-292", "shufflenetv2-x1.0"): (lambda: shufflenetv2(292, cifar=False), Options(merge="conv")),
}
GOLDEN = {
    "cifar2-mobilenetv3": ("cifar100-second", "mobilenetv3-large"),
    "cifar2-ghostnet": ("cifar100-second", "ghostnet"),
    "cifar1-resnet20": ("cifar100-first", "resnet20"),
    "cifar1-wrn40_8_bsconvu": ("cifar100-first", "wrn40-8-bsconvu"),
}
