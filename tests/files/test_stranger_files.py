"""Files from strangers: `load` imports, calls, downloads and allocates nothing that a file asks for by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import padfree
from padfree.errors import FileError
from padfree.files.bounds import size_limit
from padfree.files.sources import Source, SourceError
from padfree.files.weights import load, save


class Net(nn.Sequential):
    def __init__(self, width: int = 8) -> None:
        body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 8, 3, 2, 1))
        super().__init__(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "small.safetensors"
    save(padfree.convert(timm.create_model("lcnet_035", num_classes=5), input_size=(3, 64, 64)), path)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A network of a factory whose file keeps an argument."""
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    model = padfree.convert(Net(width=12), input_size=(3, 32, 32)).eval()
    name = f"{__name__}:Net"
    save(model, path, {"library": "factory", "name": name, "kwargs": {"width": 12}})
    return path, model


def changed(path: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["padfree"])
    change(content)
    save_file(load_file(path), target, metadata={"padfree": json.dumps(content)})
    return target


@pytest.mark.parametrize(
    "source",
    [
        {"library": "factory", "name": "os:system", "kwargs": {"command": "touch {mark}"}},
        {"library": "factory", "name": "pathlib:Path.touch", "kwargs": {"self": "{mark}"}},
        {"library": "factory", "name": "builtins:open", "kwargs": {"file": "{mark}", "mode": "w"}},
        "os:system",
        "factory:os:system",
    ],
)
def test_no_function_is_called_because_a_file_names_it(source: Any, written: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    text = json.dumps(source).replace("{mark}", str(mark))
    evil = changed(written, tmp_path / "evil.safetensors", lambda content: content.update(source=json.loads(text)))
    with pytest.raises(FileError):
        load(evil)
    assert not mark.exists()


def test_no_module_is_imported_because_a_file_names_it(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "importing_me_ends_it.py").write_text("raise AssertionError('imported')")
    monkeypatch.chdir(tmp_path)
    source = {"library": "factory", "name": "importing_me_ends_it:make"}
    evil = changed(written, tmp_path / "evil.safetensors", lambda content: content.update(source=source))
    with pytest.raises(
        FileError, match=r"is built by 'importing_me_ends_it:make', which is not called .*factory=\.\.\."
    ):
        load(evil)


def test_the_caller_s_factory_builds_it_with_the_arguments_of_the_file(own: tuple[Path, nn.Module]) -> None:
    path, model = own
    with pytest.raises(FileError, match=r"is built by '.*:Net', which is not called because a file names it"):
        load(path)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load(path, factory=Net)(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(load(path, factory=lambda width: Net(12))(x), model(x), rtol=0, atol=0)


def test_a_factory_may_stand_in_for_a_library(written: Path) -> None:
    built = load(written, factory=lambda **kwargs: timm.create_model("lcnet_035", **kwargs))
    torch.testing.assert_close(built.state_dict(), load(written).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("os:system", "factory is 'os:system'; pass the function"),
        (lambda **kwargs: None, "factory made a NoneType, not an nn.Module"),
        (lambda: Net(12), "unexpected keyword argument 'width'"),
        (lambda width: Net(11), "of another shape|does not fit"),
        (lambda width: nn.Linear(2, 2), "cannot be built"),
    ],
)
def test_a_factory_that_is_wrong_is_told(factory: Any, reason: str, own: tuple[Path, nn.Module]) -> None:
    with pytest.raises(FileError, match=reason):
        load(own[0], factory=factory)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": True},
        {"Pretrained": True},
        {"pretrained_cfg": {"url": "http://localhost/a.pth"}},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/"},
        {"weights_backbone": "DEFAULT"},
        {"hf_hub_id": "a/b"},
        {"device": "meta"},
        {"act_layer": {"pretrained_cfg": {}}},
        {"stages": [{"hf_hub_id": "a/b"}]},
    ],
)
def test_arguments_that_would_fetch_or_open_something(kwargs: dict[str, Any], written: Path, tmp_path: Path) -> None:
    evil = changed(written, tmp_path / "evil.safetensors", lambda content: content["source"].update(kwargs=kwargs))
    with pytest.raises(FileError, match="may not set"):
        load(evil)


@pytest.mark.parametrize("name", ["hf-hub:a/b", "hf_hub:a/b", "local-dir:.", "resnet18.hf-hub:a/b", "./lcnet_035"])
def test_names_that_are_places_to_fetch_from(name: str) -> None:
    for library in ("timm", "torchvision", "bsconv"):
        with pytest.raises(SourceError, match=f"{library} has no model|cannot build"):
            Source(library, name).create()


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"num_classes": 10**5}, "asks for a network of over"),
        ({"num_classes": 10**15}, "cannot be built|asks for a network of over"),
        ({"in_chans": 10**6}, "asks for a network of over"),
        ({"num_classes": "os.system"}, "cannot be built"),
        ({"act_layer": "os:system"}, "cannot build 'lcnet_035'"),
        ({"norm_layer": ["torch.nn", "BatchNorm2d"]}, "cannot build 'lcnet_035'"),
    ],
)
def test_a_small_file_builds_no_large_network(
    kwargs: dict[str, Any], reason: str, written: Path, tmp_path: Path
) -> None:
    evil = changed(written, tmp_path / "evil.safetensors", lambda content: content["source"].update(kwargs=kwargs))
    with pytest.raises(FileError, match=reason):
        load(evil)


def test_a_network_of_many_modules_is_refused_while_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("padfree.files.bounds._MODULES", 100)
    with pytest.raises(FileError, match="over 100 modules"), size_limit({"a": torch.zeros(3)}):
        nn.Sequential(*(nn.Identity() for _ in range(101)))
    with size_limit({"a": torch.zeros(3)}):
        nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30))
    nn.Sequential(*(nn.Identity() for _ in range(101)))  # the limit ends with its block


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plan: plan.update(input_size=[3, 10**6, 10**6]), "input_size is 3x1000000x1000000"),
        (lambda plan: plan.update(input_size=[3, -64, 64]), "input_size is 3x-64x64"),
        (lambda plan: plan.update(input_size=[]), "damaged metadata"),
        (lambda plan: plan.update(earlier={**plan, "input_size": [3, 10**9, 64]}), "input_size is 3x1000000000x64"),
        (lambda plan: plan.update(matches=plan["matches"][:1] * 100_000), "its metadata have .* characters"),
        (lambda plan: plan["skips"].append({"name": "a" * (5 << 20), "reason": ""}), "its metadata have .* characters"),
    ],
)
def test_plans_that_ask_for_too_much(
    change: Callable[[dict[str, Any]], Any], reason: str, written: Path, tmp_path: Path
) -> None:
    evil = changed(written, tmp_path / "evil.safetensors", lambda content: change(content["plan"]))
    with pytest.raises(FileError, match=reason):
        load(evil)
