"""Strided convolutions as data: one convolution, and several that act as one."""

from __future__ import annotations

from dataclasses import dataclass

from padfree.analysis.chain import Chain
from padfree.geometry import effective_kernel, padfree_padding, size_text
from padfree.indices import OpId, ValueId


@dataclass(frozen=True)
class Conv:
    """One recorded 2-D convolution.

    Attributes:
        op: index of the operation. source, out: the values it reads (before any pad) and writes.
        path: its module, or the module whose forward calls it as a function.
        is_module: whether `path` is a module with the convolution's own `stride` and `padding`.
        padding: zeros at (top, bottom, left, right), those of a pad before it included.
        pad: index of a pad operation before it that only it reads (-1: none).
        pad_mode: "zeros", or what the pad fills in.
        fixed: its filter is not learnt (BlurPool): a pool rather than a convolution.
    """

    op: OpId
    path: str
    is_module: bool
    source: ValueId
    out: ValueId
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding: tuple[int, int, int, int]
    pad: OpId
    pad_mode: str
    fixed: bool

    @property
    def depthwise(self) -> bool:
        """One input channel a group, and more than one group."""
        return self.groups == self.in_channels > 1

    @property
    def pointwise(self) -> bool:
        """A 1x1 kernel without padding."""
        return self.kernel == (1, 1) and not any(self.padding)

    @property
    def spans(self) -> tuple[int, int]:
        """Pixels the kernel spans along each axis, dilation included."""
        return (
            effective_kernel(self.kernel[0], self.dilation[0]),
            effective_kernel(self.kernel[1], self.dilation[1]),
        )

    @property
    def padded(self) -> bool:
        """Whether it pads more than its padding-free form would."""
        if self.spans[0] % 2 == 0 or min(self.spans) < 3:
            return any(self.padding)
        reduced = padfree_padding(self.spans[0])
        return self.padding[0] + self.padding[1] > 2 * reduced

    def out_of_scope(self) -> str:
        """Why the method has nothing to say on this strided convolution, or ""."""
        if self.stride != (2, 2):
            return f"its stride is {size_text(self.stride)}; padding-free downsampling is defined for 2x2"
        if self.pad_mode != "zeros":
            return f"it pads with {self.pad_mode}, not zeros: there is no made-up border to drop"
        if self.spans[0] % 2 == 0:
            return f"its kernel spans {size_text(self.spans)}; an odd kernel of at least 3 is needed"
        if not self.padded:
            return "it is padding-free already"
        return ""

    def trouble(self) -> str:
        """Why this stride-2 convolution cannot be given its padding-free form, or ""."""
        if self.spans[0] != self.spans[1] or self.padding[:2] != self.padding[2:]:
            return f"its kernel {size_text(self.spans)} or padding {self.padding} differs between the axes"
        if not self.is_module:
            return "it is a function call; padfree rewrites convolution modules (use an nn.Conv2d)"
        return ""


@dataclass(frozen=True)
class Site:
    """Convolutions that act as one strided convolution.

    Attributes:
        convs: those with a kernel of at least 3, the largest first.
        points: 1x1 strided convs summed with them, which read the centre pixel of the others' windows.
        source: the value the pool shortcut reads.
        chain: what follows (norm, activation).
        dense: a dense conv, or a BSConv pair that stands for one.
        paired: the pointwise convs of such a pair, in order.
        shortcut: it lies on a residual branch that only adapts shape.
    """

    convs: tuple[Conv, ...]
    points: tuple[Conv, ...]
    source: ValueId
    chain: Chain
    dense: bool
    paired: tuple[Conv, ...]
    shortcut: bool

    @property
    def largest(self) -> Conv:
        """The conv with the largest kernel; it carries the shortcut."""
        return self.convs[0]
