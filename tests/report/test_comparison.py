"""Comparisons against figures worked out by hand, and that measuring leaves both networks alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import padfree
from padfree.deploy.onnx import to_onnx
from padfree.errors import PadfreeError
from padfree.layers.learned_groups import LearnedGroupConv2d, condense_stage, condensed
from padfree.record.recording import record
from padfree.report.comparison import Comparison, Pair, StageMap, compare
from padfree.report.macs import count_macs
from padfree.report.smallest import minimum_input


class Toy(nn.Module):
    """3x33x33 -> two strided convolutions, one of them functional, then 1x1 pixels and a linear layer."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=padding, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=padding, groups=4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        x = torch.nn.functional.conv2d(x, self.second.weight, None, 2, self.second.padding, groups=4) + 0
        x = nn.functional.max_pool2d(x, 3, 1, 1)
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture(scope="module")
def large() -> tuple[nn.Module, nn.Module, Comparison]:
    original = timm.create_model("mobilenetv3_large_100")
    converted = padfree.convert(original)
    return original, converted, compare(original, converted)


def test_mobilenetv3_large_costs_what_the_method_says(large: tuple[nn.Module, nn.Module, Comparison]) -> None:
    comparison = large[2]
    assert comparison.params == Pair(5_483_032, 5_483_752)
    assert comparison.macs.original == pytest.approx(225.4e6, rel=3e-3)
    assert comparison.macs.converted == pytest.approx(206.6e6, rel=3e-3)
    before = [stage.before for stage in comparison.maps]
    after = [stage.after for stage in comparison.maps]
    assert before == [(112, 112), (56, 56), (28, 28), (14, 14), (7, 7)]
    assert after == [(112, 112), (55, 55), (27, 27), (13, 13), (6, 6)]
    assert comparison.notes == ()


def test_the_smallest_input_is_the_smallest_on_real_tensors(
    large: tuple[nn.Module, nn.Module, Comparison],
) -> None:
    _, converted, comparison = large
    side = comparison.minimum_input
    assert side == 61  # the padded stem gives 31, then 15, 7, 3, 1
    converted = copy.deepcopy(converted).eval()
    with torch.no_grad():
        assert converted(torch.rand(1, 3, side, side)).shape == (1, 1000)
        with pytest.raises(RuntimeError):
            converted(torch.rand(1, 3, side - 1, side - 1))


def test_multiply_adds_by_hand() -> None:
    count = count_macs(Toy(), (3, 33, 33))
    first, second = 17 * 17 * 4 * 3 * 9, 9 * 9 * 4 * 9  # output pixels x output channels x kernel
    norm, head = 17 * 17 * 4 * 2, 4 * 5
    assert count.macs == first + second + norm + head
    assert count.note == ""
    assert {"max_pool2d": 1, "mean": 1, "add": 1}.items() <= count.uncounted.items()


def test_maps_and_smallest_input_by_hand() -> None:
    comparison = compare(Toy(padding=1), Toy(padding=0), (3, 33, 33))
    # the second convolution is functional, so no module call says what it writes
    assert comparison.maps == (StageMap((17, 17), (16, 16)),)
    assert comparison.minimum_input == 7  # (7 - 3) // 2 + 1 = 3, then 1
    assert compare(Toy(), Toy(), (3, 33, 33)).minimum_input == 1


def test_a_network_that_takes_multiples_only() -> None:
    class Windows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unfold(2, 24, 24) if x.shape[-1] % 24 == 0 else x.view(0)

    recording = record(Windows(), (3, 96, 96))
    assert minimum_input(recording, recording) == 24


def test_a_side_found_by_bisection() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, x.new_ones(1, 3, 151, 151))

    recording = record(Wide(), (3, 224, 224))
    assert minimum_input(recording, recording) == 151


def test_a_size_that_only_the_original_takes_is_none() -> None:
    class Fixed(nn.Module):
        def __init__(self, side: int) -> None:
            super().__init__()
            self.side = side

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] != self.side:
                raise ValueError("another size")
            return x * 2

    assert minimum_input(record(Fixed(16), (3, 16, 16)), record(Fixed(32), (3, 32, 32))) is None
    only = record(Fixed(16), (3, 16, 16))
    assert minimum_input(only, only) == 16


