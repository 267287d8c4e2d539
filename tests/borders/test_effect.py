"""Border effects of networks whose answer is known by hand."""

from __future__ import annotations

import json

import pytest
import torch
from recordings import Written
from torch import Tensor, nn

import padfree
from padfree.borders.effect import scene_size
from padfree.errors import PadfreeError


def ones(stride: int = 1, **more: object) -> nn.Conv2d:
    """A 3x3 mean, padded by one."""
    conv = nn.Conv2d(1, 1, 3, stride, 1, bias=False, **more)  # type: ignore[arg-type]
    nn.init.constant_(conv.weight, 1 / 9)
    return conv


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_circular_padding_of_a_periodic_scene_has_none() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, 1, 1, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()
    scenes = noise(2, 1, 8, 8).double().tile(2, 2)
    found = padfree.border_effect(model, scenes, (1, 8, 8), margin=4, shifts=(2, 4))
    assert [layer.name for layer in found.layers] == ["1", "2"]
    for layer in found.layers:
        assert float(layer.difference.max()) == pytest.approx(0, abs=1e-12)
        assert layer.asymmetry == pytest.approx((0, 0), abs=1e-12)
    for shift in found.shifts:  # whole positions of a circle
        assert (shift.consistency, shift.change) == (1, pytest.approx(0, abs=1e-12))


def test_no_padding_has_none() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2)).double()
    found = padfree.border_effect(model, noise(2, 1, 31, 31).double(), (1, 15, 15), margin=8)
    assert [layer.size for layer in found.layers] == [(7, 7), (3, 3)]
    assert all(float(layer.difference.max()) == pytest.approx(0, abs=1e-12) for layer in found.layers)
    assert found.shifts == ()


def test_zeros_around_a_constant_image() -> None:
    """A mean of ones is 1 away from the border; 2/3 at a side, 4/9 in a corner."""
    found = padfree.border_effect(ones(), torch.ones(1, 1, 16, 16), (1, 8, 8), margin=4)
    (layer,) = found.layers
    line = torch.tensor([2 / 3, *[1.0] * 6, 2 / 3], dtype=torch.float64)
    torch.testing.assert_close(layer.difference, 1 - torch.outer(line, line), atol=1e-6, rtol=0)
    assert layer.sides == pytest.approx(((6 / 3 + 10 / 9) / 8,) * 4, abs=1e-6)
    assert layer.centre == pytest.approx(0, abs=1e-6)
    assert layer.asymmetry == pytest.approx((0, 0), abs=1e-6)


def test_a_stride_on_an_even_map_feeds_top_and_left_alone() -> None:
    found = padfree.border_effect(ones(2), torch.ones(1, 1, 16, 16), (1, 8, 8), margin=4)
    (layer,) = found.layers
    line = torch.tensor([2 / 3, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(layer.difference, 1 - torch.outer(line, line), atol=1e-6, rtol=0)
    top, bottom = (1 / 3 * 3 + 5 / 9) / 4, 1 / 3 / 4
    assert layer.sides == pytest.approx((top, bottom, top, bottom), abs=1e-6)
    assert layer.asymmetry == pytest.approx((bottom - top, bottom - top), abs=1e-6)


def test_it_reaches_as_far_as_the_footprint_says() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 5, 2, 2)).double()
    effect = padfree.border_effect(model, noise(2, 3, 64, 64).double(), (3, 32, 32), margin=16)
    footprint = padfree.footprint(model, (3, 32, 32))
    for measured, known in (("2", "0"), ("3", "3")):
        padded = footprint[known].padded
        assert padded is not None
        assert torch.equal(effect[measured].difference > 1e-9, padded > 0)


def test_consistency_by_hand() -> None:
    """The class is the sign of the frame's first pixel; rows alternate, so odd moves up and down change it."""
    model = Written(lambda self, x: torch.cat([x[:, :, 0, 0], -x[:, :, 0, 0]], 1))
    rows = torch.tensor([1.0, -1.0]).repeat(8)[:, None].expand(16, 16)
    found = padfree.border_effect(model, rows[None, None], (1, 8, 8), margin=4, shifts=(1, 2, 3))
    assert [shift.pixels for shift in found.shifts] == [1, 2, 3]
    assert [shift.consistency for shift in found.shifts] == [0.5, 1, 0.5]
    # two of four directions change both logits by 2; their own root mean square is 1
    assert [shift.change for shift in found.shifts] == pytest.approx([2**0.5, 0, 2**0.5])


