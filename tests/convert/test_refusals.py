"""What padfree leaves alone or refuses: the reason is true, names the place, and nothing is changed."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import Basic, Net, Unit, convert, depthwise, images, refusal, snapshot
from torch import Tensor, nn

import padfree
from padfree.errors import NothingToConvertError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")


# -- models that are not plain eager models --------------------------------------------------------


def wrapped(kind: str) -> Any:
    model = Net(Unit())
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "data parallel":
        return nn.DataParallel(model)
    if kind == "scripted":
        return torch.jit.script(model)
    if kind == "traced":
        return torch.jit.trace(model.eval(), images())
    if kind == "graph module":
        return torch.fx.symbolic_trace(model)
    if kind == "exported":
        return torch.export.export(model.eval(), (images(),)).module()
    if kind == "quantized":
        return nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 8, 3), Unit())
    assert kind == "quantized linear"
    return nn.Sequential(Net(Unit()), torch.ao.nn.quantized.Linear(3, 8))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("compiled", "torch.compile(padfree.convert(model))"),
        ("data parallel", "model.module"),
        ("scripted", "TorchScript"),
        ("traced", "TorchScript"),
        ("graph module", "GraphModule"),
        ("exported", "GraphModule"),
        ("quantized", "`0` is quantized"),
        ("quantized linear", "`1` is quantized"),
    ],
)
def test_wrapped_models(kind: str, words: str) -> None:
    with pytest.raises(padfree.PadfreeError) as caught:
        padfree.convert(wrapped(kind), input_size=(3, 16, 16))
    assert words in str(caught.value)


DISTRIBUTED = """
import torch, tempfile, padfree
from torch import nn
from strangers import Net, Unit
store = tempfile.mktemp()
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
model = Net(Unit())
try:
    padfree.convert(nn.parallel.DistributedDataParallel(model), input_size=(3, 16, 16))
except padfree.PadfreeError as error:
    print(error)
