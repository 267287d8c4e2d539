"""Children with names that are no identifiers: generated code reads them, and never runs them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import Net, convert, depthwise, images
from torch import Tensor, nn
from torch.testing import assert_close

NAMES = [
    'a"b',
    "a'b",
    "a\\",
    "a\nb",
    "\r",
    "x)+print(1",
    '"+print(1)+"',
    "{x}",
    "a-b",
    "1",
    "class",
    "None",
    "a b",
    "é",
]
NAMES += ["é", "input", "self", "torch", "forward_", "#", '"""', "\u2028", "del"]


class Odd(nn.Module):
    """The strided conv has an odd name, below a parent with the same."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.inner = nn.ModuleDict({name: nn.BatchNorm2d(8)}) if not hasattr(nn.ModuleDict, name) else nn.ModuleDict()
        self.add_module(name, depthwise())

    def forward(self, input: Tensor) -> Tensor:
        y = getattr(self, self.name)(input)
        for norm in self.inner.values():
            y = norm(y)
        return F.dropout(F.relu(y), 0.0, self.training)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_is_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    made: Any = convert(Net(Odd(name))).eval()
    conv = getattr(made.block, name)
    x = made.stem(images())
    y = F.conv2d(x, conv.weight, conv.bias, 2, 0, 1, 8)
    for norm in made.block.inner.values():
        y = norm(y)
    wanted = F.relu(y) + F.max_pool2d(x, 3, 2)
    for twin in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_close(twin(images()), wanted)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["1", "a-b", 'a"b', "class"])
def test_odd_names_are_read_under_compilers(name: str) -> None:
    made = convert(Net(Odd(name))).eval()
    found = torch.compile(made, fullgraph=True, backend="eager")(images())
    assert_close(found, made(images()))
