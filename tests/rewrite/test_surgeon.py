"""The seven safeguards of re-forwarding a block in place, and what a rewritten module still is."""

from __future__ import annotations

import copy
import inspect
import io
import linecache
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from strangers import SIDE, Basic, Fusable, Net, Unit, check, convert, depthwise, expected, images, snapshot
from timm.utils import ModelEmaV2
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.testing import assert_close

import padfree
from padfree.errors import LockedStateError
from padfree.rewrite.forward import original_class, rewritten_class
from padfree.rewrite.operations import AddChild, Reforward, SetAttributes, perform

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tidy(model: nn.Module) -> nn.Module:
    return convert(model, rules=None).eval()


# -- 1. trace a copy, bound to the recorded arguments --------------------------------------------------


class Skip(Unit):
    """Without `skip` it projects: the path depends on an argument that is no tensor."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is None:
            skip = F.max_pool2d(x, 2)[..., :7, :7]
        return self.act(self.bn(self.conv(x)))[..., :7, :7] + skip


def test_1_the_trace_is_bound_to_the_recorded_call_and_leaves_no_mark() -> None:
    model = Net(Skip())
    before = snapshot(model)
    made = convert(model)
    after = snapshot(model)
    assert {**after, "random": None} == {**before, "random": None}
    made.eval()
    x = made.stem(images())
    assert_close(made(images()), expected(made.block, x) + F.max_pool2d(x, 2)[..., :7, :7])
    with pytest.raises(RuntimeError, match="traced with skip=None"):
        made.block(x, x[..., :7, :7])


def test_1_buffers_are_read_when_called_not_when_traced() -> None:
    class Scaled(Unit):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.bn(self.conv(x * self.scale)))

    made = convert(Net(Scaled())).eval()
    made.block.scale.fill_(3)
    assert_close(made(images()), expected_scaled(made, 3))


def expected_scaled(made: Any, scale: float) -> Tensor:
    x = made.stem(images())
    conv = made.block.conv
    return F.relu(made.block.bn(F.conv2d(x * scale, conv.weight, conv.bias, 2, 0, 1, 8))) + F.max_pool2d(
        x * scale, 3, 2
    )


# -- 2. state read while tracing is locked, writes are refused (test_refusals.py) ---------------------------


class Stateful(Unit):
    level = 1  # class state
    table: ClassVar[dict[str, bool]] = {"relu": True}

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self._scale = 1.0
        self.names = ["a"]
        self.down: nn.Module | None = None

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.on and self.level and self.table["relu"] and "a" in self.names:
            y = self.act(y)
        y = y * self.scale
        if hasattr(self, "late") or self.down is not None:
            y = y * 0
        return y


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("on", False),
        ("on", 1),
        ("level", 0),
        ("table", {}),
        ("names", []),
        ("scale", 2.0),
        ("_scale", 2.0),
        ("down", nn.Identity()),
        ("late", True),
    ],
)
def test_2_state_that_was_read_is_locked(name: str, value: Any) -> None:
    made = check(Stateful())
    with pytest.raises(LockedStateError, match=r"baked into the converted forward .* convert again"):
        setattr(made.block, name, value)
    assert isinstance(LockedStateError(""), (padfree.PadfreeError, AttributeError))
    made.eval()
    assert_close(made(images()), expected(made.block, made.stem(images())))


def test_2_equal_values_and_other_state_may_be_set() -> None:
    made = check(Stateful())
    made.block.on = True
    made.block.scale = 1.0
    made.block.down = None
    made.block.note = "free"
    made.block.act = nn.GELU()
    made.eval()
    assert_close(made(images()), expected(made.block, made.stem(images()), F.gelu))


def test_2_the_lock_survives_copies_and_pickles() -> None:
    made = convert(Net(Locked()))
    for twin in (copy.deepcopy(made), copy.copy(made), pickle.loads(pickle.dumps(made))):
        with pytest.raises(LockedStateError):
            twin.block.on = False


def test_2_plain_tensors_are_read_when_called() -> None:
    class Weighted(Unit):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.full((1, 8, 1, 1), 2.0)  # no buffer

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.weight)

    made = convert(Net(Weighted())).eval()
    assert_close(made(images()), expected_scaled(made, 2))
    made.block.weight = torch.full((1, 8, 1, 1), 3.0)
    assert_close(made(images()), expected_scaled(made, 3))


def test_2_plain_state_of_a_child_is_not_baked_unseen() -> None:
    class Drops(Unit):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return self.drop(y) if self.drop.p > 0 else y

    made = convert(Net(Drops())).train()
    with pytest.raises(padfree.PadfreeError):
        made.block.drop.p = 1.0
        assert made(images()).unique().tolist() == [0.0]


class Locked(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.on else x


# -- 3. self-check ------------------------------------------------------------------------------------


def test_3_a_trace_that_does_something_else_is_found_out() -> None:
    """torch.fx inlines what a child's own __call__ does, and the child would do it again."""

    class Doubles(nn.Conv2d):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    unit = Unit()
    unit.conv = Doubles(8, 8, 3, 2, 1, groups=8)
    with pytest.raises(padfree.PadfreeError, match="does not do what the original does"):
        convert(Net(unit))


