"""Where a stem's tail lives: outside norms and convolutions, at one path for a classifier and its feature extractor."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.utils import freeze
from torch import Tensor, nn

import padfree
from padfree.layers.stem import StemTail
from padfree.rules._toys import depthwise, unit

SIZE = (3, 32, 32)


class NormAct(nn.BatchNorm2d):
    """A batch norm that carries its activation, like timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(input))
        return out


class Block(nn.Module):
    """A residual block."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, stride, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return x + y if self.residual else y


class Classifier(nn.Module):
    """Its stem's norm carries the activation, and its forward calls a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = NormAct(8)
        self.blocks = nn.Sequential(nn.Sequential(Block()), nn.Sequential(Block(2), Block()))
        self.head = nn.Linear(8, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.bn1(self.conv_stem(x)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.forward_features(x).mean((2, 3)))
        return out

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        return features(self, self.bn1(self.conv_stem(x)))


class Features(nn.Module):
    """The same layers, the activation beside the norm, for maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU()
        self.blocks = nn.Sequential(nn.Sequential(Block()), nn.Sequential(Block(2), Block()))

    def collect(self, x: Tensor) -> list[Tensor]:
        return features(self, x)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.collect(self.act1(self.bn1(self.conv_stem(x))))


class Plain(Features):
    """For TorchScript and norm swaps."""

    def run(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.run(self.act1(self.bn1(self.conv_stem(x))))


def features(model: Any, x: Tensor) -> list[Tensor]:
    maps = [x]
    for stage in model.blocks:
        maps.append(x := stage(x))
    return maps


def convert(model: nn.Module, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return padfree.convert(model.eval(), input_size=SIZE, **arguments).eval()


def tails(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, StemTail)]


def test_one_path_for_a_classifier_and_its_features() -> None:
    whole, maps = convert(Classifier()), convert(Features())
    assert tails(whole) == tails(maps) == ["blocks.0.0.padfree_stem"]
    assert type(whole).forward is Classifier.forward and type(maps).forward is Features.forward  # none was generated
    norms = [module for module in whole.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(parameter.dim() == 1 for norm in norms for parameter in norm.parameters())
    weights = {key: value for key, value in whole.state_dict().items() if not key.startswith("head.")}
    maps.load_state_dict(weights)
    x = torch.randn(2, *SIZE)
    for one, other in zip(whole.forward_intermediates(x), maps(x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(whole.forward_features(x), maps(x)[-1], rtol=0, atol=0)
    torch.testing.assert_close(maps(x)[0], whole.bn1(whole.conv_stem(x)), rtol=0, atol=0)  # as it was


def test_all_that_the_block_computes_reads_the_tail_and_it_runs_once() -> None:
    model = convert(Classifier())
    block, seen = model.blocks[0][0], []
    block.padfree_stem.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(1, *SIZE)
    model(x)
    (tail,) = seen
    stem = model.bn1(model.conv_stem(x))
    torch.testing.assert_close(tail, block.padfree_stem(stem), rtol=0, atol=0)
    torch.testing.assert_close(block(stem), tail + block.norm(block.conv(tail)), rtol=0, atol=0)


def _reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def _scripted(model: nn.Module) -> Any:
    return torch.jit.script(model)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        _reloaded,
        _scripted,
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda model: model.to(memory_format=torch.channels_last),
    ],
)
def test_the_tail_survives(change: Callable[[nn.Module], Any]) -> None:
    model = convert(Plain())
    x = torch.randn(2, *SIZE)
    expected = model(x)
    with torch.no_grad():
        model.blocks[0][0].padfree_stem.conv_pw.weight.mul_(2)
    changed = model(x)
    assert not torch.equal(changed, expected)
    torch.testing.assert_close(change(model).eval()(x), changed)


def test_freezing_a_stem_freezes_the_stem() -> None:
    model = padfree.convert(timm.create_model("lcnet_035"), input_size=(3, 64, 64))
    freeze(model, ["conv_stem", "bn1"])
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items() if "running_mean" in key}
    model(torch.randn(2, 3, 64, 64) + 3)
    moved = {key for key, value in before.items() if not torch.equal(model.state_dict()[key], value)}
    assert moved == set(before) - {"bn1.running_mean"}
    left = [
        name for name, parameter in model.named_parameters() if not parameter.requires_grad or name.startswith("bn1.")
    ]
    assert left == ["conv_stem.weight"]  # timm makes buffers of a frozen norm's weight and bias


class Bare(nn.Module):
    """What reads the stem is a convolution, of the root's own forward."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, padding=1) if pool else nn.Identity()
        self.conv2 = nn.Conv2d(8, 8, 3, 2, padding=1)
        self.norm2 = nn.BatchNorm2d(8)

    def features(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.pool(self.act1(self.norm1(self.conv1(x))))))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


