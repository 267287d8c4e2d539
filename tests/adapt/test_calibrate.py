"""Calibration on toy networks: closed forms where they are exact, undoing, and what is left as it was."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import padfree
from padfree.adapt.solve import Moments
from padfree.errors import PadfreeError
from padfree.layers.stem import StemTail
from padfree.rules._toys import Residual, depthwise, net, unit

SIZE = (3, 16, 16)


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """The network with norms that have seen images, and weights and biases of their own."""
    torch.manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # type: ignore[assignment]
        for images in batches(3):
            model.train()(images)
        for norm in norms:
            norm.momentum = 0.1
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.3, 0.3)
    return model.eval()


def batches(count: int = 5, size: tuple[int, ...] = SIZE, images: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(images, *size, generator=generator) for _ in range(count)]


def converted(original: nn.Module, **settings: Any) -> nn.Module:
    return padfree.convert(original, input_size=SIZE, init="preserve", **settings)


def inverted(
    act: Callable[[], nn.Module] = nn.ReLU, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Sequential:
    """An inverted bottleneck: expand, strided depthwise, project."""

    def part(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(*layers)

    expand = part(nn.Conv2d(8, 12, 1, bias=False), norm(12), act())
    strided = part(nn.Conv2d(12, 12, 3, 2, 1, groups=12, bias=False), norm(12), act())
    return net(part(expand, strided, part(nn.Conv2d(12, 8, 1, bias=False), norm(8))))


def unpooled(original: nn.Module, model: nn.Module) -> nn.Module:
    """The strided part of `inverted`, with the weights of a converted one, without padding and pool."""
    part: nn.Module = copy.deepcopy(original[1][1])  # type: ignore[index]
    part.load_state_dict(model[1][1].state_dict())  # type: ignore[index]
    part[0].padding = (0, 0)  # type: ignore[index]
    return part


def step(report: padfree.Calibration, name: str) -> Any:
    return next(each for each in report.steps if each.name == name)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


# -- closed forms


def test_a_pool_that_the_1x1_can_tell_apart_is_taken_back_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the channels are constant but for the pool's share, so that what the pool adds is a linear function."""
    monkeypatch.setattr("padfree.adapt.absorb.RIDGE", 1e-12)
    torch.manual_seed(0)
    original = trained(inverted())
    block = original[1]
    with torch.no_grad():
        block[1][0].weight[:6] = 0  # these channels pass the pool alone on
        block[0][0].weight[:6] = block[0][0].weight[6:]  # the pool of the same map as the others
        for norm in (block[0][1],):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor[:6] = tensor[6:]
    model = converted(original)
    report = padfree.calibrate(model, batches(), original=original, steps=["absorb"])
    done = step(report, "absorb")
    assert done.places == 1 and done.kept
    assert done.own_before > 0.3 and done.own_after < 1e-4
    padding_free = copy.deepcopy(original)
    padding_free[1][1][0].padding = (0, 0)
    images = batches(1)[0]
    torch.testing.assert_close(model(images), padding_free(images), rtol=1e-3, atol=1e-3)


def test_the_ridge_is_the_closed_form() -> None:
    """W' = W + [(P'P + lam tr(P'P)/C I)^-1 P'(T - PW')]', with means taken by the norm behind."""
    original = trained(inverted())
    model = converted(original)
    images = batches(5)
    block, read = model[1], {}
    point = block[2][0]
    old = point.weight.detach().double().flatten(1)
    mean = block[2][1].running_mean.clone()
    handle = point.register_forward_pre_hook(lambda module, args: read.update(x=args[0].double()))
    learnt = torch.cat(images[:4])
    with torch.no_grad():
        model(learnt)
        without = unpooled(original, model)(block[0](model[0](learnt))).double()
    handle.remove()
    p, a = (x.transpose(0, 1).flatten(1).T for x in (read["x"], without))
    target = a @ old.T
    pc, tc = p - p.mean(0), target - target.mean(0)
    pull = 0.01 * pc.square().sum() / 12 * torch.eye(12, dtype=torch.float64)
    new = old + torch.linalg.solve(pc.T @ pc + pull, pc.T @ (tc - pc @ old.T)).T
    padfree.calibrate(model, images, steps=["absorb"])
    torch.testing.assert_close(point.weight.detach().flatten(1), new.float(), rtol=1e-4, atol=1e-5)
    shift = (target.mean(0) - p.mean(0) @ new.T).float()
    torch.testing.assert_close(block[2][1].running_mean, mean - shift, rtol=1e-4, atol=1e-5)


