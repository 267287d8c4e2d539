"""timm's networks by their padding-free names: what is built, which weights it gets, what it says of itself."""

from __future__ import annotations

import copy
import csv
import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import build_model_with_cfg, register_model, save_for_hf
from torch import nn
from torch.testing import assert_close

import padfree
import padfree.timm
from padfree.errors import NothingToConvertError, PadfreeError

ROOT = Path(__file__).parents[2]
IMAGE = (3, 32, 32)

default_cfgs = {
    "tiny_network": {
        "url": "",
        "input_size": IMAGE,
        "pool_size": (4, 4),
        "num_classes": 5,
        "first_conv": "conv1",
        "classifier": "fc",
    },
}


class Tiny(nn.Module):
    """A network of three strided convolutions, with what timm asks of one."""

    def __init__(self, num_classes: int = 5, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans, self.drop_rate = num_classes, 16, in_chans, drop_rate
        self.conv1, self.bn1, self.act1 = nn.Conv2d(in_chans, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, num_classes)
        named = (("act1", 8, 2), ("layer1", 8, 4), ("layer2", 16, 8))
        self.feature_info = [dict(module=name, num_chs=count, reduction=step) for name, count, step in named]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))


@register_model
def tiny_network(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """It is built by timm as all are."""
    return build_model_with_cfg(Tiny, "tiny_network", pretrained, **kwargs)


@register_model
def only_points(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nothing in it shrinks a map."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())


NAME = "padfree_tiny_network"
padfree.timm.register("tiny_network", "only_points")


def create(name: str = NAME, **arguments: Any) -> nn.Module:
    return timm.create_model(name, **arguments)


def logits(model: nn.Module, channels: int = 3) -> Any:
    images = torch.rand(2, channels, *IMAGE[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(1)
    return create("tiny_network")


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    torch.manual_seed(2)
    return create()


@pytest.fixture(scope="module")
def files(original: nn.Module, converted: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """State dicts of the original and of a padding-free form of other weights."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {"original": str(folder / "original.pth"), "converted": str(folder / "converted.pth")}
    torch.save({"arch": "tiny_network", "state_dict": original.state_dict()}, paths["original"])
    torch.save({"arch": NAME, "state_dict": converted.state_dict()}, paths["converted"])
    return paths


def test_every_network_that_can_be_converted_has_a_name_and_no_other() -> None:
    registered = {name.removeprefix("padfree_") for name in timm.list_models("padfree_*")}
    with (ROOT / "docs" / "coverage.csv").open() as file:
        status = {row["name"][5:]: row["status"] for row in csv.DictReader(file) if row["name"].startswith("timm:")}
    known = set(timm.list_models()) & status.keys()
    assert len(known) > 1000
    assert known & registered == {name for name in known if status[name] in ("full", "part")}


def test_tags_are_known_and_the_originals_names_stay() -> None:
    tagged = timm.list_models("padfree_mobilenetv3_large_100*", pretrained=True)
    assert tagged == [f"padfree_{name}" for name in timm.list_models("mobilenetv3_large_100*", pretrained=True)]
    assert timm.models.is_model_pretrained("padfree_mobilenetv3_large_100")
    cfg = timm.get_pretrained_cfg("padfree_mobilenetv3_large_100.miil_in21k_ft_in1k")
    assert cfg.hf_hub_id == "timm/mobilenetv3_large_100.miil_in21k_ft_in1k" and cfg.tag == "miil_in21k_ft_in1k"
    assert cfg.architecture == "padfree_mobilenetv3_large_100"
    assert cfg.pool_size is None  # not known before the network is converted
    assert timm.get_pretrained_cfg("mobilenetv3_large_100").pool_size == (7, 7)


def test_registering_builds_nothing_and_is_done_once() -> None:
    def never_called(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        raise AssertionError("it is being built")

    register_model(never_called)
    padfree.timm.register("never_called")
    entry_point = timm.models.model_entrypoint("padfree_never_called")
    padfree.timm.register("never_called", "tiny_network")
    assert timm.models.model_entrypoint("padfree_never_called") is entry_point
    with pytest.raises(AssertionError, match="it is being built"):
        create("padfree_never_called")


@pytest.mark.parametrize("name", ["no_such_network", "resnet18.a1_in1k"])
def test_a_name_that_timm_lacks_is_refused(name: str) -> None:
    with pytest.raises(PadfreeError, match=f"timm has no model '{name}'"):
        padfree.timm.register(name)


def test_a_network_with_nothing_to_convert_says_so() -> None:
    with pytest.raises(NothingToConvertError, match="nothing to convert in Sequential"):
        create("padfree_only_points")


def test_it_is_what_convert_makes_and_says_what_it_is(original: nn.Module) -> None:
    made: Any = create(drop_rate=0.25)
    assert made.state_dict().keys() == padfree.convert(original).state_dict().keys()
    assert padfree.is_converted(made) and made.training and made.drop_rate == 0.25
    assert made.pretrained_cfg["architecture"] == NAME and made.default_cfg is made.pretrained_cfg
    with torch.no_grad():
        last = made.forward_features(torch.zeros(2, *IMAGE)).shape[-2:]
    assert made.pretrained_cfg["pool_size"] == last == (3, 3)
    assert create("tiny_network").pretrained_cfg["pool_size"] == (4, 4)
    assert resolve_data_config(model=made)["input_size"] == IMAGE


def test_arguments_that_a_script_resolved_first_lead_to_the_same_description() -> None:
    arguments = timm.models.resolve_model_input_args(NAME, dict(in_chans=1), num_classes=3)
    made: Any = timm.create_model(**arguments)
    assert made.pretrained_cfg["pool_size"] == (3, 3) and made.pretrained_cfg["architecture"] == NAME
    assert made.conv1.in_channels == 1 and made.num_classes == 3


def test_weights_of_the_original_are_loaded_before_the_conversion(original: nn.Module, files: dict[str, str]) -> None:
    made = create(pretrained=True, pretrained_cfg_overlay={"file": files["original"]})
    weights = made.state_dict()
    assert weights.keys() > original.state_dict().keys()
    for key, value in original.state_dict().items():
        assert_close(weights[key], value, rtol=0, atol=0)


def test_weights_of_the_original_are_adapted_as_timm_does(original: nn.Module, files: dict[str, str]) -> None:
    arguments = dict(pretrained=True, pretrained_cfg_overlay={"file": files["original"]}, in_chans=1, num_classes=7)
    made, plain = create(**arguments), create("tiny_network", **arguments)
    assert_close(made.get_submodule("conv1").weight, plain.get_submodule("conv1").weight)
    assert logits(made, channels=1).shape == (2, 7)
    assert_close(made.state_dict()["layer2.0.weight"], original.state_dict()["layer2.0.weight"])


def test_weights_of_a_padding_free_form_are_told_by_their_keys(converted: nn.Module) -> None:
    made = create(pretrained=True, pretrained_cfg_overlay={"state_dict": converted.state_dict()})
    assert_close(logits(made), logits(converted), rtol=0, atol=0)
    assert "state_dict" not in made.pretrained_cfg  # type: ignore[operator]


@pytest.mark.parametrize("rules", [["dense"], ["depthwise", "dense", "stem"]])
def test_weights_of_another_conversion_are_refused(converted: nn.Module, rules: list[str]) -> None:
    weights = converted.state_dict()
    if rules != ["dense"]:
        weights = {key: value for key, value in weights.items() if "shortcut" not in key}
    arguments = {"pretrained_cfg_overlay": {"state_dict": weights}, "num_classes": 7, "padfree": {"rules": rules}}
    with pytest.raises(PadfreeError, match=r"tiny_network converted in another way: .*pass padfree="):
        create(pretrained=True, **arguments)


def test_a_checkpoint_of_the_padding_free_form_is_loaded(
    converted: nn.Module, files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    made = create(checkpoint_path=files["converted"])
    assert_close(logits(made), logits(converted), rtol=0, atol=0)
    assert "these weights are of" not in caplog.text


def test_a_checkpoint_of_the_original_is_recognised_and_said(
    original: nn.Module, files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = create(checkpoint_path=files["original"])
    new = made.state_dict().keys() - original.state_dict().keys()
    assert f"these weights are of tiny_network; they were loaded and converted. {len(new)} tensors" in caplog.text
    for key, value in original.state_dict().items():
        assert_close(made.state_dict()[key], value, rtol=0, atol=0)


def test_a_trained_original_is_preserved_by_either_way(original: nn.Module, tmp_path: Path) -> None:
    trained = copy.deepcopy(original)
    for norm in (module for module in trained.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()  # type: ignore[union-attr, operator]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
        norm.num_batches_tracked.add_(100)  # type: ignore[union-attr, operator]
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    with pytest.warns(UserWarning, match="untrained"):
        before: Any = create(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "trained.pth")})
    with pytest.warns(UserWarning, match="untrained"):
        after: Any = create(checkpoint_path=str(tmp_path / "trained.pth"))
    assert before.padfree_plan.init == after.padfree_plan.init == "preserve"
    preserved = padfree.convert(trained, init="preserve").state_dict()
    for key in preserved:
        assert_close(after.state_dict()[key], before.state_dict()[key], rtol=0, atol=0)
        assert_close(after.state_dict()[key], preserved[key], rtol=0, atol=0)


def test_other_checkpoints_are_torchs_to_refuse(original: nn.Module, converted: nn.Module) -> None:
    made = copy.deepcopy(converted)
    half = dict(list(original.state_dict().items())[:5])
    with pytest.raises(RuntimeError, match="Missing key"):
        made.load_state_dict(half)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        made.load_state_dict({**original.state_dict(), "other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Unexpected key"):  # the other way round: another network
        copy.deepcopy(original).load_state_dict(converted.state_dict())


def test_a_folder_gives_the_same_network_back(converted: nn.Module, tmp_path: Path) -> None:
    save_for_hf(converted, str(tmp_path), safe_serialization=True)
    made: Any = create(f"local-dir:{tmp_path}", pretrained=True)
    assert_close(logits(made), logits(converted), rtol=0, atol=0)
    assert made.pretrained_cfg["architecture"] == NAME and tuple(made.pretrained_cfg["pool_size"]) == (3, 3)


def test_a_folder_gives_back_what_was_chosen_and_takes_other_classes(tmp_path: Path) -> None:
    made = create(padfree={"exclude": ["conv1"], "merge": "norm"}, in_chans=2)
    assert [match.rule for match in made.padfree_plan.matches] == ["depthwise", "dense"]  # type: ignore[union-attr]
    assert made.padfree_plan.options.merge == "norm"  # type: ignore[union-attr]
    save_for_hf(made, str(tmp_path))
    again = create(f"local-dir:{tmp_path}", pretrained=True)
    assert_close(logits(again, 2), logits(made, 2), rtol=0, atol=0)
    other = create(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert logits(other, 2).shape == (2, 3)
    assert_close(other.state_dict()["layer2.0.weight"], made.state_dict()["layer2.0.weight"])


def test_a_network_that_was_converted_by_hand_is_given_its_name(original: nn.Module, tmp_path: Path) -> None:
    made: Any = padfree.convert(original, rules=["depthwise"])
    with pytest.raises(PadfreeError, match="is not a network of timm's"):
        padfree.timm.named(original)
    assert made.pretrained_cfg["architecture"] == "tiny_network"
    assert padfree.timm.named(padfree.timm.named(made)) is made
    assert made.state_dict().keys() == original.state_dict().keys()  # no key tells it from the original
    save_for_hf(made, str(tmp_path))
    again: Any = create(f"local-dir:{tmp_path}", pretrained=True)
    assert again.padfree_plan.to_dict()["matches"] == made.padfree_plan.to_dict()["matches"]
    assert_close(logits(again), logits(made), rtol=0, atol=0)


def check_features(features: Any, whole: nn.Module) -> None:
    """That each feature map is what the module of that name returns in the whole network."""
    size = features.pretrained_cfg["input_size"]
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    duplicate = copy.deepcopy(whole).eval()
    for path in features.feature_info.module_name():
        duplicate.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        duplicate(images)
        assert_close(features.eval()(images), seen, rtol=0, atol=0)


@pytest.mark.parametrize("cls", ["list", "hook", "fx"])
def test_features_are_those_of_the_whole_network(cls: str, converted: nn.Module, files: dict[str, str]) -> None:
    arguments = dict(features_only=True, out_indices=(1, 2), feature_cls=cls)
    given = {"file": files["converted"]}
    made: Any = create(**arguments, pretrained=True, pretrained_cfg_overlay=given)
    assert made.feature_info.channels() == [8, 16]
    check_features(made, converted)
    original: Any = create("tiny_network", **arguments)
    again = create(**arguments)
    again.load_state_dict(original.state_dict())
    assert all(torch.equal(again.state_dict()[key], value) for key, value in original.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("cls", [None, "getter"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050", "hgnetv2_b0"])
def test_features_of_networks(name: str, cls: str | None, tmp_path: Path) -> None:
    whole = create(f"padfree_{name}")
    save_for_hf(whole, str(tmp_path), safe_serialization=True)
    arguments = dict(features_only=True, out_indices=(1, 2, 3), feature_cls=cls)
    check_features(create(f"local-dir:{tmp_path}", pretrained=True, **arguments), whole)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["depthwise"], "it takes a mapping"),
        ({"rule": ["dense"]}, "padfree={'rule': ...}: it takes .*exclude.*merge.*rules"),
        ({"inplace": True}, "it takes"),
        ({"merge": "sum"}, "Options.merge is 'sum'"),
        ({"rules": ["no_such"]}, "no_such"),
    ],
)
def test_a_bad_choice_is_refused(given: Any, reason: str) -> None:
    with pytest.raises(PadfreeError, match=reason):
        create(padfree=given)


def test_copies_pickles_and_weight_files(converted: nn.Module, tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save(copy.deepcopy(converted), content)
    content.seek(0)
    assert_close(logits(torch.load(content, weights_only=False)), logits(converted), rtol=0, atol=0)
    padfree.save(converted, tmp_path / "network.safetensors")
    assert_close(logits(padfree.load(tmp_path / "network.safetensors")), logits(converted), rtol=0, atol=0)


def test_a_script_runs_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "helper.py").write_text("NUMBER = 7\n")
    (folder / "run.py").write_text(
        "import sys, timm, helper\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv, helper.NUMBER, __file__)\n"
        "    print(timm.is_model(sys.argv[2]))\n"
        "    sys.exit(5)\n"
    )
    command = [sys.executable, "-m", "padfree.timm", str(folder / "run.py"), "--model", "padfree_test_resnet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    path = str(folder / "run.py")
    assert done.stdout.splitlines() == [f"{[path, '--model', 'padfree_test_resnet']} 7 {path}", "True"]


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0), (["no_such.py"], 2)])
def test_a_script_is_asked_for(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from padfree.timm.__main__ import main

    monkeypatch.setattr(sys, "argv", ["padfree.timm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    assert "usage: python -m padfree.timm SCRIPT.py" in capsys.readouterr().err
