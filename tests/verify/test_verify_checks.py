"""Each check of `verify` on a network, or a hand-made change of one, that passes it and on one that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import SIDE, Net, Unit, convert, images, refusal
from torch import Tensor, nn

from padfree import Options
from padfree.errors import Refusal
from padfree.record.recording import record
from padfree.rewrite.operations import Operation, Resize, SetAttributes, perform
from padfree.verify.verify import Original, verify

# -- what a change of the copy does, by hand --------------------------------------------------------


class Tied(nn.Module):
    """Whatever a test wants to change is one attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.heads = nn.ReLU(), 1

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.norm(self.conv(x)))
        return [y.mean((2, 3))] * self.heads


def checked(change: Callable[[Any], Any], *operations: Operation, model: nn.Module | None = None) -> str:
    """What `verify` says of a copy with this change, and these operations carried out; "" if nothing."""
    recording = record(Tied() if model is None else model, (3, SIDE, SIDE))
    altered = perform(copy.deepcopy(recording.model), operations)
    change(altered)
    try:
        verify(Original(recording), altered, operations)
    except Refusal as refusal:
        return str(refusal)
    return ""


def reorder(model: Any) -> None:
    model._modules["conv"] = model._modules.pop("conv")


def add(model: Any) -> None:
    model.extra = nn.Linear(2, 2, device="meta")


def widen(model: Any) -> None:
    model.norm = nn.BatchNorm2d(9, device="meta")


def narrow_output(model: Any) -> None:
    model.conv, model.norm = nn.Conv2d(3, 4, 3, device="meta"), nn.BatchNorm2d(4, device="meta")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: None, ""),
        (add, ""),
        (lambda model: delattr(model, "norm"), "would lose or reorder keys of the state dict"),
        (reorder, "would lose or reorder keys of the state dict"),
        (widen, "would change the shape of `norm.weight`"),
        (lambda model: setattr(model, "heads", 2), "the model's output changes from [(1, 8)] to [(1, 8), (1, 8)]"),
        (lambda model: setattr(model, "act", nn.Softplus()), ""),  # of a module's own operations torch is trusted
        (lambda model: setattr(model, "act", nn.GLU(1)), "the model's output changes from [(1, 8)] to [(1, 4)]"),
        (lambda model: setattr(model, "act", nn.Unflatten(1, (3, 3))), "`act` fails on (1, 8, 16, 16): RuntimeError"),
        (
            lambda model: setattr(model, "act", nn.Flatten()),
            "the model's own forward fails on (1, 3, 16, 16): IndexError",
        ),
    ],
)
def test_keys_shapes_and_outputs(change: Callable[[Any], Any], words: str) -> None:
    text = checked(change)
    assert words in text if words else text == ""


def test_a_parameter_may_be_resized_where_an_operation_says_so() -> None:
    assert checked(lambda model: None, Resize("conv.weight", (8, 3, 5, 5))) == ""
    assert "change the shape of `conv.weight`" in checked(
        lambda model: setattr(model.conv, "weight", nn.Parameter(torch.empty(8, 3, 5, 5, device="meta")))
    )


class Fixed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, 2, 1)


