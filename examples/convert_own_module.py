"""Convert a network of one's own: plain modules, a residual block, one site left alone on purpose.

python examples/convert_own_module.py
"""

import torch
from torch import Tensor, nn

import padfree


class Block(nn.Module):
    """A basic residual block; the first of a stage halves the map in both branches."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        same = stride == 1 and c_in == c_out
        self.shortcut = (
            None if same else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) -> (N, c_out, H / stride, W / stride), rounded."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Net(nn.Module):
    """Three stages for small images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 10)."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


original = Net()
x = torch.rand(4, 3, 32, 32)

# both branches of a block shrink alike or not at all, so the shortcuts are rewritten with the convolutions
converted = padfree.convert(original, input_size=(3, 32, 32))
print(padfree.compare(original, converted, input_size=(3, 32, 32)))
with torch.no_grad():
    assert converted.stages(converted.stem(x)).shape[-2:] == (7, 7)  # 32 -> 15 -> 7, where the original has 8
    assert original.stages(original.stem(x)).shape[-2:] == (8, 8)

# leave the last stage alone: names, wildcards, or "re:" patterns
partly = padfree.plan(original, input_size=(3, 32, 32), rules=("dense", "projection"), exclude="stages.2.*")
print(partly)
assert {match.name for match in partly.matches} == {"stages.1.conv1", "stages.1.shortcut.0"}

# what cannot be converted is refused with the reason
try:
    padfree.convert(nn.Sequential(nn.Conv2d(3, 64, 16, 16), nn.Flatten()), input_size=(3, 224, 224))
except padfree.PadfreeError as error:
    print(f"refused: {error}")