made = nn.parallel.DistributedDataParallel(padfree.convert(model, input_size=(3, 16, 16)))
made(torch.randn(2, 3, 16, 16)).sum().backward()
assert all(p.grad is not None for p in made.parameters())
torch.distributed.destroy_process_group()
"""


def test_distributed_data_parallel_is_refused_and_can_wrap_the_converted_model() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED],
        capture_output=True, text=True, timeout=600, cwd=ROOT / "tests", env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "convert the model inside (model.module), then wrap it again" in done.stdout


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("thing", [None, 3, "resnet18", nn.Conv2d, {"model": 1}, torch.zeros(1)])
def test_what_is_no_module(thing: Any) -> None:
    with pytest.raises(padfree.PadfreeError, match=r"takes a torch\.nn\.Module, not"):
        padfree.convert(thing)


@pytest.mark.parametrize(
    "lazy",
    [
        lambda: nn.Sequential(nn.LazyConv2d(8, 3, padding=1), Unit()),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LazyBatchNorm2d(), Unit()),
    ],
)
def test_lazy_modules_before_their_first_forward(lazy: Any) -> None:
    with pytest.raises(padfree.PadfreeError, match="lazy parameters that no forward has initialised yet"):
        convert(lazy())


def test_models_that_cannot_be_copied() -> None:
    model = Net(Unit())
    model.block.lock = threading.Lock()
    with pytest.raises(padfree.PadfreeError, match=r"Net cannot be copied .*keep open files"):
        convert(model)


def test_modules_without_a_hash() -> None:
    class Unhashable(Unit):
        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(padfree.PadfreeError, match=r"cannot be told apart .*eq=False"):
        convert(Net(Unhashable()))


# -- models that do not take images, or have nothing to convert ---------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(Unit())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a) + self.net(b)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 3), "does not run on a 3x16x16 input"),
        (nn.Embedding(10, 3), "does not run on a 3x16x16 input"),
        (nn.Conv1d(3, 3, 3, 2, 1), "does not run on a 3x16x16 input"),
        (nn.Sequential(nn.Conv3d(3, 3, 3, 2, 1)), "does not run on a 3x16x16 input"),
        (nn.LSTM(16, 3), "does not run on a 3x16x16 input"),
        (nn.Transformer(8, 2, 1, 1, 8), "missing 1 required positional argument"),
        (nn.ModuleList([Unit()]), "does not run"),
        (nn.Identity(), "nothing to convert in Identity"),
        (nn.Sequential(), "nothing to convert in Sequential"),
        (nn.ConvTranspose2d(3, 8, 3, 2, 1), "with an odd kernel of at least 3 and stride 2"),
        (nn.Conv2d(3, 8, 3, 2, 1), "its own forward"),
        (TwoInputs(), "called 2 times in one forward"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_models_with_nothing_to_convert(model: nn.Module, words: str) -> None:
    assert words in refusal(model, rules=None)


def test_a_wrong_input_size_is_named() -> None:
    assert "does not run on a 4x16x16 input" in refusal(Net(Unit()), size=(4, 16, 16))
    assert "smaller than the 3x3 window" in refusal(Net(Unit()), size=(3, 2, 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": (3, 16)}, "input_size is (3, 16)"),
        ({"size": 16}, "input_size is 16"),
        ({"size": "abc"}, "input_size is 'abc'"),
        ({"size": (3, -1, 4)}, "input_size is (3, -1, 4)"),
        ({"size": (3, 16.5, 16)}, "input_size is (3, 16.5, 16)"),
        ({"rules": ["nope"]}, "unknown rule 'nope'"),
        ({"rules": []}, "none given"),
        ({"rules": 3}, "unknown rule 3"),
        ({"include": "zzz"}, "include='zzz' matches none of the places found"),
        ({"exclude": "re:("}, "is not a regular expression"),
        ({"include": 3}, "include takes module paths and patterns, not 3"),
        ({"exclude": ["block.conv", None]}, "exclude takes module paths and patterns, not None"),
        ({"include": []}, "not among the included modules"),
        ({"exclude": "*"}, "or is excluded"),
        ({"options": {"merge": "conv"}}, "pass padfree.Options(...)"),
    ],
    ids=str,
)
def test_wrong_arguments(settings: dict[str, Any], words: str) -> None:
    assert words in refusal(Net(Unit()), **settings)


# -- places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "words"),
    [
        (nn.Conv2d(8, 8, (3, 5), 2, (1, 2), groups=8), "differs between the axes"),
        (depthwise(stride=(2, 1)), "its stride is 2x1"),
        (depthwise(stride=3), "its stride is 3x3"),
        (nn.Conv2d(8, 8, 4, 2, 1, groups=8), "its kernel spans 4x4"),
        (depthwise(padding_mode="reflect"), "reflection_pad2d, not zeros"),
        (depthwise(padding_mode="circular"), "not zeros"),
        (depthwise(padding=0), "padding-free already"),
        (depthwise(padding="valid"), "padding-free already"),
        (depthwise(padding=(1, 0)), "differs between the axes"),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value)[:60],
)
def test_convs_without_a_padding_free_form(conv: nn.Conv2d, words: str) -> None:
    unit = Unit()
    unit.conv = conv
    text = refusal(Net(unit))
    assert "`block.conv`" in text and words in text


class Block(Unit):
    """Base of the blocks below; `conv`, `bn` and `act` as in `Unit`."""

    def body(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class LooksAtShape(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.shape[-1] > 8 else x


class LooksAtValues(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * 2 if x.mean() > 0 else x)


class Loops(Block):
    def forward(self, x: Tensor) -> Tensor:
        for image in x:
            del image
        return self.body(x)


class Stars(Block):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.body(xs[0])


class Keywords(Block):
    def forward(self, x: Tensor, **flags: Any) -> Tensor:
        return self.body(x)


class NoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x)
        return self.act(self.bn(y))


class Autocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.body(x)


class NoAutocast(Block):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Writes(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        return self.last


class WritesInEval(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if not self.training:
            self.last = y
        return y


class Counts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.body(x)


class Appends(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.mean())
        return self.body(x)


class CountsInDict(Block):
    def __init__(self) -> None:
        super().__init__()
        self.stats = {"calls": {"n": 0}}

    def forward(self, x: Tensor) -> Tensor:
        self.stats["calls"]["n"] += 1
        return self.body(x)


class Meter:
    def __init__(self) -> None:
        self.total = 0.0

    def update(self, value: Any) -> None:
        self.total = self.total + value


class Meters(Block):
    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.meter.update(y.detach().mean())
        return y


class PythonRandom(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 1e-9:
            return F.max_pool2d(x, 2)
        return self.body(x)


class TorchRandom(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 1e-9:
            return F.max_pool2d(x, 2)
        return self.body(x)


class Functional(Unit):
    def __init__(self) -> None:
        super().__init__()
        del self.conv
        self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(F.conv2d(x, self.weight, None, 2, 1, groups=8)))


class ReflectPad(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = depthwise(padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.pad(x, (1, 1, 1, 1), mode="reflect"))


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))


class HardPadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, 2, 1, 1, 8)


class IgnoresPadding(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = HardPadding(8, 8, 3, 2, 1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Opaque:
    def __init__(self, out: Tensor) -> None:
        self.out = out


class ReturnsAnObject(Block):
    def forward(self, x: Tensor) -> Any:
        return Opaque(self.body(x))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (LooksAtShape, "cannot be traced"),
        (LooksAtValues, "cannot be traced"),
        (Loops, "cannot be traced"),
        (Stars, "takes *args or **kwargs"),
        (Keywords, "takes *args or **kwargs"),
        (NoGrad, "switches gradients on or off"),
        (Autocast, "switches autocast on or off"),
        (NoAutocast, "switches autocast on or off"),
        (Writes, "writes its own attribute `last`"),
        (WritesInEval, "writes its own attribute `last`"),
        (Counts, "writes its own attribute `count`"),
        (Appends, "writes into its own attribute `seen`"),
        (CountsInDict, "writes into its own attribute `stats`"),
        (Meters, "writes into its own attribute `meter`"),
        (PythonRandom, "draws random numbers of its own"),
        (TorchRandom, "draws random numbers of its own"),
        (Functional, "it is a function call"),
        (ReflectPad, "reflection_pad2d, not zeros"),
        (Twice, "called 2 times in one forward"),
        (ReturnsAnObject, "cannot be traced"),
    ],
)
def test_blocks_that_cannot_be_rewritten(kind: type[nn.Module], words: str) -> None:
    text = refusal(Net(kind()))
    assert words in text and "`block" in text


@pytest.mark.parametrize("side", [16, 4])
def test_a_conv_that_ignores_its_padding(side: int) -> None:
    """At 4 pixels the sum would broadcast the 1x1 pool over the 2x2 map."""
    text = refusal(Net(IgnoresPadding()), size=(3, side, side))
    assert "block" in text and ("runs with padding (1, 1)" in text or "Mismatching" in text)


def test_a_forward_on_the_instance() -> None:
    unit = Unit()
    unit.forward = lambda x: unit.act(unit.bn(unit.conv(x)))  # type: ignore[method-assign]
    assert "has a forward of its own on the instance" in refusal(Net(unit))


def test_what_fuse_returned_is_refused() -> None:
    fused = padfree.fuse(Net(Unit()).eval(), input_size=(3, 16, 16))
    for asked in (padfree.convert, padfree.plan):
        with pytest.raises(padfree.PadfreeError, match=r"convert the network that it was made from, and fuse it then"):
            asked(fused)


def test_graph_modules_and_scripted_modules_inside() -> None:
    assert "GraphModule" in refusal(Net(torch.fx.symbolic_trace(Unit())))
    with pytest.raises(NothingToConvertError):
        convert(Net(torch.jit.script(Unit())))


def test_modules_in_a_plain_list() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.units = [Unit()]

        def forward(self, x: Tensor) -> Tensor:
            return self.units[0](self.stem(x))

    assert "it is a function call" in refusal(Hidden())


def test_a_head_of_fixed_size_stops_its_domain() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Unit(), nn.Flatten(), nn.Linear(512, 3))
    text = refusal(model)
    assert "`1.conv`" in text and "512" in text and "392" in text


def test_half_a_domain_is_not_converted() -> None:
    """The shortcut is a 2x1 pool, so the block's conv stays too, and the reason names the pool."""
    block = Basic()
    block.down[0] = nn.Sequential(nn.AvgPool2d((2, 1), (2, 2)), nn.Conv2d(8, 16, 1))  # type: ignore[assignment]
    text = refusal(Net(block), rules=("dense", "projection"))
    assert "`block.conv1`: `block.down.0.0` enters the same map" in text


