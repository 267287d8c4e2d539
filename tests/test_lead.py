"""The norm and the activation ahead of a strided chain in the one pass: what an expansion ends in."""

import copy
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import padfree
from padfree import chains, native, onepass
from tests.guarded import run_alone
from tests.strangers import Net, Unit
from tests.test_onepass import LAYOUTS, PASSED_OF_ANYTHING, built, chain, modules_only, passes, some_map
from tests.test_pointwise import FAR, mixing, threads

pytestmark = built


def leads():
    """Whether the norm ahead was part of it, for each run of the pass."""
    return passes(lambda merge, leads, mixed: leads)


def expansion(channels, act="relu", seed=0):
    """A norm and an activation."""
    return mixing(1, channels, act, seed=seed)[1:]


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 3, 8, 16, 17, 40]), st.integers(5, 36), st.integers(5, 70)),
    window=st.sampled_from([(3, 0, 3, 0), (5, 1, 3, 0), (5, 2, 5, 2), (3, 1, 3, 1), (3, 0, 5, 1), (5, 1, 5, 1)]),
    ending=st.sampled_from(["sum", "mix", "late", "rest"]),
    layout=st.sampled_from(LAYOUTS),
    act=st.sampled_from(PASSED_OF_ANYTHING),
    seed=st.integers(0, 99),
    count=st.integers(1, 3),
)
def test_any_map(shape, window, ending, layout, act, seed, count):
    kernel, padding, pool, pool_padding = window
    ahead, channels = expansion(shape[1], act, seed), shape[1]
    conv, bn, activation = chain(channels, kernel, 2, padding, act, bias=seed % 2 == 0, seed=seed)
    behind = mixing(channels, 7, act, seed=seed)
    x = some_map(shape, layout, seed, spoilt=0.01 if seed % 5 == 0 else 0.0)
    sequences = {
        "sum": ((conv, bn, activation), ()),
        "mix": ((conv, bn, activation), tuple(behind)),
        "late": ((conv,), (bn, activation, *behind)),
        "rest": ((conv, bn, nn.Mish()), tuple(behind)),
    }
    before, after = sequences[ending]
    with torch.inference_mode(), threads(count), leads() as seen:
        found = onepass.downsample(x, pool, pool_padding, before, after, tuple(ahead))
        y = ahead(x)
        expected = nn.Sequential(*after)(nn.Sequential(*before)(y) + F.max_pool2d(y, pool, 2, pool_padding))
    ambiguous = x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert seen == ([] if ambiguous else [True])
    assert_close(found, expected, **FAR)
    assert found.stride() == expected.stride() or 1 in found.shape


@pytest.mark.skipif(sys.platform != "linux", reason="guards memory by mprotect")
def test_the_pass_stays_inside_its_map():
    """The map ends at, or begins after, a page that must not be touched; a step outside kills the process."""
    script = """
import itertools
import torch
from padfree import onepass
from tests.guarded import memories
from tests.test_lead import expansion
from tests.test_onepass import chain, modules_only
[memory], count = memories(1), 0
windows = [(3, 0, 3, 0), (5, 1, 3, 0), (5, 2, 5, 2), (3, 0, 5, 1)]
for channels, window, end, side, last in itertools.product((3, 16, 18), windows, (0, 1), (7, 19), (0, 1)):
    kernel, padding, pool, pool_padding = window
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, channels, side, side + 1).contiguous(memory_format=layout)
    begin = memory.numel() - x.numel() if end else 0
    x = memory.as_strided(x.shape, x.stride(), memory.storage_offset() + begin).copy_(x)
    ahead, modules = tuple(expansion(channels)), tuple(chain(channels, kernel, 2, padding))
    with torch.inference_mode():
        y = ahead[1](ahead[0](x.clone()))
        pooled = torch.nn.functional.max_pool2d(y, pool, 2, pool_padding)
        expected = modules[2](modules[1](modules[0](y))) + pooled
        out = onepass.downsample(x, pool, pool_padding, modules, (), ahead)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-4)
    count += 1
print(count)
"""
    assert run_alone(script) == 96


