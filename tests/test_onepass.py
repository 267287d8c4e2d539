"""The one pass over a map: the values of the modules it stands for, and who must see the modules themselves."""

import contextlib
import copy
import gc
import inspect
import itertools
import math
import pickle
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import padfree
from padfree import chains, native, onepass
from padfree.layers import DepthwiseReduction, StemTail
from padfree.norms import children_behind
from padfree.pooling import max_pool
from tests.guarded import run_alone
from tests.strangers import Net, Unit

CLOSE = {"rtol": 1e-5, "atol": 3e-5, "equal_nan": True}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# conv: kernel, stride, padding; pool: kernel, padding
WINDOWS = [
    (3, 2, 0, 3, 0),
    (3, 2, 1, 3, 1),
    (3, 1, 1, 3, 1),
    (3, 1, 0, 5, 1),
    (5, 2, 1, 3, 0),
    (5, 2, 1, 5, 1),
    (5, 2, 2, 3, 1),
    (5, 1, 2, 5, 2),
    (5, 2, 0, 5, 0),
    (3, 2, 0, 0, 0),
    (5, 2, 2, 0, 0),
]
ACTS = {
    **{"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU},
    **{"gelu": nn.GELU, "gelu by tanh": lambda: nn.GELU("tanh"), "leaky": lambda: nn.LeakyReLU(0.1)},
}
PASSED = list(ACTS)
PASSED_OF_ANYTHING = [name for name in ACTS if name != "gelu"]  # torch's, of inf, is inf or NaN by the map's length
ACTS["mish"] = nn.Mish  # not understood
built = pytest.mark.skipif(
    not (native.extension and native.TABLE), reason="no C extension, or a torch that cannot look into tensors"
)
pytestmark = built


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def chain(channels, kernel, stride, padding, act="relu", bias=False, norm=True, seed=0):
    """A depthwise conv, its norm and its activation, with numbers that differ from channel to channel."""
    conv = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=bias)
    bn = nn.BatchNorm2d(channels) if norm else nn.Identity()
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in (*conv.parameters(), *bn.parameters(), *bn.buffers()):
            if tensor.dim():
                tensor.uniform_(-1, 1, generator=generator)
        if norm:
            bn.running_var.abs_().add_(0.1)
    return nn.Sequential(conv, bn, ACTS[act]()).eval()


def some_map(shape, layout, seed=0, spoilt=0.0):
    x = torch.randn(shape, generator=seeded(seed))
    pick = torch.rand(shape, generator=seeded(seed + 1))
    x[pick < spoilt] = math.nan
    x[pick > 1 - spoilt] = math.inf
    return x.contiguous(memory_format=layout)


@contextlib.contextmanager
def passes(told=lambda merge, leads, mixed: "MIXED" if mixed else merge.name):
    """What is told of each run of the pass: where it adds the maxima."""
    usual, seen = native.one_pass, []

    def one_pass(watch, x, modules, pool, merge, joined, leads, mixed, extra):
        found = usual(watch, x, modules, pool, merge, joined, leads, mixed, extra)
        if found is not None and found is not native.CHANGED:
            seen.append(told(merge, leads, mixed))
        return found

    native.one_pass = one_pass
    try:
        yield seen
    finally:
        native.one_pass = usual


@contextlib.contextmanager
def modules_only():
    usual = onepass._plainly_computing
    onepass._plainly_computing = lambda: False
    try:
        yield
    finally:
        onepass._plainly_computing = usual


def by_hand(x, modules, kernel, padding, merge):
    """The sum, or what is summed, of the modules and torch's own pool."""
    conv, bn, act = modules
    pooled = F.max_pool2d(x, kernel, conv.stride, padding) if kernel else None
    y = conv(x)
    if merge == "BEFORE_NORM":
        return act(bn(y + pooled))
    y = act(bn(y))
    return y + pooled if merge == "AFTER_ACTIVATION" else (y, pooled)


