"""The deployment form: which strided chains become one call, what must stay, and the contract of the result."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.testing import assert_close

import padfree
from padfree.layers.fused import FusedChain
from tests.deploy.lived import drawn


def chains(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, FusedChain)}


def called(model, x):
    """How many modules without children a forward calls."""
    count = []
    handles = [m.register_forward_hook(lambda *_: count.append(1)) for m in model.modules() if not list(m.children())]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return len(count)


def image(side, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same(model, fused, side):
    """To 1e-5 of the largest output, or three times what float32 itself costs the unfused model."""
    with torch.no_grad():
        expected, exact = model(image(side)), copy.deepcopy(model).double()(image(side).double())
        noise = float((expected - exact).abs().max())
        limit = max(1e-5 * float(expected.abs().max()), 3 * noise)
        assert_close(fused(image(side)).double(), exact, rtol=0, atol=limit)


MODELS = {  # what builds it, and how many chains its padding-free form has
    "mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), 5),
    "ghostnet_050": (lambda: timm.create_model("ghostnet_050"), 9),  # four of them reductions of shortcuts
    "resnet18": (lambda: timm.create_model("resnet18"), 4),  # the stem's tail, three reductions
    "mixnet_s": (lambda: timm.create_model("mixnet_s"), 2),  # its split convolutions stay
    "efficientnet_lite0": (lambda: timm.create_model("efficientnet_lite0"), 5),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(width_mult=0.25), 5),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 5),
    "shufflenet_v2_x0_5": (lambda: torchvision.models.shufflenet_v2_x0_5(), 7),
}


@pytest.fixture(scope="module")
def built():
    """Converted networks by name, made once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = drawn(padfree.convert(MODELS[name][0](), input_size=(3, 64, 64)))
        return made[name]

    return get


SWEPT = ("mixnet_s", "efficientnet_lite0", "mobilenet_v2")  # chains like those of the others


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SWEPT else []) for name in MODELS]
)
def test_each_strided_chain_becomes_one_call(built, name):
    converted = built(name)
    fused = padfree.fuse(converted)
    assert len(chains(fused)) == MODELS[name][1]
    assert_same(converted, fused, 64)
    assert_same(converted, fused, 96)
    left = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == [] or name == "mixnet_s"  # there they read concatenations
    assert called(fused, image(64)) <= called(converted, image(64)) - 2 * MODELS[name][1]
    weights = sum(t.numel() for t in (*fused.parameters(), *fused.buffers()))
    assert weights < sum(t.numel() for t in (*converted.parameters(), *converted.buffers()))  # no weight is kept twice
    with torch.no_grad():
        double = copy.deepcopy(converted).double()
        expected = double(image(64).double())
        limit = 1e-11 * float(expected.abs().max())
        assert_close(padfree.fuse(double)(image(64).double()), expected, rtol=0, atol=limit)


def test_what_a_chain_holds(built):
    found = chains(padfree.fuse(built("mobilenet_v3_small")))
    stem, plain = found["features.1.padfree_stem.padfree_chain"], found["features.1.block.0.padfree_chain"]
    assert (stem.merge, stem.stride, stem.ahead, stem.point_act) == (
        "cat",
        1,
        "",
        "hardswish",
    )  # it ends another module
    assert (plain.merge, plain.stride, plain.padding, plain.pool, plain.ahead) == ("sum", 2, 0, 3, "")
    assert plain.point_weight is None  # squeeze and excitation reads the sum
    inner = found["features.2.block.1.padfree_chain"]  # torchvision keeps both its neighbours in other containers
    assert (inner.ahead, inner.act, tuple(inner.point_weight.shape)) == ("relu", "relu", (24, 72, 1, 1))
    first = chains(padfree.fuse(built("shufflenet_v2_x0_5")))["stage2.0.branch2.padfree_chain"]
    assert (first.merge, first.ahead, first.point_act) == ("norm", "relu", "relu")


@pytest.mark.parametrize("stride", [1, 2])
def test_a_stem_with_a_residual(stride):
    net = timm.create_model("mobilenetv3_small_050") if stride == 1 else timm.create_model("resnet18")
    converted = padfree.convert(net, input_size=(3, 64, 64), options=padfree.Options(stem_residual=True))
    converted = drawn(converted)
    fused = padfree.fuse(converted)
    assert [c.residual for c in chains(fused).values() if c.merge == "cat"] == [{1: "input", 2: "maxima"}[stride]]
    assert_same(converted, fused, 64)