def test_rescaling_keeps_the_function_without_the_pool() -> None:
    original = trained(inverted())
    model = converted(original, rules=["depthwise"])
    images = batches(1)[0]
    with torch.no_grad():
        expanded = model[1][0](model[0](images)).clone()
        wanted = unpooled(original, model)(expanded)
        report = padfree.calibrate(model, batches(), steps=["rescale"])
        smaller = model[1][0](model[0](images))
        torch.testing.assert_close(smaller, 0.3 * expanded)
        torch.testing.assert_close(unpooled(original, model)(smaller), wanted, rtol=1e-3, atol=1e-4)
    assert step(report, "rescale").own_after < 0.4 * step(report, "rescale").own_before


@pytest.mark.parametrize("merge", ["norm", "conv"])
def test_a_pool_that_is_a_linear_function_of_the_pixels_is_taken_over_exactly(merge: Any) -> None:
    """Each window of these images has its maximum at the centre, one more than elsewhere: pool(x) = x at the centre."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(8, 3, 9, 9, generator=generator) for _ in range(6)]
    for batch in images:
        batch[:, :, 1::2, 1::2] += 1
    torch.manual_seed(0)
    original = net(depthwise(3), stem=unit(3, 3), out=3)
    original.train()(images[0])
    options = padfree.Options(merge=merge)
    model = padfree.convert(
        original.eval(), rules=["depthwise"], options=options, input_size=(3, 9, 9), init="preserve"
    )
    with torch.no_grad():  # a stem that passes images on
        stem = model[0]
        for tensor, value in ((stem[1].running_mean, 0), (stem[1].running_var, 1 - stem[1].eps), (stem[0].weight, 0)):
            tensor.fill_(value)
        stem[0].weight[range(3), range(3), 1, 1] = 1
        part = copy.deepcopy(original[1])
        part[0].padding = (0, 0)
        wanted = part(images[5])
        report = padfree.calibrate(model, images, steps=["merge"])
        torch.testing.assert_close(model[1](images[5]), wanted, rtol=0.02, atol=0.02)
    done = step(report, "merge")
    assert done.places == 1
    assert done.own_before == pytest.approx(1.0, rel=1e-3)
    assert done.own_after < 0.01


def test_identities_keep_the_function_and_hold_in_train_mode_too() -> None:
    original = trained(net(Residual(unit(8, 16, stride=2), unit(8, 16, 1, 2, act=False)), out=16))
    model = converted(original)
    images = torch.cat(batches(4))
    wanted = model(images)
    report = padfree.calibrate(model, batches(), steps=["identity"])
    torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-5)
    done = step(report, "identity")
    assert done.places == 3 and done.own_after < 0.2 < done.own_before
    reduce = next(module for name, module in model.named_modules() if name.endswith("padfree_reduce"))
    assert isinstance(reduce, nn.Sequential)
    read = nn.Conv2d.forward(reduce[0], model[0](images))
    torch.testing.assert_close(reduce[1].train()(read.clone()), read, rtol=0.02, atol=0.02)


def stem(act: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    parts = [nn.Conv2d(3, 8, 3, padding=1, bias=norm is None), norm or nn.Identity(), act]
    return nn.Sequential(*parts)


def test_a_tail_is_fitted_where_its_activation_is_linear_nowhere() -> None:
    original = trained(net(depthwise(8), stem=stem(nn.Tanh(), nn.BatchNorm2d(8))))
    model = converted(original)
    done = step(padfree.calibrate(model, batches(), original=original, steps=["tail"]), "tail")
    assert done.places == 1
    assert 1e-3 < done.own_after < 0.6 * done.own_before
    again = converted(original)
    padfree.calibrate(again, batches(), original=original, steps=["tail"])
    same(again, values(model))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bias"])
@pytest.mark.parametrize("act", [nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(0.2), nn.ELU()], ids=repr)
def test_a_tail_passes_on_what_its_stem_gives_where_its_activation_is_linear_somewhere(
    act: nn.Module, norm: bool
) -> None:
    """What it reads is moved to where act(x) = x, and back behind its second norm: no fit, in eval and train mode."""
    worst = 3e-3  # of other images: they may have lower values, or the activation comes no nearer
    original = trained(net(depthwise(8), stem=stem(act, nn.BatchNorm2d(8) if norm else None)))
    model = converted(original, rules=["stem"])
    if not norm:  # the tail then has no norms either, which could move anything back
        assert step(padfree.calibrate(model, batches(), steps=["tail"]), "tail").own_after > worst
        return
    images = batches()
    report = padfree.calibrate(model, images, original=original, steps=["identity", "tail"])
    done = step(report, "tail")
    assert done.places == 1
    assert done.own_after < worst < 0.03 * done.own_before
    learnt = torch.cat(images[:4])
    torch.testing.assert_close(model(learnt), original(learnt), rtol=1e-2, atol=1e-2)
    bias = model[0][1].bias
    assert bias.requires_grad
    assert bool((bias - original[0][1].bias >= 0).all())
    torch.testing.assert_close(model.train()(learnt), original.train()(learnt), rtol=5e-2, atol=5e-2)


def test_an_exact_tail_is_left_alone() -> None:
    model = converted(trained(inverted()))
    before = values(model)
    assert step(padfree.calibrate(model, batches(), steps=["tail"]), "tail").places == 0
    same(model, before)


def test_recalibration_is_the_mean_over_batches() -> None:
    original = trained(inverted())
    model = converted(original)
    norm = model[0][1]
    norm.running_mean += 1
    count = norm.num_batches_tracked.clone()
    images = batches(5)
    report = padfree.calibrate(model, images, steps=["recalibrate"])
    read = [model[0][0](x) for x in images[:4]]
    wanted = torch.stack([x.mean((0, 2, 3)) for x in read]).mean(0)
    torch.testing.assert_close(norm.running_mean, wanted)
    variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in read]).mean(0)
    torch.testing.assert_close(norm.running_var, variance)
    assert torch.equal(norm.num_batches_tracked, count) and norm.momentum == 0.1
    assert step(report, "recalibrate").own_after < step(report, "recalibrate").own_before


def test_the_classifier_is_the_ridge_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("padfree.adapt.classifier.RIDGES", (0.1,))
    original = trained(inverted())
    model = converted(original)
    images = batches(5)
    with torch.no_grad():
        body, last = model[:-1], model[-1][-1]
        x = torch.cat([model[-1][:-1](body(part)) for part in images[:4]]).double()
        y = torch.cat([original(part) for part in images[:4]]).double()
        old = last.weight.double()
        xc, yc = x - x.mean(0), y - y.mean(0)
        pull = 0.1 * xc.square().sum() / 8 * torch.eye(8, dtype=torch.float64)
        new = old + torch.linalg.solve(xc.T @ xc + pull, xc.T @ (yc - xc @ old.T)).T
    report = padfree.calibrate(model, images, original=original, steps=["classifier"])
    assert step(report, "classifier").kept
    torch.testing.assert_close(last.weight.detach(), new.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.bias.detach(), (y.mean(0) - x.mean(0) @ new.T).float(), rtol=1e-4, atol=1e-5)


def test_imitation_brings_the_last_map_nearer_to_the_originals() -> None:
    original = trained(net(depthwise(8), unit(8, 8, 1)))
    model = converted(original, rules=["depthwise"])
    done = padfree.calibrate(model, batches(6, images=16), original=original, steps=["absorb", "imitate"])
    imitated = step(done, "imitate")
    assert imitated.places == 2
    assert imitated.own_after < imitated.own_before


def test_imitation_makes_up_for_what_is_wrong_with_the_rest_of_a_sum() -> None:
    """The shortcut of a residual of the last map is spoilt by a constant, which its branch can take back exactly."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = unit(8, 8, 1, act=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.branch(x)
            return out

    original = trained(net(depthwise(8), Sum()))
    model = converted(original, rules=["depthwise"])
    with torch.no_grad():
        model[1][1].bias += 3  # of the strided convolution's norm, which the imitation leaves alone
    done = step(padfree.calibrate(model, batches(6, images=16), original=original, steps=["imitate"]), "imitate")
    images = batches(1)[0]
    with torch.no_grad():
        mine, theirs = (each[2](each[1](each[0](images))).mean((0, 2, 3)) for each in (model, original))
    assert done.own_after < 0.3 * done.own_before
    torch.testing.assert_close(mine, theirs, rtol=0.2, atol=0.2)


