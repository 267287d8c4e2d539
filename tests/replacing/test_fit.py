"""Values of replaced convolutions from images: least squares of the outputs, layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.testing import assert_close

import padfree
from padfree.layers.separable import nearest_s, nearest_u
from padfree.replacing.fit import Fitted, _Maps, _moments, fit_outputs
from padfree.replacing.norms import reestimate_norms
from padfree.replacing.solve import Moments, fit_s, fit_u

SIZE = (3, 12, 12)


def images(count: int = 24, seed: int = 0) -> Tensor:
    """Smooth ones: inputs of a convolution that are far from white."""
    noise = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=SIZE[1:], mode="bilinear")


BATCHES = list(images().split(12))


class Block(nn.Module):
    """Two convolutions around a norm, beside a shortcut."""

    def __init__(self, channels: int, conv: Any = nn.Conv2d, **settings: Any) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, 3, **settings)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(x + self.conv2(F.relu(self.norm(self.conv1(x)), inplace=True)))
        return out


def network(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for conv in block.modules():
        if isinstance(conv, nn.Conv2d):
            conv.reset_parameters()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), block, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5))
    reestimate_norms(model, BATCHES)
    return model.eval()


def error(model: nn.Module, small: nn.Module) -> float:
    x = images(seed=1)
    return float((small.eval()(x) - model(x)).detach().norm() / model(x).detach().norm())


def moments(x: Tensor, y: Tensor, m: int) -> Moments:
    k = x.shape[1] // m
    return Moments((x.t() @ x).reshape(m, k, m, k), (y.t() @ x).reshape(-1, m, k), float(y.square().sum()))


def data(rows: int = 400, m: int = 4, k: int = 9, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(m * k, m * k, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, m * k, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(n, m, k, generator=generator, dtype=torch.float64)
    return x, x @ weight.flatten(1).t(), weight


def residual(x: Tensor, y: Tensor, weight: Tensor) -> float:
    return float((x @ weight.flatten(1).t() - y).norm() / y.norm())


@pytest.mark.parametrize("share", [0, 2])
def test_the_fit_is_a_minimum_better_than_that_of_the_weight(share: int) -> None:
    x, y, weight = data()
    known = moments(x, y, 4)
    start = nearest_u(weight[:, :, :, None]) if not share else nearest_s(weight[:, :, :, None], share)
    if share:
        basis, mixed, taps, said = fit_s(known, start[0], start[2], rounds=60)
        factors = [basis, mixed, taps]
        assert_close(basis @ basis.t(), torch.eye(share, dtype=torch.float64))
    else:
        points, taps, said = fit_u(known, start[1], rounds=60)
        factors = [points, taps]

    def whole(parts: Any) -> Tensor:
        first = parts[0] if not share else parts[1] @ parts[0]
        return first[:, :, None] * parts[-1][:, None, :]

    found = residual(x, y, whole(factors))
    assert found == pytest.approx(said, rel=1e-6)
    assert found < 0.9 * residual(x, y, whole(start))
    generator = torch.Generator().manual_seed(1)
    for place, factor in enumerate(factors):  # no small step of any factor is better
        for _ in range(20):
            step = (
                1e-3
                * factor.norm()
                * F.normalize(torch.randn(factor.shape, generator=generator).double().flatten(), dim=0)
            )
            moved = [*factors[:place], factor + step.reshape(factor.shape), *factors[place + 1 :]]
            assert residual(x, y, whole(moved)) > found - 1e-7


def test_what_is_separable_is_found_from_a_few_images() -> None:
    x, _, _ = data(rows=20)  # fewer than the 36 values of a window
    weight = torch.randn(5, 4, 1).double() * torch.randn(5, 1, 9).double()
    y = x @ weight.flatten(1).t()
    points, taps, said = fit_u(moments(x, y, 4), nearest_u(weight[:, :, :, None])[1])
    assert said < 1e-4 and residual(x, y, points[:, :, None] * taps[:, None]) < 1e-4
    x[:, :9] = 0  # an input that is always zero
    points, taps, _ = fit_u(moments(x, y, 4), nearest_u(weight[:, :, :, None])[1])
    assert bool(points.isfinite().all() and taps.isfinite().all())


SETTINGS = [
    {"padding": 1},
    {"padding": 1, "stride": 1, "bias": False, "padding_mode": "reflect"},
    {"padding": "same", "dilation": 2},
    {"conv": Conv2dSame},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_moments_are_those_of_the_windows(settings: dict[str, Any]) -> None:
    """What the statistics say the convolution writes is what it writes."""
    model = network(Block(8, **settings))
    conv = model[1].conv1
    found = _moments(conv, _Maps(model, model, "1.conv1", 1), BATCHES)
    weight = conv.weight.detach().double().flatten(2)
    assert_close(found.outputs, torch.einsum("nmk,mkjl->njl", weight, found.inputs), rtol=1e-4, atol=1e-3)
    written = model[1].conv1(model[0](torch.cat(BATCHES))).detach()
    written = written - (0 if conv.bias is None else conv.bias.detach()[:, None, None])
    assert found.total == pytest.approx(written.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["bsconv-u", "bsconv-s"])
def test_images_keep_more_than_the_weight_does(kind: str) -> None:
    model = network(Block(8, padding=1))
    before = copy.deepcopy(model.state_dict())
    said: list[Fitted] = []
    svd = padfree.replace(model, kind, init="svd", input_size=SIZE)
    fitted = padfree.replace(model, kind, batches=BATCHES, input_size=SIZE, progress=said.append)
    assert error(model, fitted) < 0.7 * error(model, svd), (error(model, fitted), error(model, svd))
    assert [(one.name, one.number, one.total) for one in said] == [("1.conv1", 1, 2), ("1.conv2", 2, 2)]
    assert all(0 < one.error < 1 for one in said)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(module._forward_hooks for module in [*model.modules(), *fitted.modules()])
    again = padfree.replace(model, kind, batches=[(batch, "labels") for batch in BATCHES], input_size=SIZE)
    assert_close(again.state_dict(), fitted.state_dict(), rtol=0, atol=0)


def test_each_layer_repairs_the_errors_before_it() -> None:
    model = network(Block(8, padding=1))
    together = padfree.replace(model, "bsconv-u", batches=BATCHES, input_size=SIZE)
    apart = padfree.replace(model, "bsconv-u", init="svd", input_size=SIZE)
    for name in ("1.conv1", "1.conv2"):  # each on the original's maps
        alone = padfree.replace(model, "bsconv-u", batches=BATCHES, include=name, input_size=SIZE)
        apart.get_submodule(name).load_state_dict(alone.get_submodule(name).state_dict())
    assert error(model, together) < error(model, apart)


def test_new_norms_let_through_what_was_fitted() -> None:
    model = network(Block(8, padding=1))
    plain = padfree.replace(model, "bsconv-s", batches=BATCHES, input_size=SIZE)
    normed = padfree.replace(model, "bsconv-s", with_bn=True, batches=BATCHES, input_size=SIZE)
    assert_close(normed(images()), plain(images()), atol=1e-4, rtol=1e-3)
    x = torch.cat(BATCHES)
    read = model[0](x)
    assert_close(normed[1].conv1.train()(read), plain[1].conv1(read), atol=1e-3, rtol=1e-2)  # of the same images


def test_a_layer_called_twice_is_fitted_on_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(F.relu(self.conv(x)))
            return out

    model = network(Twice())
    found = _moments(model[1].conv, _Maps(model, model, "1.conv", 2), BATCHES)
    first = _moments(model[1].conv, _Maps(model, model, "1.conv", 1), BATCHES)
    assert found.total > first.total
    fitted = padfree.replace(model, "bsconv-u", batches=BATCHES, input_size=SIZE, norms=True)
    assert error(model, fitted) < error(model, padfree.replace(model, "bsconv-u", init="svd", input_size=SIZE))


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "batches is empty"),
        (3, "batches is int; pass a list of tensors"),
        ([torch.zeros(3, 12, 12)], r"batch 0 has the shape \(3, 12, 12\); pass images as"),
        ([BATCHES[0], torch.zeros(1, 3, 12, 12, dtype=torch.uint8)], "batch 1 holds uint8"),
        ([("a", 1)], "batch 0 is a str"),
        ([torch.full((1, 3, 12, 12), torch.nan)], "batch 0 holds NaN or infinite values"),
        ([torch.zeros(1, 4, 12, 12)], r"the network does not take batches of \(1, 4, 12, 12\)"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_batches_that_do_not_fit(batches: Any, words: str, inplace: bool) -> None:
    model = network(Block(8, padding=1))
    keys = list(model.state_dict())
    with pytest.raises(padfree.PadfreeError, match=words):
        padfree.replace(model, "bsconv-u", batches=batches, input_size=SIZE, inplace=inplace)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("count", [1, 2])
def test_statistics_of_norms_take_two_images_in_a_batch(count: int) -> None:
    model = nn.Sequential(*network(Block(8, padding=1)).children())
    singles = list(BATCHES[0][:count].split(1))
    with pytest.raises(padfree.PadfreeError, match=r"batches hold one image.*the statistics of norms take 2"):
        padfree.replace(model, "bsconv-u", batches=singles, input_size=SIZE, norms=True)
    padfree.replace(model, "bsconv-u", batches=singles, input_size=SIZE)


@pytest.mark.parametrize("inplace", [False, True])
def test_norms_are_estimated_with_the_values_that_were_fitted(inplace: bool) -> None:
    model = network(Block(8, padding=1)).train()
    seen: list[int] = []
    handle = model[1].conv1.register_forward_hook(lambda *_: seen.append(1))
    small = padfree.replace(model, "bsconv-u", batches=BATCHES, input_size=SIZE, norms=True, inplace=inplace)
    assert not seen and small.training and small[1].norm.momentum == 0.1
    written = small[1].conv1(small[0](torch.cat(BATCHES)))
    assert_close(small[1].norm.running_mean, written.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert seen == [1]  # the hook is the pair's
    if inplace:
        handle.remove()
        small(BATCHES[0])
        assert seen == [1]


def test_norms_are_estimated_anew_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.BatchNorm2d(3, affine=False)).train()
    model[2].eval()
    assert reestimate_norms(model, BATCHES) == 2
    x = torch.cat(BATCHES)
    assert_close(model[0].running_mean, x.mean((0, 2, 3)))
    assert_close(model[2].running_mean, torch.zeros(3), atol=1e-5, rtol=0)  # no dropout
    assert [module.training for module in model] == [True, True, False]
    assert model[0].momentum == 0.1


def test_a_fit_needs_finite_maps() -> None:
    model = network(Block(8, padding=1))
    nn.init.constant_(model[0].bias, torch.inf)
    small = padfree.replace(model, "bsconv-u", init="svd", input_size=SIZE)
    with pytest.raises(padfree.PadfreeError, match=r"`1.conv1` reads or writes on these batches is not finite"):
        fit_outputs(model, small, {"1.conv1": 1}, BATCHES)
