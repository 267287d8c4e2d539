"""The children of a rewritten block, called one after another: the same values, or an error that says what to do."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import Net, Unit, convert, depthwise, images
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint_sequential

import padfree

SIZE = (3, 32, 32)


def flat() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        depthwise(), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.ReLU(),
        depthwise(), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def shared_activation() -> nn.Sequential:
    act = nn.ReLU()
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), act, depthwise(), nn.BatchNorm2d(8), act, nn.Conv2d(8, 8, 1))


def inner() -> nn.Sequential:
    """The strided chain is an inner Sequential of its own."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(depthwise(), nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, 8, 1)
    )


def norm_inside() -> nn.Sequential:
    """Conv and norm are a child, the activation is the next one."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(depthwise(), nn.BatchNorm2d(8)), nn.ReLU())


def padded() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ZeroPad2d(1), depthwise(padding=0), nn.BatchNorm2d(8), nn.ReLU()
    )


def loop(seq: Any, x: Tensor) -> Tensor:
    for layer in seq:
        x = layer(x)
    return x


def by_index(seq: Any, x: Tensor) -> Tensor:
    for index in range(len(seq)):
        x = seq[index](x)
    return x


def from_the_end(seq: Any, x: Tensor) -> Tensor:
    for index in range(-len(seq), 0):
        x = seq[index](x)
    return x


def sliced(seq: Any, x: Tensor) -> Tensor:
    return seq[len(seq) // 2 :](seq[: len(seq) // 2](x))


def rebuilt(seq: Any, x: Tensor) -> Tensor:
    return nn.Sequential(*seq.children())(x)


def rebuilt_from_names(seq: Any, x: Tensor) -> Tensor:
    return loop(dict(seq.named_children()).values(), x)


def unpacked(seq: Any, x: Tensor) -> Tensor:
    return nn.Sequential(*seq)(x)


def copied(seq: Any, x: Tensor) -> Tensor:
    return copy.deepcopy(nn.Sequential(*seq)).eval()(x)


def pickled(seq: Any, x: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(nn.Sequential(*seq))).eval()(x)


def checkpointed(seq: Any, x: Tensor) -> Tensor:
    return checkpoint_sequential(seq, 2, x.clone().requires_grad_(), use_reentrant=False)


def timm_checkpointed(seq: Any, x: Tensor) -> Tensor:
    models = pytest.importorskip("timm.models")
    return models.checkpoint_seq(seq, x.clone().requires_grad_(), every=2)


def compiled(seq: Any, x: Tensor) -> Tensor:
    torch.compiler.reset()
    return torch.compile(lambda x: loop(seq, x), backend="eager")(x)


def deep(seq: Any, x: Tensor) -> Tensor:
    """Sequentials inside are walked through, too, as feature extractors do that flatten."""
    for layer in seq.children():
        x = deep(layer, x) if isinstance(layer, nn.Sequential) else layer(x)
    return x


USES = [loop, by_index, from_the_end, sliced, rebuilt, rebuilt_from_names, unpacked, copied, pickled]
USES += [checkpointed, timm_checkpointed, compiled, deep]


@pytest.mark.parametrize("build", [flat, shared_activation, inner, norm_inside, padded])
@pytest.mark.parametrize("use", USES)
def test_the_shortcut_is_not_lost_in_silence(build: Callable[[], nn.Sequential], use: Any) -> None:
    made = convert(build(), size=SIZE).eval()
    x = images(side=32)
    wanted = made(x)
    try:
        found = use(made, x)
    except padfree.PadfreeError as error:
        assert "convert" in str(error)
    else:
        assert_close(found, wanted)


@pytest.mark.parametrize("use", [loop, by_index, rebuilt, checkpointed])
def test_a_tap_ahead_of_the_chain_sees_what_it_saw(use: Any) -> None:
    made = convert(flat(), size=SIZE).eval()
    x = images(side=32)
    wanted = F.relu(made[1](made[0](x)))
    assert_close(loop(itertools.islice(made, 3), x), wanted)
    with pytest.raises(padfree.PadfreeError, match="as a whole"):
        loop(itertools.islice(made, 6), x)


def test_a_view_is_the_child_but_for_calls() -> None:
    made = convert(flat(), size=SIZE).train()
    end, true = made[5], made._modules["5"]
    assert isinstance(end, nn.ReLU) and end is made[5] is list(made)[5] and end.__dict__ is true.__dict__
    assert dict(made.named_modules())["5"] is true is made.get_submodule("5")
    seen: list[int] = []
    end.register_forward_hook(lambda *_: seen.append(1))
    made[5].eval()
    assert not true.training
    wanted = made.eval()(images(side=32))
    assert seen == [1]
    twin = copy.deepcopy(made)
    assert twin[5].__dict__ is twin._modules["5"].__dict__ and twin[5].__dict__ is not end.__dict__
    assert_close(twin(images(side=32)), wanted)
    assert made.to(torch.float64)[9].weight.dtype == torch.float64  # a norm without an activation ends a chain


def test_what_changes_children_gets_them() -> None:
    made = convert(flat(), size=SIZE).eval()
    kinds: list[type] = []
    made.apply(lambda module: kinds.append(type(module)))
    assert [kind for kind in kinds if kind is nn.ReLU] == [nn.ReLU] * 3
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(made))
    assert type(synced._modules["9"]) is nn.SyncBatchNorm
    trained = copy.deepcopy(made).train()
    trained.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(trained, inplace=True)
    assert {type(child).__module__.partition(".nn.")[0] for child in trained.children()} >= {"torch.ao"}
    trained(images(side=32))


def test_an_end_that_is_wrapped_still_runs_in_its_block() -> None:
    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    made = convert(flat(), size=SIZE).eval()
    wanted = made(images(side=32))
    made[5] = Wrapped(made[5])
    assert_close(made(images(side=32)), wanted)
    with pytest.raises(padfree.PadfreeError):
        loop(made, images(side=32))


def test_compilers_call_the_children_themselves() -> None:
    torch.compiler.reset()
    made = convert(flat(), size=SIZE).eval()
    x = images(side=32)
    wanted = made(x)
    assert_close(torch.compile(made, fullgraph=True, backend="eager")(x), wanted)
    assert_close(torch.export.export(made, (x,)).module()(x), wanted)
    assert_close(torch.jit.script(made)(x), wanted)
    assert_close(torch.func.vmap(made)(x[:, None])[:, 0], wanted)
    assert_close(pickle.loads(pickle.dumps(made))(x), wanted)


class Rooted(nn.Module):
    """Its forward calls its children in order, as feature extractors expect."""

    def __init__(self) -> None:
        super().__init__()
        self.c0, self.a0 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.dw, self.bn, self.act = depthwise(), nn.BatchNorm2d(8), nn.ReLU()
        self.pw = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.act(self.bn(self.dw(self.a0(self.c0(x))))))


@pytest.mark.parametrize("build", [flat, inner, Rooted])
def test_feature_extractors_of_torchvision(build: Any) -> None:
    utils = pytest.importorskip("torchvision.models._utils")
    made = convert(build(), size=SIZE).eval()
    x = images(side=32)
    last = [name for name, _ in made.named_children()][-1]
    try:
        found = utils.IntermediateLayerGetter(made, {last: "out"})(x)["out"]
    except padfree.PadfreeError:
        return
    assert_close(found, made(x))


def test_feature_lists_of_timm() -> None:
    features = pytest.importorskip("timm.models._features")

    class Named(Rooted):
        feature_info = [{"num_chs": 8, "reduction": 2, "module": "pw"}]  # noqa: RUF012

    made = convert(Named(), size=SIZE).eval()
    listed = features.FeatureListNet(made, out_indices=(0,), flatten_sequential=True)
    with pytest.raises(padfree.PadfreeError, match="as a whole"):
        listed(images(side=32))


def test_children_of_a_block_with_a_forward_of_its_own() -> None:
    made: Any = convert(Net(Unit())).eval()
    with pytest.raises(padfree.PadfreeError, match="as a whole"):
        loop(made.block.children(), made.stem(images()))


class Listed(nn.Module):
    """Its forward takes a container apart."""

    def __init__(self, container: Callable[[list[nn.Module]], nn.Module]) -> None:
        super().__init__()
        self.layers = container(list(flat())[:8])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers:
            x = layer(x)
        return x


class OwnList(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        return loop(self, x)


class OwnDict(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        return loop(self.values(), x)


def in_dict(layers: list[nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({f"layer{index}": layer for index, layer in enumerate(layers)})


def values(container: Any, x: Tensor) -> Tensor:
    return loop(container.values() if isinstance(container, nn.ModuleDict) else container[:], x)


def by_items(container: Any, x: Tensor) -> Tensor:
    pairs = container.items() if isinstance(container, nn.ModuleDict) else enumerate(container)
    return loop([layer for _, layer in pairs], x)


def by_keys(container: Any, x: Tensor) -> Tensor:
    keys = list(container) if isinstance(container, nn.ModuleDict) else range(len(container))
    return loop([container[key] for key in keys], x)


def called(container: Any, x: Tensor) -> Tensor:
    return (
        nn.Sequential.forward(container, x) if isinstance(container, nn.Sequential) else loop(container.children(), x)
    )


def popped(container: Any, x: Tensor) -> Tensor:
    twin = copy.deepcopy(container)
    return loop([twin.pop("layer5" if isinstance(twin, nn.ModuleDict) else 5)], x)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: Listed(nn.ModuleList),
    "dict": lambda: Listed(in_dict),
    "sequential": lambda: Listed(lambda layers: nn.Sequential(*layers)),
    "list with a forward": lambda: OwnList(list(flat())[:8]),
    "dict with a forward": lambda: OwnDict(in_dict(list(flat())[:8]).items()),
}


@pytest.mark.parametrize("build", BUILD)
@pytest.mark.parametrize("form", ["converted", "fused"])
def test_containers_that_a_forward_takes_apart_lose_no_shortcut(build: str, form: str) -> None:
    made: Any = convert(BUILD[build](), size=SIZE).eval()
    x = images(side=32)
    wanted = made(x)
    if form == "fused":
        made = padfree.fuse(made, input_size=SIZE)
    container = made.layers if isinstance(made, Listed) else made
    assert_close(made(x), wanted, rtol=1e-4, atol=1e-5)
    for use in (values, by_items, by_keys, called, popped):
        with pytest.raises(padfree.PadfreeError):
            use(container, x)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_close(twin(x), made(x))
        assert len(twin.layers if isinstance(twin, Listed) else twin) == 8


def test_compilers_take_such_containers_as_they_are() -> None:
    torch.compiler.reset()
    made = convert(Listed(nn.ModuleList), size=SIZE).eval()
    x = images(side=32)
    wanted = made(x)
    assert_close(torch.compile(made, fullgraph=True, backend="eager")(x), wanted)
    assert_close(torch.export.export(made, (x,)).module()(x), wanted)
    assert_close(torch.jit.script(made)(x), wanted)
    assert_close(torch.fx.symbolic_trace(made)(x), wanted)
