"""1x1 convolutions in the one pass: what follows a strided chain's sum, and the second half of a stem tail."""

import contextlib
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import padfree
from padfree import chains, native, onepass
from padfree.layers import StemTail
from padfree.native import Extra
from tests.guarded import run_alone
from tests.strangers import Net, Unit
from tests.test_onepass import (
    ACTS,
    CHANGES,
    LAYOUTS,
    PASSED_OF_ANYTHING,
    built,
    chain,
    modules_only,
    passes,
    seeded,
    some_map,
)

pytestmark = built
FAR = {"rtol": 1e-4, "atol": 2e-4, "equal_nan": True}  # sums over channels, in another order


def mixing(inputs, outputs, act="relu", bias=False, norm=True, seed=0):
    """A 1x1 conv, its norm and its activation, with numbers that differ from channel to channel."""
    conv = nn.Conv2d(inputs, outputs, 1, bias=bias)
    bn = nn.BatchNorm2d(outputs) if norm else nn.Identity()
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in (*conv.parameters(), *bn.parameters(), *bn.buffers()):
            if tensor.dim():
                tensor.uniform_(-1, 1, generator=generator)
        if norm:
            bn.running_var.abs_().add_(0.1)
    return nn.Sequential(conv, bn, ACTS[act]()).eval()


def tail(channels, act="relu", stride=1, residual=False, seed=0, bias=False, norm=True):
    """A stem tail whose modules have numbers of their own."""
    made = StemTail(channels, (None, None), (None, None), stride=stride, residual=residual)
    _, made.norm1, made.act1 = chain(channels, 3, stride, 1, act, seed=seed)
    made.conv_pw, made.norm2, made.act2 = mixing(2 * channels, channels, act, bias, norm, seed + 1)
    return made.eval()


@contextlib.contextmanager
def threads(count):
    usual = native._threads
    native._threads = lambda numel: count
    try:
        yield
    finally:
        native._threads = usual


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 3, 8, 16, 17, 40]), st.integers(5, 36), st.integers(5, 40)),
    kernel=st.sampled_from([3, 5]),
    outputs=st.sampled_from([1, 2, 4, 7, 8, 15, 16, 17, 31, 32, 33, 50, 70]),
    late=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    act=st.sampled_from(PASSED_OF_ANYTHING),
    seed=st.integers(0, 99),
    count=st.integers(1, 3),
)
def test_any_map_behind_a_sum(shape, kernel, outputs, late, layout, act, seed, count):
    conv, bn, activation = chain(shape[1], kernel, 2, kernel // 2 - 1, act, seed=seed)
    behind = mixing(shape[1], outputs, act, bias=seed % 2 == 0, norm=late or seed % 3 > 0, seed=seed)
    x = some_map(shape, layout, seed, spoilt=0.01 if seed % 5 == 0 else 0.0)
    pooled = F.max_pool2d(x, 3, 2)
    with torch.inference_mode(), threads(count), passes() as seen:
        if late:
            found = onepass.downsample(x, 3, 0, (conv,), (bn, activation, *behind))
            expected = behind(activation(bn(conv(x) + pooled)))
        else:
            found = onepass.downsample(x, 3, 0, (conv, bn, activation), (nn.Identity().eval(), *behind))
            expected = behind(activation(bn(conv(x))) + pooled)
    ambiguous = x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert seen == ([] if ambiguous else ["MIXED"])
    assert_close(found, expected, **FAR)
    assert found.stride() == expected.stride() or 1 in found.shape


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 3, 8, 16, 17, 40]), st.integers(5, 36), st.integers(5, 40)),
    kernel=st.sampled_from([3, 5]),
    outputs=st.sampled_from([1, 7, 16, 33, 50]),
    kind=st.sampled_from(["apart", "one Sequential", "two Sequentials", "rest"]),
    layout=st.sampled_from(LAYOUTS),
    act=st.sampled_from(PASSED_OF_ANYTHING),
    seed=st.integers(0, 99),
    count=st.integers(1, 3),
)
def test_any_map_in_a_projection_shortcut(shape, kernel, outputs, kind, layout, act, seed, count):
    conv, bn, activation = chain(shape[1], kernel, 2, seed % (kernel // 2 + 1), act, seed=seed)
    behind = mixing(shape[1], outputs, act, bias=seed % 2 == 0, norm=seed % 3 > 0, seed=seed)
    given = {
        "apart": ((conv, bn, activation), tuple(behind)),
        "one Sequential": ((nn.Sequential(conv, bn, activation, *behind),), ()),
        "two Sequentials": ((nn.Sequential(conv, bn, activation),), (behind,)),
        "rest": ((conv, bn, activation, behind[0]), (*behind[1:], nn.Mish())),
    }
    x = some_map(shape, layout, seed, spoilt=0.01 if seed % 5 == 0 else 0.0)
    with torch.inference_mode(), threads(count), passes() as seen:
        found = onepass.reduce(x, *given[kind])
        expected = nn.Sequential(*(module for modules in given[kind] for module in modules))(x)
    ambiguous = x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert seen == ([] if ambiguous else ["MIXED"])
    assert_close(found, expected, **FAR)
    assert found.stride() == expected.stride() or 1 in found.shape


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 9), st.sampled_from([2, 3, 8, 16, 17, 24, 40]), st.integers(3, 36), st.integers(3, 40)
    ),
    stride=st.sampled_from([1, 2]),
    residual=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    act=st.sampled_from(PASSED_OF_ANYTHING),
    seed=st.integers(0, 99),
    count=st.integers(1, 3),
)
def test_any_map_in_a_stem(shape, stride, residual, layout, act, seed, count):
    stem = tail(shape[1], act, stride, residual, seed, bias=seed % 2 == 0, norm=seed % 3 > 0)
    x = some_map(shape, layout, seed, spoilt=0.01 if seed % 5 == 0 else 0.0)
    with torch.inference_mode(), threads(count), passes() as seen:
        found = stem(x)
    assert seen == ["MIXED"]
    with torch.inference_mode(), modules_only():
        expected = stem(x)
    assert_close(found, expected, **FAR)
    assert found.stride() == expected.stride() or 1 in found.shape