def test_weighted_rows_count_as_if_they_came_more_often() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 20, 3, generator=generator) for _ in range(2))
    weight = torch.zeros(2, 3, 3)
    once, often = Moments(), Moments()
    once.add(x, y)
    once.add(x[:, :5], y[:, :5], 3)
    often.add(torch.cat([x, *3 * [x[:, :5]]], 1), torch.cat([y, *3 * [y[:, :5]]], 1))
    for found in (once, often):
        assert found.rows == 35
    torch.testing.assert_close(once.ridge(weight, 0.1, centred=True), often.ridge(weight, 0.1, centred=True))
    torch.testing.assert_close(torch.tensor(once.error(weight)), torch.tensor(often.error(weight)))


def test_the_strength_is_chosen_by_other_rows() -> None:
    """Targets that are noise are best not fitted at all, and those that are a linear map without a pull."""
    generator = torch.Generator().manual_seed(0)
    x, other, noise, true = (torch.randn(1, rows, 8, generator=generator) for rows in (20, 200, 220, 8))
    for targets, strength in ((noise, 100.0), (torch.cat([x, other], 1) @ true.mT, 1e-6)):
        learnt, held = Moments(), Moments()
        learnt.add(x, targets[:, :20])
        held.add(other, targets[:, 20:])
        solved, _, error = learnt.best(held, torch.zeros(1, 8, 8), (1e-6, 1.0, 100.0), centred=True)
        torch.testing.assert_close(solved, learnt.ridge(torch.zeros(1, 8, 8), strength, centred=True))
        assert error == pytest.approx(held.error(solved, learnt.constant(solved)))


