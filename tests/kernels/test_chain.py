"""`padfree::chain` against its meaning, and as what compilers, exporters and transforms see."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from padfree import kernels
from padfree.kernels import DECOMPOSITIONS, activation, chain, chain_meaning, extension
from tests.kernels.test_pool import LAYOUTS, some_map

chain_file = __import__("sys").modules["padfree.kernels.chain"]  # the package has an operator by that name
built = pytest.mark.skipif(not kernels.available(), reason="the C extension was not built")
# (kernel, stride, padding, the pool's kernel and padding), as far as both have one centre
WINDOWS = [
    *((3, 2, 0, 3, 0), (5, 2, 1, 3, 0), (5, 2, 2, 3, 1), (5, 2, 1, 5, 1), (5, 2, 0, 5, 0), (3, 2, 1, 3, 1)),
    *(
        (3, 1, 1, 3, 1),
        (5, 1, 2, 3, 1),
        (5, 1, 2, 5, 2),
        (3, 1, 0, 3, 0),
        (3, 2, 1, 5, 2),
        (3, 2, 0, 0, 0),
        (5, 2, 2, 0, 0),
    ),
]
ACTS = ["", "relu", "relu6", "hardtanh(-0.5,1.5)", "hardswish", "silu", "gelu", "gelu_tanh", "leaky_relu(0.1)"]
ACTS_OF_ANYTHING = [act for act in ACTS if act != "gelu"]  # torch's, of inf, is inf or NaN by the map's length


def weights(channels, kernel, seed, outputs=0, inputs=0, parts=3):
    """Weight, bias, scale, shift, point_weight, point_bias; `parts` of them are there."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.empty(shape).uniform_(-1, 1, generator=generator)

    bias = drawn(channels) if parts & 1 else None
    scale, shift = (drawn(channels), drawn(channels)) if parts & 2 else (None, None)
    point = (drawn(outputs, inputs, 1, 1), drawn(outputs) if parts & 1 else None) if outputs else (None, None)
    return drawn(channels, 1, kernel, kernel), bias, scale, shift, *point


def arguments(x, window, ahead="", act="relu", merge="sum", outputs=0, point_act="", residual="", seed=0, parts=3):
    kernel, stride, padding, pool, pool_padding = window
    merge = merge if pool else ""
    channels = x.shape[-3]
    inputs = 2 * channels if merge == "cat" else channels
    weight, bias, scale, shift, point_weight, point_bias = weights(channels, kernel, seed, outputs, inputs, parts)
    told = (x, ahead, weight, bias, stride, padding, scale, shift, act, pool, pool_padding, merge)
    return *told, point_weight, point_bias, point_act, residual


def assert_alike(found, expected):
    """To 1e-5 of the largest number; NaN and infinities where they are."""
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 1.0
    assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(largest, 1.0), equal_nan=True)


@settings(max_examples=400, deadline=None)
@given(
    shape=st.tuples(
        st.integers(0, 5), st.sampled_from([1, 2, 3, 8, 15, 16, 17, 24, 40]), st.integers(5, 36), st.integers(5, 70)
    ),
    window=st.sampled_from(WINDOWS),
    layout=st.sampled_from(LAYOUTS),
    acts=st.tuples(*[st.sampled_from(ACTS_OF_ANYTHING)] * 3),
    merge=st.sampled_from(["sum", "norm", "cat", ""]),
    outputs=st.sampled_from([0, 0, "same", 1, 7, 16, 33, 50]),
    residual=st.sampled_from(["", "", "input", "maxima"]),
    seed=st.integers(0, 99),
    threads=st.integers(1, 3),
)
def test_any_chain(shape, window, layout, acts, merge, outputs, residual, seed, threads):
    outputs = shape[1] if outputs == "same" else outputs
    kernel, stride, padding, pool, _ = window
    wide = 2 * shape[1] if merge == "cat" and pool else shape[1]
    if residual and ((outputs or wide) != shape[1] or (residual == "maxima" and not pool)):
        residual = ""
    if residual == "input" and (stride != 1 or 2 * padding + 1 != kernel):
        residual = ""
    x = some_map(shape, layout, seed=seed, spoilt=0.005 if seed % 4 == 0 else 0.0)
    ahead, act, point_act = acts
    told = arguments(x, window, ahead, act, merge, outputs, point_act, residual, seed, seed % 4)
    expected = chain_meaning(*told)
    usual = chain_file.threads
    chain_file.threads = lambda x: threads
    try:
        found = chain(*told)
    finally:
        chain_file.threads = usual
    assert_alike(found, expected)
    assert found.stride() == expected.stride() or 1 in found.shape or 0 in found.shape


