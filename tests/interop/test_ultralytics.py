"""Converted networks in ultralytics (extra `interop`): as docs/interop.md says."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import padfree

pytestmark = pytest.mark.slow
SIDE = 96
NETWORK = "yolov8n-cls.yaml"


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package, with its settings in a folder of the test's, and kept from looking for weights and updates."""
    settings = {
        "YOLO_CONFIG_DIR": str(tmp_path_factory.mktemp("settings")),
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield pytest.importorskip("ultralytics")
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def converted(ultralytics: Any) -> Any:
    """A YOLO classification network, converted, whose norms are none of them the identity."""
    torch.manual_seed(0)
    return lived_in(padfree.convert(ultralytics.YOLO(NETWORK).model, input_size=(3, SIDE, SIDE)))


def lived_in(model: nn.Module) -> nn.Module:
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.2)
        norm.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, SIDE, SIDE))
    return model.eval()


def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def photo() -> Any:
    return np.random.default_rng(0).integers(0, 256, (100, 120, 3)).astype(np.uint8)


def predicted(yolo: Any) -> tuple[Tensor, Tensor]:
    """What YOLO.predict says of a photo, and the batch that it gave the network."""
    given: list[Tensor] = []
    handle = yolo.model.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    result = yolo.predict(photo(), imgsz=SIDE, verbose=False)[0]
    handle.remove()
    return result.probs.data, given[-1]


def test_every_strided_convolution_of_the_network_is_converted(converted: Any) -> None:
    assert [(match.rule, match.name) for match in converted.padfree_plan.matches] == [
        ("stem", "model.0.conv"),
        *[("dense", f"model.{index}.conv") for index in (1, 3, 5, 7)],
    ]


def test_predict_takes_the_fused_network(ultralytics: Any, converted: Any) -> None:
    yolo = ultralytics.YOLO(NETWORK)
    yolo.model = padfree.fuse(converted)
    assert yolo.fuse().model is yolo.model
    found, batch = predicted(yolo)
    with torch.no_grad():
        assert_close(found, converted(batch)[0][0], rtol=1e-4, atol=1e-7)


def test_its_own_fuse_raises_and_so_does_predict_unfused(ultralytics: Any, converted: Any) -> None:
    yolo = ultralytics.YOLO(NETWORK)
    yolo.model = copy.deepcopy(converted)
    for run in (yolo.fuse, lambda: yolo.predict(photo(), imgsz=SIDE, verbose=False)):
        with pytest.raises(padfree.PadfreeError, match=r"call padfree.fuse\(model\)"):
            run()
    assert_close(yolo.model(images())[0], converted(images())[0], rtol=0, atol=0)


def test_fuse_of_a_network_around_a_converted_one_raises(ultralytics: Any) -> None:
    """Only its `Sequential` was converted: the network around it does not know, and its `fuse` takes blocks apart."""
    model = copy.deepcopy(ultralytics.YOLO(NETWORK).model)
    model.model = padfree.convert(model.model, input_size=(3, SIDE, SIDE))
    lived_in(model)
    with pytest.raises(padfree.PadfreeError, match="forward_fuse"):
        model.fuse(verbose=False)(images())


def test_files_of_ultralytics_keep_the_network(ultralytics: Any, converted: Any, tmp_path: Path) -> None:
    yolo = ultralytics.YOLO(NETWORK)
    yolo.model = copy.deepcopy(converted)
    yolo.save(tmp_path / "converted.pt")
    again = ultralytics.YOLO(tmp_path / "converted.pt").model
    assert padfree.is_converted(again)
    wanted = copy.deepcopy(converted).half().float()  # their files hold halves
    with torch.no_grad():
        assert_close(again(images())[0], wanted(images())[0], rtol=0, atol=0)


def test_a_converted_timm_network_is_predicted_with(ultralytics: Any) -> None:
    yolo = ultralytics.YOLO(NETWORK)
    yolo.model = lived_in(padfree.convert(timm.create_model("mobilenetv3_small_050", num_classes=5)))
    yolo.model.names = {index: f"class {index}" for index in range(5)}
    found, batch = predicted(yolo)
    with torch.no_grad():
        assert_close(found, yolo.model(batch)[0], rtol=1e-4, atol=1e-6)


def test_a_torchvision_network_inside_a_yolo_network(ultralytics: Any) -> None:
    from ultralytics.nn.tasks import ClassificationModel

    layers = [[-1, 1, "TorchVision", [512, "resnet18", None, True, 2]]]
    torch.manual_seed(0)
    description = {"nc": 5, "backbone": layers, "head": [[-1, 1, "Classify", ["nc"]]]}
    model = lived_in(padfree.convert(ClassificationModel(description, verbose=False), input_size=(3, SIDE, SIDE)))
    assert len(model.padfree_plan.matches) >= 4
    fused = padfree.fuse(model)
    with torch.no_grad():
        assert_close(fused(images())[0], model(images())[0], rtol=1e-4, atol=1e-6)