def test_measuring_leaves_both_networks_and_the_random_state_alone() -> None:
    original, converted = Toy().train(), Toy(padding=0).train()
    converted.head.requires_grad_(False)
    fired: list[str] = []
    original.register_forward_hook(lambda *_: fired.append("hook"))
    before = [copy.deepcopy(model.state_dict()) for model in (original, converted)]
    state = torch.random.get_rng_state()
    compare(original, converted, (3, 33, 33))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fired == []
    for model, kept in zip((original, converted), before, strict=True):
        assert model.training
        assert all(module.training for module in model.modules())
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        torch.testing.assert_close(dict(model.state_dict()), dict(kept), rtol=0, atol=0)
    assert not converted.head.weight.requires_grad


def test_half_precision_and_meta_models_are_counted_alike() -> None:
    usual = count_macs(Toy(), (3, 33, 33))
    assert count_macs(Toy().bfloat16(), (3, 33, 33)) == usual
    assert count_macs(Toy().to("meta"), (3, 33, 33)) == usual


def test_a_network_that_cannot_be_traced_gets_a_note() -> None:
    class Stubborn(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.jit.is_tracing():
                raise RuntimeError("no tracing here")
            return super().forward(x)

    comparison = compare(Stubborn(), Stubborn(), (3, 33, 33))
    assert comparison.macs == Pair(None, None)
    assert comparison.notes == ("fvcore cannot count it: RuntimeError: no tracing here",)
    assert "MACs (fvcore)    ? -> ?" in str(comparison)


def test_a_size_the_network_does_not_take_is_refused() -> None:
    with pytest.raises(PadfreeError, match="does not run on a 4x33x33 input"):
        compare(Toy(), Toy(), (4, 33, 33))


def test_it_prints_and_serialises(large: tuple[nn.Module, nn.Module, Comparison]) -> None:
    comparison = large[2]
    text = str(comparison)
    assert "parameters       5,483,032 -> 5,483,752 (+0.01%)" in text
    assert "MACs (fvcore)    225.4M -> 206.6M (-8.3" in text
    assert "maps before      112 56 28 14 7\n" in text
    assert "maps after       112 55 27 13 6\n" in text
    assert "smallest input   61 pixels a side" in text
    assert "max_pool2d 0 -> 5" in text
    data = json.loads(json.dumps(comparison.to_dict()))
    assert data["params"] == {"original": 5_483_032, "converted": 5_483_752}
    assert data["maps"]["before"][0] == [112, 112]
    assert len(data["maps"]["before"]) == len(data["maps"]["after"]) == 5
    assert data["uncounted"]["max_pool2d"] == {"original": 0, "converted": 5}
    assert data["minimum_input"] == 61


def test_change_is_relative_and_unknown_without_figures() -> None:
    assert Pair(200, 150).change == -0.25
    assert Pair(None, 3).change is None
    assert Pair(0, 3).change is None


class FixedEmbedding(nn.Module):
    """Takes 40x40 images only: a position embedding is added before the strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1)
        self.position = nn.Parameter(torch.rand(1, 8, 40, 40))
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.conv(x) + self.position).mean((2, 3))


def test_a_converted_network_is_looked_at_in_the_size_it_was_converted_at(tmp_path: Path) -> None:
    original = FixedEmbedding().eval()
    converted = padfree.convert(original, input_size=(3, 40, 40)).eval()
    assert padfree.compare(original, converted).input_size == (3, 40, 40)
    image = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(padfree.fuse(converted)(image), converted(image))
    assert to_onnx(converted, tmp_path / "a.onnx", dynamic_sides=False).exists()
    assert padfree.plan(converted).input_size == (3, 40, 40)


@pytest.mark.parametrize("other", [None, "resnet18", 3])
def test_what_is_no_network_is_refused(other: object) -> None:
    model, kind = nn.Conv2d(3, 4, 3), type(other).__name__
    for pair in ((other, model), (model, other), (other, other)):
        with pytest.raises(PadfreeError, match=f"compare takes two torch.nn.Modules, not {kind}"):
            compare(*pair)  # type: ignore[arg-type]
    with pytest.raises(PadfreeError, match=f"is_converted takes a torch.nn.Module, not {kind}"):
        padfree.is_converted(other)  # type: ignore[arg-type]


def test_masked_weights_of_learned_groups_do_not_count():
    model = nn.Sequential(LearnedGroupConv2d(8, 8, bias=True), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    before = padfree.compare(model, model, (8, 6, 6))
    assert (before.params.converted, before.macs.converted) == (64 + 8 + 36, (64 + 32) * 36)
    for kept in (48, 32, 16, 16):
        condense_stage(model)
        assert model[0].masked == 64 - kept
        figures = padfree.compare(model, condensed(model), (8, 6, 6))
        assert figures.params.original == figures.params.converted == kept + 8 + 36
        assert figures.macs.original == figures.macs.converted == (kept + 32) * 36
