"""Recordings: what one forward on meta tensors notes down, and what it leaves alone."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import padfree
from padfree.analysis.flow import Flow
from padfree.analysis.sites import Sites
from padfree.record.inputs import default_input_size
from padfree.record.recording import record
from padfree.rules._toys import Residual, depthwise, net, unit


def test_calls_and_operations_of_a_small_network() -> None:
    recording = record(net(depthwise(8)), (3, 16, 16))
    assert recording.meta and recording.input_size == (3, 16, 16)
    kinds = [op.kind for op in recording.ops if op.inputs]
    assert kinds == ["convolution", "native_batch_norm", "relu"] * 2 + ["mean", "view", "addmm"]
    assert [call.path for call in recording.calls][:5] == ["", "0", "0.0", "0.1", "0.2"]
    conv = recording.calls_of["1.0"][0]
    (source,), (out,) = conv.inputs, conv.outputs
    assert recording.values[source].shape == (1, 8, 16, 16) and recording.values[out].shape == (1, 8, 8, 8)


def test_branches_that_meet_share_a_domain() -> None:
    flow = Flow(record(net(Residual(unit(8, 8, stride=2), unit(8, 8, 1, 2, act=False))), (3, 16, 16)))
    convs = Sites(flow).convs.values()
    by_path = {conv.path: flow.domain(conv.out) for conv in convs}
    assert by_path["1.main.0"] == by_path["1.shortcut.0"] != by_path["0.0"]
    (entries,) = [ops for ops in flow.entries.values() if len(ops) == 2]
    assert [flow.size(op.outputs[0]) for op in entries] == [(8, 8), (8, 8)]


class Branchy(nn.Module):
    """A forward that only real tensors can run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.down = depthwise(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.down(x) if x.sum() > -1e9 else x


def test_real_tensors_are_the_fallback() -> None:
    model = Branchy().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recording = record(model, (3, 16, 16))
    assert not recording.meta
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    converted = padfree.convert(model, input_size=(3, 16, 16)).eval()
    conv, norm = model.down[0], model.down[1]
    x = torch.randn(2, 3, 16, 16)
    y = converted.stem(x)
    expected = F.relu(norm(F.conv2d(y, conv.weight, stride=2, groups=8))) + F.max_pool2d(y, 3, 2)
    torch.testing.assert_close(converted(x), expected)


def test_hooks_do_not_fire_and_stay() -> None:
    model, fired = net(depthwise(8)), []
    model[1].register_forward_hook(lambda *_: fired.append("forward"))
    model[1][0].register_forward_pre_hook(lambda *_: fired.append("before"))
    converted = padfree.convert(model, input_size=(3, 16, 16))
    assert fired == []
    converted(torch.zeros(2, 3, 16, 16))
    assert fired == ["before", "forward"]


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("mobilenetv3_small_050", {}, (3, 224, 224)),
        ("mobilenetv3_small_050", {"in_chans": 1}, (1, 224, 224)),
        ("inception_v3", {}, (3, 299, 299)),
    ],
)
def test_default_input_sizes_of_timm(name: str, settings: dict[str, int], size: tuple[int, ...]) -> None:
    assert default_input_size(timm.create_model(name, **settings)) == size


def test_default_input_sizes_of_others() -> None:
    assert default_input_size(net()) == (3, 224, 224)
    assert default_input_size(nn.Sequential(nn.Conv2d(2, 4, 3))) == (2, 224, 224)
    assert default_input_size(nn.Sequential(nn.Conv3d(3, 4, 3))) == (3, 16, 224, 224)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("merged_after", ["act", "norm"])
def test_what_drops_in_training_makes_no_other_network(p: float, merged_after: str) -> None:
    unit = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.Dropout2d(p), nn.ReLU())
    model = net(unit).eval()
    merge = "activation" if merged_after == "act" else "norm"
    options = padfree.Options(merge=merge)
    converted = padfree.convert(model, input_size=(3, 16, 16), rules=("depthwise",), options=options)
    x = torch.randn(2, 8, 16, 16)
    normed = model[1][1](F.conv2d(x, model[1][0].weight, model[1][0].bias, stride=2, groups=8))
    pooled = F.max_pool2d(x, 3, 2)
    expected = F.relu(normed) + pooled if merged_after == "act" else F.relu(normed + pooled)
    torch.testing.assert_close(converted[1](x), expected)
    drop = converted[1][2].train()
    torch.manual_seed(0)
    trained = converted[1](x)
    torch.manual_seed(0)
    expected = F.relu(drop(normed)) + pooled if merged_after == "act" else F.relu(drop(normed + pooled))
    torch.testing.assert_close(trained, expected)
