"""`padfree-recipes benchmark`: which networks, in which form; no test depends on how long anything takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from padfree.recipes import benchmark, load
from padfree.recipes.cli import main
from torch import Tensor, nn

from padfree import PadfreeError

SMALL = "digits/mobilenetv2-lgc"
NOTHING = "bsconv:cifar_resnet20"  # stands for a network without a padding-free form, see `_without`


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Passes that are timed, which take 1, 2, 3, ... thousandths of a second."""
    seen: list[tuple[nn.Module, tuple[int, ...]]] = []

    def timed(form: nn.Module, images: Tensor) -> float:
        assert not form.training and not torch.is_grad_enabled()
        seen.append((form, tuple(images.shape)))
        return len(seen) / 1000

    monkeypatch.setattr(benchmark, "_pass", timed)
    return seen


def test_both_forms_take_turns_and_the_median_is_told(passes: list[Any]) -> None:
    (timing,) = benchmark.timings([SMALL], [2], repeats=3, cpu=True)
    forms = [form for form, _ in passes]
    assert [form is forms[0] for form in forms] == [True, False] * 3
    assert {shape for _, shape in passes} == {(2, 3, 16, 16)}
    assert hasattr(forms[1], "padfree_plan") and not hasattr(forms[0], "padfree_plan")
    assert (timing.original, timing.padfree, timing.skipped) == (0.003, 0.004, None)


@pytest.fixture
def _without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(model: nn.Module, **options: Any) -> nn.Module:
        raise PadfreeError("nothing to convert")

    with monkeypatch.context() as patch:
        patch.setattr(benchmark.padfree, "convert", refuse)
        yield


def test_the_form_is_the_documents(passes: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", SMALL, "--batches", "2", "1", "--repeats", "1", "--cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("CPU ") and out[0].endswith("batchsize = 2")
    assert out[1].split() == ["original", "padding-free"]
    assert out[2] == "digits/mobilenetv2-lgc : 0.001000  0.002000"
    assert out[4].endswith("batchsize = 1") and out[6] == "digits/mobilenetv2-lgc : 0.003000  0.004000"


@pytest.mark.usefixtures("_without")
def test_a_network_without_a_padding_free_form_is_timed_and_the_reason_told(
    passes: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["benchmark", NOTHING, "--batches", "1", "--repeats", "1", "--cpu"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"{NOTHING} : 0.001000  -\n" in out and f"- {NOTHING}: nothing to convert" in out
    assert main([*command, "--json", "-"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["network"] == NOTHING and row["side"] == 32 and row["padfree"] is None
    assert row["skipped"] == "nothing to convert" and row["original"] == 0.002


def test_the_default_networks_are_the_documents() -> None:
    assert list(benchmark.DOCUMENT) == ["resnet18", "alexnet", "vgg16", "squeezenet", "mobilenet"]
    assert benchmark.BATCHES == (16, 1)
    side, model, _ = benchmark._original(benchmark.DOCUMENT["mobilenet"])
    assert side == 224 and type(model).__name__ == "MobileNetV1"


def test_a_recipe_is_timed_in_its_own_padding_free_form() -> None:
    side, (_, timed), skipped = benchmark._forms("digits/ghostnet", None)
    made = load("digits/ghostnet").build("padfree")
    assert skipped is None and side == load("digits/ghostnet").model.input_side
    assert timed.padfree_plan.options == made.padfree_plan.options
    assert timed.padfree_plan.options.merge == "norm"  # not the default
    assert timed.state_dict().keys() == made.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet19"], "no recipe and no file 'resnet19'"),
        (["torchvision:resnet19"], "torchvision has no model 'resnet19'"),
        ([SMALL, "--batches", "0"], "--batches is 0; give 1 or more"),
        ([SMALL, "--side", "-1"], "--side is -1; give 1 or more"),
        ([SMALL, "--repeats", "0"], "--repeats is 0; give 1 or more"),
        ([SMALL, "--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
        (["mobilenet123/mobilenetv1-net", "--side", "64"], "does not run on images (16, 3, 64, 64)"),
    ],
)
def test_what_cannot_be_timed_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--cpu", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("padfree-recipes: ") and words in line


def test_a_pass_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the clock starts and before it stops."""
    happened: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: happened.append("waited"))
    images = torch.zeros(1, 3, 4, 4, device="meta")  # a device that is no CPU
    model = nn.Identity()
    model.register_forward_hook(lambda *_: happened.append("run"))
    assert benchmark._pass(model, images) >= 0
    assert happened == ["waited", "run", "waited"]