@built
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_c_takes_the_windows_of_the_families(window, layout, monkeypatch):
    """What is compared above is not the meaning with itself."""
    monkeypatch.setattr(chain_file, "chain_meaning", None)
    for (shape, act), merge in itertools.product(
        zip([(1, 3, 7, 9), (2, 16, 12, 13), (2, 17, 15, 16), (1, 40, 33, 18), (3, 24, 9, 66)], ACTS[1:6], strict=True),
        ("sum", "norm", "cat"),
    ):
        x = some_map(shape, layout)
        for outputs, residual in ((0, ""), (5, ""), (shape[1], "maxima" if merge == "cat" and window[3] else "")):
            told = arguments(x, window, "relu", act, merge, outputs, act, residual)
            assert_alike(chain(*told), chain_meaning(*told))


@built  # torch's own float32 gelu of 3e38 is infinite on some processors
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "leaky_relu(-0.3)"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_of_any_number(layout, act):
    near = {"silu": 1e-30, "leaky_relu(-0.3)": 0}.get(act, 1e-6)
    special = [math.inf, -math.inf, math.nan, 0.0, 1e-30, -1e-30, 3e38, -3e38]
    values = torch.cat((torch.linspace(-130, 130, 4001), torch.tensor(special)))
    weight = torch.zeros(2, 1, 3, 3)
    weight[:, :, 0, 0] = 1
    x = torch.zeros(1, 2, 3, 2 * len(values) + 1)
    x[:, :, 0, 0:-1:2] = values
    told = (weight, None, 2, 0, None, None, act, 0, 0, "", None, None, "", "")
    found = chain(x.contiguous(memory_format=layout), "", *told)
    expected = chain_meaning(x.double(), "", weight.double(), *told[1:])
    assert_close(found.double(), expected, rtol=1e-6, atol=near, equal_nan=True)


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [8, 40])
def test_weights_that_are_not_finite(side, layout, wrong):
    """Beside an infinite weight a frame of zeros is not what torch sees there, which is nothing."""
    x = some_map((2, 16, side, side + 1), layout)
    for window, which in itertools.product([(3, 2, 1, 3, 1), (3, 2, 0, 3, 0)], (2, 6, 12)):
        told = arguments(x, window, outputs=4)
        told[which].view(-1)[3] = wrong
        assert_alike(chain(*told), chain_meaning(*told))


@built
@pytest.mark.parametrize(("name", "limit"), [("WIDEST", 7), ("LARGEST", 47)])
@pytest.mark.parametrize("residual", ["", "maxima"])
def test_wide_matrices_are_torchs(name, limit, residual, monkeypatch):
    monkeypatch.setattr(chain_file, name, limit)
    x = some_map((2, 8, 15, 16))
    told = arguments(x, WINDOWS[0], merge="cat", outputs=8, point_act="hardswish", residual=residual)
    expected, made = chain_meaning(*told), []
    monkeypatch.setattr(chain_file, "chain_meaning", None)
    monkeypatch.setattr(chain_file.F, "conv2d", lambda *given, usual=F.conv2d: made.append(1) or usual(*given))
    assert_alike(chain(*told), expected)
    assert made == [1]


def test_rows_that_are_too_long_for_the_caches():
    x = torch.randn(1, 4, 3, 2 * (1 << 17) + 1)
    told = arguments(x, WINDOWS[0], outputs=2)
    assert_alike(chain(*told), chain_meaning(*told))


