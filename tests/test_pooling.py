"""The pool functions against F.max_pool2d: values, gradients, who must see the plain operator."""

import io
import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.testing import assert_close

from padfree import native, pooling, pooling_training
from padfree.pooling import max_pool, shortcut_pool
from tests.guarded import run_alone

EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}
WINDOWS = [(3, 2, 0), (5, 2, 1), (7, 2, 2), (3, 1, 1), (3, 2, 1), (2, 2, 0), (4, 3, 1)]
NATIVE_WINDOWS = [(3, 2, 0), (5, 2, 1), (3, 1, 1), (3, 2, 1), (5, 1, 2), (5, 2, 0), (5, 2, 2), (3, 1, 0)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
built = pytest.mark.skipif(native.extension is None, reason="the C extension was not built")


def some_map(shape, layout=torch.contiguous_format, dtype=torch.float32, levels=None, seed=0):
    """A random map; `levels` small integers make ties common."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if levels is not None:
        x = torch.randint(-levels, levels + 1, shape, generator=generator).float()
    return x.to(dtype).contiguous(memory_format=layout)


def gradients(pool, x, weight):
    """Output, first and second order gradients of sum(weight * pool(x)) and of sum((that gradient)^2)."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weight = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = pool(x)
    (first,) = torch.autograd.grad((out * weight).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    return out.detach(), first.detach(), second


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("path", ["_separable", "_through_channels_last", "_pool"])
def test_every_path_gives_the_builtin_values_and_strides(path, window, layout):
    if path == "_through_channels_last" and layout is torch.channels_last:
        layout = torch.contiguous_format
    shapes = list(itertools.product((1, 3), (2, 17), (7, 8, 19), (8, 21)))
    assert len(shapes) == 24
    for shape in shapes:
        x = some_map(shape, layout)
        out, expected = getattr(pooling, path)(x, *window), F.max_pool2d(x, *window)
        assert_close(out, expected, **EXACT)
        assert out.stride() == expected.stride(), shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_dtype_on_maps_large_enough_for_chunks(dtype, layout, monkeypatch):
    monkeypatch.setattr(pooling_training, "CHUNK_BYTES", 20_000)
    for window in WINDOWS:
        x = some_map((3, 40, 33, 30), layout, dtype)
        out = max_pool(x, *window)
        assert out.dtype == dtype
        assert_close(out, F.max_pool2d(x, *window), **EXACT)


@pytest.mark.parametrize("path", ["_separable", "_pool"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinities_spread_as_in_the_builtin(layout, path):
    for seed, window in enumerate(WINDOWS):
        x = some_map((2, 5, 12, 13), layout, seed=seed)
        pick = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))
        x[pick < 0.05] = math.nan
        x[pick > 0.9] = -math.inf
        x[(pick > 0.5) & (pick < 0.52)] = math.inf
        expected = F.max_pool2d(x, *window)
        assert expected.isnan().any() and not expected.isnan().all()
        assert_close(getattr(pooling, path)(x, *window), expected, **EXACT)
        assert_close(max_pool(x.fill_(-math.inf), *window), F.max_pool2d(x, *window), **EXACT)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(3, 24), st.integers(3, 24)),
    window=st.sampled_from([(3, 2, 0), (3, 1, 1), (3, 2, 1)]),
    layout=st.sampled_from(LAYOUTS),
    train=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_small_map(shape, window, layout, train, seed):
    x = some_map(shape, layout, levels=2, seed=seed)
    expected = F.max_pool2d(x, *window)
    assert_close(max_pool(x.clone().requires_grad_(train), *window).detach(), expected, **EXACT)
    assert_close(pooling._separable(x, *window), expected, **EXACT)


@pytest.fixture(params=[pytest.param(True, id="extension", marks=built), pytest.param(False, id="torch")])
def by_extension(request, monkeypatch):
    """Both ways to train: with the C extension, and as where it was not built."""
    if not request.param:
        monkeypatch.setattr(native, "extension", None)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("levels", [None, 1, 0], ids=["no ties", "many ties", "all equal"])
@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_go_to_the_first_maximum(window, levels, layout, by_extension, monkeypatch):
    monkeypatch.setattr(pooling_training, "CHUNK_BYTES", 5_000)
    x = some_map((3, 5, 14, 17), layout, levels=levels)
    if levels == 1:
        x[x == 0] = torch.where(torch.rand(int((x == 0).sum())) < 0.5, -0.0, 0.0)
        x[0, 0, 3, 4] = math.nan
    weight = some_map(F.max_pool2d(x, *window).shape, layout, seed=1)
    ours = gradients(lambda x: max_pool(x, *window), x, weight)
    theirs = gradients(lambda x: F.max_pool2d(x, *window), x, weight)
    for mine, builtin in zip(ours, theirs, strict=True):
        assert_close(mine, builtin, **EXACT)


def first_order(pool, x, weight):
    """Output and gradient of sum(weight * pool(x)) as training computes them."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = pool(x)
    out.backward(weight)
    return out.detach(), x.grad


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 40), st.integers(5, 40), st.integers(5, 70)),
    window=st.sampled_from(NATIVE_WINDOWS),
    layout=st.sampled_from(LAYOUTS),
    levels=st.sampled_from([None, 2]),
    seed=st.integers(0, 99),
)
def test_a_training_step_on_any_map(shape, window, layout, levels, seed):
    x = some_map(shape, layout, levels=levels, seed=seed)
    pick = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    x[pick < 0.1] = math.nan
    x[pick > 0.7] = -math.inf
    weight = some_map(F.max_pool2d(x, *window).shape, LAYOUTS[seed % 2], seed=seed + 1)
    ours = first_order(lambda x: max_pool(x, *window), x, weight)
    theirs = first_order(lambda x: F.max_pool2d(x, *window), x, weight)
    for mine, builtin in zip(ours, theirs, strict=True):
        assert_close(mine, builtin, **EXACT)
        assert mine.stride() == builtin.stride()


@built
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_training_step_on_several_threads(layout, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = some_map((5, 37, 41, 33), layout, levels=3)
        assert x.numel() > native.THREADED_NUMEL
        for window in NATIVE_WINDOWS:
            weight = some_map(F.max_pool2d(x, *window).shape, layout, seed=1)
            ours = first_order(lambda x, window=window: max_pool(x, *window), x, weight)
            theirs = first_order(lambda x, window=window: F.max_pool2d(x, *window), x, weight)
            assert_close(ours, theirs, **EXACT)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("looked_on", ["batched", "flops", "sums", "replaced"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_backward_pass_that_is_looked_on_is_the_builtins(looked_on, layout, by_extension):
    from torch.utils.flop_counter import FlopCounterMode

    def step(pool):
        x = some_map((2, 4, 13, 17), levels=2).contiguous(memory_format=layout).requires_grad_()
        if looked_on == "replaced":  # hooks that keep what is saved in another form
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: t.short() if t.dtype is torch.uint8 else t, lambda t: t
            ):
                out = pool(x)
        else:
            out = pool(x)
        weight = some_map((3, *out.shape), seed=1)
        if looked_on == "batched":
            return torch.autograd.grad(out, x, weight, is_grads_batched=True)[0]
        if looked_on == "sums":  # an expanded gradient, without memory of its own
            return torch.autograd.grad(out.sum(), x)[0]
        with FlopCounterMode(display=False):
            return torch.autograd.grad(out, x, weight[0])[0]

    assert_close(step(lambda x: max_pool(x, 3, 2, 1)), step(lambda x: F.max_pool2d(x, 3, 2, 1)), **EXACT)


def test_the_first_of_equal_maxima_takes_the_whole_gradient():
    x = torch.zeros(1, 2, 3, 3).requires_grad_()
    shortcut_pool(x).sum().backward()
    expected = torch.zeros(1, 2, 3, 3)
    expected[..., 0, 0] = 1
    assert_close(x.grad, expected)


@pytest.mark.parametrize("kernel, width, with_extension, without", [(3, 126, 1, 1), (3, 127, 1, 2), (17, 40, 2, 2)])
def test_training_keeps_one_or_two_bytes_an_output(kernel, width, with_extension, without, by_extension):
    bytes_an_output = with_extension if by_extension else without
    kept = []
    x = some_map((1, 2, 20, width)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = shortcut_pool(x, kernel)
    assert [t.numel() * t.element_size() for t in kept] == [out.numel() * bytes_an_output]
    out.sum().backward()
    twin = x.detach().clone().requires_grad_()
    F.max_pool2d(twin, kernel, 2).sum().backward()
    assert_close(x.grad, twin.grad, **EXACT)


def test_gradients_under_checkpointing_and_bfloat16():
    x = some_map((2, 6, 11, 11), dtype=torch.bfloat16, levels=3).requires_grad_()
    out = torch.utils.checkpoint.checkpoint(shortcut_pool, x, use_reentrant=False)
    out.sum().backward()
    twin = x.detach().clone().requires_grad_()
    F.max_pool2d(twin, 3, 2).sum().backward()
    assert_close(x.grad, twin.grad, **EXACT)


def test_a_map_smaller_than_the_kernel_is_the_builtins_error():
    with pytest.raises(RuntimeError, match="too small"):
        shortcut_pool(torch.zeros(1, 4, 2, 9))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 9, 9),  # unbatched
        torch.randn(2, 1, 9, 9),  # both layouts at once
        torch.randn(2, 9, 9, 4).transpose(1, 2),  # neither
        torch.randn(0, 4, 9, 9),  # empty
        torch.randn(2, 8, 18, 18)[:, :, ::2, ::2],
        torch.nn.Parameter(torch.randn(2, 4, 9, 9)),
        torch.randint(0, 9, (2, 4, 9, 9)),
    ],
    ids=["unbatched", "ambiguous", "permuted", "empty", "strided", "parameter", "integers"],
)
def test_unusual_tensors_take_the_plain_operator(x):
    out, expected = shortcut_pool(x), F.max_pool2d(x, 3, 2)
    assert_close(out, expected, **EXACT)
    assert out.stride() == expected.stride()


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layout in LAYOUTS:
        meta = torch.empty(8, 64, 112, 112, device="meta").contiguous(memory_format=layout)
        assert shortcut_pool(meta).shape == (8, 64, 55, 55)
    with FakeTensorMode():
        fake = shortcut_pool(torch.empty(8, 64, 112, 112).requires_grad_())
    assert fake.shape == (8, 64, 55, 55) and type(fake).__name__ == "FakeTensor"


def test_functional_transforms_agree_with_the_builtin():
    x = some_map((3, 2, 4, 9, 9), levels=2)

    def plain(x):
        return F.max_pool2d(x, 3, 2)

    assert_close(torch.func.vmap(shortcut_pool)(x), torch.func.vmap(plain)(x), **EXACT)
    for transform in (torch.func.grad, torch.func.hessian):
        ours = transform(lambda x: shortcut_pool(x).square().sum())(x[0, :, :1])
        theirs = transform(lambda x: plain(x).square().sum())(x[0, :, :1])
        assert_close(ours, theirs, **EXACT)
    tangent = some_map(x[0].shape, seed=5)
    ours, theirs = (torch.func.jvp(pool, (x[0],), (tangent,)) for pool in (shortcut_pool, plain))
    assert_close(ours, theirs, **EXACT)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], tangent)
        assert_close(forward_ad.unpack_dual(shortcut_pool(dual)).tangent, theirs[1], **EXACT)


class Pools(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return shortcut_pool(max_pool(x, 3, 1, 1), 5, 1)


class PlainPools(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.max_pool2d(x, 3, 1, 1), 5, 2, 1)


def test_torchscript_scripts_traces_and_round_trips():
    x = some_map((2, 30, 28, 28))
    expected = PlainPools()(x)
    for compiled in (torch.jit.script(Pools()), torch.jit.trace(Pools(), x)):
        kinds = {node.kind() for node in compiled.inlined_graph.nodes()}
        assert "aten::max_pool2d" in kinds and "aten::maximum" not in kinds
        file = io.BytesIO()
        torch.jit.save(compiled, file)
        file.seek(0)
        assert_close(torch.jit.load(file)(x), expected, **EXACT)


def test_fx_sees_the_plain_operator():
    traced = torch.fx.symbolic_trace(Pools())
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert len(targets) == 2
    assert all("max_pool2d" in target.__name__ for target in targets)
    x = some_map((2, 30, 28, 28))
    assert_close(traced(x), PlainPools()(x), **EXACT)


@pytest.mark.parametrize("strict", [True, False])
def test_export_sees_the_plain_operator(strict):
    x = some_map((2, 30, 28, 28))
    batch = torch.export.Dim("batch")
    program = torch.export.export(Pools(), (x,), dynamic_shapes=({0: batch},), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.max_pool2d.default"] * 2
    assert_close(program.module()(x[:1]), PlainPools()(x[:1]), **EXACT)


@pytest.mark.parametrize("train", [False, True])
def test_compile_sees_the_plain_operator_in_one_graph(train):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    x = some_map((2, 30, 28, 28)).requires_grad_(train)
    out = torch.compile(Pools(), backend=keep, fullgraph=True)(x)
    assert_close(out, PlainPools()(x), **EXACT)
    (graph,) = graphs
    names = [getattr(node.target, "__name__", "") for node in graph.graph.nodes if node.op == "call_function"]
    assert len(names) == 2 and all("max_pool2d" in name for name in names)


def test_dispatch_modes_see_the_plain_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(Pools())(some_map((2, 30, 28, 28)))
    targets = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert not any("maximum" in target for target in targets)
    assert any("max_pool2d" in target for target in targets)


def test_inference_mode_and_no_grad_on_a_leaf_that_requires_grad():
    x = some_map((1, 64, 56, 56)).requires_grad_()
    expected = F.max_pool2d(x, 3, 2).detach()
    with torch.no_grad():
        assert_close(shortcut_pool(x), expected, **EXACT)
    with torch.inference_mode():
        assert_close(shortcut_pool(x), expected, **EXACT)


def test_the_choice_is_what_was_measured_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "extension", None)
    choices = {
        (1, 64, 112, 112): ("separable", "separable"),
        (1, 672, 4, 4): ("channels_last", "plain"),
        (1, 240, 8, 8): ("channels_last", "plain"),
        (32, 72, 32, 32): ("separable", "separable"),
    }
    for shape, expected in choices.items():
        chosen = tuple(pooling._choose(some_map(shape, layout), 3, 2, 0) for layout in LAYOUTS)
        assert chosen == expected, shape


@built
def test_the_extension_takes_the_float32_maps_that_it_knows():
    x = some_map((1, 64, 40, 40))
    assert pooling._choose(x, 3, 2, 0) == pooling._choose(x, 5, 2, 1) == pooling._choose(x, 3, 1, 1) == "native"
    assert "native" not in (
        pooling._choose(x, 7, 2, 2),
        pooling._choose(x, 3, 3, 1),
        pooling._choose(x.double(), 3, 2, 0),
    )
    negative = torch._neg_view(x)
    assert negative.is_neg() and pooling._choose(negative, 3, 2, 0) != "native"
    assert_close(max_pool(negative, 3, 2, 0), F.max_pool2d(-x, 3, 2), **EXACT)
    nothing = torch._efficientzerotensor((1, 64, 40, 40))
    assert nothing._is_zerotensor() and pooling._choose(nothing, 3, 2, 0) != "native"


@built
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", NATIVE_WINDOWS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_extension_gives_the_builtin_values_and_strides(window, layout, threads, monkeypatch):
    monkeypatch.setattr(native, "THREADED_NUMEL", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in itertools.product((1, 3), (2, 17, 64), (5, 8, 33), (5, 16, 21, 47)):
            x = some_map(shape, layout, seed=shape[3])
            x[:, 1, 3, 4] = math.nan
            out, expected = native.max_pool(x, *window), F.max_pool2d(x, *window)
            assert_close(out, expected, **EXACT)
            assert out.stride() == expected.stride()
    finally:
        torch.set_num_threads(before)


@built
@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 40), st.integers(5, 40), st.integers(5, 70)),
    window=st.sampled_from(NATIVE_WINDOWS),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_the_extension_on_any_map(shape, window, layout, seed):
    x = some_map(shape, layout, levels=2, seed=seed)
    pick = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    x[pick < 0.1] = math.nan
    x[pick > 0.8] = -math.inf
    assert_close(native.max_pool(x, *window), F.max_pool2d(x, *window), **EXACT)


@built
@pytest.mark.skipif(sys.platform != "linux", reason="guards memory by mprotect")
def test_the_extension_stays_inside_its_maps():
    """Every map ends at, and then begins after, a page that must not be touched; a step outside kills the process."""
    script = """
import itertools
import torch
import torch.nn.functional as F
from padfree import native
from tests.guarded import memories
[inside] = memories(1)
windows = [(3, 2, 0), (3, 1, 1), (3, 2, 1), (5, 2, 1), (5, 1, 2)]
count = 0
for n, c, h, w in itertools.product((1, 2), (1, 3, 16), (5, 6, 9), (5, 7, 16, 17, 33)):
    for begin in (0, inside.numel() - n * c * h * w):
        flat = inside[begin : begin + n * c * h * w].copy_(torch.randn(n * c * h * w))
        for x in (flat.view(n, c, h, w), flat.view(n, h, w, c).permute(0, 3, 1, 2)):
            for window in windows:
                expected, where = F.max_pool2d(x, *window, return_indices=True)
                pooled, taps = native.max_pool_taps(x, *window)
                assert torch.equal(native.max_pool(x, *window), expected) and torch.equal(pooled, expected)
                back = native.max_pool_backward(pooled, taps, torch.empty_like(x), *window)
                builtin = torch.ops.aten.max_pool2d_with_indices_backward
                sides = [[side, side] for side in window]
                assert torch.equal(back, builtin(pooled, x, *sides, [1, 1], False, where))
                # and into guarded memory
                assert torch.equal(native.max_pool_backward(pooled, taps, x, *window), back)
                x.copy_(torch.randn(x.shape))
                count += 1
print(count)
"""
    assert run_alone(script) == 1800


@built
@pytest.mark.parametrize("wrong", [(7, 2, 0), (3, 3, 0), (3, 2, 2), (3, 2, -1)])
def test_the_extension_refuses_other_windows(wrong):
    with pytest.raises(ValueError, match="windows of 3 or 5"):
        native.extension.max_pool(1, 1, 1, 9, 9, 1, *wrong, 1)
    with pytest.raises(ValueError, match="without memory"):
        native.extension.max_pool(0, 0, 1, 9, 9, 1, 3, 2, 0, 1)
    for function in (native.extension.max_pool_taps, native.extension.max_pool_backward):
        with pytest.raises(ValueError, match="windows of 3 or 5"):
            function(1, 1, 1, 1, 9, 9, 1, *wrong, 1)
        with pytest.raises(ValueError, match="without memory"):
            function(1, 1, 0, 1, 9, 9, 1, 3, 2, 0, 1)


@pytest.mark.parametrize("setting", ["as it is", "ceil_mode", "return_indices", "kernel 2"])
def test_an_absorbed_max_pool_is_the_same_object_made_fast(setting):
    from padfree.layers.stem import StemPool, StemTail

    pool = torch.nn.MaxPool2d(2 if setting == "kernel 2" else (3, 3), 2, 1, **{setting: True} if "_" in setting else {})
    seen = []
    pool.register_forward_hook(lambda *_: seen.append(1))
    norms = (torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4))
    tail = StemTail(4, norms, (torch.nn.ReLU(), torch.nn.ReLU()), pool, stride=2, absorbs=True).eval()
    assert tail.pool is pool
    assert (type(pool) is StemPool) == (setting == "as it is")
    if setting == "as it is":
        x = some_map((1, 4, 33, 40))
        assert_close(pool(x), F.max_pool2d(x, 3, 2, 1), **EXACT)
        tail(x)
        assert seen == [1, 1]


def test_the_module_imports_nothing_but_torch_and_the_extension():
    code = (
        "import os, sys, types, torch, torch.autograd.forward_ad, torch.utils._device;"
        "package = sys.modules['padfree'] = types.ModuleType('padfree');"
        "package.__path__ = [os.path.dirname(sys.argv[1])]; before = set(sys.modules);"
        "allowed = {'padfree.' + name for name in ('pooling', 'pooling_training', 'native', '_maxpool')};"
        "import padfree.pooling; print(sorted(set(sys.modules) - before - allowed))"
    )
    command = [sys.executable, "-c", code, pooling.__file__]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_sum_goes_into_the_pool_and_leaves_the_chain_alone():
    y, pooled = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    kept, total = y.clone(), y + pooled
    found = pooling.add_shortcut(y, pooled)
    assert torch.equal(found, total) and torch.equal(y, kept) and found.data_ptr() == pooled.data_ptr()


@pytest.mark.parametrize("other", ["dtype", "layout", "shape"])
def test_the_sum_of_unlike_maps_is_plus(other):
    y, pooled = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    y = {"dtype": y.double(), "layout": y.contiguous(memory_format=torch.channels_last), "shape": y[:1]}[other]
    kept = pooled.clone()
    found, total = pooling.add_shortcut(y, pooled), y + pooled
    assert found.dtype is total.dtype and found.stride() == total.stride() and torch.equal(found, total)
    assert torch.equal(pooled, kept)


def test_the_sum_sends_gradients_to_both():
    x = torch.randn(2, 3, 9, 9, dtype=torch.double, requires_grad=True)
    y = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: pooling.add_shortcut(y * 2, pooling.shortcut_pool(x)), (x, y))