def one_pass(x, modules, kernel, padding, merge, concatenated=False):
    before, behind = ((modules[0],), tuple(modules[1:])) if merge == "BEFORE_NORM" else (tuple(modules), ())
    pool = (modules[0].stride[0], kernel, padding)
    watch = chains.read(before, behind).watch
    found = native.one_pass(watch, x, chains.listed(before, behind, ()), pool, native.Merge[merge], concatenated)
    assert found is not None and found is not native.CHANGED
    return found.tensor_split(2, 1) if concatenated else found if isinstance(found, tuple) else (found, None)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_pass_gives_what_the_modules_give(window, layout, threads, monkeypatch):
    monkeypatch.setattr(native, "_threads", lambda numel: threads)
    kernel, stride, padding, pool, pool_padding = window
    merges = ["AFTER_ACTIVATION", "BEFORE_NORM", "BESIDE"] if pool else ["BESIDE"]
    shapes = [(1, 3, 7, 9), (2, 16, 12, 13), (2, 17, 15, 16), (1, 40, 33, 18), (3, 24, 9, 66), (1, 2, 70, 16)]
    for number, (shape, merge) in enumerate(itertools.product(shapes, merges)):
        act = PASSED[number % len(PASSED)]
        modules = chain(shape[1], kernel, stride, padding, act, bias=number % 2 == 0, norm=number % 3 > 0, seed=number)
        x = some_map(shape, layout, number)
        if merge == "BEFORE_NORM" and not isinstance(modules[1], nn.BatchNorm2d):
            continue
        with torch.inference_mode():
            expected = by_hand(x, modules, pool, pool_padding, merge)
            concatenated = merge == "BESIDE" and bool(pool) and number % 2 == 0
            found = one_pass(x, modules, pool, pool_padding, merge, concatenated)
        assert found[0].shape == (expected if torch.is_tensor(expected) else expected[0]).shape
        for mine, theirs in zip(found, expected if merge == "BESIDE" else (expected, None), strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert_close(mine, theirs, **CLOSE)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 40), st.integers(5, 36), st.integers(5, 70)),
    window=st.sampled_from(WINDOWS),
    layout=st.sampled_from(LAYOUTS),
    merge=st.sampled_from(["BESIDE", "AFTER_ACTIVATION", "BEFORE_NORM"]),
    act=st.sampled_from(PASSED_OF_ANYTHING),
    seed=st.integers(0, 99),
)
def test_any_map_with_nan_and_infinities(shape, window, layout, merge, act, seed):
    kernel, stride, padding, pool, pool_padding = window
    name = merge if pool else "BESIDE"
    modules = chain(shape[1], kernel, stride, padding, act, bias=True, seed=seed)
    x = some_map(shape, layout, seed, spoilt=0.01)
    with torch.inference_mode():
        expected = by_hand(x, modules, pool, pool_padding, name)
        found = one_pass(x, modules, pool, pool_padding, name)
    for mine, theirs in zip(found, expected if name == "BESIDE" else (expected, None), strict=True):
        if theirs is not None:
            assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize(
    ("act", "near"),
    [(nn.SiLU(), 1e-30), (nn.GELU(), 1e-6), (nn.GELU("tanh"), 1e-6), (nn.LeakyReLU(-0.3), 0)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_of_any_number(layout, act, near):
    conv = nn.Conv2d(2, 2, 3, 2, groups=2, bias=False).requires_grad_(False)
    conv.weight.zero_()[:, :, 0, 0] = 1
    special = [math.inf, -math.inf, math.nan, 0.0, 1e-30, -1e-30, 3e38, -3e38]
    values = torch.cat((torch.linspace(-130, 130, 40_001), torch.tensor(special)))
    x = torch.zeros(1, 2, 3, 2 * len(values) + 1)
    x[:, :, 0, 0:-1:2] = values
    x = x.contiguous(memory_format=layout)
    with torch.no_grad(), passes() as seen:
        found = onepass.reduce(x, (conv, act))
        expected = act(conv(x).double())
    assert seen == ["BESIDE"]
    assert_close(found.double(), expected, rtol=5e-7, atol=near, equal_nan=True)


@pytest.mark.skipif(sys.platform != "linux", reason="guards memory by mprotect")
def test_the_pass_stays_inside_its_maps():
    """Maps end at, and begin after, a page that must not be touched; a step outside kills the process."""
    script = """
import itertools, math
import torch
from tests.guarded import memories
from tests.test_onepass import WINDOWS, by_hand, chain, one_pass
first, second = memories(2)
def place(memory, shape, last, end):
    n, c, h, w = shape
    begin = memory.numel() - n * c * h * w if end else 0
    flat = memory[begin : begin + n * c * h * w]
    return flat.view(n, h, w, c).permute(0, 3, 1, 2) if last else flat.view(n, c, h, w)
def new_empty_strided(like, shape, strides):  # where the extension gets its map from
    count = math.prod(shape)
    begin = second.numel() - count if end else 0
    return second[begin : begin + count].as_strided(shape, strides, begin + second.storage_offset())
usual, count = torch.Tensor.new_empty_strided, 0
shapes = [(1, 3, 5, 6), (2, 16, 9, 17), (1, 20, 7, 33), (2, 18, 12, 5)]
for shape, window, last in itertools.product(shapes, WINDOWS, (0, 1)):
    kernel, stride, padding, pool, pool_padding = window
    modules = chain(shape[1], kernel, stride, padding, bias=True)
    merge = "AFTER_ACTIVATION" if pool else "BESIDE"
    for end in (False, True):
        x = place(first, shape, last, end).copy_(torch.randn(shape))
        with torch.inference_mode():
            expected = by_hand(x.clone(), modules, pool, pool_padding, merge)
            torch.Tensor.new_empty_strided = new_empty_strided
            out, _ = one_pass(x, modules, pool, pool_padding, merge)
            torch.Tensor.new_empty_strided = usual
        assert second.data_ptr() <= out.data_ptr() < second.data_ptr() + 4 * second.numel()
        torch.testing.assert_close(out.clone(), expected if pool else expected[0], rtol=1e-5, atol=3e-5)
        count += 1
print(count)
"""
    assert run_alone(script) == 4 * len(WINDOWS) * 2 * 2


@pytest.mark.parametrize(
    "window", [(2, 7, 0), (2, 5, 0), (2, 3, 1), (1, 3, 0), (2, 3, -1), (0, 3, 0), (2, 1, 0), (2, 0, 0)]
)
def test_the_extension_passes_over_no_other_windows(window):
    modules, x = tuple(chain(4, 3, 2, 0)), torch.randn(1, 4, 9, 8)
    watch = chains.read(modules).watch

    def passed(x, window, merge=native.Merge.AFTER_ACTIVATION):
        return native.one_pass(watch, x, chains.listed(modules, (), ()), window, merge, False)

    with torch.no_grad():
        assert passed(x, (2, 3, 0)) is not None
        assert passed(x, window) is None
        for other in (x[:, :3], x[:, :, :2], x.double(), x[0], x[:, :, ::2], x.to("meta"), x[:0], x.to_sparse()):
            assert passed(other, (2, 3, 0)) is None
        assert passed(torch._neg_view(x), (2, 3, 0)) is None


def test_the_extension_refuses_what_was_not_read():
    modules, x = tuple(chain(4, 3, 2, 0)), torch.randn(1, 4, 9, 8)
    watch = chains.read(modules).watch
    for wrong in ((), watch[:-1], (*watch, 1)):
        with pytest.raises(ValueError, match="other fields"):
            native.one_pass(wrong, x, modules, (2, 3, 0), native.Merge.AFTER_ACTIVATION, False)
    for others in (modules[::-1], modules[:2]):
        listed = chains.listed(others, (), ())
        found = native.one_pass(watch, x, listed, (2, 3, 0), native.Merge.AFTER_ACTIVATION, False)
        assert found is native.CHANGED


def test_without_a_way_to_see_into_tensors_the_modules_are_called(monkeypatch):
    block, x = padfree.convert(Net(Unit())).eval().block, torch.randn(1, 8, 15, 16)
    with torch.no_grad(), passes() as seen:
        expected = block(x)
        monkeypatch.setattr(native, "TABLE", None)
        assert_close(block(x), expected, **CLOSE)
    assert len(seen) == 1


# -- converted networks ---------------------------------------------------------------------------------------------

NETWORKS = {
    "timm/mobilenetv3_small_100": 64,
    "timm/ghostnet_100": 128,
    "timm/efficientnet_lite0": 64,
    "torchvision/shufflenet_v2_x0_5": 64,
    "torchvision/mobilenet_v2": 64,
    "strangers/Net": 32,
}


def network(name):
    import timm
    import torchvision

    kind, model = name.split("/")
    if kind == "strangers":
        return Net(Unit())
    return timm.create_model(model) if kind == "timm" else torchvision.models.get_model(model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_what_their_modules_give(name, layout):
    torch.manual_seed(0)
    model = padfree.convert(network(name), input_size=(3, NETWORKS[name], NETWORKS[name])).eval()
    model = model.to(memory_format=layout)
    x = torch.randn(2, 3, NETWORKS[name], NETWORKS[name]).contiguous(memory_format=layout)
    with torch.no_grad(), passes() as seen:
        found = model(x)
    with torch.no_grad(), modules_only(), passes() as unseen:
        expected = model(x)
    assert seen and not unseen
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("merge, found", [("conv", "BEFORE_NORM"), ("norm", "AFTER_ACTIVATION")])
def test_the_sum_is_taken_where_the_options_say(merge, found):
    model = padfree.convert(Net(Unit()), options=padfree.Options(merge=merge)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), passes() as seen:
        quick = model(x)
    assert found in seen
    with torch.no_grad(), modules_only():
        assert_close(quick, model(x), **CLOSE)


def test_a_generated_forward_has_a_body_for_torchscript():
    model = padfree.convert(Net(Unit())).eval()
    source = inspect.getsource(model.block.forward)
    assert "if torch.jit.is_scripting() or not padfree_onepass_quick():" in source and "downsample" in source
    x = torch.randn(2, 3, 16, 16)
    scripted = torch.jit.script(model)
    assert "downsample" not in str(scripted.block.code)
    with torch.no_grad():
        assert_close(scripted(x), model(x), **CLOSE)


@pytest.mark.parametrize("act", ["mish", "relu"])
def test_what_is_not_understood_is_called(act):
    modules = tuple(chain(8, 3, 2, 0, act))
    x = torch.randn(2, 8, 15, 15)
    called = []

    class Mine(nn.Module):
        def forward(self, x):
            called.append(x.shape)
            return x * 2

    with torch.no_grad(), passes() as seen:
        found = onepass.downsample(x, 3, 0, (*modules, Mine()), (Mine(),))
    with torch.no_grad():
        y = modules[2](modules[1](modules[0](x)))
        assert_close(found, (y * 2 + F.max_pool2d(x, 3, 2)) * 2, **CLOSE)
    assert seen == ["BESIDE"] and called == [(2, 8, 7, 7)] * 2


FUNCTIONS = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "relu of a sum": lambda x: F.relu(x + 1),
}


class FunctionalUnit(Unit):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return FUNCTIONS[self.name](self.bn(self.conv(x)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations_that_are_functions(function, monkeypatch):
    model = padfree.convert(Net(FunctionalUnit(function))).eval()
    passed = not {"mish", "gelu by tanh", "leaky", "relu of a sum"} & {function}
    with torch.no_grad():
        model.block.bn.running_mean.uniform_(-1, 1)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), passes() as seen:
        quick = model(x)
    assert seen.count("AFTER_ACTIVATION") == passed
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad(), modules_only():
        assert_close(quick, model(x), **CLOSE)
    with torch.no_grad():
        assert_close(again(x), quick, **CLOSE)
        assert_close(torch.jit.script(model)(x), quick, **CLOSE)
    if passed:
        name = function.removeprefix("torch.").split()[0]
        monkeypatch.setattr(F, name, lambda x, inplace=False: x * 0 + 7)
        with torch.no_grad(), passes() as seen:
            model(x)
        assert "AFTER_ACTIVATION" not in seen


@pytest.mark.parametrize("preact", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_stem_tail(stride, residual, preact):
    torch.manual_seed(0)
    norms, acts = (nn.BatchNorm2d(8), nn.BatchNorm2d(16 if preact else 8)), (nn.ReLU(), nn.ReLU())
    tail = StemTail(8, norms, acts, stride=stride, residual=residual, preact=preact).eval()
    x = torch.randn(2, 8, 12, 13)
    with torch.no_grad(), passes() as seen:
        found = tail(x)
    assert seen == ([] if preact else ["MIXED"])
    with torch.no_grad(), modules_only():
        assert_close(found, tail(x), **CLOSE)


def test_a_reduction():
    """By itself it is a Sequential; the forward that calls it has its pass."""
    reduction = DepthwiseReduction(8, nn.BatchNorm2d(8)).eval()
    x = torch.randn(2, 8, 12, 13)
    with torch.no_grad(), passes() as seen:
        expected = reduction(x)
        assert_close(expected, reduction.norm(reduction.conv(x)))
        assert seen == []
        assert_close(onepass.reduce(x, (reduction,)), expected, **CLOSE)
    assert seen == ["BESIDE"]


# -- who sees the modules themselves --------------------------------------------------------------------------------


def hook(module):
    module.register_forward_hook(lambda module, inputs, output: output + 1)


def replaced_forward(module):
    module.forward = lambda x, usual=module.forward: usual(x) + 1


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


class Equal(nn.BatchNorm2d):
    """To other norms, as far as `==` can tell."""

    __hash__ = nn.Module.__hash__

    def __eq__(self, other):
        return isinstance(other, Equal)

    @staticmethod
    def like(norm):
        made = Equal(norm.num_features).eval()
        made.load_state_dict(norm.state_dict())
        return made


CHANGES = {
    "a hook on the conv": lambda m: hook(m[0]),
    "a hook on the norm": lambda m: hook(m[1]),
    "a hook on the activation": lambda m: hook(m[2]),
    "a pre-hook": lambda m: m[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "a forward of its own": lambda m: replaced_forward(m[1]),
    "a norm in training": lambda m: m[1].train(),
    "no running statistics": lambda m: [setattr(m[1], name, None) for name in ("running_mean", "running_var")],
    "another eps": lambda m: setattr(m[1], "eps", 0.5),
    "another limit": lambda m: setattr(m, "2", nn.Hardtanh(-0.1, 0.1)),
    "a parametrized weight": lambda m: parametrize.register_parametrization(m[0], "weight", Doubling()),
    "a weight norm": lambda m: parametrizations.weight_norm(m[0]).parametrizations.weight.original0.data.mul_(2),
    "a pruned weight": lambda m: prune.random_unstructured(m[0], "weight", 0.5),
    "another weight": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(8, 1, 3, 3))),
    "weights changed in place": lambda m: m[0].weight.data.mul_(2),
    "weights of another layout": lambda m: setattr(m[0].weight, "data", m[0].weight.data.transpose(2, 3)),
    "a bias": lambda m: setattr(m[0], "bias", nn.Parameter(torch.randn(8))),
    "another padding": lambda m: setattr(m[0], "padding", (1, 1)),
    "a convolution of its own": lambda m: setattr(
        m[0], "_conv_forward", lambda x, weight, bias: F.conv2d(x, 2 * weight, bias, 2, groups=8)
    ),
    "a call of its own": lambda m: setattr(m[1], "_call_impl", lambda x: x + 1),
    "an attribute before the weight": lambda m: m[1].__dict__.update(weight=torch.full((8,), 3.0)),
    "an equal norm": lambda m: [
        setattr(m, "1", Equal.like(m[1])),
        onepass.downsample(torch.randn(1, 8, 9, 9), 3, 0, tuple(m)),
        setattr(m, "1", Equal(8).eval()),
    ],
    "another norm": lambda m: setattr(m, "1", nn.InstanceNorm2d(8)),
    "another activation": lambda m: setattr(m, "2", nn.Mish()),
}


@pytest.mark.parametrize("again", [False, True], ids=["before", "after a first call"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_module_is_seen(change, again):
    torch.manual_seed(0)
    modules = chain(8, 3, 2, 0)
    x = torch.randn(2, 8, 15, 16)
    with torch.no_grad():
        before = onepass.downsample(x, 3, 0, tuple(modules)) if again else None
    with torch.no_grad():
        CHANGES[change](modules)
    torch.manual_seed(0)
    with torch.no_grad():
        try:
            y = modules[2](modules[1](modules[0](x)))
            expected = y + F.max_pool2d(x, 3, 2)
        except RuntimeError as error:  # a padding of one more: the sum does not fit
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                onepass.downsample(x, 3, 0, tuple(modules))
            return
        found = onepass.downsample(x, 3, 0, tuple(modules))
    assert_close(found, expected, **CLOSE)
    assert before is None or not torch.allclose(found, before)


def test_hooks_run_and_see_what_they_would():
    modules = chain(8, 3, 2, 0)
    x, seen = torch.randn(2, 8, 15, 16), []
    handle = modules[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad(), passes() as merges:
        onepass.downsample(x, 3, 0, tuple(modules))
    assert merges == ["BESIDE"]
    with torch.no_grad():
        assert_close(seen[0], modules[0](x), **CLOSE)
    handle.remove()
    with torch.no_grad(), passes() as merges:
        onepass.downsample(x, 3, 0, tuple(modules))
    assert merges == ["AFTER_ACTIVATION"] and len(seen) == 1


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "owner, name",
    [
        (nn.BatchNorm2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.ReLU, "forward"),
        (nn.Module, "_call_impl"),
        (F, "conv2d"),
        (F, "batch_norm"),
        (F, "dropout"),
        (nn.modules.batchnorm._BatchNorm, "forward"),
    ],
)
def test_a_patched_function_is_seen(owner, name, again, monkeypatch):
    (conv, *_), x = chain(8, 3, 2, 0), torch.randn(1, 8, 15, 16)
    modules = nn.Sequential(conv, NormAct(8), nn.Dropout()).eval()
    with torch.no_grad(), passes() as seen:
        before = onepass.downsample(x, 3, 0, tuple(modules))
        assert seen == ["AFTER_ACTIVATION"]
        if not again:
            chains._KNOWN.clear()
        usual = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, **keywords: usual(*arguments, **keywords) * 0 + 5)
        if name == "_call_impl":
            monkeypatch.setattr(owner, "__call__", nn.Module._call_impl)
        found = onepass.downsample(x, 3, 0, tuple(modules))
        assert not torch.allclose(found, before)
        assert_close(found, modules(x) + F.max_pool2d(x, 3, 2), **CLOSE)


class Weighing(nn.Conv2d):
    weight = property(lambda self: 2 * self._parameters["weight"], lambda self, value: None)


class Listing(nn.Sequential):
    def __iter__(self):
        return iter([*super().__iter__(), nn.Hardswish()])


class Refusing(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        raise ValueError("not today")


def test_classes_of_ones_own_are_called():
    torch.manual_seed(0)
    x, modules = torch.randn(2, 8, 15, 16), chain(8, 3, 2, 0)
    conv = copy.deepcopy(modules[0])
    conv.__class__ = Weighing
    listing = Listing(*modules).eval()
    with torch.no_grad():
        pooled = F.max_pool2d(x, 3, 2)
        assert_close(onepass.downsample(x, 3, 0, (conv,)), conv(x) + pooled, **CLOSE)
        assert_close(onepass.downsample(x, 3, 0, (listing,)), listing(x) + pooled, **CLOSE)
        with pytest.raises(ValueError, match="not today"):
            onepass.downsample(x, 3, 0, (modules[0], Refusing(8).eval()))


def test_a_norm_that_is_not_the_chains_is_called_once():
    torch.manual_seed(0)
    x, (conv, _, act) = torch.randn(2, 8, 15, 16), chain(8, 3, 2, 0)
    for _ in range(2):
        norms = [NormAct(8).eval(), NormAct(8).eval()]
        for norm in norms:
            norm.act = nn.Hardswish()
            norm.running_mean.normal_()
        orders = [
            (conv, act, norms[0]),
            (conv, nn.Mish(), norms[0]),
            (conv, *norms),
            (conv, nn.Sequential(*norms), act),
        ]
        with torch.no_grad():
            pooled = F.max_pool2d(x, 3, 2)
            for modules in orders:
                assert_close(onepass.downsample(x, 3, 0, modules), nn.Sequential(*modules)(x) + pooled, **CLOSE)
            behind = (act, norms[0])
            found = onepass.downsample(x, 3, 0, (conv,), behind)
            assert_close(found, nn.Sequential(*behind)(conv(x) + pooled), **CLOSE)


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [8, 40])
def test_weights_that_are_not_finite(side, layout, wrong):
    modules, x = chain(16, 5, 2, 1), torch.randn(2, 16, side, side).contiguous(memory_format=layout)
    with torch.no_grad():
        modules[0].weight[0, 0, 0, 0] = wrong
        found = onepass.downsample(x, 3, 0, tuple(modules))
        assert_close(found, modules(x) + F.max_pool2d(x, 3, 2), **CLOSE)


@pytest.mark.parametrize(
    "name, shape", [("0.weight", (1, 8, 3, 3)), ("0.weight", (8, 3, 3)), ("0.bias", (8, 1)), ("1.running_mean", (8, 1))]
)
def test_tensors_of_another_shape_are_torchs_to_judge(name, shape):
    modules, x = chain(8, 3, 2, 0, bias=True), torch.randn(1, 8, 15, 16)
    with torch.no_grad():
        onepass.downsample(x, 3, 0, tuple(modules))
        tensor = dict([*modules.named_parameters(), *modules.named_buffers()])[name]
        tensor.data = tensor.data.reshape(shape)
        with pytest.raises(RuntimeError):
            onepass.downsample(x, 3, 0, tuple(modules))


def test_the_profiler_names_the_pass():
    block, x = padfree.convert(Net(Unit())).eval().block, torch.randn(1, 8, 15, 16)
    with torch.no_grad(), torch.profiler.profile() as profile:
        block(x)
    assert "padfree::depthwise" in {event.key for event in profile.key_averages()}


def test_global_hooks_are_called():
    block, x, seen = padfree.convert(Net(Unit())).eval().block, torch.randn(1, 8, 15, 16), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    try:
        with torch.no_grad(), passes() as merges:
            block(x)
    finally:
        handle.remove()
    assert not merges and seen == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, type(block)]


def looked_on(kind, block, x):
    if kind == "gradients":
        return block(x)
    with torch.no_grad():
        if kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return block(x)
        if kind == "float64":
            return block.double()(x.double())
        if kind == "vmap":
            return torch.func.vmap(block)(x[None])[0]
        if kind == "trace":
            return torch.jit.trace(block, x, check_trace=False)(x)
        if kind == "flops":
            with FlopCounterMode(display=False) as counter:
                out = block(x)
            assert counter.get_total_flops() > 0
            return out
        if kind == "one channel":
            return onepass.downsample(x[:, :1], 3, 0, tuple(chain(1, 3, 2, 0)))
        if kind == "a view":
            return block(x.transpose(2, 3))
        assert kind == "small"
        with pytest.raises(RuntimeError):
            block(x[:, :, :2])
        return None


@pytest.mark.parametrize(
    "kind", ["gradients", "autocast", "float64", "vmap", "trace", "flops", "one channel", "a view", "small"]
)
def test_who_looks_on_sees_the_modules(kind):
    block, x = padfree.convert(Net(Unit())).eval().block, torch.randn(2, 8, 15, 16)
    with torch.no_grad(), passes() as merges:
        block(x)
    assert merges
    with passes() as merges:
        out = looked_on(kind, block, x)
    assert not merges
    assert out is None or out.shape[2:] == (7, 7)
    if kind == "gradients":
        out.sum().backward()
        assert block.conv.weight.grad is not None


def test_symbolic_traces_and_graphs_see_the_modules():
    model = padfree.convert(Net(Unit())).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        traced = fx.symbolic_trace(model)
        assert "block.conv" in {node.target for node in traced.graph.nodes if node.op == "call_module"}
        assert_close(traced(x), expected, **CLOSE)
        exported = torch.export.export(model, (x,))
        targets = {str(node.target) for node in exported.graph.nodes}
        assert "aten.max_pool2d.default" in targets and "aten.conv2d.default" in targets
        assert_close(exported.module()(x), expected, **CLOSE)


def test_copies_and_pickles_have_chains_of_their_own():
    model = padfree.convert(Net(Unit())).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_close(other(x), expected, rtol=0, atol=0)
            other.block.bn.running_mean.add_(1)
            assert not torch.allclose(other(x), expected)
        assert_close(model(x), expected, rtol=0, atol=0)


class OwnEps(nn.BatchNorm2d):
    eps = property(lambda self: self.__dict__["_eps"], lambda self, value: self.__dict__.update(_eps=value))


class ClassEps(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        del self.__dict__["eps"]

    eps = 1e-5


class OwnTraining(nn.BatchNorm2d):
    training = property(
        lambda self: self.__dict__["_training"], lambda self, value: self.__dict__.update(_training=value)
    )


def set_eps(norm, value):
    owner = type(norm) if "eps" in vars(type(norm)) and not isinstance(vars(type(norm))["eps"], property) else norm
    owner.eps = value


@pytest.mark.parametrize("kind", [OwnEps, ClassEps])
def test_settings_that_are_not_the_instances_own(kind, monkeypatch):
    (conv, _, act), x = chain(8, 3, 2, 0), torch.randn(1, 8, 15, 16)
    norm = kind(8).eval()
    norm.running_var.fill_(0.01)
    monkeypatch.setattr(ClassEps, "eps", 1e-5)
    with torch.no_grad():
        for eps in (1e-5, 0.5):
            set_eps(norm, eps)
            found = onepass.downsample(x, 3, 0, (conv, norm, act))
            assert_close(found, act(norm(conv(x))) + F.max_pool2d(x, 3, 2), **CLOSE)


def test_a_training_mode_that_is_a_property():
    (conv, _, act), x = chain(8, 3, 2, 0), torch.randn(4, 8, 15, 16)
    norm = OwnTraining(8).eval()
    with torch.no_grad():
        onepass.downsample(x, 3, 0, (conv, norm, act))
        norm.train()
        found = onepass.downsample(x, 3, 0, (conv, norm, act))
        assert_close(found, act(norm(conv(x))) + F.max_pool2d(x, 3, 2), **CLOSE)


def test_the_same_modules_in_other_places():
    (conv, norm, act), x = chain(8, 3, 2, 0), torch.randn(1, 8, 15, 16)
    mish = nn.Mish()
    with torch.no_grad():
        pooled = F.max_pool2d(x, 3, 2)
        for _ in range(2):
            found = onepass.downsample(x, 3, 0, (conv,), (norm, act, mish))
            assert_close(found, mish(act(norm(conv(x) + pooled))), **CLOSE)
            assert_close(onepass.downsample(x, 3, 0, (conv, norm, act)), act(norm(conv(x))) + pooled, **CLOSE)
            assert_close(onepass.downsample(x, 3, 0, (conv, norm), (act,)), act(norm(conv(x)) + pooled), **CLOSE)
            assert_close(onepass.reduce(x, (conv, norm, act, mish)), mish(act(norm(conv(x)))), **CLOSE)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_scripted_modules_are_called(number):
    modules, x = list(chain(8, 3, 2, 0)), torch.randn(1, 8, 15, 16)
    with torch.no_grad():
        expected = modules[2](modules[1](modules[0](x))) + F.max_pool2d(x, 3, 2)
        modules[number] = torch.jit.script(modules[number])
        assert_close(onepass.downsample(x, 3, 0, tuple(modules)), expected, **CLOSE)
        assert_close(onepass.downsample(x, 3, 0, tuple(modules)), expected, **CLOSE)


def test_modules_that_lack_what_is_looked_at():
    class Meta(type):
        def __getattribute__(cls, name):
            if name in ("forward", "_check_input_dim"):
                raise KeyError(name)
            return super().__getattribute__(name)

    class Hidden(nn.Identity, metaclass=Meta):
        pass

    x = torch.randn(1, 8, 15, 16)
    for spoil in (
        lambda modules: modules[0].__dict__.pop("in_channels"),
        lambda modules: modules[1].__dict__.pop("num_features"),
        lambda modules: setattr(modules[0], "in_channels", 8.0),
        lambda modules: modules.__setitem__(2, Hidden().eval()),
    ):
        for again in (False, True):
            modules = list(chain(8, 3, 2, 0))
            with torch.no_grad():
                if again:
                    onepass.downsample(x, 3, 0, tuple(modules))
                spoil(modules)
                expected = modules[2](modules[1](modules[0](x))) + F.max_pool2d(x, 3, 2)
                assert_close(onepass.downsample(x, 3, 0, tuple(modules)), expected, **CLOSE)


def test_a_clamp_that_torch_refuses():
    (conv, norm, _), x = chain(8, 3, 2, 0), torch.randn(1, 8, 15, 16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="overflow"):
        onepass.downsample(x, 3, 0, (conv, norm, nn.Hardtanh(-1e39, 1e39)))


def test_functional_tensors_are_torchs():
    modules, x = tuple(chain(8, 3, 2, 0)), torch.randn(1, 8, 15, 16)
    with torch.no_grad():
        found = onepass.downsample(torch._to_functional_tensor(x), 3, 0, modules)
        assert_close(torch._from_functional_tensor(found), onepass.downsample(x, 3, 0, modules), **CLOSE)


def test_a_module_that_goes_while_its_tensors_are_looked_at(monkeypatch):
    block, x = nn.Sequential(*chain(8, 3, 2, 0)).eval(), torch.randn(1, 8, 15, 16)
    with torch.no_grad():
        expected = onepass.downsample(x, 3, 0, (block,))
    usual, gone = torch.Tensor.is_neg, []

    def is_neg(tensor):
        if not gone:
            gone.append(weakref.ref(block[1]))
            block[0] = block[1] = nn.Identity()
            gc.collect()
            assert gone[0]() is not None  # the pass holds it as long as it reads it
        return usual(tensor)

    monkeypatch.setattr(torch.Tensor, "is_neg", is_neg)
    with torch.no_grad():
        assert_close(onepass.downsample(x, 3, 0, (block,)), expected, **CLOSE)
    assert gone[0]() is None


OWN_FUNCTIONS = {
    "bound": lambda m: setattr(m[0], "forward", m[0].forward),
    "closing over all": lambda m: setattr(m[1], "forward", lambda x, usual=m[1].forward, root=m: usual(x)),
    "a convolution": lambda m: setattr(m[0], "_conv_forward", m[0]._conv_forward),
    "compiled": lambda m: m[1].compile(backend="eager"),
    "a hook": lambda m: m[1].register_forward_hook(lambda *_, root=m: None),
}


@pytest.mark.parametrize("kind", OWN_FUNCTIONS)
def test_functions_of_an_instance_keep_nothing_alive(kind):
    gc.collect()
    before = len(chains._KNOWN)
    modules, x = nn.Sequential(*chain(8, 3, 2, 0)), torch.randn(1, 8, 9, 10)
    OWN_FUNCTIONS[kind](modules)
    with torch.no_grad():
        expected = modules[2](modules[1](modules[0](x))) + F.max_pool2d(x, 3, 2)
        assert_close(onepass.downsample(x, 3, 0, tuple(modules)), expected, **CLOSE)
    conv = weakref.ref(modules[0])
    del modules
    torch.compiler.reset()
    gc.collect()
    assert conv() is None and len(chains._KNOWN) == before


def test_what_was_read_goes_with_its_modules():
    gc.collect()
    before = len(chains._KNOWN)
    modules, x = [chain(8, 3, 2, 0), nn.Sequential(chain(8, 3, 2, 0))], torch.randn(1, 8, 9, 10)
    with torch.no_grad():
        for each in modules:
            onepass.downsample(x, 3, 0, tuple(each))
    assert len(chains._KNOWN) == before + 2
    modules[0][0].register_forward_hook(modules[1].forward)  # hooks and attributes that lead back to it
    modules[1][0][1].__dict__["root"] = modules[1]
    modules[0][1].register_forward_hook(lambda *_, root=modules: root)
    with torch.no_grad():
        onepass.downsample(x, 3, 0, tuple(modules[1][0]))
    del modules, each
    gc.collect()
    assert len(chains._KNOWN) == before


def test_threads_share_what_was_read():
    modules, x, wrong = chain(8, 3, 2, 0), torch.randn(1, 8, 40, 41), []
    with torch.no_grad():
        expected = onepass.downsample(x, 3, 0, tuple(modules))

    def work():
        for number in range(50):
            if number % 10 == 0:
                chains._KNOWN.clear()
            with torch.no_grad():
                if not torch.equal(onepass.downsample(x, 3, 0, tuple(modules)), expected):
                    wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- norms with a forward of their own ------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """As libraries write them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Counting(NormAct):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Keeping(NormAct):
    def forward(self, x):
        self.last = x
        return super().forward(x)


class Switched(NormAct):
    double = False

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.double else y


DOUBLE = {"it": False}


class Global(NormAct):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if DOUBLE["it"] else y


class Drawing(NormAct):
    def forward(self, x):
        torch.randn(3)
        return super().forward(x)


class Functional(NormAct):
    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(y)


class Twice(NormAct):
    def forward(self, x):
        return self.act(F.batch_norm(super().forward(x), self.running_mean, self.running_var))


class Scaled(NormAct):
    def forward(self, x):
        return super().forward(x * 2)


class Shaped(NormAct):
    def forward(self, x):
        return super().forward(x) if x.shape[0] < 3 else x


class Skipping(NormAct):
    def forward(self, x):
        normed = nn.BatchNorm2d.forward(self, x)
        self.act(normed)
        return normed


class Shifted(NormAct):
    def forward(self, x):
        return self.act(F.batch_norm(x, self.running_mean + 1, self.running_var, self.weight, self.bias, eps=self.eps))


@pytest.mark.parametrize(
    "kind, behind",
    [
        (NormAct, ("drop", "act")),
        (Functional, ("act",)),
        (Counting, None),
        (Keeping, None),
        (Switched, None),
        (Global, None),
        (Drawing, None),
        (Twice, None),
        (Scaled, None),
        (Shaped, None),
        (Skipping, None),
        (Shifted, None),
    ],
)
def test_norms_of_ones_own(kind, behind):
    torch.manual_seed(0)
    norm = kind(8).eval()
    norm.running_mean.normal_()
    state, drawn = copy.deepcopy(norm.state_dict()), torch.get_rng_state()
    assert children_behind(norm) == behind
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(state[name], tensor) for name, tensor in norm.state_dict().items())
    conv, x = chain(8, 3, 2, 0)[0], torch.randn(4, 8, 15, 16)
    with torch.no_grad(), passes() as seen:
        found = onepass.downsample(x, 3, 0, (conv, norm))
    assert seen == (["BESIDE"] if behind is None else ["AFTER_ACTIVATION"])
    with torch.no_grad():
        assert_close(found, norm(conv(x)) + max_pool(x, 3, 2, 0), **CLOSE)
    norm.act = nn.Hardswish()
    with torch.no_grad():
        assert_close(onepass.downsample(x, 3, 0, (conv, norm)), norm(conv(x)) + max_pool(x, 3, 2, 0), **CLOSE)
    norm.train()
    assert children_behind(norm) is None


def test_timm_norms_are_understood():
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(8, act_layer=nn.Hardswish).eval()
    assert children_behind(norm) == ("drop", "act")