# -- modules of one's own ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """1x1 -> act -> depthwise 3x3 stride 2 beside a max-pool -> 1x1, each act as asked for."""

    def __init__(self, act, merge="activation", channels=3):
        super().__init__()
        self.expand, self.norm0 = nn.Conv2d(channels, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm1 = nn.Conv2d(8, 8, 3, 2, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.norm2 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.act, self.merge = act, merge

    def forward(self, x):
        x = self.act(self.norm0(self.expand(x)))
        pooled = F.max_pool2d(x, 3, 2)
        if self.merge == "activation":
            y = self.act(self.norm1(self.conv(x))) + pooled
        elif self.merge == "norm":
            y = self.act(self.norm1(self.conv(x)) + pooled)
        else:
            y = self.act(self.norm1(self.conv(x) + pooled))
        return self.norm2(self.point(y))


class Called(nn.Module):
    """A module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ACTS = {
    "relu": torch.relu,
    "relu in place": nn.ReLU(inplace=True),
    "hardtanh(0.0,6.0)": F.relu6,
    "hardtanh(-1.0,1.0)": nn.Hardtanh(),
    "hardtanh(-2.0,3.0)": Called(lambda x: x.clamp(-2, 3)),
    "hardswish": F.hardswish,
    "silu": Called(F.silu),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "leaky_relu(0.01)": F.leaky_relu,
    "leaky_relu(0.2)": nn.LeakyReLU(0.2, inplace=True),
}


@pytest.mark.parametrize("act", ACTS)
def test_an_activation_is_known_however_it_is_called(act):
    model = drawn(nn.Sequential(Block(copy.deepcopy(ACTS[act]))))
    fused = padfree.fuse(model, input_size=(3, 9, 9))
    (chain,) = chains(fused).values()
    name = act.removesuffix(" in place")
    assert (chain.ahead, chain.act, chain.merge) == (name, name, "sum")
    assert chain.point_weight is not None
    assert_same(model, fused, 9)
    assert_same(model, fused, 12)


@pytest.mark.parametrize("merge", ["norm", "conv"])
def test_where_the_sum_is_taken(merge):
    model = drawn(nn.Sequential(Block(nn.ReLU(), merge)))
    fused = padfree.fuse(model, input_size=(3, 9, 9))
    (chain,) = chains(fused).values()
    assert (chain.merge, chain.act, chain.scale is not None) == ("norm", "relu", merge == "conv")
    assert_same(model, fused, 9)


def test_an_activation_the_operator_lacks_stays():
    model = drawn(nn.Sequential(Block(nn.Softplus())))
    fused = padfree.fuse(model, input_size=(3, 9, 9))
    assert chains(fused) == {}
    assert_same(model, fused, 9)


class Seen:
    def __init__(self):
        self.seen = []

    def __call__(self, module, args, output):
        self.seen.append(output)


@pytest.mark.parametrize(
    ("place", "left"),
    [
        ("conv", "all"),
        ("norm1", "all"),
        ("norm0", "nothing"),
        ("expand", "nothing"),
        ("point", "point"),
        ("", "nothing"),
    ],
)
def test_a_hook_sees_what_it_saw(place, left):
    """Parts that carry hooks stay outside of the chain, as does what they read."""
    model = nn.Sequential(Block(torch.relu))
    seen = Seen()
    model[0].get_submodule(place).register_forward_hook(seen)
    model = drawn(model)
    seen.seen.clear()
    fused = padfree.fuse(model, input_size=(3, 9, 9))
    assert seen.seen == []
    assert_same(model, fused, 9)
    mine = fused[0].get_submodule(place)._forward_hooks.values()
    (other,) = mine
    assert len(other.seen) == 1
    assert_close(other.seen[0], seen.seen[0], rtol=1e-5, atol=1e-5)
    found = list(chains(fused).values())
    assert [chain.point_weight is None for chain in found] == {"all": [], "point": [True], "nothing": [False]}[left]


class Reads(Block):
    """Something else reads a value that the chain would make on the way."""

    def __init__(self, what):
        super().__init__(torch.relu)
        self.what = what

    def forward(self, x):
        x = self.act(self.norm0(self.expand(x)))
        conv = self.conv(x)
        act = self.act(self.norm1(conv))
        pooled = F.max_pool2d(x, 3, 2)
        total = act + pooled
        extra = {"ahead": x, "conv": conv, "act": act, "pooled": pooled, "sum": total}
        value = self.point.weight if self.what == "weight" else extra[self.what]
        return self.norm2(self.point(total)) * value.mean()


@pytest.mark.parametrize("what", ["ahead", "conv", "act", "pooled", "sum", "weight"])
def test_what_something_else_reads_stays(what):
    model = drawn(nn.Sequential(Reads(what)))
    fused = padfree.fuse(model, input_size=(3, 9, 9))
    found = [(chain.ahead, chain.point_weight is None) for chain in chains(fused).values()]
    assert found == {"ahead": [("", False)], "sum": [("relu", True)], "weight": [("relu", True)]}.get(what, [])
    assert_same(model, fused, 9)


def test_shared_parts_stay():
    first, second = Block(nn.ReLU()), Block(nn.ReLU())
    second.conv.weight = first.conv.weight
    twice = Block(nn.ReLU())

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.twice = first, second, twice

        def forward(self, x):
            return self.first(x), self.second(x), self.twice(x), self.twice(x[..., 2:, 2:])

    model = drawn(Three())
    fused = padfree.fuse(model, input_size=(3, 11, 11))
    assert chains(fused) == {}
    with torch.no_grad():
        for mine, theirs in zip(model(image(11)), fused(image(11)), strict=True):
            assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_network_that_was_not_converted_has_no_chains():
    model = drawn(timm.create_model("mobilenetv3_small_050"))
    fused = padfree.fuse(model, input_size=(3, 64, 64))
    assert chains(fused) == {}
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert_same(model, fused, 64)


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(built):
    """A converted network and its fused form."""
    return built("mobilenetv3_small_050"), padfree.fuse(built("mobilenetv3_small_050"))


def test_it_is_frozen(pair):
    _, fused = pair
    assert not any(p.requires_grad for p in fused.parameters())
    for module in (fused, *fused.modules(), copy.deepcopy(fused).blocks, pickle.loads(pickle.dumps(fused))):
        with pytest.raises(padfree.PadfreeError, match="belongs to a fused network"):
            module.train()
        assert module.eval() is module
    assert not any(module.training for module in fused.modules())


class Folding(nn.Module):
    """With a fusing method of its own, which would fold what `padfree.fuse` has folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return self.down(self.norm(self.conv(x)))

    def fuse(self, verbose=True):
        self.conv, self.norm = torch.nn.utils.fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class Computing(Folding):
    """One of whose methods has the name of a fusing method, and computes."""

    def forward(self, x):
        return self.merge_bn(super().forward(x), 2)

    def merge_bn(self, x, factor):
        return x * factor


@pytest.mark.parametrize("kind", [Folding, Computing])
def test_fusing_methods_of_a_fused_network_have_nothing_left_to_do(kind):
    model = Computing() if kind is Computing else padfree.convert(Folding(), input_size=(3, 64, 64))
    fused = padfree.fuse(drawn(model), input_size=(3, 64, 64))
    with torch.no_grad():
        expected = fused(image(64))
        for module in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert module.fuse(verbose=False) is module
            assert_close(module(image(64)), expected, rtol=0, atol=0)


def test_it_takes_no_gradients(pair):
    with pytest.raises(RuntimeError, match="for inference"):
        pair[1](image(64).requires_grad_())


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_unfused_network_are_refused(pair, strict):
    converted, fused = pair
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    with pytest.raises(padfree.PadfreeError, match="load them into the unfused network, and fuse it then"):
        fused.load_state_dict(converted.state_dict(), strict=strict)
    assert_close(dict(fused.state_dict()), before, rtol=0, atol=0)
    fused.load_state_dict(before)


def test_weights_of_another_shape_are_refused(pair):
    chain = next(iter(chains(copy.deepcopy(pair[1])).values()))
    with pytest.raises(padfree.PadfreeError, match=r"has the shape \(16, 1, 3, 3\), and \(8, 1, 3, 3\)"):
        chain.weight = chain.weight[:8]
    with pytest.raises(padfree.PadfreeError, match="and None would be another network"):
        chain.bias = None
    chain.weight = chain.weight.clone()


@pytest.mark.parametrize("how", ["copied", "pickled", "channels_last", "fused again"])
def test_copies(pair, how):
    _, fused = pair
    made = {
        "copied": copy.deepcopy,
        "pickled": lambda model: pickle.loads(pickle.dumps(model)),
        "channels_last": lambda model: copy.deepcopy(model).to(memory_format=torch.channels_last),
        "fused again": padfree.fuse,
    }[how](fused)
    assert chains(made).keys() == chains(fused).keys()
    with torch.no_grad():
        x = image(64)
        x = x.contiguous(memory_format=torch.channels_last) if how == "channels_last" else x
        assert_close(made(x), fused(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(pair, dtype):
    converted, fused = (copy.deepcopy(model).to(dtype) for model in pair)
    with torch.no_grad():
        expected = converted(image(64, dtype=dtype))
        limit = {torch.float64: 1e-5, torch.bfloat16: 0.1}[dtype] * float(expected.abs().max())
        assert_close(fused(image(64, dtype=dtype)), expected, rtol=0, atol=limit)


def test_a_file_is_read_back_bit_by_bit(pair, tmp_path):
    _, fused = pair
    padfree.save(fused, tmp_path / "fused.safetensors")
    read = padfree.load(tmp_path / "fused.safetensors")
    assert chains(read).keys() == chains(fused).keys()
    assert read.padfree_plan == fused.padfree_plan
    with torch.no_grad():
        assert torch.equal(read(image(64)), fused(image(64)))
    with pytest.raises(padfree.PadfreeError, match="belongs to a fused network"):
        read.train()


@pytest.fixture(scope="module")
def toy():
    return padfree.fuse(
        drawn(nn.Sequential(Block(nn.ReLU()), Block(nn.Hardswish(), channels=6))), input_size=(3, 64, 64)
    )


def test_an_exported_program_holds_plain_operators(toy, tmp_path):
    fused = toy
    path = padfree.export.to_exported_program(fused, tmp_path / "fused.pt2", (3, 64, 64))
    program = torch.export.load(path)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators
    assert not [name for name in operators if "padfree" in name]
    with torch.no_grad():
        for side in (64, 96):
            assert_close(program.module()(image(side)), fused(image(side)), rtol=1e-5, atol=1e-5)


def test_an_onnx_file(toy, tmp_path):
    pytest.importorskip("onnxruntime")
    path = padfree.export.to_onnx(toy, tmp_path / "fused.onnx", (3, 64, 64))  # which compares outputs itself
    import onnx

    assert {node.domain for node in onnx.load(path).graph.node} <= {""}


# -- the check --------------------------------------------------------------------------------------------------------


def test_a_fold_that_is_wrong_is_found(monkeypatch):
    """The eleventh part of a promille in one weight is more than rounding."""

    def off(*args):
        weight, bias = fuse_conv_bn_weights(*args)
        return weight * (1 + 9e-5), bias

    monkeypatch.setattr("padfree.deploy.fold.fuse_conv_bn_weights", off)
    model = drawn(nn.Sequential(Block(nn.ReLU())))
    with pytest.raises(padfree.PadfreeError, match=r"differs by .* of the largest output, and at most 1e-09"):
        padfree.fuse(model, input_size=(3, 9, 9))


def test_rounding_that_a_network_magnifies_is_none_of_the_fold():
    """Beyond 1e-5 in float32 by rounding alone: the same in float64 agrees, so it is accepted."""

    class Magnified(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(nn.ReLU())

        def forward(self, x):
            y = self.block(x)
            return (y + 300) - 300

    model = drawn(nn.Sequential(Magnified()))
    fused = padfree.fuse(model, input_size=(3, 9, 9))
    assert len(chains(fused)) == 1


def test_what_looks_at_the_size_is_compared_at_two():
    class Sized(Block):
        def forward(self, x):
            return super().forward(x) if x.shape[-1] < 20 else super().forward(x) * self.norm2.running_var.mean()

    model = drawn(nn.Sequential(Sized(nn.ReLU())))
    with pytest.raises(padfree.PadfreeError, match="the fused Sequential fails"):
        padfree.fuse(model, input_size=(3, 9, 9))


def test_forward_mode_and_functional_gradients_are_those_of_the_network(built):
    converted = built("mobilenetv3_small_050")
    fused = padfree.fuse(converted)
    x = image(64)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (_, ours), (_, theirs) = (torch.func.jvp(model, (x,), (tangent,)) for model in (fused, converted))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    with torch.autograd.forward_ad.dual_level():
        dual = fused(torch.autograd.forward_ad.make_dual(x, tangent))
        assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, ours)
    first, second = (torch.func.grad(lambda z, m=model: m(z).sum())(x) for model in (fused, converted))
    assert_close(first, second, rtol=1e-4, atol=1e-4 * float(second.abs().max()))
