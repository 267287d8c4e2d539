"""ONNX files in int8: shortcuts stay on integers in the graph that ONNX Runtime runs; and what is refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy.lived import lived_in
from torch import nn

import padfree
from padfree.deploy.int8 import decibels
from padfree.errors import PadfreeError
from padfree.export import to_int8_onnx
from padfree.rules._toys import Joined, Residual, depthwise, net, unit
from padfree.types import Options

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SIDE = 40
SHORTCUTS = ("Add", "Concat", "MaxPool")  # what padfree puts on one


def images(*counts: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 3, SIDE, SIDE, generator=generator) for count in counts]


def small() -> nn.Module:
    return net(unit(8, 12, 1), depthwise(12), unit(12, 8, 1, act=False))


def with_all_shortcuts() -> nn.Module:
    """A strided stem, a strided depthwise unit, two branches with one each, and a residual block with a projection."""
    left = nn.Sequential(depthwise(8), unit(8, 4, 1))
    right = nn.Sequential(unit(8, 8, 1), depthwise(8), unit(8, 4, 1))
    strided = Residual(unit(8, 8, stride=2, act=False), unit(8, 8, 1, 2, act=False))
    return net(depthwise(8), Joined(left, right, out=8), strided, stem=unit(3, 8, 3, 2))


def converted(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = padfree.convert(make(), input_size=(3, SIDE, SIDE), options=Options(**options))
    return lived_in(model, SIDE)


def optimized(path: Path) -> Any:
    """The graph that ONNX Runtime makes of a file, before it lays maps out for the processor at hand."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


def counted(graph: Any) -> dict[str, int]:
    """Operators of a shortcut in a graph, the integer forms of sums and concatenations by the float ones' names."""
    kinds = [node.op_type.removeprefix("QLinear") for node in graph.node]
    return {kind: kinds.count(kind) for kind in SHORTCUTS}


OTHERWISE = {"merge": "norm", "stem_residual": True, "projection": "dense"}


@pytest.mark.parametrize("options", [{}, pytest.param(OTHERWISE, marks=pytest.mark.slow)])
def test_shortcuts_stay_on_integers(options: dict[str, Any], tmp_path: Path) -> None:
    """No sum, concatenation or pool is in float, and nothing on the way to or from one is dequantized."""
    model = converted(with_all_shortcuts, **options)
    assert {match.rule for match in model.__dict__["padfree_plan"].matches} == {"depthwise", "dense", "stem"}
    found = to_int8_onnx(model, tmp_path / "int8.onnx", images(16, 9), dynamic_sides=False)
    assert (found.calibrated, found.held) == (21, 4)
    graph = optimized(tmp_path / "int8.onnx")
    source = {name: node.op_type for node in graph.node for name in node.output}
    kinds = [node.op_type for node in graph.node]
    assert not {"Add", "Concat", "Conv", "Relu"} & set(kinds)
    assert counted(graph) == counted(onnx.load(tmp_path / "int8.onnx").graph)  # the file's own, in integers now
    assert all(count >= 2 for count in counted(graph).values())
    for node in graph.node:
        if node.op_type == "MaxPool":
            readers = [other.op_type for other in graph.node if node.output[0] in other.input]
            assert source[node.input[0]].startswith(("QLinear", "QuantizeLinear"))
            assert readers and all(reader.startswith("QLinear") for reader in readers)
    floats = {node.op_type for node in graph.node if "DequantizeLinear" in map(source.get, node.input)}
    assert floats == {"BatchNormalization", "ReduceMean"}  # the norm behind the concatenation, and the head's mean


def test_the_file_computes_what_the_network_does_and_its_figures_are_those_of_the_images_held_back(
    tmp_path: Path,
) -> None:
    model, batches = converted(small), images(6, 6, 6, 6, 6)
    found = to_int8_onnx(model, tmp_path / "int8.onnx", batches)
    session = ort.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        mine = model(batches[-1])
    theirs = torch.from_numpy(session.run(None, {"input": batches[-1].numpy()})[0])
    assert (found.calibrated, found.held) == (24, 6)
    assert found.decibels == pytest.approx(decibels(mine.double(), theirs.double()), abs=0.01)
    same = 100 * (mine.argmax(1) == theirs.argmax(1)).double().mean().item()
    assert found.same_class == pytest.approx(same, abs=0.01)
    assert found.decibels > 20
    larger = torch.randn(1, 3, SIDE + 4, SIDE + 8).numpy()  # its sides are free
    assert session.run(None, {"input": larger})[0].shape == (1, 4)
    assert f"{found.decibels:.1f} dB" in str(found) and "24 images, 6 held back" in str(found)
    weights = {t.data_type for t in onnx.load(tmp_path / "int8.onnx").graph.initializer if len(t.dims) == 4}
    assert weights == {onnx.TensorProto.INT8}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [([1.1, 0.9], 20.0), ([1.0, 1.0], math.inf), ([2.0, 0.0], 0.0), ([11.0, -9.0], -20.0)],
)
def test_decibels(changed: list[float], expected: float) -> None:
    assert decibels(torch.ones(2).double(), torch.tensor(changed).double()) == expected


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "batches is empty"),
        ([torch.zeros(1, 3, SIDE, SIDE)], "1 in all, of which none can be held back"),
        ([torch.zeros(4, 3, SIDE, SIDE), torch.zeros(4, 3, SIDE, 8)], "images of 3x40x8 and 3x40x40; pass one size"),
        ([torch.full((4, 3, SIDE, SIDE), torch.nan)], "holds NaN"),
        ([(torch.zeros(4, 3, SIDE, SIDE), torch.zeros(4))], "no labels are taken"),
        (4, "pass a list of tensors"),
        ([torch.zeros(4, 1, SIDE, SIDE)], "cannot be exported"),
    ],
)
def test_wrong_images_leave_nothing_behind(batches: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "kept.onnx"
    file.write_text("before")
    with pytest.raises(PadfreeError, match=words):
        to_int8_onnx(small().eval(), file, batches, dynamic_sides=False)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_what_the_quantizer_says_is_raised_and_logging_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime.quantization as tools

    def fail(*_: Any, **__: Any) -> None:
        logging.warning("something odd")
        raise RuntimeError("no such operator\nmore of it")

    monkeypatch.setattr(tools, "quantize_static", fail)
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(PadfreeError, match=r"does not quantize Sequential: RuntimeError: no such operator$"):
        to_int8_onnx(small().eval(), tmp_path / "a.onnx", images(4), dynamic_sides=False)
    assert logging.getLogger().handlers == handlers and not list(tmp_path.iterdir())
