"""How new layers begin: fresh, or at values where the network computes what it did."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import padfree
from padfree.layers.new import new_layers, untrained
from padfree.layers.preserve import make_identity, make_zero, shows_training
from padfree.layers.stem import StemTail
from padfree.rules._toys import Residual, depthwise, net, unit

SIZE = (3, 32, 32)


def trained(model: nn.Module) -> nn.Module:
    """The network with norms as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.3)):
                    tensor.uniform_(low, low + 1)
                module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr, operator]
    return model.eval()


def quiet(model: nn.Module, **settings: object) -> nn.Module:
    return padfree.convert(model, input_size=SIZE, init="preserve", **settings)  # type: ignore[arg-type]


def tail_values(converted: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the stem's tail reads (behind the module whose place it takes), and what it gives."""
    tail = next(module for module in converted.modules() if isinstance(module, StemTail))
    seen: list[tuple[Tensor, Tensor]] = []
    handle = tail.register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out.clone())))
    with torch.no_grad():
        converted(images)
    handle.remove()
    read, out = seen[0]
    return (tail.end(read) if tail.has_end else read), out


def acts(act: Callable[[], nn.Module]) -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act())
    return net(depthwise(8), stem=stem)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_a_tail_is_the_identity_for_activations_that_are_their_own_square(act: Callable[[], nn.Module]) -> None:
    read, out = tail_values(quiet(trained(acts(act))), torch.randn(2, *SIZE))
    torch.testing.assert_close(out, read)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Mish])
def test_with_the_residual_it_is_for_all_that_keep_zero(act: Callable[[], nn.Module]) -> None:
    options = padfree.Options(stem_residual=True)
    read, out = tail_values(quiet(trained(acts(act)), options=options), torch.randn(2, *SIZE))
    torch.testing.assert_close(out, read)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_tail_that_absorbs_a_pool_is_the_pool(stride: int, residual: bool) -> None:
    stem = nn.Sequential(unit(3, 8), nn.MaxPool2d(3, stride, padding=1))
    original = trained(net(depthwise(8), stem=stem))
    images = torch.randn(2, *SIZE)
    read, out = tail_values(quiet(original, options=padfree.Options(stem_residual=residual)), images)
    torch.testing.assert_close(out, nn.functional.max_pool2d(read, 3, stride, padding=1))


def test_a_preactivation_tail_with_the_residual_adds_nothing() -> None:
    body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), unit(8, 8, stride=2))
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    original = trained(net(Residual(body, unit(8, 8, 1, 2, act=False)), stem=stem))
    converted = quiet(original, options=padfree.Options(stem_residual=True))
    read, out = tail_values(converted, torch.randn(2, *SIZE))
    assert next(m for m in converted.modules() if isinstance(m, StemTail)).preact
    torch.testing.assert_close(out, read)


def residual_net(projection: nn.Module) -> nn.Sequential:
    return net(Residual(unit(8, 16, stride=2), projection), out=16)


@pytest.mark.parametrize(
    ("projection", "options"),
    [
        (lambda: unit(8, 16, 1, 2, act=False), padfree.Options()),
        (lambda: nn.Sequential(nn.Conv2d(8, 16, 1, 2)), padfree.Options()),
        (lambda: unit(8, 16, 1, 2, act=False), padfree.Options(projection="dense")),
        (lambda: nn.Sequential(nn.Conv2d(8, 16, 1, 2)), padfree.Options(projection="dense")),
    ],
)
def test_shortcuts_give_what_the_unpadded_block_gives(
    projection: Callable[[], nn.Module], options: padfree.Options
) -> None:
    """Dense shortcuts add nothing, and projections read the centre of each window."""
    original = trained(residual_net(projection()))
    converted = quiet(original, options=options, rules=["dense", "projection"])
    images = torch.randn(2, *SIZE)
    block = original[1]
    assert isinstance(block, Residual)
    with torch.no_grad():
        x = original[0](images)
        conv = copy.deepcopy(block.main)
        assert isinstance(conv, nn.Sequential)
        conv[0].padding = (0, 0)
        main = conv(x)
        expected = block.act(main + block.shortcut(x[:, :, 1:-1, 1:-1]))
        torch.testing.assert_close(converted[1](converted[0](images)), expected)  # type: ignore[index]


def test_a_zero_shortcut_learns() -> None:
    converted = quiet(trained(residual_net(unit(8, 16, 1, 2, act=False))))
    converted.train()(torch.randn(4, *SIZE)).square().mean().backward()
    layers = new_layers(converted)
    for path, module in layers.items():
        assert all(p.grad is not None for p in module.parameters()), path
    point = next(path for path in layers if path.endswith("shortcut.conv"))
    weight = layers[point].weight
    assert isinstance(weight, nn.Parameter) and weight.grad is not None
    assert not weight.any() and weight.grad.any()