class Doubled(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 2


CHANGES = {
    "a hook of the norm": lambda m: m[1].register_forward_hook(lambda module, inputs, output: output + 1),
    "a hook of the activation": lambda m: m[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "a replaced forward": lambda m: setattr(m[1], "forward", lambda x, usual=m[1].forward: usual(x) + 1),
    "training": lambda m: m[1].train(),
    "another norm": lambda m: setattr(m, "1", nn.InstanceNorm2d(8)),
    "another activation": lambda m: setattr(m, "2", Doubled()),
    "statistics in place": lambda m: m[1].running_mean.add_(1),
    "another weight": lambda m: setattr(m[1], "weight", nn.Parameter(torch.randn(8))),
    "another epsilon": lambda m: setattr(m[1], "eps", 0.5),
    "none": lambda m: None,
}


@pytest.mark.parametrize("again", [False, True], ids=["before", "after a first call"])
@pytest.mark.parametrize("count", [1, 2, 3], ids=["activation", "norm", "convolution"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_each_module_runs_once(change, count, again):
    ahead = nn.Sequential(nn.Conv2d(8, 8, 1), *expansion(8)).eval()
    modules, calls = chain(8, 3, 2, 0), []
    ahead[0].register_forward_hook(lambda module, inputs, output: calls.append(1))
    x = torch.randn(2, 8, 15, 16)

    def run():
        front, rest = ahead[: 3 - count], tuple(ahead[3 - count :])
        return onepass.downsample(front(x), 3, 0, tuple(modules), (), rest)

    with torch.no_grad():
        if again:
            run()
        CHANGES[change](ahead)
        calls.clear()
        found = run()
        assert calls == [1]
        y = ahead(x)
        assert_close(found, modules(y) + F.max_pool2d(y, 3, 2), **FAR)


def test_an_activation_alone_may_work_on_what_others_read():
    x, act = torch.randn(2, 8, 15, 16), nn.ReLU(inplace=True)
    modules = tuple(chain(8, 3, 2, 0))
    with torch.no_grad(), leads() as seen:
        onepass.downsample(x, 3, 0, modules, (), (act,))
    assert seen == [False]
    assert (x >= 0).all()


def test_maps_that_no_pass_takes():
    ahead, modules = expansion(8).double(), chain(8, 3, 2, 0).double()
    x = torch.randn(2, 8, 15, 16, dtype=torch.float64)
    with torch.no_grad(), leads() as seen:
        found = onepass.downsample(x, 3, 0, tuple(modules), (), tuple(ahead))
        y = ahead(x)
        assert_close(found, modules(y) + F.max_pool2d(y, 3, 2))
    assert seen == []


def test_the_extension_leads_with_nothing_that_was_not_read():
    modules, x = tuple(chain(8, 3, 2, 0)), torch.randn(1, 8, 9, 10)
    watch, listed = chains.read(modules).watch, chains.listed(modules, ())
    with torch.no_grad(), pytest.raises(TypeError):
        native.one_pass(watch, x, listed, (2, 3, 0), native.Merge.AFTER_ACTIVATION, False, True)


# -- which calls a generated forward hands over ---------------------------------------------------------------------


class Expanding(Unit):
    def __init__(self):
        super().__init__()
        self.expand, self.bn0, self.act0 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def ahead(self, x):
        return self.act0(self.bn0(self.expand(x)))

    def forward(self, x):
        return super().forward(self.ahead(x))


class ReadTwice(Expanding):
    def forward(self, x):
        y = self.ahead(x)
        return Unit.forward(self, y) + y.mean((2, 3), keepdim=True)


class ChangedInBetween(Expanding):
    def forward(self, x):
        raw = self.expand(x)
        y = self.bn0(raw)
        raw.mul_(3)
        return Unit.forward(self, y) + raw.mean((2, 3), keepdim=True)


class OtherCallsInBetween(Expanding):
    def forward(self, x):
        y = self.ahead(x)
        z = self.expand(x).mean((2, 3), keepdim=True)
        return Unit.forward(self, y) + z


class Preactivated(Unit):
    """Its first activation works in place on what its caller may read again."""

    def forward(self, x):
        return self.bn(self.conv(F.relu(x, inplace=True)))


class InPlaceOfAView(Expanding):
    def forward(self, x):
        normed = self.bn0(self.expand(x))
        activated = F.relu(normed.view_as(normed), inplace=True)
        return Unit.forward(self, activated) + normed.mean((2, 3), keepdim=True)


class Count(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Counting(Unit):
    def __init__(self):
        super().__init__()
        self.count = Count()


class CountingBehind(Counting):
    def forward(self, x):
        y = self.conv(x)
        gate = self.count(x.mean((2, 3), keepdim=True))
        return self.count(self.act(self.bn(y))) + gate


class CountingBefore(Counting):
    def forward(self, x):
        y = self.conv(x)
        gate = self.count(x.mean((2, 3), keepdim=True))
        return self.count(self.bn(y)) + gate


class ReadsItsInputAgain(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), block

    def forward(self, x):
        h = self.stem(x)
        return self.block(h).mean((2, 3)) + h.mean((2, 3))


@pytest.mark.parametrize("kind", [Preactivated, InPlaceOfAView, CountingBehind, CountingBefore])
def test_the_order_of_calls_and_what_works_in_place_stay(kind):
    torch.manual_seed(0)
    model = padfree.convert(ReadsItsInputAgain(kind()).eval(), input_size=(3, 16, 16)).eval()
    again, x = copy.deepcopy(model), torch.randn(1, 3, 17, 17)
    with torch.no_grad():
        found = model(x)
        with modules_only():
            assert_close(found, again(x), **FAR)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "led"), [(Expanding, True), (ReadTwice, False), (ChangedInBetween, False), (OtherCallsInBetween, False)]
)
def test_networks(kind, led, layout):
    model = padfree.convert(Net(kind())).eval().to(memory_format=layout)
    with torch.no_grad():
        for norm in (model.block.bn, model.block.bn0):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 33, 32).contiguous(memory_format=layout)
    with torch.no_grad(), leads() as seen:
        found = model(x)
    assert any(seen) == led and seen
    with torch.no_grad(), modules_only():
        assert_close(found, model(x), **FAR)
    assert_close(model(x).detach(), found, **FAR)  # with gradients


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_050", "efficientnet_lite0"])
def test_networks_of_timm(name):
    torch.manual_seed(0)
    model = padfree.convert(timm.create_model(name), input_size=(3, 64, 64)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), leads() as seen:
        found = model(x)
    assert seen.count(True) >= 2
    with torch.no_grad(), modules_only():
        expected = model(x)
    assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
