"""The max-pool operators against F.max_pool2d: values, gradients, and who sees which operator."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.testing import assert_close

from padfree import kernels
from padfree.kernels import extension, pool
from padfree.kernels.pool import max_pool, shortcut_pool

EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}
KNOWN = [(3, 2, 0), (5, 2, 1), (3, 1, 1), (3, 2, 1), (5, 1, 2), (5, 2, 0), (5, 2, 2), (3, 1, 0)]
OTHERS = [(7, 2, 2), (2, 2, 0), (4, 3, 1)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
OPERATORS = torch.ops.padfree
built = pytest.mark.skipif(not kernels.available(), reason="the C extension was not built")


def some_map(shape, layout=torch.contiguous_format, dtype=torch.float32, levels=None, seed=0, spoilt=0.0):
    """A random map; `levels` small integers make ties common, `spoilt` of it are NaN and as many infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if levels is not None:
        x = torch.randint(-levels, levels + 1, shape, generator=generator).float()
    pick = torch.rand(shape, generator=generator)
    x[pick < spoilt] = math.nan
    x[pick > 1 - 2 * spoilt] = -math.inf
    x[pick > 1 - spoilt] = math.inf
    return x.to(dtype).contiguous(memory_format=layout)


def step(function, x, weight):
    """Output, gradient of sum(weight * output), and the gradient of that one's squares by the weight."""
    x, weight = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight))
    out = function(x)
    (first,) = torch.autograd.grad((out * weight).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    return out.detach(), first.detach(), second


@pytest.fixture(params=[pytest.param(True, id="extension", marks=built), pytest.param(False, id="torch")])
def by_extension(request, monkeypatch):
    """With the C extension, and as where it was not built."""
    if not request.param:
        monkeypatch.setattr(extension, "native", None)
    return request.param


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(5, 40), st.integers(5, 70)),
    window=st.sampled_from(KNOWN + OTHERS),
    layout=st.sampled_from(LAYOUTS),
    levels=st.sampled_from([None, 2]),
    seed=st.integers(0, 99),
)
def test_any_map(shape, window, layout, levels, seed):
    if min(shape[2:]) < window[0]:
        return
    x = some_map(shape, layout, levels=levels, seed=seed, spoilt=0.05 if seed % 2 else 0.0)
    expected = F.max_pool2d(x, *window)
    for function in (max_pool, OPERATORS.max_pool, OPERATORS.max_pool_values):
        found = function(x, *window)
        assert_close(found, expected, **EXACT)
        assert found.stride() == expected.stride() or 1 in found.shape or 0 in found.shape
    if shape[0] == 0:
        return
    weight = some_map(expected.shape, LAYOUTS[seed % 2], seed=seed + 1)
    ours, theirs = (step(lambda x, f=f: f(x, *window), x, weight) for f in (OPERATORS.max_pool, F.max_pool2d))
    for mine, builtin in zip(ours, theirs, strict=True):
        assert_close(mine, builtin, **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2])
def test_threads(layout, count, monkeypatch):
    monkeypatch.setattr(pool, "threads", lambda x: count)
    for window in KNOWN:
        x = some_map((3, 19, 21, 17), layout, levels=3, spoilt=0.01)
        weight = some_map(F.max_pool2d(x, *window).shape, layout, seed=1)
        assert_close(max_pool(x, *window), F.max_pool2d(x, *window), **EXACT)
        ours, theirs = (step(lambda x, f=f: f(x, *window), x, weight) for f in (max_pool, F.max_pool2d))  # noqa: B023
        assert_close(ours, theirs, **EXACT)


def test_the_first_of_equal_maxima_takes_the_whole_gradient(by_extension):
    x = torch.zeros(1, 2, 3, 3).requires_grad_()
    shortcut_pool(x).sum().backward()
    expected = torch.zeros(1, 2, 3, 3)
    expected[..., 0, 0] = 1
    assert_close(x.grad, expected)


