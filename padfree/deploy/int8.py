"""ONNX files in int8: ONNX Runtime's static quantization, with the ranges of activations read off images.

The graph keeps its operators and gains a pair of QuantizeLinear and DequantizeLinear on every map (QDQ); a runtime
fuses them with what lies between. Weights are int8 and symmetric with one scale an output channel, activations uint8
with one scale a map, which is the form that the providers for phones (NNAPI, QNN, XNNPACK) take, too. The max-pools,
sums and concatenations that padfree puts on shortcuts are quantized on all their sides: ONNX Runtime then runs them on
integers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padfree.deploy.limits import Stage, limited
from padfree.deploy.onnx import onnx_graph
from padfree.deploy.program import ADVICE, TRACING, quietly
from padfree.errors import PadfreeError
from padfree.files.writing import check_target, replacing
from padfree.record.trees import first_line, tensors

__all__ = ["Int8", "write_int8"]


@dataclass(frozen=True)
class Int8:
    """How far an int8 file is from the network that it was made from.

    Attributes:
        calibrated: images that ranges were read off.
        held: images that were held back to compare outputs on.
        decibels: power of the network's outputs over that of the difference; of several outputs the least.
        same_class: percent of the images held back with the same largest logit; None where the network gives none.
    """

    calibrated: int
    held: int
    decibels: float
    same_class: float | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; exact outputs have no decibels."""
        return asdict(self) | {"decibels": self.decibels if math.isfinite(self.decibels) else None}

    def __str__(self) -> str:
        text = f"int8: calibrated on {self.calibrated} images, {self.held} held back: outputs {self.decibels:.1f} dB"
        return text + ("" if self.same_class is None else f", the same class for {self.same_class:.1f} %")


def write_int8(
    model: nn.Module,
    path: str | os.PathLike[str],
    calibration: Sequence[Tensor],
    held: Sequence[Tensor],
    *,
    dynamic_sides: bool,
    opset: int,
    time_limit: float | None,
) -> Int8:
    """Write the file; see `padfree.export.to_int8_onnx`.

    Args:
        model: in eval mode.
        path: the file.
        calibration: batches (N, C, H, W) of one size, which the graph is traced at.
        held: batches that outputs are compared on.
        dynamic_sides: leave height and width free.
        opset: version of the ONNX operators.
        time_limit: seconds that it may take; None for no limit.

    Raises:
        PadfreeError: the network is not exported, or not quantized; or outputs of the file are not finite.
        FileError: the file cannot be written.
    """
    target = check_target(path)
    stage, size = Stage(TRACING), tuple(calibration[0].shape[1:])

    def write() -> Int8:
        # with its stem's 1x1 whole: of two, each half would be rounded to eight bits before they are summed
        graph = onnx_graph(model, size, dynamic_sides=dynamic_sides, opset=opset, lower=None, stage=stage)
        with tempfile.TemporaryDirectory() as folder:
            plain, quantized = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            graph.save(plain)
            stage.text = "reading the ranges of activations off the images"
            try:
                with quietly(), _unlogged():
                    _quantize(plain, quantized, calibration)
            except Exception as error:  # of onnx, of ONNX Runtime or of its tools, which document none
                raise PadfreeError(
                    f"ONNX Runtime does not quantize {type(model).__name__}: {type(error).__name__}: "
                    f"{first_line(error)}"
                ) from error
            stage.text = "comparing outputs"
            found = _compared(model, quantized, calibration, held)
            with replacing(target) as temporary:
                temporary.write_bytes(quantized.read_bytes())
        return found

    return limited(time_limit, f"the int8 export of {type(model).__name__}", stage, ADVICE, write)


class _Reader:
    """What gives ONNX Runtime's calibration one batch after another."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by the graph's input; None after the last."""
        batch = next(self._left, None)
        return None if batch is None else {"input": batch.cpu().numpy()}


def _quantize(plain: Path, quantized: Path, batches: Sequence[Tensor]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = plain.with_name("prepared.onnx")
    # norms go into convolutions first: one that is left would be a float operation between two integer ones
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(quantized),
        _Reader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _compared(model: nn.Module, file: Path, calibration: Sequence[Tensor], held: Sequence[Tensor]) -> Int8:
    import onnxruntime

    name = type(model).__name__
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found = [[torch.from_numpy(out) for out in session.run(None, {"input": b.cpu().numpy()})] for b in held]
    except Exception as error:
        raise PadfreeError(f"ONNX Runtime does not run {name} in int8: {first_line(error)}") from error
    with torch.no_grad():
        expected = [[out.cpu() for out in tensors(model(batch))] for batch in held]
    pairs = [
        (_joined(mine), _joined(theirs))
        for mine, theirs in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True)
    ]
    if not all(bool(theirs.isfinite().all()) and decibels(mine, theirs) > -math.inf for mine, theirs in pairs):
        raise PadfreeError(
            f"outputs of {name} in int8 are not finite, or are not 0 where they must be; please report it"
        )
    first, quantized = pairs[0]
    logits = first.dim() == 2 and first.shape[1] > 1
    same = (first.argmax(-1) == quantized.argmax(-1)).double().mean() if logits else None
    return Int8(
        calibrated=sum(map(len, calibration)),
        held=sum(map(len, held)),
        decibels=min(decibels(mine, theirs) for mine, theirs in pairs),
        same_class=None if same is None else round(100 * float(same), 2),
    )


def _joined(outs: Sequence[Tensor]) -> Tensor:
    """One output of all batches; a number counts as an image's."""
    return torch.cat([out if out.dim() else out[None] for out in outs]).double()


def decibels(signal: Tensor, changed: Tensor) -> float:
    """Power of a signal over that of the difference, in dB; infinite where there is none."""
    power, noise = float(signal.square().sum()), float((signal - changed).square().sum())
    if not noise:
        return math.inf
    return round(10 * math.log10(power / noise), 2) if power else -math.inf


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep ONNX Runtime's tools from setting up logging for the whole program when they warn."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
