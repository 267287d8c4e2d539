"""Blueprint-separable convolutions (BSConv, CVPR 2020), and the ones nearest to a given weight.

A BSConv-U pair is the convolution W[n, m] = p[n, m] B[n]: one k x k blueprint B[n] for each *output* channel n, which
input m has p[n, m] times. BSConv-S shares a basis V (M' x M, rows nearly orthonormal) of the inputs: p[n] = V^T a[n].
Factors are computed in float64; of equal errors there are many, so signs and sizes are fixed here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError

ROUNDS = 12  # of the alternation for BSConv-S; it is flat after about 10


class BSConvU(nn.Sequential):
    """1x1 `pw` (M -> N, no bias), [norm `bn`], depthwise k x k `dw` on N, in the place of a convolution.

    The children are bsconv's by name, and so are the keys. Built from an `OrderedDict`, like any `nn.Sequential`.
    """


class BSConvS(nn.Sequential):
    """1x1 `pw1` (M -> M') and 1x1 `pw2` (M' -> N), without bias, each with [norm `bn1`, `bn2`], depthwise `dw` on N.

    `orthonormal_loss` holds the rows of `pw1` together.
    """


_SMOOTH = 1e-3  # of a Frobenius norm, where its gradient turns round at zero


def orthonormal_loss(model: nn.Module, alpha: float = 0.1) -> Tensor:
    """The sum over a model's `BSConvS` of alpha ||V V^T - I||, V the rows of `pw1`: to be added to the training loss.

    The published loss takes the Frobenius norm f itself, whose gradient has norm 2 right beside its minimum. Here it is
    sqrt(f^2 + d^2) - d with d = 1e-3, which differs from f by d at most and has no kink. Zero for a model without any.
    """
    pairs = [pair for pair in model.modules() if isinstance(pair, BSConvS)]
    terms = [_departure(pair.get_submodule("pw1").get_parameter("weight")) for pair in pairs]
    return alpha * torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else torch.zeros(())


def _departure(weight: Tensor) -> Tensor:
    rows = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    squared = (rows @ rows.t() - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)).square().sum()
    return (squared + _SMOOTH**2).sqrt() - _SMOOTH


def nearest_u(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The BSConv-U pair nearest to a weight (N, M, k, l) in the Frobenius norm: p (N, M) and B (N, k l), in float64.

    For each output channel the first singular triple of its (M, k l) matrix (Eckart-Young).
    """
    left, size, right = _first_triples(_matrices(weight))
    return balanced(left * size[:, None], right)


def nearest_s(weight: Tensor, mid_channels: int, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor]:
    """A BSConv-S triple near to a weight (N, M, k, l): V (M', M), a (N, M') and B (N, k l), in float64.

    Alternates between the nearest a and B for a basis, and the nearest basis for those; the error never rises. V has
    orthonormal rows. A local optimum.
    """
    matrices = _matrices(weight)
    left, size, _ = _first_triples(matrices)
    basis = _leading(left * size[:, None], mid_channels)
    for _ in range(rounds):
        _, _, right = _first_triples(basis @ matrices)
        basis = _leading(torch.einsum("nmk,nk->nm", matrices, right), mid_channels)
    left, size, right = _first_triples(basis @ matrices)
    return basis, *balanced(left * size[:, None], right)


def _matrices(weight: Tensor) -> Tensor:
    """(N, M, K) in float64.

    Raises:
        PadfreeError: some values are not finite.
    """
    if not bool(weight.isfinite().all()):
        raise PadfreeError(f"a weight of {tuple(weight.shape)} has values that are not finite; no pair is near it")
    return weight.detach().double().flatten(2)


def _first_triples(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of N matrices (M, K): u (N, M) and v (N, K) of length 1 and s (N), so that s u v^T is the nearest of rank 1.

    From the K x K Gram matrices: K is the number of a kernel's taps, and M that of channels.
    """
    _, vectors = torch.linalg.eigh(matrices.transpose(1, 2) @ matrices)
    right = vectors[:, :, -1]
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))
    right = right * torch.where(largest < 0, -1.0, 1.0)
    left = torch.einsum("nmk,nk->nm", matrices, right)
    size = left.norm(dim=1)
    return left / size.clamp(min=torch.finfo(size.dtype).tiny)[:, None], size, right


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of two factors made equally long, so that a step of training moves both alike; their products stay."""
    tiny = torch.finfo(left.dtype).tiny
    ratio = (right.norm(dim=1).clamp(min=tiny) / left.norm(dim=1).clamp(min=tiny)).sqrt()[:, None]
    return left * ratio, right / ratio


def _leading(rows: Tensor, count: int) -> Tensor:
    """(count, M): an orthonormal basis of the directions along which rows (N, M) are largest."""
    _, vectors = torch.linalg.eigh(rows.t() @ rows)
    basis: Tensor = vectors[:, -count:].flip(1).t()
    return basis.contiguous()
