"""Which steps a calibration keeps in the end, and the images and outputs by which none can be judged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import padfree
from padfree.adapt import calibrate as module
from padfree.adapt.solve import Moments
from padfree.adapt.work import Outcome, Work, rows
from padfree.errors import PadfreeError
from padfree.rules._toys import depthwise, net, unit

SIZE = (3, 16, 16)


def trained(model: nn.Module) -> nn.Module:
    """Norms that have seen images."""
    torch.manual_seed(0)
    for _ in range(20):
        model.train()(torch.randn(8, *SIZE))
    return model.eval()


def toy() -> nn.Module:
    return net(unit(8, 16, 1), depthwise(16), unit(16, 8, 1))


def images(count: int = 10, each: int = 16, size: tuple[int, ...] = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(each, *size, generator=generator) for _ in range(count)]


def converted(original: nn.Module, **settings: Any) -> nn.Module:
    return padfree.convert(original, input_size=SIZE, init="preserve", **settings)


def same(model: nn.Module, other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(other), rtol=0, atol=0)


def spoiling(step: Callable[[Work], Outcome]) -> Callable[[Work], Outcome]:
    """A step that also makes the outputs a thousand times as large, which no error of its own nor of shapes tells."""

    def spoilt(work: Work) -> Outcome:
        outcome = step(work)
        last = [layer for layer in work.modules.values() if isinstance(layer, nn.Linear)][-1]
        last.weight.mul_(1000)
        return outcome

    return spoilt


def failing_at_first(step: Callable[[Work], Outcome]) -> Callable[[Work], Outcome]:
    """The classifier's step, which solves nothing when it is called first."""
    calls: list[int] = []

    def made(work: Work) -> Outcome:
        calls.append(1)
        return step(work) if len(calls) > 1 else Outcome()

    return made


@pytest.mark.parametrize("spoilt", ["imitate", "recalibrate"])
def test_what_the_classifier_does_not_mend_is_taken_back(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the classifier is solved again: the network is what the other steps alone make of it."""
    original = trained(toy())
    first = ["identity", "rescale", "absorb"]
    expected, model = converted(original), converted(original)
    padfree.calibrate(expected, images(), original=original, steps=[*first, "classifier"])
    monkeypatch.setitem(module.STEPS, spoilt, spoiling(module.STEPS[spoilt]))
    monkeypatch.setitem(module.STEPS, "classifier", failing_at_first(module.STEPS["classifier"]))
    report = padfree.calibrate(model, images(), original=original, steps=[*first, spoilt, "classifier"])
    taken = next(step for step in report.steps if step.name == spoilt)
    assert not taken.kept and "taken back: with it the outputs ended at an error of" in taken.notes[-1]
    assert [step.name for step in report.steps] == [*first, spoilt, "classifier"]
    assert report.steps[-1].places == 1 and report.after == pytest.approx(report.steps[-1].after)
    same(model, expected.state_dict())


def test_it_never_ends_worse_than_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by steps that are judged by what they mend; what was taken back may be done again."""
    original = trained(toy())
    model = converted(original)
    before = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patched:
        patched.setitem(module.STEPS, "absorb", spoiling(module.STEPS["absorb"]))
        report = padfree.calibrate(model, images(), original=original, steps=["absorb"])
        assert not report.steps[0].kept and report.after == report.before
        same(model, before)
    assert padfree.calibrate(model, images(), original=original, steps=["absorb"]).steps[0].places == 1


def test_of_constants_nothing_is_learnt() -> None:
    """A group of features that do not vary keeps its weights; the group beside it is solved as it is alone."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 50, 3) + 2, torch.randn(2, 50, 4)
    x[0] = torch.tensor([0.1, 0.7, 1.3])
    weight = torch.randn(2, 4, 3)
    both, alone = Moments(), Moments()
    both.add(x, y)
    alone.add(x[1:], y[1:])
    solved = both.ridge(weight, 0.01, centred=True)
    torch.testing.assert_close(solved[0], weight[0].double(), rtol=0, atol=0)
    torch.testing.assert_close(solved[1:], alone.ridge(weight[1:], 0.01, centred=True))


@pytest.mark.parametrize("merge", ["activation", "norm", "conv"])
def test_channels_that_do_not_vary_are_no_trouble(merge: Any) -> None:
    original = trained(toy())
    with torch.no_grad():
        for norm in original.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight[::2] = 0
                norm.bias[::2] = torch.rand(len(norm.bias[::2])) + 0.1
    model = converted(original, options=padfree.Options(merge=merge))
    report = padfree.calibrate(model, images(), original=original)
    assert report.after < report.before
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


# -- by what nothing can be judged


class Made(nn.Module):
    """What a function makes of a network's outputs."""

    def __init__(self, inner: nn.Module, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner(x))


@pytest.mark.parametrize(
    ("function", "given", "words"),
    [
        (lambda y: y.argmax(1), images(), "Made returns no floating-point numbers"),
        (lambda y: {"class": y.argmax(1), "sure": y > 0}, images(), "Made returns no floating-point numbers"),
        (lambda y: y * 0 + 1, images(), "the outputs of original are the same for all held-back images"),
        (lambda y: y, [torch.ones(16, *SIZE)] * 10, "the 32 held-back images are all the same"),
        (lambda y: y.squeeze(), [*images(9), images(1, 1)[0]], "tensors of 1 and 2 dimensions, depending on the batch"),
    ],
    ids=["argmax", "classes", "constant", "one-image", "squeezed"],
)
def test_outputs_that_tell_nothing_are_refused(function: Any, given: list[Tensor], words: str) -> None:
    original = Made(trained(toy()), function)
    model = converted(original)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PadfreeError, match=words):
        padfree.calibrate(model, given, original=original)
    same(model, before)