def test_all_of_it_brings_a_network_near_to_what_it_was() -> None:
    original = trained(inverted())
    model = converted(original)
    report = padfree.calibrate(model, batches(10, images=16), original=original)
    assert report.after < 0.5 * report.before
    assert [each.name for each in report.steps] == [
        "identity", "tail", "rescale", "merge", "absorb", "imitate", "recalibrate", "classifier",
    ]  # fmt: skip
    assert json.loads(json.dumps(report.to_dict()))["images"] == 128
    assert "calibrated Sequential on 128 images, 32 held back" in str(report)
    images = batches(1)[0]
    with torch.no_grad():
        far, near = ((each(images) - original(images)).norm() for each in (converted(original), model))
    assert float(near) < 0.7 * float(far)


# -- undoing, and what stays


def test_a_step_that_makes_the_outputs_worse_is_undone() -> None:
    original = trained(inverted())
    model = converted(original, rules=["stem"])
    before = values(model)
    images = batches(10)
    for batch in images[:4] + images[5:9]:  # what it learns from is nothing like what it is measured on
        batch.mul_(30).add_(5)
    report = padfree.calibrate(model, images, original=original, steps=["recalibrate"])
    assert not step(report, "recalibrate").kept and "undone" in str(report)
    assert report.before == pytest.approx(0, abs=1e-5) and report.after == report.before
    same(model, before)


def test_modes_gradients_hooks_and_random_state_are_as_before() -> None:
    original = trained(inverted())
    model = converted(original).train()
    model[0].eval()
    fired: list[str] = []
    model[1].register_forward_hook(lambda *_: fired.append("hook"))
    first = next(model.parameters()).requires_grad_(False)
    parameters = [id(parameter) for parameter in model.parameters()]
    gradient = model[1][0][0].weight.grad = torch.ones_like(model[1][0][0].weight)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    padfree.calibrate(model, batches(), original=original)
    assert modes == [module.training for module in model.modules()]
    assert parameters == [id(parameter) for parameter in model.parameters()]
    assert not first.requires_grad and model[1][0][0].weight.requires_grad
    assert model[1][0][0].weight.grad is gradient and bool((gradient == 1).all())
    assert fired == [] and torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.grad_fn for parameter in model.parameters())


def test_it_does_the_same_every_time_and_under_any_mode() -> None:
    original = trained(inverted(nn.Hardswish))
    first, second, third = (converted(original) for _ in range(3))
    padfree.calibrate(first, batches(), original=original)
    with torch.inference_mode():
        padfree.calibrate(second, batches(), original=original)
    with torch.enable_grad():
        padfree.calibrate(third, iter(batches()), original=original)
    same(second, values(first))
    same(third, values(first))


def test_the_images_are_left_alone() -> None:
    original, images = trained(inverted()), batches()
    padfree.calibrate(converted(original), images, original=original)
    torch.testing.assert_close(images, batches(), rtol=0, atol=0)