UNUSUAL = {
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "neither layout": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "both layouts": lambda x: x[:, :, :3, :3].clone(),
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "unbatched": lambda x: x[0],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "negative": torch._neg_view,
    "parameter": lambda x: nn.Parameter(x, requires_grad=False),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_maps_and_weights(kind):
    x = UNUSUAL[kind](some_map((2, 8, 15, 16)))
    told = [t.to(x.dtype) if isinstance(t, torch.Tensor) else t for t in arguments(x, WINDOWS[0], outputs=6)]
    found, expected = chain(*told), chain_meaning(*told)
    assert found.dtype is x.dtype
    assert_close(found, expected, rtol=1e-5, atol=1e-4) if x.dtype is torch.float32 else assert_close(found, expected)
    told = list(arguments(some_map((2, 8, 15, 16)), WINDOWS[0], outputs=6))
    told[6] = told[6].repeat_interleave(2)[::2]  # a scale with steps
    told[12] = told[12].transpose(0, 1).contiguous().transpose(0, 1)
    assert_alike(chain(*told), chain_meaning(*told))


def test_everything_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "native", None)
    for window, merge in itertools.product(WINDOWS, ("sum", "norm", "cat")):
        told = arguments(some_map((2, 8, 15, 16)), window, "relu", "silu", merge, 5, "relu")
        assert torch.equal(chain(*told), chain_meaning(*told))


