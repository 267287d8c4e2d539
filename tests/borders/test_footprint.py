"""Footprints against figures worked out by hand, and against torch's own convolutions with uniform kernels."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import Written
from torch import Tensor, nn
from torch.nn import functional as F

import padfree
from padfree.borders.layers import Footprint, Layer
from padfree.borders.walk import GATES, MIXED
from padfree.errors import PadfreeError


def last(model: nn.Module, *size: int) -> Layer:
    return padfree.footprint(model, size).layers[-1]


def conv(kernel: int, stride: int = 1, padding: int = 0, channels: int = 1, **more: object) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, padding, **more)  # type: ignore[arg-type]


def uniform(model: nn.Module) -> nn.Module:
    """Every kernel a mean, no bias: on an image of ones the output is the share of paths that end at pixels."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight.fill_(1 / module.weight[0].numel())
                if module.bias is not None:
                    module.bias.zero_()
    return model.double()


# one operation


def test_a_convolution_without_padding_reads_none() -> None:
    layer = last(conv(3, 2), 1, 9, 9)
    assert layer.reads is not None
    assert (layer.reads.positions, layer.reads.taps, layer.reads.sides) == (0, 0, (0, 0, 0, 0))
    assert layer.padded is not None and layer.outside is not None
    assert layer.padded.abs().max() == 0
    assert layer.outside.abs().max() == 0