@pytest.mark.skipif(sys.platform != "linux", reason="guards memory by mprotect")
def test_the_pass_stays_inside_its_maps():
    """The result ends at, or begins after, a page that must not be touched; a step outside kills the process."""
    script = """
import itertools, math
import torch
from tests.guarded import memories
from tests.test_pointwise import modules_only, tail
first, second = memories(2)
def place(memory, shape, strides):
    count = math.prod(shape)
    begin = memory.numel() - count if end else 0
    return memory.as_strided(shape, strides, memory.storage_offset() + begin)
def new_empty_strided(like, shape, strides):
    return place(second, shape, strides)
usual, count = torch.Tensor.new_empty_strided, 0
for channels, stride, residual, end, side, last in itertools.product(
    (3, 16, 18), (1, 2), (False, True), (False, True), (7, 19), (False, True)
):
    stem = tail(channels, stride=stride, residual=residual)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, channels, side, side + 1).contiguous(memory_format=layout)
    x = place(first, x.shape, x.stride()).copy_(x)
    with torch.inference_mode():
        with modules_only():
            expected = stem(x.clone())
        torch.Tensor.new_empty_strided = new_empty_strided
        out = stem(x)
        torch.Tensor.new_empty_strided = usual
    assert second.data_ptr() <= out.data_ptr() < second.data_ptr() + 4 * second.numel()
    torch.testing.assert_close(out.clone(), expected, rtol=1e-4, atol=2e-4)
    count += 1
print(count)
"""
    assert run_alone(script) == 96


NOT_MIXED = {
    "strided": lambda m: nn.Conv2d(8, 6, 1, 2),
    "grouped": lambda m: nn.Conv2d(8, 6, 1, groups=2),
    "padded": lambda m: nn.Conv2d(8, 6, 1, padding=1),
    "wider": lambda m: nn.Conv2d(8, 6, 3, padding=1),
    "of a class that computes something else": lambda m: type("Mine", (nn.Conv2d,), {"forward": lambda s, x: x * 2})(
        8, 6, 1
    ),
    "a norm in between": lambda m: nn.Sequential(nn.InstanceNorm2d(8), m[0]),
}


@pytest.mark.parametrize("kind", NOT_MIXED)
def test_other_convolutions_are_called(kind):
    before, behind = chain(8, 3, 2, 0), mixing(8, 6, norm=False)
    behind[0] = NOT_MIXED[kind](behind).eval()
    x = torch.randn(2, 8, 15, 16)
    with torch.no_grad(), passes() as seen:
        found = onepass.downsample(x, 3, 0, tuple(before), tuple(behind))
        assert_close(found, behind(before(x) + F.max_pool2d(x, 3, 2)), **FAR)
    assert seen == ["AFTER_ACTIVATION"]


def test_a_pre_hook_that_works_in_place_leaves_the_residual_alone():
    stem = tail(8, stride=2, residual=True)
    stem.conv_pw.register_forward_pre_hook(lambda module, inputs: inputs[0].mul_(2))
    x = torch.randn(2, 8, 15, 16)
    with torch.no_grad(), passes() as seen:
        found = stem(x)
    assert seen == ["BESIDE"]
    with torch.no_grad(), modules_only():
        assert_close(found, stem(x), **FAR)


def test_rows_that_are_too_long_are_the_modules():
    before, behind = chain(4, 3, 2, 0), mixing(4, 2)
    x = torch.randn(1, 4, 3, 2 * (1 << 16) + 1)
    with torch.no_grad(), passes() as seen:
        onepass.downsample(x, 3, 0, tuple(before), tuple(behind))
        longer = torch.cat((x, x), 3)
        found = onepass.downsample(longer, 3, 0, tuple(before), tuple(behind))
        assert_close(found, behind(before(longer) + F.max_pool2d(longer, 3, 2)), **FAR)
    assert seen == ["MIXED"]