def test_3_in_place_sums_stay_in_place() -> None:
    class Sum(Unit):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = y
            z += 1
            return self.act(self.bn(y))

    made = convert(Net(Sum())).eval()
    x = made.stem(images())
    y = F.conv2d(x, made.block.conv.weight, made.block.conv.bias, 2, 0, 1, 8) + 1
    assert_close(made(images()), F.relu(made.block.bn(y)) + F.max_pool2d(x, 3, 2))


# -- 4. the class ---------------------------------------------------------------------------------------


def test_4_the_class_is_built_once_and_looks_like_the_original() -> None:
    one, two = convert(Net(Unit())), convert(Net(Unit()))
    kind = type(one.block)
    assert kind is type(two.block) and kind.__bases__ == (Unit,)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == ("Unit", "Unit", "strangers")
    assert kind.__doc__ == Unit.__doc__ and type(kind) is type(Unit)
    assert isinstance(one.block, Unit) and not isinstance(Unit(), kind)
    assert repr(one) == repr(convert(Net(Unit())))
    assert original_class(one.block) is Unit


def test_4_the_source_can_be_read() -> None:
    made = convert(Net(Unit()))
    source = inspect.getsource(type(made.block).forward)
    assert source.startswith("def forward(self, x") and "self.conv(x)" in source
    linecache.checkcache()
    assert inspect.getsource(type(made.block).forward) == source


def test_4_sources_do_not_mix_when_the_line_cache_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linecache, "cache", {})

    class Plus(Unit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 1)

    first = type(convert(Net(Plus())).block)
    linecache.clearcache()

    class Plus(Unit):  # type: ignore[no-redef]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 2)

    second = type(convert(Net(Plus())).block)
    assert first.forward.__code__.co_filename != second.forward.__code__.co_filename
    assert "x + 2" in inspect.getsource(second.forward)


def test_4_an_error_inside_shows_the_generated_line() -> None:
    made = convert(Net(Unit()))
    made.block.bn = nn.BatchNorm2d(5)
    with pytest.raises(RuntimeError) as caught:
        made(images())
    lines = [str(entry.statement) for entry in caught.traceback]
    assert any("self.bn(conv)" in line for line in lines)