def test_classes_alone_are_no_trouble_without_the_original() -> None:
    model = converted(Made(trained(toy()), lambda y: y.argmax(1)))
    report = padfree.calibrate(model, images())
    assert {step.name: step.places for step in report.steps}["absorb"] == 1


def test_one_number_a_batch_is_no_row_of_the_classifier() -> None:
    original = Made(trained(toy()), lambda y: y.mean())
    report = padfree.calibrate(converted(original), images(), original=original)
    assert report.after <= report.before
    assert report.steps[-1].notes == ("the outputs are no rows of one linear layer: the classifier stays as it is",)


def test_weights_made_under_inference_mode_are_refused() -> None:
    original = trained(toy())
    with torch.inference_mode():
        model = copy.deepcopy(converted(original))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PadfreeError, match=r"was made under torch\.inference_mode, .* pass copy\.deepcopy of it"):
        padfree.calibrate(model, images(), original=original)
    same(model, before)
    assert padfree.calibrate(copy.deepcopy(model), images(), original=original).images == 128


# -- maps of several sizes


class Dense(nn.Module):
    """Gives a map of the images' size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*list(toy().children())[:-1])
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.interpolate(self.body(x), x.shape[2:]))
        return out


@pytest.mark.parametrize("sizes", [(16, 16), (16, 20)], ids=["one", "two"])
def test_maps_are_compared_pixel_by_pixel(sizes: tuple[int, int]) -> None:
    original = trained(Dense())
    batches = [torch.randn(10, 3, side, 16) for side in sizes]  # a fifth of each is held back
    report = padfree.calibrate(converted(original), batches, original=original)
    assert report.after < report.before
    classifier = report.steps[-1]
    assert classifier.places == 1 and classifier.own_after < classifier.own_before
    assert classifier.own_before < 1.2  # features belong to the outputs of their own pixels


def test_sides_that_differ_are_rows() -> None:
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5)
    expected = torch.cat([part.permute(0, 2, 1, 3).reshape(-1, 3, 5) for part in (a, b)])
    torch.testing.assert_close(rows([a, b]), expected, rtol=0, atol=0)
    torch.testing.assert_close(rows([a, a]), torch.cat([a, a]), rtol=0, atol=0)
    torch.testing.assert_close(rows([torch.tensor(1.0), torch.tensor(2.0)]), torch.tensor([1.0, 2.0]))