def test_a_padded_stride_2_window_reads_top_and_left_of_an_even_map() -> None:
    layer = last(conv(3, 2, 1), 1, 8, 8)
    assert layer.reads is not None
    assert layer.size == (4, 4)
    # 4 positions of 3 taps along each axis; the first position's first tap lies outside
    assert layer.reads.sides == pytest.approx((1 / 12, 0, 1 / 12, 0))
    assert layer.reads.taps == pytest.approx(1 - (11 / 12) ** 2)
    assert layer.reads.positions == pytest.approx(1 - (3 / 4) ** 2)
    line = torch.tensor([2 / 3, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(layer.padded, 1 - torch.outer(line, line))
    torch.testing.assert_close(layer.outside, 1 - torch.outer(line, line))
    assert layer.edges == pytest.approx((1 - 2 / 3 * 11 / 12, 1 / 12, 1 - 2 / 3 * 11 / 12, 1 / 12))


def test_on_an_odd_map_it_reads_all_sides_alike() -> None:
    layer = last(conv(3, 2, 1), 1, 9, 9)
    assert layer.reads is not None
    assert layer.reads.sides == pytest.approx((1 / 15,) * 4)


@pytest.mark.parametrize(
    ("stride", "kernel", "dilation", "side", "top", "bottom"),
    [(2, 3, 1, 8, 0, 1), (2, 3, 1, 9, 1, 1), (2, 5, 1, 8, 1, 2), (1, 3, 2, 8, 2, 2), (2, 4, 1, 8, 1, 1)],
)
def test_same_padding_by_an_operation_of_its_own(
    stride: int, kernel: int, dilation: int, side: int, top: int, bottom: int
) -> None:
    """TF-SAME pads lie before the convolution; the shares are of the map before the pad."""
    layer = last(timm.layers.Conv2dSame(1, 1, kernel, stride, dilation=dilation), 1, side, side)
    assert layer.reads is not None
    assert layer.before == (side, side)
    out = -(-side // stride)
    taps = [at * stride - top + tap * dilation for at in range(out) for tap in range(kernel)]
    above, below = (sum(tap < 0 for tap in taps), sum(tap >= side for tap in taps))
    assert max(0, (out - 1) * stride + (kernel - 1) * dilation + 1 - side) == top + bottom
    assert layer.reads.sides == pytest.approx((above / len(taps), below / len(taps)) * 2)


def test_a_max_pool_never_chooses_its_padding() -> None:
    layer = last(nn.MaxPool2d(3, 2, 1), 1, 8, 8)
    assert layer.reads is not None and layer.padded is not None and layer.outside is not None
    assert layer.reads.fill == "left out"
    assert layer.reads.sides == pytest.approx((1 / 12, 0, 1 / 12, 0))
    assert layer.padded.max() == 0
    assert layer.outside[0, 0] == pytest.approx(1 - 4 / 9)


def test_a_pad_of_minus_infinity_is_a_max_pools() -> None:
    net = Written(lambda self, x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=float("-inf")), 3, 2))
    layer = last(net, 1, 8, 8)
    assert layer.reads is not None and layer.padded is not None
    assert layer.reads.fill == "left out"
    assert layer.padded.max() == 0


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("side", [8, 9, 10])
def test_average_pools_as_torch_counts_them(side: int, counted: bool, ceil: bool) -> None:
    pool = nn.AvgPool2d(3, 2, 1, ceil_mode=ceil, count_include_pad=counted)
    layer = last(pool, 1, side, side)
    expected = 1 - pool(torch.ones(1, 1, side, side, dtype=torch.float64))[0, 0]
    torch.testing.assert_close(layer.padded, expected)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_that_reads_the_map_again_is_none(mode: str) -> None:
    layer = last(conv(5, 1, 2, padding_mode=mode), 1, 7, 9)
    assert layer.padded is not None and layer.outside is not None
    assert layer.padded.max() == 0
    assert layer.outside.max() == 0


def test_a_transposed_convolution_reads_no_padding() -> None:
    layer = last(nn.ConvTranspose2d(1, 1, 4, 2, 1), 1, 5, 5)
    assert layer.reads is not None and layer.padded is not None
    assert (layer.size, layer.reads.taps, float(layer.padded.max())) == ((10, 10), 0, 0)


# carried on


def test_the_receptive_field_of_a_chain() -> None:
    """7x7 /2, pool 3x3 /2, two 3x3: 7, then 7 + 2 * 2 = 11, 11 + 2 * 4 = 19, 27 pixels (Araujo et al., 2019)."""
    chain = nn.Sequential(conv(7, 2, 3), nn.MaxPool2d(3, 2, 1), conv(3, 1, 1), conv(3, 1, 1))
    layers = padfree.footprint(chain, (1, 64, 64)).layers
    assert [layer.receptive_field for layer in layers] == [(7, 7), (11, 11), (19, 19), (27, 27)]
    outside = layers[-1].outside
    assert outside is not None
    # the first window starts 3 + 1 * 2 + 1 * 4 + 1 * 4 = 13 pixels above the image
    assert outside[0, 8] == pytest.approx(13 / 27)
    assert outside[0, 0] == pytest.approx(1 - (14 / 27) ** 2)


def _moved(out: Tensor, x: Tensor) -> Tensor:
    """The map two columns further to the left, as networks of shifts write it."""
    out[:, :, :, :-2] = x[:, :, :, 2:]
    return out


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "stride": lambda: nn.Sequential(conv(3, 2, 1), nn.ReLU(), conv(5, 2, 2), conv(3, 1, 1)),
    "dilation": lambda: nn.Sequential(conv(3, 1, 2, dilation=2), conv(3, 2, 2, dilation=2)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 3, 2, 1, groups=4), nn.BatchNorm2d(8)),
    "oblong": lambda: nn.Sequential(nn.Conv2d(1, 1, (1, 7), padding=(0, 3)), nn.Conv2d(1, 1, (3, 1), (2, 1), (1, 0))),
    "pool": lambda: nn.Sequential(conv(3, 1, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True), conv(3, 2, 1)),
    "even kernel": lambda: nn.Sequential(conv(4, 2, 1), conv(2, 2), conv(3, padding="same")),  # type: ignore[arg-type]
    "sum": lambda: Written(lambda s, x: (s.a(x) + s.b(x)) / 2, a=conv(3, 2, 1), b=conv(1, 2)),
    "concatenation": lambda: Written(
        lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)),
        a=nn.Conv2d(1, 3, 3, padding=1),
        b=nn.Conv2d(1, 1, 1),
        c=nn.Conv2d(4, 1, 3, 2, 1),
    ),
    "space to depth": lambda: nn.Sequential(conv(3, 1, 1), nn.PixelUnshuffle(2), nn.Conv2d(4, 1, 3, padding=1)),
    "shuffle": lambda: nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ChannelShuffle(2), nn.Conv2d(4, 1, 3, 1, 1)),
    "channels last": lambda: Written(
        lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), a=conv(3, 2, 1), b=conv(3, 1, 1)
    ),
    "crop": lambda: Written(lambda s, x: s.b(s.a(x)[:, :, 1:, :-2]), a=conv(5, 2, 2), b=conv(3, 1, 1)),
    "written into zeros": lambda: Written(lambda s, x: s.a(_moved(torch.zeros_like(x), x)), a=conv(3, 2)),
    "written into a full one": lambda: Written(lambda s, x: s.a(_moved(x.new_full(x.shape, 0.0), x)), a=conv(3, 2)),
    "a full part of zeros": lambda: Written(
        lambda s, x: s.a(torch.cat([torch.full_like(x[:, :, :2], 0.0), x], 2)), a=conv(3, 2)
    ),
    "a parameter first": lambda: Written(lambda s, x: s.a(s.b.weight.flatten() * x), a=conv(3, 2, 1), b=conv(1)),
    "zeros written around": lambda: Written(
        lambda s, x: s.a(torch.cat([torch.zeros_like(x[:, :, :2]), x], 2)), a=conv(3, 2)
    ),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("size", [(16, 16), (18, 20)])