def test_4_classes_that_register_themselves_see_no_generated_class() -> None:
    registry: dict[str, type] = {}

    class Registers(nn.Module):
        def __init_subclass__(cls, *, alias: str, **settings: Any) -> None:
            super().__init_subclass__(**settings)
            assert alias not in registry
            registry[alias] = cls

    class Registered(Unit, Registers, alias="unit"):
        pass

    class Meta(type):
        def __new__(mcs, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> type:
            assert name not in registry, f"{name} registered twice"
            registry[name] = super().__new__(mcs, name, bases, members)
            return registry[name]

    class Metered(Unit, metaclass=Meta):
        pass

    for kind in (Registered, Metered):
        made = check(kind())
        assert type(type(made.block)) is type(kind) and isinstance(made.block, kind)
    assert registry == {"unit": Registered, "Metered": Metered}


def test_4_parametrized_after_rewriting_and_rewritten_again() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.c2 = depthwise(), depthwise()
            self.gamma = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.c2(F.relu(self.c1(x)))) * self.gamma

    made = convert(Net(Two()), include="block.c1")
    parametrize.register_parametrization(made.block, "gamma", Double())
    made = convert(made, include="block.c2").eval()
    x, gamma = made.stem(images()), made.block.gamma
    assert_close(gamma, made.block.parametrizations.gamma.original * 2)
    for conv in (made.block.c1, made.block.c2):
        x = F.relu(F.conv2d(x, conv.weight, conv.bias, 2, 0, 1, 8)) + F.max_pool2d(x, 3, 2)
    # the second pool is added where conv -> act ends, before the scale
    assert_close(made(images()), x * gamma)


def test_4_flags_that_compare_equal_make_different_classes() -> None:
    source = "def forward(self, x):\n    return x\n"
    kinds = {rewritten_class(Unit, source, (), (("flag", value),)) for value in (True, 1, 1.0)}
    assert len(kinds) == 3


def test_4_threads() -> None:
    made: list[nn.Module] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            made.append(convert(Net(Unit())).eval())
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(made) == 4
    for model in made:
        assert_close(model(images()), expected(model.block, model.stem(images())))


# -- 5. pickling ------------------------------------------------------------------------------------------

LOAD = """
import sys, pickle, torch
path, = sys.argv[1:]
saved = torch.load(path, weights_only=False)
model, x, wanted = saved["model"], saved["x"], saved["wanted"]
torch.testing.assert_close(model(x), wanted)
again = pickle.loads(pickle.dumps(model))
torch.testing.assert_close(again(x), wanted)
assert type(again.block) is type(model.block)
from strangers import Basic
assert isinstance(model.block, Basic) and type(model.block) is not Basic
import padfree
assert padfree.is_converted(model) and model.padfree_plan.matches
print("loaded")
"""


def test_5_a_whole_model_loads_in_a_fresh_process(tmp_path: Path) -> None:
    made = tidy(Net(Basic()))
    path = tmp_path / "model.pt"
    torch.save({"model": made, "x": images(), "wanted": made(images()).detach()}, path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)],
        capture_output=True, text=True, timeout=600, cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loaded"


SCRIPT = """
import pickle, sys, torch, padfree
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8)
    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))
class Main(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), Block()
    def forward(self, x):
        return self.block(self.stem(x))
x = torch.randn(2, 3, 16, 16)
if sys.argv[1] == "save":
    made = padfree.convert(Main().eval(), input_size=(3, 16, 16))
    torch.save((made, x, made(x)), sys.argv[2])
else:
    made, x, wanted = torch.load(sys.argv[2], weights_only=False)
    torch.testing.assert_close(made(x), wanted)
    print("loaded")
"""