@pytest.mark.parametrize(("pool", "place"), [(False, "act1"), (True, "pool")])
@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_on_a_place_that_the_tail_takes(pool: bool, place: str, inplace: bool) -> None:
    """They see what the next layer reads, and what the module there is given, as before."""
    model = Bare(pool).eval()
    given: list[Tensor] = []
    seen: list[Tensor] = []
    read: list[Tensor] = []
    module = model.get_submodule(place)
    handles = [
        module.register_forward_pre_hook(lambda module, args: given.append(args[0])),
        module.register_forward_hook(lambda module, args, out: seen.append(out)),
        model.conv2.register_forward_pre_hook(lambda module, args: read.append(args[0])),
    ]
    plan = padfree.plan(model, rules=["stem"], input_size=SIZE)
    converted = plan.apply(model, inplace=inplace)
    assert tails(converted) == [place] and not seen
    x = torch.randn(1, *SIZE)
    converted(x)
    assert len(seen) == len(given) == len(read) == 1
    torch.testing.assert_close(seen[0], read[0], rtol=0, atol=0)
    before = converted.norm1(converted.conv1(x))  # type: ignore[operator]
    torch.testing.assert_close(given[0], before.relu() if pool else before, rtol=0, atol=0)
    if inplace:
        for handle in handles[:2]:
            handle.remove()
        converted(x)
        assert len(seen) == len(given) == 1 and len(read) == 2


def test_hooks_stay_where_they_were_when_a_conversion_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from padfree.rewrite import operations

    model = Bare(True).eval()
    seen: list[Tensor] = []
    model.pool.register_forward_hook(lambda module, args, out: seen.append(out))
    done = operations._DO[operations.ReplaceEnd]

    def fail(*arguments: Any) -> None:
        done(*arguments)
        if arguments[0] is model:
            raise RuntimeError("afterwards")

    monkeypatch.setitem(operations._DO, operations.ReplaceEnd, fail)
    with pytest.raises(RuntimeError, match="afterwards"):
        padfree.convert(model, input_size=SIZE, inplace=True)
    assert type(model.pool) is nn.MaxPool2d
    model(torch.randn(1, *SIZE))
    assert len(seen) == 1 and seen[0].shape[-1] == 16


class Several(Classifier):
    """A skip connection reads the stem's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Sequential(unit(8, 8), depthwise(8))

    def forward_features(self, x: Tensor) -> Tensor:
        stem = self.bn1(self.conv_stem(x))
        out: Tensor = self.blocks(stem) + self.skip(stem)
        return out


def test_no_tail_in_one_of_several_readers() -> None:
    """None of the places that all of them read lies outside the norm, and the tail goes into none of them alone."""
    plan = padfree.plan(Several(), input_size=SIZE)
    stem = [match for match in plan.matches if match.rule == "stem"]
    assert not stem
    (skip,) = (skip for skip in plan.skips if skip.rule == "stem")
    assert skip.in_scope and skip.reason
