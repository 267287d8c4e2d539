"""Least squares of a convolution: its weights as a linear map of the pixels it reads, pulled to what they are.

Sums are kept in double precision, for each group of the convolution by itself; from them come the solution and the
error of any solution, so that no batch need be kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST = 1 << 24  # numbers of one unfolded batch
_ROWS = 1 << 14  # pixels of one batch that are looked at
_FLAT = 1e-12  # of features' squares, what is left of constants without their means: rounding of the sums


class Moments:
    """Sums over rows of features x and targets y: their number, means and products.

    Every tensor has a first side for groups that are solved apart.
    """

    def __init__(self) -> None:
        self.rows = 0.0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Take in x (groups, rows, features) and y (groups, rows, outputs), each row `weight` times."""
        x, y = x.double(), y.double()
        new = [x.sum(1), y.sum(1), x.mT @ x, x.mT @ y, y.square().sum(1)]
        new = new if weight == 1 else [weight * part for part in new]
        self._sums = new if not self._sums else [old + more for old, more in zip(self._sums, new, strict=True)]
        self.rows += weight * x.shape[1]

    @property
    def features(self) -> int:
        """Features a group."""
        return int(self._sums[0].shape[1])

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """(groups, features) and (groups, outputs)."""
        return self._sums[0] / self.rows, self._sums[1] / self.rows

    def ridge(self, weight: Tensor, strength: float, *, centred: bool) -> Tensor:
        """The weight (groups, outputs, features) that minimises |y - w x|^2 + s |w - weight|^2.

        Args:
            weight: what it is pulled to.
            strength: s, of the mean of the features' squares.
            centred: whether a constant takes the means, so that only what differs from them is fitted.

        Returns:
            the weight; `weight` itself for groups whose features are constants, of which nothing can be learnt.
        """
        _, _, xx, xy, _ = self._centred() if centred else self._sums
        rest = xy - xx @ weight.double().mT
        power = xx.diagonal(dim1=1, dim2=2).mean(1)
        pull = strength * power.clamp_min(1e-30)
        matrix = xx + pull[:, None, None] * torch.eye(self.features, dtype=xx.dtype, device=xx.device)
        solved, failed = torch.linalg.solve_ex(matrix, rest)
        flat = power <= _FLAT * self._sums[2].diagonal(dim1=1, dim2=2).mean(1)
        added = torch.where((flat | (failed != 0))[:, None, None], 0.0, solved)
        return weight.double() + added.mT

    def best(
        self, held: Moments, weight: Tensor, strengths: Sequence[float], *, centred: bool
    ) -> tuple[Tensor, Tensor | None, float]:
        """The solution of the strength that gives the least error on other rows, its constant, and that error."""
        found: tuple[Tensor, Tensor | None, float] | None = None
        for strength in strengths:
            solved = self.ridge(weight, strength, centred=centred)
            constant = self.constant(solved) if centred else None
            error = held.error(solved, constant)
            if found is None or error < found[2]:
                found = solved, constant, error
        assert found is not None
        return found

    def constant(self, weight: Tensor) -> Tensor:
        """What is missing to the targets' means, (groups, outputs)."""
        x, y = self.means
        return y - (weight.double() @ x[:, :, None])[:, :, 0]

    def error(self, weight: Tensor, constant: Tensor | None = None) -> float:
        """The relative error |y - w x - c| / |y - mean of y| of a solution."""
        sx, sy, xx, xy, yy = self._sums
        w = weight.double()
        c = torch.zeros_like(sy) if constant is None else constant.double()
        missing = yy - 2 * (w * xy.mT).sum(2) + ((w @ xx) * w).sum(2)
        missing = missing - 2 * c * (sy - (w @ sx[:, :, None])[:, :, 0]) + self.rows * c.square()
        spread = yy - sy.square() / self.rows
        return float((missing.sum().clamp_min(0) / spread.sum().clamp_min(1e-30)).sqrt())

    def _centred(self) -> list[Tensor]:
        sx, sy, xx, xy, yy = self._sums
        return [
            sx,
            sy,
            xx - sx[:, :, None] * sx[:, None, :] / self.rows,
            xy - sx[:, :, None] * sy[:, None, :] / self.rows,
            yy,
        ]


def pixels_read(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution with zero padding reads, (groups, rows, features): a row for each pixel it writes."""
    groups = conv.groups
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0):
        return by_group(x, groups)
    assert not isinstance(conv.padding, str)
    taps = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # (N, C k k, L)
    taps = taps.reshape(taps.shape[0], groups, -1, taps.shape[2])
    return taps.permute(1, 0, 3, 2).reshape(groups, -1, taps.shape[2])


def by_group(x: Tensor, groups: int) -> Tensor:
    """A map (N, C, H, W) as (groups, N H W, C / groups)."""
    parts = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    return parts.permute(1, 0, 3, 2).reshape(groups, -1, parts.shape[2])


def grouped(conv: nn.Conv2d) -> Tensor:
    """The weight of a convolution as (groups, outputs a group, features a group)."""
    return conv.weight.detach().reshape(conv.groups, conv.out_channels // conv.groups, -1)


def images_to_unfold(conv: nn.Conv2d, x: Tensor, written: tuple[int, int]) -> int:
    """How many images of a batch are looked at, so that unfolding them takes no more memory than it should."""
    each = x.shape[1] * conv.kernel_size[0] * conv.kernel_size[1] * written[0] * written[1]
    return max(1, min(x.shape[0], _MOST // max(1, each)))


def every_few(rows: int) -> slice:
    """Rows evenly chosen, so that there are not many more than are needed."""
    return slice(None, None, max(1, rows // _ROWS))
