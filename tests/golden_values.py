"""Values that depend on tensor shapes alone, so that two implementations of one network give equal logits.

The scheme is that of the golden files in `tests/data/golden`: every tensor is drawn from a generator seeded
by its role and shape; batch norms run on batch statistics, everything else in eval mode.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "data" / "golden"


def _draw(role: str, shape: tuple[int, ...], normal: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{role}{tuple(shape)}".encode()))
    return torch.randn(shape, generator=generator) if normal else torch.rand(shape, generator=generator)


def _value(name: str, shape: tuple[int, ...], norm: bool) -> Tensor:
    if name == "weight" and norm:
        return _draw("bnw", shape, normal=False) + 0.5
    if name == "running_var":
        return _draw("var", shape, normal=False) + 0.5
    if name == "running_mean":
        return _draw("mean", shape) * 0.1
    if len(shape) <= 1:
        return _draw("b", shape) * 0.1
    rows, columns = shape[0], int(torch.Size(shape[1:]).numel())
    return (_draw("w", (rows, columns)) * columns**-0.5).reshape(shape)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Set every floating parameter and buffer by its role and shape, and the modes described above."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.is_floating_point():
                    tensor.copy_(_value(name, tuple(tensor.shape), module in norms))
    model.eval()
    for norm in norms:
        norm.eps = 1e-5
        norm.train()
    return model


def load(name: str) -> tuple[int, Tensor]:
    """(side, reference logits (4, classes)) of a golden file."""
    data = json.loads((FOLDER / f"{name}.json").read_text())
    return data["side"], torch.tensor(data["logits"])


def batch(side: int) -> Tensor:
    """The fixed input (4, 3, side, side)."""
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(7))


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """Max |a - b| / max |b|."""
    return ((logits - reference).abs().max() / reference.abs().max()).item()