def test_paths_are_what_uniform_kernels_take(name: str, size: tuple[int, int]) -> None:
    model = uniform(CHAINS[name]()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    found = padfree.footprint(model, (1, *size))
    x = torch.ones(1, 1, *size, dtype=torch.float64, requires_grad=True)
    out = model(x)
    expected = 1 - out[0, 0].detach()
    padded = found.layers[-1].padded
    assert padded is not None
    torch.testing.assert_close(padded, expected)
    assert found.outputs == {"": pytest.approx(float(expected.mean()))}
    out.sum().backward()
    assert x.grad is not None and found.read is not None
    assert torch.equal(found.read, x.grad[0, 0] != 0)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=3),
    st.integers(20, 24),
)
@settings(max_examples=25)
def test_any_chain_of_convolutions(chain: list[tuple[int, int, int]], side: int) -> None:
    model = uniform(nn.Sequential(*[conv(*each) for each in chain]))
    try:
        expected = 1 - model(torch.ones(1, 1, side, side, dtype=torch.float64))[0, 0].detach()
    except RuntimeError:  # a map became smaller than a kernel
        return
    layer = last(model, 1, side, side)
    torch.testing.assert_close(layer.padded, expected)
    start = pace = 0
    width, pace = 1, 1
    for kernel, stride, padding in chain:
        start, width, pace = start - padding * pace, width + (kernel - 1) * pace, pace * stride
    begins = start + pace * torch.arange(layer.size[0], dtype=torch.float64)
    seen = ((begins + width).clamp(0, side) - begins.clamp(0, side)) / width
    torch.testing.assert_close(layer.outside, 1 - torch.outer(seen, seen))


def test_a_mean_reads_everything() -> None:
    for pool in (nn.AdaptiveAvgPool2d(1), Written(lambda self, x: x.mean((2, 3)))):
        model = nn.Sequential(conv(3, 1, 1), pool, nn.Flatten(), nn.Linear(1, 3))
        found = padfree.footprint(model, (1, 4, 4))
        inside = sum(a * b for a in (2, 3, 3, 2) for b in (2, 3, 3, 2)) / (9 * 16)
        assert found.outputs == {"": pytest.approx(1 - inside)}
        assert found.unread == 0


def test_a_linear_layer_over_positions_reads_everything() -> None:
    model = nn.Sequential(conv(3, 1, 1), nn.Flatten(), nn.Linear(16, 3))
    inside = sum(a * b for a in (2, 3, 3, 2) for b in (2, 3, 3, 2)) / (9 * 16)
    assert padfree.footprint(model, (1, 4, 4)).outputs == {"": pytest.approx(1 - inside)}


@pytest.mark.parametrize(("mode", "share"), [("nearest", 1 / 3), ("bilinear", 1 / 3), ("bicubic", 1 / 4)])
def test_a_resize_repeats_edges_and_pads_nothing(mode: str, share: float) -> None:
    net = Written(lambda s, x: s.b(F.interpolate(s.a(x), scale_factor=2, mode=mode)), a=conv(3, 2, 1), b=conv(1))
    found = padfree.footprint(net, (1, 8, 8))
    padded = found["b"].padded
    assert padded is not None
    assert padded.shape == (8, 8)
    assert padded[0, 7] == pytest.approx(share)  # bicubic: three of its four rows are the first
    assert padded[7, 7] == 0


def test_gates_are_left_out_and_named() -> None:
    net = Written(lambda s, x: s.b(x * s.a(x.mean((2, 3), keepdim=True)).sigmoid()), a=conv(1), b=conv(3, 2))
    found = padfree.footprint(net, (1, 8, 8))
    assert found.notes == (GATES,)
    assert found["b"].padded is not None and found["b"].padded.max() == 0
    assert found.unread == 0  # the gate reads the last row, which no window of b does
    assert found["b"].reads is not None and found["b"].reads.unread == (0, 1, 0, 1)


def test_attention_is_taken_to_read_the_whole_map() -> None:
    found = padfree.footprint(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32), (3, 32, 32))
    assert found.notes == (MIXED,)
    assert found.outputs == {"": 0.0}


