"""Weight files: what is refused, that nothing half-written stays, and that everything comes back."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import padfree
from padfree.errors import FileError, PadfreeError
from padfree.files.checkpoint import read_checkpoint
from padfree.files.sources import Source
from padfree.files.weights import load, save
from padfree.files.writing import replacing

SMALL = "lcnet_035"


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(0)
    model = padfree.convert(timm.create_model(SMALL, num_classes=5, in_chans=1), input_size=(1, 64, 64))
    with torch.no_grad():
        model(torch.rand(4, 1, 64, 64))  # running statistics other than the initial ones
    return model


@pytest.fixture(scope="module")
def written(converted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "small.safetensors"
    save(converted, path)
    return path


def rewritten(path: Path, target: Path, change: Any) -> Path:
    """A copy of a file whose padfree metadata went through `change`."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        metadata = json.loads(file.read(length))["__metadata__"]
    content = change(json.loads(metadata["padfree"]))
    if content is None:
        del metadata["padfree"]
    else:
        metadata["padfree"] = content if isinstance(content, str) else json.dumps(content)
    save_file(load_file(path), target, metadata=metadata)
    return target


# refused on reading


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match="no such file"):
        read_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.parametrize("read", [load, read_checkpoint])
def test_a_folder(read: Any, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a folder; pass the file in it that holds the weights"):
        read(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.pt").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(FileError, match=r"a\.pt cannot be read: Permission denied"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 200, -1])
def test_a_truncated_file(written: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(written.read_bytes()[:kept])
    with pytest.raises(FileError, match="damaged, truncated or not safetensors"):
        load(path)


@pytest.mark.parametrize("content", [b"\x80\x04N.", b"PK\x03\x04 not a zip", b"{}", b"\xff" * 4000])
def test_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(FileError, match="damaged, truncated or not safetensors"):
        load(path)
    with pytest.raises(FileError):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: None, "was not written by padfree.save"),
        (lambda content: "{", "damaged metadata: JSONDecodeError"),
        (lambda content: "[]", r"has format \[\]"),
        (lambda content: "null", "has format None"),
        (lambda content: {**content, "format": 99}, "has format 99; this padfree reads 1"),
        (lambda content: {"format": 1}, "damaged metadata: KeyError"),
        (lambda content: {**content, "plan": {}}, "damaged metadata: PlanError"),
        (lambda content: {**content, "plan": []}, "damaged metadata: PlanError"),
        (lambda content: {**content, "source": 5}, "is not a model source"),
        (lambda content: {**content, "source": {"library": "timm", "name": "no_such"}}, "timm has no model"),
        (
            lambda content: {**content, "source": {**content["source"], "kwargs": {"pretrained": True}}},
            "may not set 'pretrained'",
        ),
        (
            lambda content: {
                **content,
                "source": {"library": "timm", "name": "resnet18", "kwargs": {"in_chans": 1}},
            },
            r"timm:resnet18 with the plan of this file cannot be built: .*does not fit this ResNet",
        ),
        (
            lambda content: {**content, "source": {**content["source"], "kwargs": {"in_chans": 1}}},
            "keys 2 of another shape",
        ),
        (
            lambda content: {
                **content,
                "plan": {**content["plan"], "matches": content["plan"]["matches"][1:]},
            },
            "do not fit MobileNetV3: keys .* unknown",
        ),
    ],
)
def test_metadata_that_does_not_fit(written: Path, tmp_path: Path, change: Any, reason: str) -> None:
    with pytest.raises(FileError, match=reason):
        load(rewritten(written, tmp_path / "changed.safetensors", change))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("input_size",), [3, float("inf"), 64]),
        (("input_size",), "164"),
        (("model",), ["MobileNetV3"]),
        (("matches",), [None]),
        (("skips",), [{"name": 1, "reason": ""}]),
        (("matches", 0, "rule"), ["stem"]),
        (("matches", 0, "name"), {}),
        (("matches", 0, "domain"), None),
        (("matches", 0, "domain"), True),
        (("matches", 0, "size"), 64),
        (("matches", 0, "detail"), None),
        (("matches", 0, "detail"), [1]),
        (("matches", 0, "detail", "op"), [1]),
    ],
)
def test_a_plan_with_values_of_the_wrong_kind(
    written: Path, tmp_path: Path, place: tuple[str | int, ...], value: Any
) -> None:
    def change(content: Any) -> Any:
        inner = content["plan"]
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        return content

    with pytest.raises(FileError, match="damaged metadata: PlanError: not a plan of padfree"):
        load(rewritten(written, tmp_path / "changed.safetensors", change))