@pytest.mark.parametrize(
    ("kind", "words"), [(nn.Conv2d, ""), (Fixed, "runs with padding (1, 1) whatever its attribute")]
)
def test_settings_are_obeyed(kind: Any, words: str) -> None:
    model = nn.Sequential(kind(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    text = checked(lambda model: None, SetAttributes("0", (("padding", (0, 0)),)), model=model)
    assert words in text if words else text == ""


# -- networks that `convert` meets ------------------------------------------------------------------


class Reads(nn.Module):
    """A strided unit's map (8, padding-free 7), read by a function of the model and the map."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor], side: int = SIDE) -> None:
        super().__init__()
        self.body, self.read = Net(Unit()), read
        self.table, self.rows = nn.Parameter(torch.randn(1, 8, 64)), nn.Embedding(64, 8)
        self.register_buffer("order", torch.randperm(49))
        self.fc, self.fixed = nn.Linear(8, 2), nn.Linear(8 * 64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, self.body(x)).flatten(1)


def count(y: Tensor) -> int:
    return y.shape[2] * y.shape[3]


CASES: list[tuple[Callable[[Any, Tensor], Tensor], str]] = [
    # it runs
    (lambda m, y: m.fc(y.mean((2, 3))), ""),
    (lambda m, y: m.fixed(y.flatten(1)), "`fixed` takes (1, 512) and would get (1, 392)"),
    (lambda m, y: m.fixed(F.adaptive_avg_pool2d(y, 4).repeat(1, 1, 2, 2).flatten(1)), ""),
    # tables and indices
    (lambda m, y: (y.flatten(2) + m.table[..., : count(y)]).mean(2), "from a table of its own 64 places, and there"),
    (lambda m, y: (y.flatten(2) + m.table[..., :8].mean()).mean(2), ""),
    (
        lambda m, y: m.rows(torch.arange(count(y), device=y.device)).mean(0) + y.mean((2, 3)),
        "`rows` reads from a table",
    ),
    (lambda m, y: m.rows(torch.arange(8, device=y.device)).mean(0) + y.mean((2, 3)), ""),
    (lambda m, y: y.flatten(2)[..., m.order].mean(2), "by (49,) indices of its own a map of 64 places"),
    (lambda m, y: y[:, m.order % 8].mean((2, 3)), ""),
    # one pixel spread over a map
    (lambda m, y: (y * y.mean((2, 3), keepdim=True)).mean((2, 3)), ""),
    (lambda m, y: (F.avg_pool2d(y, 4)[..., -1:, -1:] * y).mean((2, 3)), ""),
    (lambda m, y: (F.avg_pool2d(y, 4) + F.avg_pool2d(y, 3, 4)).mean((2, 3)), "newly combine maps of (1, 1) and (2, 2)"),
    # pads, rolls, stretching
    (lambda m, y: F.pad(y, (0, y.shape[3] % 2, 0, 1)).mean((2, 3)), ""),
    (lambda m, y: (F.pad(y, (0, 1)) if y.shape[3] % 2 else y).mean((2, 3)), "newly run constant_pad_nd"),
    (
        lambda m, y: (F.pad(y, (0, 1, 0, 0), "reflect") if y.shape[3] % 2 else y).mean((2, 3)),
        "newly run reflection_pad",
    ),
    (lambda m, y: y.roll(1, 2).mean((2, 3)), ""),
    (lambda m, y: (y.roll(1, 2) if y.shape[2] % 2 else y).mean((2, 3)), "would run roll 1 time instead of 0"),
    (lambda m, y: F.interpolate(y, scale_factor=2).mean((2, 3)), ""),
    (lambda m, y: F.interpolate(y, size=(8, 8)).mean((2, 3)), "newly run upsample_nearest2d"),
    (lambda m, y: F.adaptive_avg_pool2d(y, 4).mean((2, 3)), ""),
    (lambda m, y: F.adaptive_avg_pool2d(y, 8).mean((2, 3)), "newly run _adaptive_avg_pool2d"),
    (lambda m, y: F.adaptive_max_pool2d(y, 8).mean((2, 3)), "newly run adaptive_max_pool2d"),
]


@pytest.mark.parametrize(("read", "words"), CASES)
def test_what_reads_a_smaller_map(read: Callable[[Any, Tensor], Tensor], words: str) -> None:
    if words:
        assert words in refusal(Reads(read))
    else:
        assert convert(Reads(read).eval())(images()).shape[0] == 2


def test_new_pads_are_accepted_where_that_is_asked_for() -> None:
    read = next(read for read, words in CASES if "constant_pad_nd" in words)
    assert convert(Reads(read).eval(), options=Options(allow_resize=True))(images()).shape == (2, 8)


# -- training ---------------------------------------------------------------------------------------


class Trains(Reads):
    """A head that runs in training only."""

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return (y.mean((2, 3)), self.read(self, y)) if self.training else y.mean((2, 3))


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda m, y: m.fc(y.mean((2, 3))), ""),
        (lambda m, y: m.fixed(y.flatten(1)), "in train mode `fixed` takes (2, 512) and would get (2, 392)"),
        (lambda m, y: m.fc(y.mean((2, 3))) if y.shape[2] == 8 else y, "in train mode the model's own forward decides"),
        (
            lambda m, y: F.interpolate(y, size=(8, 8)),
            "in train mode the model's own forward would newly run upsample_nearest2d",
        ),
        (
            lambda m, y: F.interpolate(y, scale_factor=2),
            "in train mode the model returns a map of the image's own sides",
        ),
    ],
)
def test_a_head_in_training(read: Callable[[Any, Tensor], Tensor], words: str) -> None:
    if words:
        assert words in refusal(Trains(read))
    else:
        assert len(convert(Trains(read).train())(images())) == 2


def test_a_converted_place_that_training_calls_again() -> None:
    class Again(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return (y, self.block(self.stem(x.flip(-1)))) if self.training else y

    assert (
        "`block" in (text := refusal(Again(Unit()))) and "is called 1 times in eval mode and 2 times in train" in text
    )


class Detects(Net):
    """As many rows as a threshold lets through: their number may differ, and what runs for them."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x).flatten(2).transpose(1, 2).flatten(0, 1)
        found = (scores.max(1).values > scores.mean()).nonzero()[:, 0]
        rows = scores[found]
        for _ in range(len(found)):
            rows = rows + 1
        return rows


def test_what_values_decide_is_not_compared() -> None:
    assert convert(Detects(Unit()).eval())(images()).shape[1] == 8
