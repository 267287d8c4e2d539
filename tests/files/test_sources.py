"""Models by name: what is refused, and that nothing is imported or downloaded before it is asked for."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.files.sources import Source, SourceError, bsconv_names


@pytest.mark.parametrize(
    ("library", "name", "expected"),
    [
        ("timm", "mobilnetv3_large_100", "mobilenetv3_large_100"),
        ("torchvision", "mobilenet-v3-large", "mobilenet_v3_large"),
        ("bsconv", "cifar_resnet21x", "cifar_resnet20"),
        ("factory", "torch.nn:Sequentia", "Sequential"),
    ],
)
def test_an_unknown_name_is_refused_with_close_ones(library: str, name: str, expected: str) -> None:
    with pytest.raises(SourceError, match=f"did you mean .*{expected}"):
        Source(library, name).create()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("keras", "is not a factory"),
        ("timm:hf-hub:someone/model", "timm has no model"),
        ("no_such_package.models:net", "cannot import no_such_package"),
        ("math:pi", "is a float, not a function"),
        ("math:floor", "cannot build 'math:floor'"),
        ("collections:OrderedDict", "made a OrderedDict, not an nn.Module"),
        ({"library": "timm"}, "is not a model source"),
        ({"library": "timm", "name": 3}, "is not a model source"),
        ({"library": "onnx", "name": "x"}, "no model library 'onnx'"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"pretrained": True}}, "may not set 'pretrained'"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"checkpoint_path": "x"}}, "may not set"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"no_such": 1}}, "timm cannot build 'resnet18'"),
        (7, "is not a model source"),
    ],
)
def test_a_bad_source_is_refused(source: object, reason: str) -> None:
    with pytest.raises(PadfreeError, match=reason):
        Source.from_dict(source).create()


@pytest.mark.parametrize("source", ["bsconv:cifar_resnet20", "torch.nn:Identity"])
def test_pretrained_weights_exist_for_timm_and_torchvision_only(source: str) -> None:
    with pytest.raises(SourceError, match="pretrained"):
        Source.from_dict(source).create(pretrained=True)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("timm:mobilenetv3_small_050", "MobileNetV3"),
        ("torchvision:mobilenet_v3_small", "MobileNetV3"),
        ("torchvision:fcn_resnet50", "FCN"),
        ("torchvision:googlenet", "GoogLeNet"),
        ("bsconv:cifar_mobilenetv1_w1d4", "MobileNetV1"),
        ("torch.nn:Identity", "Identity"),
    ],
)
def test_a_model_is_built_by_name_without_weights(source: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("something is being downloaded")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with torch.device("meta"):
        model = Source.from_dict(source).create()
    assert type(model).__name__ == kind


def test_the_number_of_classes_reaches_the_builder() -> None:
    for text in ("timm:lcnet_035", "torchvision:shufflenet_v2_x0_5", "bsconv:mobilenetv1_w1d4"):
        library, _, name = text.partition(":")
        model = Source(library, name, {"num_classes": 7}).create()
        assert list(model.parameters())[-1].shape == (7,)


def test_a_source_reads_back_what_it_wrote() -> None:
    source = Source("timm", "resnet18", {"num_classes": 10, "in_chans": 1})
    assert Source.from_dict(source.to_dict()) == source
    assert Source.from_dict("timm:resnet18") == Source("timm", "resnet18")
    assert Source.from_dict("package.module:factory") == Source("factory", "package.module:factory")
    assert str(source) == "timm:resnet18"


def test_a_factory_may_live_in_the_working_directory(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_network.py").write_text(  # type: ignore[operator]
        "from torch import nn\n\nclass Zoo:\n    @staticmethod\n    def small(): return nn.Conv2d(3, 4, 3)\n"
        "MADE = nn.Identity()\n"
        "def broken():\n    raise ZeroDivisionError('no')\n"
        "def ends():\n    raise SystemExit(0)\n"
        "def stopped():\n    raise KeyboardInterrupt\n"
    )
    (tmp_path / "own_program.py").write_text("raise SystemExit(0)\n")  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)  # type: ignore[arg-type]
    path = list(sys.path)
    assert isinstance(Source("factory", "own_network:Zoo.small").create(), nn.Conv2d)
    with pytest.raises(SourceError, match="is a model, not a function"):
        Source("factory", "own_network:MADE").create()
    with pytest.raises(SourceError, match="ZeroDivisionError: no"):
        Source("factory", "own_network:broken").create()
    with pytest.raises(SourceError, match="cannot build 'own_network:ends': SystemExit: 0"):
        Source("factory", "own_network:ends").create()
    with pytest.raises(SourceError, match="cannot import own_program: SystemExit: 0"):
        Source("factory", "own_program:make").create()
    with pytest.raises(KeyboardInterrupt):
        Source("factory", "own_network:stopped").create()
    assert sys.path == path


def test_every_documented_bsconv_name_is_built() -> None:
    names = bsconv_names()
    assert len(names) == len(set(names)) >= 100
    chosen = [name for name in names if "602" not in name and "302" not in name and "110" not in name][::9]
    assert len(chosen) >= 10
    with torch.device("meta"):
        for name in chosen:
            assert isinstance(Source("bsconv", name).create(), nn.Module)
    assert Source("bsconv", "cifar_resnet20").input_size == (3, 32, 32)
    assert Source("bsconv", "resnet18").input_size is None