def test_scenes_are_cropped_to_their_middle_and_may_come_in_batches() -> None:
    model, images = ones(2), noise(3, 1, 16, 16)
    found = padfree.border_effect(model, images, (1, 8, 8), margin=4)
    wide = nn.functional.pad(images, (3, 2, 1, 4), value=9.0)
    again = padfree.border_effect(model, (image for image in wide[..., 1:, 1:]), (1, 8, 8), margin=4)
    del wide
    assert found.images == again.images == 3
    assert again.layers[0].size == found.layers[0].size
    exact = padfree.border_effect(model, iter(images), (1, 8, 8), margin=4)
    torch.testing.assert_close(exact.layers[0].difference, found.layers[0].difference)
    cropped = padfree.border_effect(model, nn.functional.pad(images, (3, 3, 1, 1), value=9.0), (1, 8, 8), margin=4)
    torch.testing.assert_close(cropped.layers[0].difference, found.layers[0].difference)


def test_tables_and_json() -> None:
    model = nn.Sequential(ones(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(PadfreeError, match="does not run on 1x16x16, which border_effect needs"):
        padfree.border_effect(model, noise(1, 1, 16, 16), (1, 8, 8), margin=4)
    model = nn.Sequential(ones(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    found = padfree.border_effect(model, noise(1, 1, 16, 16), (1, 8, 8), margin=4, shifts=(1,))
    assert found.notes == ("maps that do not grow with the image, or not alike, are left out: 1",)
    data = json.loads(json.dumps(found.to_dict(maps=True)))
    assert [layer["name"] for layer in data["layers"]] == ["0"]
    assert len(data["layers"][0]["map"]) == 4
    text = str(found)
    assert text.startswith("border effect of Sequential at 1x8x8 with 4 pixels around, 1 image\n")
    assert "moved by 1 pixel: " in text
    with pytest.raises(PadfreeError, match="no map 'x'"):
        found["x"]


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = nn.Sequential(ones(2), nn.BatchNorm2d(1)).train()
    generator, mean = torch.get_rng_state(), model[1].running_mean.clone()
    padfree.border_effect(model, noise(1, 1, 16, 16), (1, 8, 8), margin=4)
    assert model.training
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model[0]._forward_hooks


def test_the_size_of_scenes() -> None:
    strided = nn.Sequential(ones(2), ones(2), ones(2))
    assert scene_size(strided, (1, 20, 24)) == (1, 20 + 32, 24 + 32)  # half of 24, rounded up to a multiple of 8
    assert scene_size(strided, (1, 20, 24), margin=8) == (1, 36, 40)


@pytest.mark.parametrize(
    ("images", "more", "reason"),
    [
        (noise(1, 1, 15, 16), {}, "images are 1x15x16; a frame of 1x8x8 with 4 pixels around it takes 1x16x16"),
        (noise(1, 3, 16, 16), {}, "images are 3x16x16"),
        (noise(16, 16), {}, "not torch.float32 16x16"),
        (noise(1, 1, 16, 16).to(torch.uint8), {}, "not torch.uint8 1x1x16x16"),
        (["a.png"], {}, "not str"),
        ([], {}, "was given no images"),
        (noise(0, 1, 16, 16), {}, "was given no images"),
        (noise(1, 1, 16, 16) / 0, {}, "not finite"),
        (noise(1, 1, 16, 16), {"margin": 3}, "a positive multiple of the network's stride, 2 pixels"),
        (noise(1, 1, 16, 16), {"margin": 0}, "margin is 0"),
        (noise(1, 1, 16, 16), {"shifts": (1, 9)}, "shifts of [9] pixels"),
        (noise(1, 1, 16, 16), {"input_size": (1, 8)}, "it takes (C, H, W)"),
        (noise(1, 1, 16, 16), {"input_size": (1, 2, 8, 8)}, "the size of a video"),
    ],
)
def test_refusals(images: Tensor, more: dict[str, object], reason: str) -> None:
    settings = {"input_size": (1, 8, 8), "margin": 4} | more
    with pytest.raises(PadfreeError) as caught:
        padfree.border_effect(ones(2), images, **settings)  # type: ignore[arg-type]
    assert reason in str(caught.value)


def test_it_takes_a_module() -> None:
    with pytest.raises(PadfreeError, match=r"takes a torch\.nn\.Module, not str"):
        padfree.border_effect("resnet18", noise(1, 1, 16, 16))  # type: ignore[arg-type]