def test_what_can_be_converted_is_when_a_neighbour_cannot() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Writes(), Unit())
    before = snapshot(model)
    made = convert(model)
    assert snapshot(model) == before
    assert [match.name for match in made.padfree_plan.matches] == ["2.conv"]
    assert [skip.name for skip in made.padfree_plan.skips] == ["1.conv"]
    made(images())
    assert made[1].last.shape[-1] == 8 and made[1].conv.padding == (1, 1)


# -- nothing is touched ------------------------------------------------------------------------------


class Noisy(Net):
    """Draws from every generator in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(()) + random.random())


@pytest.mark.parametrize("function", [padfree.plan, padfree.convert])
def test_the_original_is_untouched(function: Any) -> None:
    fired: list[str] = []
    model = Noisy(Basic())
    model.block.bn1.eval()
    model.block.register_forward_hook(lambda *_: fired.append("forward"))
    model.stem.register_forward_pre_hook(lambda *_: fired.append("pre"))
    model.block.conv1.register_full_backward_hook(lambda *_: fired.append("backward"))
    model.stem.weight.requires_grad_(False)
    before = snapshot(model)
    function(model, input_size=(3, 16, 16))
    after = snapshot(model)
    if function is padfree.convert:  # new layers are initialised from the generator
        assert before.pop("random")[1] == after.pop("random")[1]
    assert after == before
    assert not fired


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_are_seen_where_they_are_off_anyway(context: Any) -> None:
    with context():
        text = refusal(Net(NoGrad()))
    assert "switches gradients on or off" in text


def test_global_state_is_restored() -> None:
    enter = torch.autocast.__enter__
    grad = torch.is_grad_enabled()
    call = nn.Module.__call__
    refusal(Net(Autocast()))
    convert(Net(Unit()))
    assert torch.autocast.__enter__ is enter and nn.Module.__call__ is call and torch.is_grad_enabled() is grad
