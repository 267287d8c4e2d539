"""The 1x1 convolution of a hybrid stem as two, so that runtimes need not write the concatenation it reads.

    conv_pw(cat(left, pooled)) = conv_pw[:, :C](left) + conv_pw[:, C:](pooled)

The stem works on the largest map of a network, and writing 2C channels of it again costs what the sum does not:
runtimes add the second convolution's result while they write it. The norm behind is folded into both first, or it would
stand between the sum and the activation. Only for files: in eager torch the sum is one more pass over the map.
"""

from __future__ import annotations

from torch import Tensor, nn

from padfree.deploy.fold import fold
from padfree.deploy.readers import hooked
from padfree.errors import PadfreeError
from padfree.layers.stem import StemTail
from padfree.record.copies import full_copy
from padfree.record.recording import record
from padfree.rewrite.forward import set_class


class SplitTail(StemTail):
    """A `StemTail` whose 1x1 convolution is two, `left` for the depthwise branch and `right` for the pool."""

    left: nn.Conv2d
    right: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Run the tail on the stem's output."""
        if self.has_end:
            x = self.end(x)
        pooled = self.pool(x)
        convolved = self.act1(self.norm1(self.conv_dw(x)))
        out: Tensor = self.act2(self.norm2(self.left(convolved) + self.right(pooled)))
        if self.residual:
            out = out + (x if self.conv_dw.stride[0] == 1 else pooled)
        return out


def split_stems(model: nn.Module, input_size: tuple[int, ...]) -> nn.Module:
    """A copy with every tail split that can be; the model itself where there is none.

    A tail stays whole in its pre-activation form, where the norm before the 1x1 spans both branches, and where its
    convolution carries hooks or is no plain one.

    Args:
        model: in eval mode.
        input_size: (C, H, W) to look at it with.
    """
    if not any(_splittable(module) for module in model.modules()):
        return model
    try:
        recording = record(model, input_size)
        copy = full_copy(model)
        fold(copy, recording)
    except PadfreeError:  # what cannot be copied or recorded is written as it is
        return model
    for module in copy.modules():
        if _splittable(module):
            _split(module)
    return copy


def _splittable(module: nn.Module) -> bool:
    if not isinstance(module, StemTail) or isinstance(module, SplitTail) or module.preact:
        return False
    conv = module.conv_pw
    return type(conv) is nn.Conv2d and not hooked(conv) and set(conv._parameters) == {"weight", "bias"}


def _split(tail: nn.Module) -> None:
    assert isinstance(tail, StemTail)
    whole = tail.conv_pw
    channels = whole.in_channels // 2
    halves = whole.weight.detach().chunk(2, 1)
    for name, half, bias in (("left", halves[0], whole.bias), ("right", halves[1], None)):
        conv = nn.Conv2d(channels, whole.out_channels, 1, bias=bias is not None, device="meta")
        conv.weight = nn.Parameter(half.contiguous(), requires_grad=False)
        if bias is not None:
            conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
        tail.add_module(name, conv.eval())
    tail._modules["conv_pw"] = nn.Identity()  # past the lock on what is folded
    set_class(tail, SplitTail)