def test_5_classes_defined_in_main(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for step in ("save", "load"):
        done = subprocess.run(
            [sys.executable, str(script), step, str(tmp_path / "model.pt")],
            capture_output=True, text=True, timeout=600,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "loaded"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_5_pickle_protocols(protocol: int) -> None:
    made = tidy(Net(Basic()))
    twin = pickle.loads(pickle.dumps(made, protocol))
    assert type(twin.block) is type(made.block)
    assert_close(twin(images()), made(images()), rtol=0, atol=0)
    assert list(twin.state_dict()) == list(made.state_dict())


def test_5_weights_only_says_what_to_do_instead(tmp_path: Path) -> None:
    made = tidy(Net(Basic()))
    torch.save(made, tmp_path / "whole.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "whole.pt", weights_only=True)
    buffer = io.BytesIO()
    torch.save({"plan": made.padfree_plan.to_dict(), "state": made.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    fresh = padfree.Plan.from_dict(saved["plan"]).apply(Net(Basic())).eval()
    assert fresh.load_state_dict(saved["state"]) and list(fresh.state_dict()) == list(made.state_dict())
    assert_close(fresh(images()), made(images()), rtol=0, atol=0)


def test_5_getstate_and_setstate_of_the_original_are_used() -> None:
    twin = pickle.loads(pickle.dumps(convert(Net(Remembers()))))
    assert twin.block.loaded == "set" and twin.block.saved == "got"


class Remembers(Unit):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "saved": "got"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "loaded": "set"})


# -- 6. fusing and re-arranging -----------------------------------------------------------------------------


class Deployable(Net):
    def switch_to_deploy(self) -> None:
        self.block = nn.Identity()


class Holder(nn.Module):
    """An ancestor between the root and the rewritten block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Fusable()
        self.other = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def reparameterize(self) -> None:
        self.inner = nn.Identity()


def test_6_fusers_of_the_block_and_of_every_ancestor_raise() -> None:
    made = convert(Deployable(Holder())).eval()
    wanted = made(images())
    for path, name in (("block.inner", "fuse"), ("block", "reparameterize"), ("", "switch_to_deploy")):
        module = made.get_submodule(path)
        with pytest.raises(padfree.PadfreeError, match=rf"call padfree.fuse\(model\), which keeps it, or {name}\(\)"):
            getattr(module, name)()
    assert_close(made(images()), wanted, rtol=0, atol=0)
    twin = pickle.loads(pickle.dumps(made))
    with pytest.raises(padfree.PadfreeError):
        twin.switch_to_deploy()


def test_6_fusers_of_what_was_not_rewritten_still_work() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.plain, self.strided = nn.Conv2d(3, 8, 3, padding=1), Fusable(), Unit()
            self.plain.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.strided(self.plain(self.stem(x)))

    made = convert(Both()).eval()
    wanted = made(images())
    made.plain.fuse()
    assert isinstance(made.plain.bn, nn.Identity)
    assert_close(made(images()), wanted, rtol=1e-4, atol=1e-5)


def test_6_fused_first_then_converted() -> None:
    model = Net(Fusable()).eval()
    model.block.fuse()
    made = convert(model)
    assert_close(made(images()), expected(made.block, made.stem(images())))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(depthwise(), nn.BatchNorm2d(8), nn.ReLU()))


def _delete(seq: Any) -> None:
    del seq[0]


def _iadd(seq: Any) -> None:
    seq += nn.Sequential(nn.ReLU())


CHANGES: list[Callable[[Any], Any]] = [
    lambda seq: seq[:2],
    lambda seq: seq[1:],
    lambda seq: seq.append(nn.ReLU()),
    lambda seq: seq.insert(0, nn.ReLU()),
    lambda seq: seq.extend([nn.ReLU()]),
    lambda seq: seq.pop(0),
    lambda seq: seq + nn.Sequential(nn.ReLU()),
    lambda seq: seq * 2,
    _delete,
    _iadd,
]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_6_a_rewritten_sequential_is_not_re_arranged(change: Callable[[Any], Any]) -> None:
    made = convert(sequential()).eval()
    wanted, keys = made(images()), list(made.state_dict())
    with pytest.raises(padfree.PadfreeError, match="Sequential"):
        change(made[1])
    assert list(made.state_dict()) == keys
    assert_close(made(images()), wanted, rtol=0, atol=0)


def test_6_a_rewritten_sequential_still_is_one() -> None:
    made = convert(sequential()).eval()
    seq = made[1]
    assert (
        len(seq) == 3
        and list(seq) == [seq[0], seq[1], seq[2]]
        and seq[-1] is seq[2]
        and list(seq._modules) == list("012")
    )
    seq[2] = nn.GELU()
    x = made[0](images())
    y = seq[1](F.conv2d(x, seq[0].weight, seq[0].bias, 2, 0, 1, 8))
    assert_close(made(images()), F.gelu(y) + F.max_pool2d(x, 3, 2))
    made.append(nn.Flatten())
    assert made(images()).dim() == 2 and len(made[:1]) == 1


# -- 7. the return value of train() -----------------------------------------------------------------------------


def test_7_train_may_return_nothing() -> None:
    class Silent(Unit):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    class SilentNet(Net):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    made = convert(SilentNet(Silent()))
    assert made.block.bn.training
    made.train(False)
    assert_close(made(images()), expected(made.block, made.stem(images())))


# -- all or nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 5))
def test_a_failure_midway_rolls_back(count: int) -> None:
    model = Net(Basic())
    plan = padfree.plan(model, input_size=(3, SIDE, SIDE))
    twin = plan.apply(copy.deepcopy(model))
    assert type(twin.block) is not Basic
    kind: Any = type(twin.block)
    operations = [
        SetAttributes("block.conv1", (("padding", (0, 0)),)),
        AddChild("block", "padfree_x", padfree_spec()),
        Reforward("block", *kind._padfree_recipe),
        SetAttributes("block.down.0", (("stride", (1, 1)), ("padding", (0, 0)))),
    ]
    before = snapshot(model)
    bad = SetAttributes("block.conv2", (("padding", (0, 0)), ("nonsense", 1)))
    state = torch.get_rng_state()
    with pytest.raises(padfree.PadfreeError, match="nonsense"):
        perform(model, [*operations[:count], bad])
    torch.set_rng_state(state)
    assert snapshot(model) == before
    assert list(dict(model.named_modules())) == list(dict(Net(Basic()).named_modules()))


def padfree_spec() -> Any:
    from padfree.layers.spec import PoolProjectionSpec

    return PoolProjectionSpec("block.conv1", 8, 16)


class Pooled(nn.Module):
    """Its stem tail absorbs the max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.block = Basic()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


@pytest.mark.parametrize("build", [lambda: Net(Basic()), Pooled], ids=["net", "pooled"])
def test_inplace_conversion_that_fails_leaves_the_model(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    before = snapshot(model)
    calls = []

    def fails(target: nn.Module, operations: Any) -> nn.Module:
        if target is model:
            calls.append(len(operations))
            operations = [*operations, SetAttributes("block.conv2", (("nonsense", 1),))]
        return perform(target, operations)

    monkeypatch.setattr(sys.modules["padfree.convert"], "perform", fails)
    with pytest.raises(padfree.PadfreeError, match="nonsense"):
        padfree.convert(model, input_size=(3, 32, 32), inplace=True)
    assert calls and calls[0] > 3
    after = snapshot(model)
    assert {**after, "random": 0} == {**before, "random": 0}


# -- what a converted model still is -------------------------------------------------------------------------------


def test_inplace_keeps_the_model_and_its_parameters() -> None:
    model = Net(Basic())
    old = {name: p for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    made = padfree.convert(model, input_size=(3, SIDE, SIDE), inplace=True)
    assert made is model
    new = dict(made.named_parameters())
    assert all(new[name] is parameter for name, parameter in old.items())
    assert [name for name in made.state_dict() if name in old] == list(old)
    made(images()).sum().backward()
    weight = made.block.conv1.weight.detach().clone()
    optimiser.step()
    assert not torch.equal(weight, made.block.conv1.weight)


def test_hooks_fire_and_may_change_what_passes() -> None:
    fired: list[str] = []
    model = Net(Unit())
    model.block.register_forward_hook(lambda module, args, out: out * 3)
    model.block.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.block.conv.register_forward_hook(lambda *_: fired.append("conv"))
    model.block.bn.register_forward_pre_hook(lambda *_: fired.append("bn"))
    model.block.register_full_backward_hook(lambda *_: fired.append("backward"))
    made = convert(model).eval()
    assert not fired
    found = made(images())
    found.sum().backward()
    assert fired == ["conv", "bn", "backward"]
    bare = copy.deepcopy(made.block)
    bare._forward_hooks.clear()
    bare._forward_pre_hooks.clear()
    assert_close(found, 3 * expected(bare, made.stem(images()) + 1))


@pytest.mark.parametrize("build", [lambda: Net(Unit()), lambda: Net(Basic()), Pooled], ids=["unit", "basic", "pooled"])
def test_compilers_and_tracers(build: Any) -> None:
    made = padfree.convert(build(), input_size=(3, 32, 32)).eval()
    x = images(side=32)
    wanted = made(x)
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "compile": torch.compile(made, fullgraph=True, backend="eager"),
        "export": torch.export.export(made, (x,)).module(),
        "fx": torch.fx.symbolic_trace(made),
        "trace": torch.jit.trace(made, x),
        "script": torch.jit.script(made),
        "deepcopy": copy.deepcopy(made),
        "copy": copy.copy(made),
        "ema": ModelEmaV2(made).module,
        "sync": nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(made)),
        "functional_call": lambda x: functional_call(made, {**dict(made.named_parameters())}, (x,)),
        "vmap": lambda x: vmap(lambda image: made(image[None])[0])(x),
        "data parallel": nn.DataParallel(made),
    }
    for name, other in others.items():
        assert_close(other(x), wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_training_through_compile_matches_eager() -> None:
    made = tidy(Net(Basic())).train()
    twin = copy.deepcopy(made)
    torch.compile(made, fullgraph=True, backend="aot_eager")(images()).square().sum().backward()
    twin(images()).square().sum().backward()
    for (name, one), two in zip(made.named_parameters(), twin.parameters(), strict=True):
        assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_functional_gradients() -> None:
    made = tidy(Net(Unit()))
    parameters = {name: p.detach() for name, p in made.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return functional_call(made, p, (images(),)).square().mean()

    found = grad(loss)(parameters)
    made(images()).square().mean().backward()
    for name, parameter in made.named_parameters():
        assert_close(found[name], parameter.grad, msg=name)


def test_ema_follows() -> None:
    made = tidy(Net(Unit()))
    ema = ModelEmaV2(made, decay=0.5)
    old = made.block.conv.weight.detach().clone()
    made.block.conv.weight.data.zero_()
    ema.update(made)
    assert_close(ema.module.block.conv.weight, old / 2)


def test_script_of_a_block_with_a_none_child() -> None:
    class Optional(Unit):
        def __init__(self) -> None:
            super().__init__()
            self.down = None

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.bn(self.conv(x)))
            return y if self.down is None else y + self.down(x)

    made = convert(Net(Optional())).eval()
    assert_close(torch.jit.script(made)(images()), expected(made.block, made.stem(images())))


class WithFlag(Unit):
    def forward(self, x: Tensor, linear: bool = False) -> Tensor:
        y = self.bn(self.conv(x))
        return y if linear else self.act(y)


def test_script_of_a_block_with_a_flag() -> None:
    torch.jit.script(Net(WithFlag()))
    made = convert(Net(WithFlag())).eval()
    assert_close(torch.jit.trace(made, images())(images()), made(images()))
    torch.jit.script(made)


def test_moving_casting_and_resetting() -> None:
    made = tidy(Net(Basic()))
    wanted = made(images())
    assert_close(made.double()(images().double()).float(), wanted, rtol=1e-4, atol=1e-4)
    made.float().to("meta")
    assert made(images().to("meta")).shape == wanted.shape
    fired: list[nn.Module] = []
    made = tidy(Net(Basic())).apply(fired.append)
    assert made.block.padfree_shortcut.conv in fired and len(fired) == len(list(made.modules()))
