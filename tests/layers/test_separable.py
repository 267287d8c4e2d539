"""The separable convolutions nearest to a weight, and the loss that keeps a basis orthonormal."""

from __future__ import annotations

import itertools
import pickle
from collections import OrderedDict

import pytest
import torch
from bsconv.pytorch import BSConvS as PackageS
from torch import Tensor, nn
from torch.testing import assert_close

import padfree
from padfree.layers.separable import BSConvS, nearest_s, nearest_u


def weight(n: int, m: int, *kernel: int, seed: int = 0) -> Tensor:
    return torch.randn(n, m, *kernel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(points: Tensor, taps: Tensor, like: Tensor) -> Tensor:
    return torch.einsum("nm,nk->nmk", points, taps).reshape(like.shape)


@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (4, 1, 3, 3), (3, 2, 5, 5), (6, 4, 1, 3), (2, 8, 1, 1)])
def test_u_has_the_error_of_all_singular_values_but_the_first(shape: tuple[int, ...]) -> None:
    given = weight(*shape)
    points, taps = nearest_u(given)
    values = torch.linalg.svdvals(given.flatten(2))
    assert_close((dense(points, taps, given) - given).norm(), values[:, 1:].norm())
    assert_close(points.norm(dim=1), taps.norm(dim=1))


def test_a_separable_weight_is_recovered() -> None:
    given = dense(weight(6, 4)[:, :, None][..., 0], weight(6, 9, seed=1), torch.empty(6, 4, 3, 3)).float()
    assert_close(dense(*nearest_u(given), given).float(), given, atol=5e-7, rtol=0)
    basis = torch.linalg.qr(weight(8, 3)).Q.t()
    low = dense(weight(6, 3, seed=2) @ basis, weight(6, 9, seed=3), torch.empty(6, 8, 3, 3)).float()
    found, mixed, taps = nearest_s(low, 3)
    assert_close(dense(mixed @ found, taps, low).float(), low, atol=5e-7, rtol=0)
    assert_close(found @ found.t(), torch.eye(3, dtype=torch.float64))


def test_rounds_of_s_never_make_it_worse() -> None:
    given = weight(12, 8, 3, 3)
    errors = [
        float((dense(mixed @ basis, taps, given) - given).norm())
        for rounds in range(6)
        for basis, mixed, taps in [nearest_s(given, 4, rounds)]
    ]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    points, taps = nearest_u(given)  # with a basis of all inputs it is BSConv-U
    basis, mixed, same = nearest_s(given, 8)
    assert_close(dense(mixed @ basis, same, given), dense(points, taps, given))


def test_channels_of_zeros_stay_zero() -> None:
    given = weight(4, 3, 3, 3)
    given[1] = 0
    for points, taps in (nearest_u(given), (lambda v, a, b: (a @ v, b))(*nearest_s(given, 2))):
        assert bool(dense(points, taps, given).isfinite().all())
        assert float(dense(points, taps, given)[1].abs().max()) == 0


def basis_of(rows: Tensor) -> BSConvS:
    conv = nn.Conv2d(rows.shape[1], rows.shape[0], 1, bias=False)
    conv.weight.data = rows[:, :, None, None].clone()
    return BSConvS(OrderedDict(pw1=conv, pw2=nn.Conv2d(len(rows), 6, 1), dw=nn.Conv2d(6, 6, 3, groups=6)))


def test_the_orthonormal_loss_is_the_packages_without_its_kink() -> None:
    theirs = nn.Sequential(PackageS(8, 6, 3), PackageS(6, 6, 3))
    ours = nn.Sequential(*(basis_of(pair.pw1.weight.detach().flatten(1)) for pair in theirs))
    expected = 0.1 * sum(pair._reg_loss() for pair in theirs)
    assert_close(padfree.orthonormal_loss(ours), expected, atol=2e-4, rtol=0)
    assert_close(padfree.orthonormal_loss(ours, 0.5), 5 * padfree.orthonormal_loss(ours))
    kept = pickle.loads(pickle.dumps(ours))
    assert_close(padfree.orthonormal_loss(kept), padfree.orthonormal_loss(ours))
    assert float(padfree.orthonormal_loss(nn.Conv2d(3, 3, 1))) == 0


def test_its_gradient_is_small_near_the_minimum() -> None:
    rows = torch.linalg.qr(weight(8, 3)).Q.t().float()
    pair = basis_of(rows + 1e-5)
    loss = padfree.orthonormal_loss(pair, 1.0)
    loss.backward()
    assert float(pair.pw1.weight.grad.norm()) < 0.2  # of the norm itself it is 2
    assert 0 <= loss.item() < 1e-5


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(padfree.PadfreeError, match="has values that are not finite"):
        nearest_u(torch.full((2, 2, 3, 3), torch.nan))