@pytest.mark.parametrize(("name", "limit"), [("WIDEST", 7), ("LARGEST", 47)])
def test_wide_matrices_are_the_librarys(name, limit, monkeypatch):
    monkeypatch.setattr(chains, name, limit)
    before, behind = chain(8, 3, 2, 0), mixing(8, 6)
    x = torch.randn(2, 8, 15, 16)
    with torch.no_grad(), passes() as seen:
        found = onepass.downsample(x, 3, 0, tuple(before), tuple(behind))
        assert_close(found, behind(before(x) + F.max_pool2d(x, 3, 2)), **FAR)
    assert seen == ["AFTER_ACTIVATION"]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_stem_whose_last_activation_is_called(stride, residual):
    stem = tail(8, stride=stride, residual=residual)
    stem.act2 = nn.Mish()
    x = torch.randn(2, 8, 15, 16)
    with torch.no_grad(), passes() as seen:
        found = stem(x)
    with torch.no_grad(), modules_only():
        assert_close(found, stem(x), **FAR)
    assert seen == ["BESIDE" if residual else "MIXED"]


@pytest.mark.parametrize("again", [False, True], ids=["before", "after a first call"])
@pytest.mark.parametrize("change", ["a hook", "a replaced forward", "another weight", "a bias", "weights in place"])
def test_a_change_of_the_convolution_is_seen(change, again):
    def change_it(conv):
        if change == "a hook":
            conv.register_forward_hook(lambda module, inputs, output: output + 1)
        elif change == "a replaced forward":
            conv.forward = lambda x, usual=conv.forward: usual(x) + 1
        elif change == "another weight":
            conv.weight = nn.Parameter(torch.randn(8, 16, 1, 1))
        elif change == "a bias":
            conv.bias = nn.Parameter(torch.randn(8))
        else:
            conv.weight.data.mul_(2)

    stem, x = tail(8), torch.randn(2, 8, 15, 16)
    with torch.no_grad():
        before = stem(x) if again else None
        change_it(stem.conv_pw)
        found = stem(x)
        with modules_only():
            assert_close(found, stem(x), **FAR)
    assert before is None or not torch.allclose(found, before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_chain_is_seen(change):
    modules, behind = chain(8, 3, 2, 0), mixing(8, 8, norm=False)
    x = torch.randn(2, 8, 15, 16)
    with torch.no_grad():
        onepass.downsample(x, 3, 0, tuple(modules), tuple(behind))
        torch.manual_seed(0)
        CHANGES[change](modules)
        torch.manual_seed(0)
        try:
            expected = behind(modules[2](modules[1](modules[0](x))) + F.max_pool2d(x, 3, 2))
        except RuntimeError:
            with pytest.raises(RuntimeError):
                onepass.downsample(x, 3, 0, tuple(modules), tuple(behind))
            return
        assert_close(onepass.downsample(x, 3, 0, tuple(modules), tuple(behind)), expected, **FAR)


def test_the_extension_adds_nothing_of_another_size():
    before, behind = tuple(chain(8, 3, 1, 1)), tuple(mixing(8, 6))
    watch, modules = chains.read(before, behind).watch, chains.listed(before, behind, ())
    x = torch.randn(1, 8, 9, 10)

    def passed(extra, merge="AFTER_ACTIVATION", joined=False):
        return native.one_pass(watch, x, modules, (1, 3, 1), native.Merge[merge], joined, False, True, extra)

    with torch.no_grad():
        assert passed(Extra.NOTHING).shape == (1, 6, 9, 10)
        assert passed(Extra.INPUT) is None and passed(Extra.MAXIMA) is None
        assert passed(Extra.NOTHING, "BESIDE") is None
        assert passed(Extra.NOTHING, "BESIDE", joined=True) is None  # its weights are of 8 inputs


def test_weights_of_another_shape_are_torchs_to_judge():
    stem = tail(8)
    stem.conv_pw.weight = nn.Parameter(torch.randn(8, 15, 1, 1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected input"):
        stem(torch.randn(1, 8, 9, 10))


def test_an_infinite_weight_spreads():
    stem = tail(8)
    with torch.no_grad():
        stem.conv_pw.weight[3, 2] = math.inf
        x = torch.randn(2, 8, 15, 16)
        found = stem(x)
        with modules_only():
            assert_close(found, stem(x), **FAR)


class Inverted(Unit):
    """What follows the strided chain is a 1x1 convolution and its norm, as in MobileNetV2."""

    def __init__(self):
        super().__init__()
        self.project, self.last = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.last(self.project(super().forward(x)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network(layout):
    model = padfree.convert(Net(Inverted())).eval().to(memory_format=layout)
    x = torch.randn(2, 3, 33, 32).contiguous(memory_format=layout)
    with torch.no_grad(), passes() as seen:
        found = model(x)
    assert seen.count("MIXED") == len(seen) > 0
    with torch.no_grad(), modules_only():
        assert_close(found, model(x), **FAR)