def test_auto_looks_at_the_norms() -> None:
    fresh, old = acts(nn.ReLU), trained(acts(nn.ReLU))
    assert padfree.plan(fresh, input_size=SIZE).init == "fresh"
    assert padfree.plan(old, input_size=SIZE).init == "preserve"
    assert padfree.plan(old, input_size=SIZE, init="fresh").init == "fresh"
    assert padfree.plan(fresh, input_size=SIZE, init="preserve").init == "preserve"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), False),
        (nn.BatchNorm2d(4, affine=False), False),
        (nn.GroupNorm(2, 4), False),
        (nn.Conv2d(3, 4, 3), False),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to("meta"), False),
    ],
)
def test_a_fresh_network_shows_no_training(module: nn.Module, expected: bool) -> None:
    assert shows_training(module) is expected


def test_any_sign_of_training_is_seen() -> None:
    norms: list[nn.Module] = [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False), nn.LayerNorm(4)]
    with torch.no_grad():
        norms[0](torch.randn(2, 4, 3, 3))
        norms[1].weight[1] = 2.0  # type: ignore[index, union-attr, operator]
        norms[2].running_mean[1] = 2.0  # type: ignore[index, union-attr, operator]
        norms[3].bias[1] = 2.0  # type: ignore[index, union-attr, operator]
    assert all(map(shows_training, norms))


def test_fresh_draws_what_it_drew_before_and_preserve_too() -> None:
    """New layers take the same numbers from the generator, so that what is made next is the same."""
    states, weights = [], []
    for init in ("fresh", "auto", "preserve"):
        torch.manual_seed(3)
        converted = padfree.convert(acts(nn.ReLU), input_size=SIZE, init=init)  # type: ignore[arg-type]
        states.append(torch.get_rng_state())
        weights.append(converted.state_dict())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_the_choice_is_in_the_plan_and_in_the_comparison() -> None:
    original = trained(acts(nn.ReLU))
    made = padfree.plan(original, input_size=SIZE)
    assert "init preserve" in str(made)
    again = padfree.Plan.from_dict(made.to_dict())
    assert again == made
    converted, fresh = again.apply(original), again.apply(original, init="fresh")
    assert (converted.padfree_plan.init, fresh.padfree_plan.init) == ("preserve", "fresh")  # type: ignore[union-attr]
    torch.testing.assert_close(converted.state_dict(), quiet(original).state_dict(), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(fresh.state_dict(), converted.state_dict())
    comparison = padfree.compare(original, converted)
    assert (comparison.init, comparison.new_layers) == ("preserve", 4)
    assert "4, init preserve" in str(comparison)


def test_plans_of_earlier_versions_are_fresh() -> None:
    data = padfree.plan(trained(acts(nn.ReLU)), input_size=SIZE).to_dict()
    del data["init"]
    assert padfree.Plan.from_dict(data).init == "fresh"
    with pytest.raises(padfree.PadfreeError, match="init of the plan is 'auto'"):
        padfree.Plan.from_dict(data | {"init": "auto"})


@pytest.mark.parametrize("init", ["old", None, 1])
def test_another_word_is_refused(init: object) -> None:
    with pytest.raises(padfree.PadfreeError, match="init is"):
        padfree.convert(acts(nn.ReLU), input_size=SIZE, init=init)  # type: ignore[arg-type]


def test_a_trained_network_is_told_about_once() -> None:
    original = trained(acts(nn.ReLU))
    with pytest.warns(padfree.UntrainedWarning, match=r"4 new layers \(.* parameters\) are untrained: call") as told:
        padfree.convert(original, input_size=SIZE)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padfree.convert(acts(nn.ReLU), input_size=SIZE)
        padfree.convert(original, input_size=SIZE, init="fresh")
        quiet(original)
    assert untrained(original) == ""


def test_a_second_conversion_leaves_the_new_layers_of_the_first() -> None:
    original = trained(acts(nn.ReLU))
    first = quiet(original, rules=["stem"])
    tail = next(module for module in first.modules() if isinstance(module, StemTail))
    with torch.no_grad():
        tail.conv_pw.weight.fill_(2.0)
    second = quiet(first, rules=["depthwise"])
    kept = next(module for module in second.modules() if isinstance(module, StemTail))
    assert bool((kept.conv_pw.weight == 2.0).all())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, eps=0.1)])
def test_an_identity_norm(norm: nn.BatchNorm2d) -> None:
    norm.train()(torch.randn(8, 4, 5, 5) * 3 + 1)
    x = torch.randn(2, 4, 5, 5)
    assert make_identity(norm)
    torch.testing.assert_close(norm.eval()(x), x)


def test_norms_without_statistics_are_no_identities_but_can_be_silent() -> None:
    norm = nn.GroupNorm(2, 4)
    assert not make_identity(norm)
    assert make_zero(norm)
    assert not norm(torch.randn(2, 4, 5, 5)).any()
    assert not make_zero(nn.BatchNorm2d(4, affine=False))


def test_the_image_with_the_originals_last_map() -> None:
    original = net(depthwise(8), depthwise(8), depthwise(8), stem=unit(3, 8, stride=2))
    converted = padfree.convert(original, input_size=(3, 224, 224))
    comparison = padfree.compare(original, converted)
    assert comparison.last_map_size == (3, 238, 238)  # 14 <- 29 <- 59 <- 119 <- 238
    assert comparison.last_map_macs == padfree.compare(original, converted, (3, 238, 238)).macs.converted
    assert "on 3x238x238" in str(comparison)
    assert padfree.compare(original, original, (3, 64, 64)).last_map_size is None