def test_what_is_not_understood_is_named() -> None:
    net = Written(lambda s, x: s.b(torch.fft.fft2(s.a(x)).real), a=conv(3, 1, 1), b=conv(3, 1, 1))
    found = padfree.footprint(net, (1, 8, 8))
    assert found.outputs == {"": None}
    assert found.read is None
    assert "_fft" in found["b"].unknown
    assert found["a"].unknown == ""
    assert any("not followed past _fft" in note for note in found.notes)
    assert "?" in str(found)


def test_a_write_into_a_map_is_named() -> None:
    def forward(s: Written, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, :2] = 0
        return s.a(x)

    found = padfree.footprint(Written(forward, a=conv(3, 1, 1)), (1, 8, 8))
    assert found.outputs == {"": None} and any("not followed past" in note for note in found.notes)


@pytest.mark.parametrize("turned", [False, True])
def test_a_gate_that_is_not_understood_is_no_gate_left_out(turned: bool) -> None:
    """It may read what nothing else does."""

    def forward(s: Written, x: Tensor) -> Tensor:
        y = s.a(x)
        gate = x.flatten(2).topk(3)[0][..., :1, None]
        return gate * y if turned else y * gate

    found = padfree.footprint(Written(forward, a=conv(3, 2)), (1, 8, 8))
    assert found.outputs == {"": None} and found.read is None


# what padding-free downsampling does


def test_a_converted_network_and_what_it_does_not_read() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.down = nn.Conv2d(4, 4, 3, 2, 1, groups=4)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.down(self.act(self.stem(x))))

    model = Net()
    before = padfree.footprint(model, (3, 8, 8))
    after = padfree.footprint(padfree.convert(model, input_size=(3, 8, 8), rules=["depthwise"]), (3, 8, 8))
    assert before.unread == 0
    assert (after.unread, after.unread_text()) == (15, "15 pixels: 1 row at the bottom and 1 column at the right")
    reads = [layer.reads for layer in after.layers if layer.reads is not None and layer.reads.kernel == (3, 3)]
    assert [each.taps for each in reads] == [0, 0]  # the convolution and the pool beside it
    assert [each.unread for each in reads] == [(0, 1, 0, 1)] * 2
    change = before.compare(after)
    assert next(new for old, new in change.pairs() if old and old.name == "down") == after["down"]
    text = str(change)
    assert "4x4 -> 3x3" in text
    assert "none -> 15 pixels: 1 row at the bottom and 1 column at the right" in text
    assert json.loads(json.dumps(change.to_dict()))["after"]["unread_pixels"] == 15


# results and refusals


def test_tables_and_json() -> None:
    found = padfree.footprint(nn.Sequential(conv(3, 2, 1), nn.ReLU(), conv(3, 2, 1)), (1, 8, 8))
    assert isinstance(found, Footprint)
    data = json.loads(json.dumps(found.to_dict(maps=True)))
    assert [layer["name"] for layer in data["layers"]] == ["0", "2"]
    assert data["layers"][0]["reads"]["sides"] == pytest.approx([1 / 12, 0, 1 / 12, 0])
    assert data["layers"][0]["padded"]["map"][0][0] == pytest.approx(5 / 9, abs=1e-6)
    assert "map" not in found.to_dict()["layers"][0]["padded"]
    lines = str(found).splitlines()
    assert lines[0] == "footprint of Sequential at 1x8x8"
    cells = ["0", "conv", "3x3", "/2", "4x4", "16.0%", "8.3%", "0", "8.3%", "0", "16.0%", "55.6%", "16.0%"]
    assert lines[2].split() == cells
    with pytest.raises(PadfreeError, match="Sequential has no map 'x'"):
        found["x"]


def test_a_module_that_is_called_twice_has_two_maps() -> None:
    found = padfree.footprint(Written(lambda s, x: s.a(s.a(x)), a=conv(3, 1, 1)), (1, 8, 8))
    assert [layer.name for layer in found.layers] == ["a", "a#2"]


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = nn.Sequential(conv(3, 2, 1), nn.BatchNorm2d(1)).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    padfree.footprint(model, (1, 8, 8))
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name])


@pytest.mark.parametrize(
    ("model", "size", "reason"),
    [
        ("resnet18", (3, 8, 8), "footprint takes a torch.nn.Module, not str"),
        (conv(3), (1, 2, 2), "does not run on a 1x2x2 input"),
        (conv(3), (1, 8), "it takes (C, H, W)"),
        (conv(3), (1, 4, 8, 8), "is the size of a video"),
        (conv(3), (3, 8, 8), "does not run on a 3x8x8 input"),
    ],
)
def test_refusals(model: nn.Module, size: tuple[int, ...], reason: str) -> None:
    with pytest.raises(PadfreeError) as caught:
        padfree.footprint(model, size)
    assert reason in str(caught.value)