def test_whatever_applying_a_plan_raises_is_a_file_error(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (AttributeError("none"), SystemExit(0)):

        def fail(*args: object, error: BaseException = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(padfree.Plan, "apply", fail)
        with pytest.raises(FileError, match=f"cannot be built: {type(error).__name__}"):
            load(written)


@settings(max_examples=25)
@given(data=st.data())
def test_a_damaged_byte_is_refused_or_harmless(written: Path, data: st.DataObject) -> None:
    """Any one byte of the header: lengths, keys, source and plan are all in it."""
    content = bytearray(written.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    place = data.draw(st.integers(0, header - 1))
    content[place] ^= data.draw(st.integers(1, 127))
    path = written.with_name("damaged.safetensors")
    path.write_bytes(content)
    with contextlib.suppress(PadfreeError):
        assert len(load(path).state_dict()) == len(load_file(written))


def test_weights_that_do_not_fit(written: Path, tmp_path: Path) -> None:
    tensors = load_file(written)
    metadata = {"padfree": json.dumps(_content(written))}
    for key, kind in ((next(iter(tensors)), "missing"), (None, "unknown")):
        changed = dict(tensors)
        changed.pop(key) if key else changed.update(more=torch.zeros(2))
        save_file(changed, tmp_path / "changed.safetensors", metadata=metadata)
        with pytest.raises(FileError, match=f"keys 1 {kind} "):
            load(tmp_path / "changed.safetensors")


def _content(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        content: dict[str, Any] = json.loads(file.metadata()["padfree"])
    return content


# refused on writing


def test_a_model_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="carries no plan"):
        save(timm.create_model(SMALL), tmp_path / "a.safetensors")


def test_a_model_that_does_not_say_where_it_comes_from(tmp_path: Path) -> None:
    own = padfree.convert(_own())
    with pytest.raises(FileError, match="does not say where it comes from; pass source="):
        save(own, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_new_head_is_saved_with_the_source_that_the_error_names(tmp_path: Path) -> None:
    model = padfree.convert(timm.create_model("test_resnet", num_classes=5), input_size=(3, 64, 64)).eval()
    model.fc = nn.Linear(model.fc.in_features, 3)
    with pytest.raises(FileError, match="2 keys or shapes differ") as caught:
        save(model, tmp_path / "a.safetensors")
    (advised,) = re.findall(r"pass source=(\{.*?\}\})", str(caught.value))
    save(model, tmp_path / "a.safetensors", json.loads(advised.replace("{...}", '{"num_classes": 3}')))
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load(tmp_path / "a.safetensors")(images), model(images))


def test_a_source_that_gives_another_network(converted: nn.Module, tmp_path: Path) -> None:
    fewer = {"library": "timm", "name": SMALL, "kwargs": {"in_chans": 1, "num_classes": 4}}
    with pytest.raises(FileError, match="does not give this network: 2 keys or shapes differ"):
        save(converted, tmp_path / "a.safetensors", fewer)
    with pytest.raises(FileError, match="does not run on a 1x64x64 input"):
        save(converted, tmp_path / "a.safetensors", "timm:lcnet_035")
    with pytest.raises(FileError, match="timm:resnet18 does not take this network's plan"):
        save(
            padfree.convert(timm.create_model(SMALL), input_size=(3, 64, 64)),
            tmp_path / "a.safetensors",
            "timm:resnet18",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing(converted: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        save(converted, tmp_path / "none" / "a.safetensors")
    with pytest.raises(FileError, match="it is a folder"):
        save(converted, tmp_path)


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    with pytest.raises(FileError, match="disk full"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "disk full")
    with pytest.raises(ZeroDivisionError), replacing(path):
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["kept"]


def test_meta_weights_cannot_be_saved(tmp_path: Path) -> None:
    model = padfree.convert(timm.create_model(SMALL), input_size=(3, 64, 64)).to("meta")
    with pytest.raises(FileError, match="on the meta device"):
        save(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "changed",
    [{"act_layer": "silu"}, {"output_stride": 16}, {"global_pool": "max"}],
    ids=lambda changed: next(iter(changed)),
)
def test_arguments_that_show_in_the_outputs_only(changed: dict[str, Any], tmp_path: Path) -> None:
    model = padfree.convert(timm.create_model("resnet10t", **changed), input_size=(3, 32, 32))
    before = torch.get_rng_state()
    with pytest.raises(FileError, match="keys and shapes agree, but its outputs differ; pass source="):
        save(model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    save(model, tmp_path / "a.safetensors", {"library": "timm", "name": "resnet10t", "kwargs": changed})
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    x = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(load(tmp_path / "a.safetensors")(x), model.eval()(x), rtol=0, atol=0)


OWN = """
import itertools, torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, gain=1):
        body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        super().__init__(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        self.gain = gain

    def forward(self, x):
        return super().forward(x) * self.gain

class Random(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(())

class Counting(Net):
    count = itertools.count()

    def forward(self, x):
        return super().forward(x) + next(self.count)

class Failing(Net):
    def forward(self, x):
        assert x.is_meta
        return super().forward(x)

def normed():
    net = Net()
    nn.utils.weight_norm(net[3])
    return net
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_networks")
    del sys.modules["own_networks"]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", ["Net", "Random", "Counting", "Failing", "normed"])
def test_random_and_failing_forwards_are_saved(name: str, own: Any, tmp_path: Path) -> None:
    model = padfree.convert(getattr(own, name)(), input_size=(3, 32, 32))
    seen: list[Any] = []
    model.register_forward_hook(lambda *args: seen.append(args))
    save(model, tmp_path / "a.safetensors", f"own_networks:{name}")
    assert not seen
    again = load(tmp_path / "a.safetensors", factory=getattr(own, name))
    assert list(again.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", ["Net", "Random"])
def test_a_factory_that_builds_something_else(name: str, own: Any, tmp_path: Path) -> None:
    model = padfree.convert(getattr(own, name)(gain=2), input_size=(3, 32, 32))
    with pytest.raises(FileError, match="its outputs differ"):
        save(model, tmp_path / "a.safetensors", f"own_networks:{name}")
    with torch.no_grad():
        model[3].weight.fill_(float("nan"))  # a training that went wrong, and one cannot tell any more
    save(model, tmp_path / "a.safetensors", f"own_networks:{name}")


def test_arguments_that_no_file_can_hold(own: Any, tmp_path: Path) -> None:
    source = {"library": "factory", "name": "own_networks:Net", "kwargs": {"gain": torch.ones(1)}}
    model = padfree.convert(own.Net(), input_size=(3, 32, 32))
    with pytest.raises(FileError, match=r"own_networks:Net cannot be written down: .*Tensor.*numbers, strings"):
        save(model, tmp_path / "a.safetensors", source)


@pytest.mark.parametrize("path", [None, 5, b"a.safetensors", "a\0b"])
def test_paths_that_are_none(path: Any, converted: nn.Module) -> None:
    with pytest.raises(FileError, match="is not the path of a file"):
        save(converted, path)
    with pytest.raises(FileError, match="is not the path of a file"):
        load(path)


def test_a_full_disk(converted: nn.Module, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(FileError, match=r"cannot write .*a\.safetensors: .*File too large"):
            save(converted, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_the_permissions_are_those_of_any_new_file(written: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    assert written.stat().st_mode == (tmp_path / "usual").stat().st_mode


# what comes back


def test_the_same_outputs_come_back(converted: nn.Module, written: Path) -> None:
    again = padfree.load(written)
    assert not again.training
    assert type(again) is type(converted)
    assert again.padfree_plan == converted.padfree_plan
    assert list(again.state_dict()) == list(converted.state_dict())
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), converted.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ("torchvision:mobilenet_v3_small", (3, 96, 96)),
        ("bsconv:cifar_mobilenetv1_w1d4", (3, 32, 32)),
        ("torchvision:shufflenet_v2_x0_5", (3, 96, 96)),
    ],
)
def test_other_libraries_with_their_source(source: str, size: tuple[int, ...], tmp_path: Path) -> None:
    origin = Source.from_dict(source)
    model = padfree.convert(origin.create(), input_size=size)
    padfree.save(model, tmp_path / "a.safetensors", source)
    again = padfree.load(tmp_path / "a.safetensors")
    x = torch.rand(1, *size)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model.eval()(x), rtol=0, atol=0)


def _own() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def test_a_factory_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_factory.py").write_text(
        "from torch import nn\n\ndef make(num_classes=2):\n"
        "    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))\n"
        "    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    source = {"library": "factory", "name": "own_factory:make", "kwargs": {"num_classes": 3}}
    model = padfree.convert(Source.from_dict(source).create())
    padfree.save(model, "a.safetensors", source)
    make = importlib.import_module("own_factory").make
    assert padfree.load("a.safetensors", factory=make)[3].out_features == 3


def test_a_network_converted_in_two_steps_comes_back(tmp_path: Path) -> None:
    model = padfree.convert(timm.create_model(SMALL), rules=("stem",), input_size=(3, 64, 64))
    model = padfree.convert(model, rules=("depthwise",), input_size=(3, 64, 64))
    save(model, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model.eval()(x), rtol=0, atol=0)


def test_half_precision_and_shared_tensors_come_back(tmp_path: Path) -> None:
    model = padfree.convert(timm.create_model(SMALL), input_size=(3, 64, 64)).bfloat16()
    save(model, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    model.blocks[0][0].bn1.bias = model.blocks[0][0].bn1.weight
    save(model, tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors").blocks[0][0].bn1.bias, model.blocks[0][0].bn1.weight)


# checkpoints of unconverted models


@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state}]
)
def test_a_torch_checkpoint_with_or_without_wrapping(tmp_path: Path, wrap: Any) -> None:
    state = nn.Linear(2, 3).state_dict()
    torch.save(wrap({f"module.{key}": value for key, value in state.items()}), tmp_path / "a.pt")
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.pt"), dict(state))


def test_a_safetensors_checkpoint_and_a_converted_one(tmp_path: Path, written: Path) -> None:
    state = nn.Linear(2, 3).state_dict()
    save_file(dict(state), tmp_path / "a.safetensors")
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.safetensors"), dict(state))
    with pytest.raises(FileError, match="holds a converted network already"):
        read_checkpoint(written)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (nn.Linear(2, 3), "weights_only"),
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds a dict, not a state dict"),
        ({"a": 1}, "holds more than tensors"),
    ],
)
def test_a_checkpoint_that_is_no_state_dict(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(PadfreeError, match=reason):
        read_checkpoint(tmp_path / "a.pt")