@built
def test_training_keeps_one_byte_an_output():
    kept = []
    x = some_map((1, 2, 20, 126)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = shortcut_pool(x)
    assert [t.numel() * t.element_size() for t in kept] == [out.numel()]


@pytest.mark.parametrize("kind", ["replaced", "batched", "expanded", "checkpoint"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backward_pass_out_of_the_ordinary(kind, layout, by_extension):
    def found(function):
        x = some_map((2, 4, 13, 17), layout, levels=2).requires_grad_()
        if kind == "replaced":  # hooks that keep what is saved in another form
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: t.short() if t.dtype is torch.uint8 else t, lambda t: t
            ):
                out = function(x, 3, 2, 1)
        elif kind == "checkpoint":
            out = torch.utils.checkpoint.checkpoint(function, x, 3, 2, 1, use_reentrant=False)
        else:
            out = function(x, 3, 2, 1)
        if kind == "expanded":  # a gradient without memory of its own
            return torch.autograd.grad(out.sum(), x)[0]
        weight = some_map((3, *out.shape), seed=1)
        batched = kind == "batched"
        return torch.autograd.grad(out, x, weight if batched else weight[0], is_grads_batched=batched)[0]

    assert_close(found(max_pool), found(F.max_pool2d), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("window", KNOWN[:2] + OTHERS)
def test_other_dtypes(dtype, window):
    x = some_map((2, 5, 12, 13), dtype=dtype)
    weight = some_map(F.max_pool2d(x, *window).shape, dtype=dtype, seed=1)
    for function in (max_pool, OPERATORS.max_pool):
        ours, theirs = (step(lambda x, f=f: f(x, *window), x, weight) for f in (function, F.max_pool2d))
        assert ours[0].dtype is dtype
        assert_close(ours, theirs, **EXACT)


UNUSUAL = {
    "unbatched": torch.randn(4, 9, 9),
    "both layouts at once": torch.randn(2, 1, 9, 9),
    "permuted": torch.randn(2, 9, 9, 4).transpose(1, 2),
    "empty": torch.randn(0, 4, 9, 9),
    "strided": torch.randn(2, 8, 18, 18)[:, :, ::2, ::2],
    "parameter": torch.nn.Parameter(torch.randn(2, 4, 9, 9)),
    "integers": torch.randint(0, 9, (2, 4, 9, 9)),
    "negative": torch._neg_view(torch.randn(2, 4, 9, 9)),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_maps(kind):
    x, expected = UNUSUAL[kind], F.max_pool2d(UNUSUAL[kind], 3, 2)
    for out in (shortcut_pool(x), OPERATORS.max_pool(x, 3, 2, 0)):
        assert_close(out, expected, **EXACT)
        assert out.stride() == expected.stride()


def test_errors_are_the_builtins():
    for function in (max_pool, OPERATORS.max_pool, OPERATORS.max_pool_values):
        with pytest.raises(RuntimeError, match="too small"):
            function(torch.zeros(1, 4, 2, 9), 3, 2, 0)
        with pytest.raises(RuntimeError, match="half"):
            function(torch.zeros(1, 4, 9, 9), 3, 2, 2)


@pytest.mark.parametrize("name", ["max_pool_values", "max_pool_taps"])
def test_the_parts_refuse_gradients(name):
    x = some_map((1, 4, 9, 9)).requires_grad_()
    with pytest.raises(RuntimeError, match=r"call padfree.kernels.max_pool"):
        getattr(OPERATORS, name)(x, 3, 2, 0)
    with torch.no_grad():
        getattr(OPERATORS, name)(x, 3, 2, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(3, 2, 1), (5, 1, 2), (4, 3, 1)])
def test_opcheck(window, layout):
    x = some_map((2, 4, 13, 11), layout)
    pooled, taps = OPERATORS.max_pool_taps(x, *window)
    torch.library.opcheck(OPERATORS.max_pool.default, (x, *window))
    torch.library.opcheck(OPERATORS.max_pool.default, (x.clone().requires_grad_(), *window))
    torch.library.opcheck(OPERATORS.max_pool_values.default, (x, *window))
    torch.library.opcheck(OPERATORS.max_pool_taps.default, (x, *window))
    last = layout is torch.channels_last
    torch.library.opcheck(OPERATORS.max_pool_backward.default, (pooled, taps, 13, 11, last, *window))


def test_meta_and_fake_maps():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for function in (max_pool, OPERATORS.max_pool, OPERATORS.max_pool_values):
        for layout in LAYOUTS:
            meta = torch.empty(8, 64, 112, 112, device="meta").contiguous(memory_format=layout)
            out = function(meta, 3, 2, 0)
            assert out.shape == (8, 64, 55, 55) and out.is_contiguous(memory_format=layout)
        with FakeTensorMode():
            assert function(torch.empty(8, 64, 112, 112), 3, 2, 0).shape == (8, 64, 55, 55)


@pytest.mark.parametrize("function", [max_pool, OPERATORS.max_pool], ids=["function", "operator"])
def test_functional_transforms(function):
    x = some_map((3, 2, 4, 9, 9), levels=2)
    tangent = some_map(x[0].shape, seed=5)

    def both(transform):
        ours, theirs = (transform(lambda x, f=f: f(x, 3, 2, 1)) for f in (function, F.max_pool2d))
        assert_close(ours, theirs, **EXACT)

    both(lambda f: torch.func.vmap(f)(x))
    both(lambda f: torch.func.vmap(f, in_dims=1)(x))
    both(lambda f: torch.func.vmap(torch.func.vmap(f))(x))  # maps of three axes
    both(lambda f: torch.func.grad(lambda x: f(x).square().sum())(x[0]))
    both(lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(x))
    both(lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).square().sum())(x))
    both(lambda f: torch.func.hessian(lambda x: f(x).square().sum())(x[0, :1, :1]))
    both(lambda f: torch.func.jacrev(f)(x[0, :, :1]))
    both(lambda f: torch.func.jacfwd(f)(x[0, :1, :1]))
    both(lambda f: torch.func.jvp(f, (x[0],), (tangent,)))
    both(lambda f: torch.func.jvp(torch.func.vmap(f), (x,), (tangent.expand(x.shape),)))
    with forward_ad.dual_level():
        both(lambda f: forward_ad.unpack_dual(f(forward_ad.make_dual(x[0], tangent))).tangent)


class Pools(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return shortcut_pool(max_pool(x, 3, 1, 1), 5, 1)


class PlainPools(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.max_pool2d(x, 3, 1, 1), 5, 2, 1)


def test_torchscript_sees_the_builtin():
    x = some_map((2, 3, 28, 28))
    for compiled in (torch.jit.script(Pools()), torch.jit.trace(Pools(), x)):
        assert [node.kind() for node in compiled.inlined_graph.nodes()].count("aten::max_pool2d") == 2
        file = io.BytesIO()
        torch.jit.save(compiled, file)
        file.seek(0)
        assert_close(torch.jit.load(file)(x), PlainPools()(x), **EXACT)


def test_tracers_compilers_and_exporters_see_the_builtin():
    x = some_map((2, 3, 28, 28))
    traced = torch.fx.symbolic_trace(Pools())
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [F.max_pool2d] * 2 or all(
        "max_pool2d" in node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"
    )
    for strict in (True, False):
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(Pools(), (x,), dynamic_shapes=(batch,), strict=strict)
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets == ["aten.max_pool2d.default"] * 2
        assert_close(program.module()(x[:1]), PlainPools()(x[:1]), **EXACT)
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    assert_close(torch.compile(Pools(), backend=backend, fullgraph=True)(x), PlainPools()(x), **EXACT)
    assert [g for g in graphs if "padfree" in g.code] == [] and len(graphs) == 1


@built
def test_modes_see_the_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen, x = [], some_map((2, 3, 28, 28)).requires_grad_()
    with Seen(), torch.no_grad():
        OPERATORS.max_pool(x, 3, 2, 0)
    assert seen == ["padfree.max_pool_values.default"]
    seen.clear()
    with Seen():
        max_pool(x, 3, 2, 0).sum().backward()
    assert {"padfree.max_pool_taps.default", "padfree.max_pool_backward.default"} <= set(seen)


def test_copies_autocast_and_pickles():
    x, module = some_map((2, 3, 28, 28)), copy.deepcopy(Pools())
    with torch.autocast("cpu"):
        assert_close(module(x), PlainPools()(x), **EXACT)
    assert_close(module(x.bfloat16()), PlainPools()(x.bfloat16()), **EXACT)