def test_the_original_is_left_alone() -> None:
    original = trained(inverted())
    before = values(original)
    padfree.calibrate(converted(original), batches(), original=original)
    same(original, before)


def test_what_was_done_is_not_done_again() -> None:
    original = trained(inverted())
    model = converted(original)
    padfree.calibrate(model, batches(), steps=["rescale", "absorb"])
    before = values(model)
    report = padfree.calibrate(model, batches(), steps=["rescale", "absorb"])
    assert [each.places for each in report.steps] == [0, 0]
    assert "done before" in str(report)
    same(model, before)


# -- networks of which less can be done


def test_group_norms_are_done_without() -> None:
    original = trained(inverted(norm=lambda channels: nn.GroupNorm(2, channels)), 2)
    with torch.no_grad():
        original[1][0][1].weight[0] = 2.0
    model = converted(original)
    report = padfree.calibrate(model, batches(), original=original)
    assert step(report, "absorb").places == 1
    assert "not rescaled" in str(report)
    assert report.after < report.before


def frozen(channels: int) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(channels)


def test_frozen_norms_keep_their_statistics_in_recalibration() -> None:
    original = inverted(norm=frozen)
    torch.manual_seed(3)
    for module in original.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[operator, union-attr]
    model = converted(original.eval())
    report = padfree.calibrate(model, batches(), original=original)
    assert step(report, "rescale").places == 1 and step(report, "absorb").places == 1
    assert "norms are frozen" in str(report)
    assert report.after < report.before


def test_shared_weights_are_named_and_left() -> None:
    original = trained(inverted())
    original[1].add_module("again", nn.Identity())
    model = converted(original)
    twin = copy.deepcopy(model[1][2][0])
    twin.weight = model[1][2][0].weight
    model[1][2].add_module("twin", nn.Identity())
    model[1][2].twin.add_module("inner", twin)
    report = padfree.calibrate(model, batches(), steps=["absorb"])
    assert step(report, "absorb").places == 0
    assert "its weight is computed, or another layer's too" in str(report)


def test_a_tail_that_begins_fresh_is_named_and_left() -> None:
    model = padfree.convert(trained(inverted(nn.SiLU)), input_size=SIZE, init="fresh")
    report = padfree.calibrate(model, batches(), steps=["tail"])
    assert 'not the identity that init="preserve" begins with (init="fresh", or' in str(report)


def test_a_sum_that_no_1x1_reads_is_named() -> None:
    model = converted(trained(net(depthwise(8), unit(8, 8))))
    report = padfree.calibrate(model, batches(), steps=["absorb"])
    assert "is no plain 1x1 convolution" in str(report)


def test_without_the_original_steps_are_judged_one_by_one() -> None:
    model = converted(trained(inverted()))
    report = padfree.calibrate(model, batches())
    assert math.isnan(report.before) and report.to_dict()["before"] is None
    assert {each.name for each in report.steps}.isdisjoint({"imitate", "classifier"})
    assert "without original=" in str(report)


# -- wrong arguments


def pairs() -> list[Any]:
    return [(batch, torch.zeros(len(batch))) for batch in batches()]


def spoilt(value: float) -> list[Tensor]:
    images = batches()
    images[2][0, 0, 0, 0] = value
    return images


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "batches is empty"),
        (iter(()), "batches is empty"),
        (pairs(), r"batch 0 is a tuple of 2 .* no labels are taken; pass \(images for images, labels in loader\)"),
        ([[batch] for batch in batches()], r"batch 0 is a list of 1 .*; pass \(images for \(images,\) in loader\)"),
        ([(batch, 1, 2) for batch in batches()], r"is a tuple of 3 .* pass \(batch\[0\] for batch in loader\)"),
        ([{"image": 1}], "batch 0 is a dict with 'image'"),
        (7, "batches is int"),
        (["a.png"], "batch 0 is a str"),
        ([torch.zeros(3, 16, 16)], r"has the shape \(3, 16, 16\); pass images as \(N, C, H, W\)"),
        ([torch.zeros(0, 3, 16, 16)], r"has the shape \(0, 3, 16, 16\)"),
        ([torch.zeros(4, 3, 16, 16, dtype=torch.uint8)], "holds uint8"),
        ([torch.zeros(4, 3, 16, 16, device="meta")], "meta device"),
        (spoilt(math.nan), "batch 2 holds NaN"),
        (spoilt(math.inf), "batch 2 holds NaN or infinite"),
        ([torch.zeros(4, 1, 16, 16)] * 5, "the batches do not fit"),
        ([torch.zeros(4, 3, 2, 2)] * 5, "the batches do not fit"),
        ([torch.zeros(4, 3, 16, 16), torch.zeros(4, 1, 16, 16)], "1 and 3 channels"),
        ([torch.zeros(1, 3, 16, 16)], "batches hold one image"),
    ],
)
def test_wrong_batches_are_refused_and_nothing_changes(given: Any, words: str) -> None:
    original = trained(inverted())
    model = converted(original)
    before = values(model)
    with pytest.raises(PadfreeError, match=words):
        padfree.calibrate(model, given, original=original)
    same(model, before)
    assert "padfree_calibrated" not in model.__dict__


