"""Separable convolutions with the smallest error of their *outputs* over given inputs. Pure, in float64.

For unfolded inputs x (M K values, K = taps of the kernel) and wanted outputs y (N values) all that counts is
c = sum x x^T and t[n] = sum y[n] x. One factor given the others is a linear least-squares problem; each in its turn.
A small ridge, relative to the mean of the diagonal, keeps inputs that say nothing from getting large weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from padfree.layers.separable import balanced

ROUNDS = 15
_RIDGE = 1e-6
_VALUES = 1 << 24  # of a batch of systems of equations; 128 MiB
_STEPS = 40  # of conjugate gradients for a basis
_TINY = 1e-300  # so that inputs that are zero have a solution: zero


@dataclass
class Moments:
    """What a least-squares fit knows of the data.

    Attributes:
        inputs: c, (M, K, M, K).
        outputs: t, (N, M, K).
        total: the sum of the squares of y.
    """

    inputs: Tensor
    outputs: Tensor
    total: float

    def on(self, basis: Tensor) -> Moments:
        """Of inputs in another basis (M', M)."""
        inputs = torch.einsum("im,mknl,jn->ikjl", basis, self.inputs, basis)
        return Moments(inputs, torch.einsum("im,nmk->nik", basis, self.outputs), self.total)

    def error(self, points: Tensor, taps: Tensor) -> float:
        """The norm of the error of W[n] = points[n] taps[n]^T, relative to that of y."""
        left = self.total
        for rows in _chunks(len(points), self.inputs[0].numel()):
            matrix = self._for_taps(points[rows])
            wanted = torch.einsum("nmk,nm,nk->", self.outputs[rows], points[rows], taps[rows])
            left += float(torch.einsum("nk,nkl,nl->", taps[rows], matrix, taps[rows]) - 2 * wanted)
        return (max(left, 0.0) / self.total) ** 0.5 if self.total else 0.0

    def points_given(self, taps: Tensor) -> Tensor:
        """The best points (N, M) for taps (N, K)."""
        m, k = self.inputs.shape[:2]
        flat = self.inputs.permute(1, 3, 0, 2).reshape(k * k, m * m)
        found = taps.new_empty(len(taps), m)
        for rows in _chunks(len(taps), m * m):
            squares = (taps[rows, :, None] * taps[rows, None, :]).flatten(1)
            wanted = torch.einsum("nmk,nk->nm", self.outputs[rows], taps[rows])
            found[rows] = _solved((squares @ flat).reshape(-1, m, m), wanted)
        return found

    def taps_given(self, points: Tensor) -> Tensor:
        """The best taps (N, K) for points (N, M)."""
        found = points.new_empty(len(points), self.inputs.shape[1])
        for rows in _chunks(len(points), self.inputs[0].numel()):
            wanted = torch.einsum("nmk,nm->nk", self.outputs[rows], points[rows])
            found[rows] = _solved(self._for_taps(points[rows]), wanted)
        return found

    def basis_given(self, basis: Tensor, mixed: Tensor, taps: Tensor) -> Tensor:
        """A better basis (M', M) than `basis` for mixed (N, M') and taps (N, K), by conjugate gradients."""
        m, k = self.inputs.shape[:2]
        square = self.inputs.reshape(m * k, m * k)

        def product(direction: Tensor) -> Tensor:
            weights = ((mixed @ direction)[:, :, None] * taps[:, None, :]).flatten(1)
            return mixed.t() @ torch.einsum("nmk,nk->nm", (weights @ square).reshape(-1, m, k), taps)

        own = torch.einsum("mkml->mkl", self.inputs)
        scale = mixed.square().t() @ torch.einsum("nk,mkl,nl->nm", taps, own, taps)  # the diagonal, (M', M)
        ridge = _RIDGE * scale.mean() + _TINY
        wanted = mixed.t() @ torch.einsum("nmk,nk->nm", self.outputs, taps)
        found, left = basis, wanted - product(basis) - ridge * basis
        ahead = step = left / (scale + ridge)
        size = (left * ahead).sum()
        enough = size * 1e-20
        for _ in range(_STEPS):
            if size <= enough:
                break
            along = product(step) + ridge * step
            length = size / (step * along).sum()
            found, left = found + length * step, left - length * along
            ahead = left / (scale + ridge)
            size, before = (left * ahead).sum(), size
            step = ahead + size / before * step
        return found

    def _for_taps(self, points: Tensor) -> Tensor:
        m, k = self.inputs.shape[:2]
        half = (points @ self.inputs.reshape(m, -1)).reshape(-1, k, m, k)
        return torch.einsum("nkml,nm->nkl", half, points)


def fit_u(moments: Moments, taps: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, float]:
    """BSConv-U from taps (N, K): points (N, M), taps (N, K) and the relative error of the outputs."""
    for _ in range(rounds):
        points = moments.points_given(taps)
        taps = _unit(moments.taps_given(_unit(points)))
    points = moments.points_given(taps)
    return *balanced(points, taps), moments.error(points, taps)


def fit_s(moments: Moments, basis: Tensor, taps: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor, float]:
    """BSConv-S from a basis (M', M) and taps (N, K): basis, rows orthonormal, mixed (N, M'), taps, and the error."""
    for _ in range(rounds):
        reduced = moments.on(basis)
        mixed = reduced.points_given(taps)
        taps = _unit(reduced.taps_given(_unit(mixed)))
        mixed = reduced.points_given(taps)
        basis = torch.linalg.qr(moments.basis_given(basis, mixed, taps).t()).Q.t().contiguous()
    reduced = moments.on(basis)
    mixed = reduced.points_given(taps)
    return basis, *balanced(mixed, taps), reduced.error(mixed, taps)


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=_TINY)
    return unit


def _solved(matrices: Tensor, wanted: Tensor) -> Tensor:
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + _TINY
    found: Tensor = torch.linalg.solve(matrices, wanted[:, :, None])[:, :, 0]
    return found


def _chunks(count: int, each: int) -> list[slice]:
    step = max(1, _VALUES // each)
    return [slice(start, start + step) for start in range(0, count, step)]