WRONG = {
    "merge": ({11: "product"}, "merge 'product'"),
    "residual": ({15: "outputs"}, "residual 'outputs'"),
    "residual without a 1x1": ({12: None, 13: None, 15: "outputs"}, "residual 'outputs'"),
    "no pool": ({9: 0}, "a pool of 0 pixels"),
    "activation": ({8: "mish"}, "'mish' is no activation; known are"),
    "activation ahead": ({1: "relu(3)"}, "is no activation"),
    "activation behind": ({14: "hardtanh(1)"}, "is no activation"),
    "scale alone": ({7: None}, "given together"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arguments_that_are_none(kind, by_extension):
    changes, message = WRONG[kind]
    told = [changes.get(i, value) for i, value in enumerate(arguments(some_map((2, 8, 15, 16)), WINDOWS[0], outputs=6))]
    with pytest.raises(ValueError, match=message):
        chain(*told)


@pytest.mark.parametrize(
    ("which", "shape"), [(2, (7, 1, 3, 3)), (2, (8, 1, 3, 2)), (3, (7,)), (6, (7,)), (12, (6, 7, 1, 1)), (13, (5,))]
)
def test_tensors_of_another_shape_are_torchs_to_refuse(which, shape, by_extension):
    told = list(arguments(some_map((2, 8, 15, 16)), WINDOWS[0], outputs=6))
    told[which] = torch.zeros(shape)
    with pytest.raises(RuntimeError):
        chain(*told)


@pytest.fixture(params=[pytest.param(True, id="extension", marks=built), pytest.param(False, id="torch")])
def by_extension(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(extension, "native", None)
    return request.param


def test_activations_by_name():
    assert activation("relu") == "relu" and activation("hardtanh", 0, 6) == "hardtanh(0.0,6.0)"
    assert activation("leaky_relu", 1e-20) == "leaky_relu(1e-20)"
    for wrong in (("mish",), ("relu", 1.0), ("leaky_relu",)):
        with pytest.raises(ValueError, match="is no activation"):
            activation(*wrong)


@pytest.mark.parametrize("which", [0, 2, 3, 6, 12])
def test_gradients_are_refused(which):
    told = arguments(some_map((2, 8, 15, 16)), WINDOWS[0], outputs=6)
    told[which].requires_grad_()
    with pytest.raises(RuntimeError, match="is for inference"):
        chain(*told)
    with pytest.raises(Exception, match="is for inference"):
        torch.compile(lambda: chain(*told), backend="aot_eager", fullgraph=True)()
    with torch.no_grad():
        assert_alike(chain(*told), chain_meaning(*told))
    with torch.inference_mode():
        assert_alike(chain(*told), chain_meaning(*told))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    for window, merge, outputs in (((3, 2, 0, 3, 0), "sum", 0), ((5, 2, 1, 3, 0), "cat", 8), ((3, 1, 0, 0, 0), "", 4)):
        x = some_map((2, 8, 13, 11), layout)
        torch.library.opcheck(chain, arguments(x, window, "silu", "relu", merge, outputs, "gelu"))
    told = arguments(some_map((2, 8, 13, 11)), (3, 1, 1, 3, 1))
    torch.library.opcheck(chain, [t.double() if isinstance(t, torch.Tensor) else t for t in told])


def test_meta_and_fake_maps():
    told = arguments(torch.empty(8, 4, 15, 17, device="meta"), WINDOWS[0], outputs=6)
    told = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in told]
    assert chain(*told).shape == (8, 6, 7, 8)


def test_vmap():
    x = some_map((3, 2, 8, 15, 16))
    told = arguments(x[0], WINDOWS[0], merge="cat", outputs=8, residual="maxima")
    found = torch.func.vmap(lambda x: chain(x, *told[1:]))(x)
    assert_alike(found, torch.stack([chain_meaning(each, *told[1:]) for each in x]))
    scaled = torch.func.vmap(lambda w: chain(*told[:2], w, *told[3:]))(torch.stack((told[2], told[2] * 2)))
    assert_alike(scaled[1], chain_meaning(*told[:2], told[2] * 2, *told[3:]))


def test_autocast():
    told = arguments(some_map((2, 8, 15, 16)), WINDOWS[0], outputs=6)
    with torch.autocast("cpu"):
        assert_close(chain(*told).float(), chain_meaning(*told).float(), rtol=0.05, atol=0.1)
        assert_close(chain(told[0].bfloat16(), *told[1:]).float(), chain_meaning(*told).float(), rtol=0.05, atol=0.1)


class Chains(nn.Module):
    """Two calls of the operator, as in a fused network."""

    def __init__(self):
        super().__init__()
        kernel = weights(8, 3, 0, 6, 8)
        for name, tensor in zip(("weight", "bias", "scale", "shift", "matrix", "vector"), kernel, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = chain(x, "relu", self.weight, self.bias, 1, 1, None, None, "", 3, 1, "sum", None, None, "", "input")
        told = (self.weight, None, 2, 0, self.scale, self.shift, "relu6", 3, 0, "norm", self.matrix, self.vector)
        return chain(x, "", *told, "hardswish", "")


def plain(x, model):
    usual, chain_file_globals = model.forward.__globals__["chain"], model.forward.__globals__
    chain_file_globals["chain"] = chain_meaning
    try:
        return model(x)
    finally:
        chain_file_globals["chain"] = usual


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_keeps_the_operator_in_one_graph(layout):
    model, x, graphs = Chains(), some_map((2, 8, 15, 16), layout), []
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    assert_alike(torch.compile(model, backend=backend, fullgraph=True)(x), plain(x, model))
    assert [node.target for g in graphs for node in g.graph.nodes if node.op == "call_function"] == [chain] * 2
    assert_alike(torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)(x), plain(x, model))


@pytest.mark.parametrize("strict", [True, False])
def test_export_leaves_no_operator_after_decomposition(strict, tmp_path):
    model, x = Chains(), some_map((2, 8, 15, 16))
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [chain] * 2
    torch.export.save(program, tmp_path / "program.pt2")
    assert_alike(torch.export.load(tmp_path / "program.pt2").module()(x[:1]), plain(x[:1], model))
    table = torch.export.default_decompositions()
    table.update(DECOMPOSITIONS)
    decomposed = program.run_decompositions(table)
    assert not [node for node in decomposed.graph.nodes if "padfree" in str(node.target)]
    assert_alike(decomposed.module()(x[:1]), plain(x[:1], model))


def test_onnx_of_the_decomposed_program(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = Chains(), some_map((2, 8, 15, 16))
    table = torch.export.default_decompositions()
    table.update(DECOMPOSITIONS)
    program = torch.export.export(model, (x,)).run_decompositions(table)
    torch.onnx.export(program, (x,), str(tmp_path / "chain.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "chain.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_alike(torch.from_numpy(found), plain(x, model))