def test_wrong_networks_are_refused() -> None:
    original = trained(inverted())
    model = converted(original)
    images = batches()
    for given, before, words in (
        (original, None, "is not converted; calibrate what padfree.convert returned"),
        (padfree.fuse(model), None, "is fused, and its weights are frozen"),
        (model, padfree.fuse(model), "original is a fused Sequential, .* pass the network that was converted"),
        (torch.zeros(1), None, "takes a torch.nn.Module, not Tensor"),
        (model, model, "original is a converted network"),
        (model, torch.zeros(1), "original takes a torch.nn.Module"),
        (model, trained(nn.Sequential(*original[:-1], nn.Flatten(), nn.LazyLinear(9))), "it is another network"),
        (model, nn.Linear(3, 4), "original does not run"),
        (copy.deepcopy(model).to("meta"), None, "meta device"),
    ):
        with pytest.raises(PadfreeError, match=words):
            padfree.calibrate(given, images, original=before)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["absorp"], "unknown step 'absorp'; there are identity"),
        ("imitate", "pass original="),
        (3, "steps is 3; it takes names of steps: identity"),
        ([3], "unknown step 3"),
    ],
)
def test_wrong_steps_are_refused(steps: Any, words: str) -> None:
    with pytest.raises(PadfreeError, match=words):
        padfree.calibrate(converted(trained(inverted())), batches(), steps=steps)


def test_a_failure_on_the_way_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from padfree.adapt import calibrate as module

    def fail(work: Any) -> Any:
        raise KeyboardInterrupt

    original = trained(inverted())
    model = converted(original)
    before = values(model)
    monkeypatch.setitem(module.STEPS, "imitate", fail)
    with pytest.raises(KeyboardInterrupt):
        padfree.calibrate(model, batches(), original=original)
    same(model, before)


def test_a_loader_and_uneven_batches_will_do() -> None:
    original = trained(inverted())
    model = converted(original)
    images = torch.cat(batches(6, images=9))
    loader: Any = torch.utils.data.DataLoader(images, batch_size=8)  # type: ignore[arg-type]
    report = padfree.calibrate(model, loader, original=original)
    assert (report.images, report.held_back) == (46, 8)
    few = padfree.calibrate(converted(original), [images[:10], images[10:13]], original=original)
    assert (few.images, few.held_back) == (10, 3)


def test_a_calibrated_network_is_saved_copied_and_fused() -> None:
    original = trained(inverted())
    model = converted(original)
    padfree.calibrate(model, batches(), original=original)
    images = batches(1)[0]
    torch.testing.assert_close(copy.deepcopy(model)(images), model(images))
    torch.testing.assert_close(padfree.fuse(model.eval())(images), model(images), rtol=1e-3, atol=1e-4)
    assert any(isinstance(module, StemTail) for module in model.modules())


@pytest.mark.parametrize("end", [nn.Identity(), nn.Softmax(1)], ids=["features", "softmax"])
@pytest.mark.parametrize("count", [2, 12], ids=["few", "many"])
def test_outputs_that_no_classifier_mends_do_not_get_worse(end: nn.Module, count: int) -> None:
    """A step that is judged by the outputs is kept only where they come nearer as they are."""
    original = trained(nn.Sequential(inverted()[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), end))
    report = padfree.calibrate(converted(original), batches(count, images=16), original=original)
    assert step(report, "classifier").places == 0
    judged = [step(report, name) for name in ("imitate", "recalibrate")]
    assert any(each.places for each in judged)
    for each in judged:
        assert each.kept is not (each.after > each.before * (1 + 1e-4))
