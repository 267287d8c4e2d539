"""Converted networks in fastai (extra `interop`): as docs/interop.md says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

import padfree
import padfree.timm

pytestmark = pytest.mark.slow
SIDE = 64


@pytest.fixture(scope="module")
def fastai() -> Any:
    pytest.importorskip("fastai")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fastai.vision.all

    return fastai.vision.all


@pytest.fixture
def loaders(fastai: Any, tmp_path: Path) -> Any:
    """Loaders of a folder with eight images of each of two classes."""
    generator = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / name).mkdir()
        for index in range(8):
            pixels = generator.integers(0, 128, (SIDE, SIDE, 3)) + (128 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{index}.png")
    return fastai.ImageDataLoaders.from_folder(
        tmp_path, valid_pct=0.5, seed=0, bs=4, num_workers=0, device=torch.device("cpu")
    )


def pooled(model: nn.Module, pool: str, x: Tensor) -> Tensor:
    """What a network's global pool is given."""
    found: list[Tensor] = []
    handle = model.get_submodule(pool).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(x)
    handle.remove()
    return found[0]


BODIES: dict[str, tuple[Callable[..., nn.Module], str, int | None]] = {
    "resnet18": (torchvision.models.resnet18, "avgpool", -2),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, "avgpool", None),
    "timm_resnet18": (lambda **_: timm.create_model("resnet18"), "global_pool", None),
    "timm_efficientnet_lite0": (lambda **_: timm.create_model("efficientnet_lite0"), "global_pool", None),
    "timm_mobilenetv3_small_050": (lambda **_: timm.create_model("mobilenetv3_small_050"), "global_pool", None),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_cut_off_by_fastai_is_that_of_the_converted_network(fastai: Any, name: str) -> None:
    build, pool, cut = BODIES[name]
    converted = padfree.convert(build()).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        wanted = pooled(converted, pool, x)
        body = fastai.create_body(converted, cut=cut).eval()
        assert_close(body(x), wanted, rtol=0, atol=0)


def test_a_learner_trains_freezes_exports_and_reads_a_network_by_name(
    fastai: Any, loaders: Any, tmp_path: Path
) -> None:
    learner = fastai.vision_learner(loaders, "padfree_test_efficientnet", pretrained=False)
    body = learner.model[0]
    assert padfree.is_converted(body)
    with learner.no_bar(), learner.no_logging():
        learner.freeze()
        trained = {name for name, parameter in body.named_parameters() if parameter.requires_grad}
        norms = [name for name, module in body.named_modules() if isinstance(module, nn.BatchNorm2d)]
        assert trained == {f"{name}.{part}" for name in norms for part in ("weight", "bias")}  # fastai's `train_bn`
        learner.fit(1, 1e-3)
        learner.unfreeze()
        assert all(parameter.requires_grad for parameter in learner.model.parameters())
        learner.fit_one_cycle(1, 1e-3)
        learner.export("learner.pkl")
        images = [tmp_path / "dark" / "0.png", tmp_path / "light" / "1.png"]
        batches = loaders.test_dl(images)
        found, _ = learner.get_preds(dl=batches)
    again = fastai.load_learner(tmp_path / "learner.pkl")
    assert padfree.is_converted(again.model)
    with again.no_bar():
        assert_close(again.get_preds(dl=again.dls.test_dl(images))[0], found, rtol=0, atol=0)
    with torch.no_grad():  # plain tensors, and not fastai's class of images
        batch = torch.cat([each[0] for each in batches]).as_subclass(Tensor)
        wanted = learner.model.eval()(batch).softmax(1)
    assert_close(found.as_subclass(Tensor), wanted, rtol=1e-5, atol=1e-6)
