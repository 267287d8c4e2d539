"""What strangers put around a strided convolution, and what must come of it: the paper's network, or a reason."""

import functools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

import padfree
from tests.strangers import SIDE, Net, Unit, convert, images


def reasons(model, **settings):
    plan = padfree.plan(model, **{"input_size": (3, SIDE, SIDE), **settings})
    return plan, " | ".join(f"{skip.name}: {skip.reason}" for skip in plan.skips)


# -- in front of the stem --------------------------------------------------------------------------------------------


class Prepared(nn.Module):
    def __init__(self, prepare):
        super().__init__()
        self.prepare, self.net = prepare, torchvision.models.resnet18(weights=None)

    def forward(self, x):
        return self.net(self.prepare(x))


class Mixing(nn.Module):
    """Colours mixed by a fixed matrix."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.rand(3, 3))

    def forward(self, x):
        return torch.einsum("dc,nchw->ndhw", self.matrix, x)


PREPARATIONS = {
    "an antialiased resize": torchvision.transforms.Resize((96, 96)),
    "channels repeated": lambda x: x[:, :1].repeat(1, 3, 1, 1),
    "clamp": lambda x: x.clamp(0, 1),
    "flip": lambda x: x.flip(-1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 96),
    "pool": nn.AvgPool2d(2),
    "logarithm": lambda x: torch.log1p(x.abs()),
    "a colour matrix": Mixing(),
    "a learnt 1x1": nn.Conv2d(3, 3, 1),
    "noise where there is none": lambda x: x.nan_to_num(),
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_the_stem_is_the_first_layer_that_learns(name):
    plan = padfree.plan(Prepared(PREPARATIONS[name]), input_size=(3, 128, 128))
    rules = {match.name: match.rule for match in plan.matches}
    assert rules["net.conv1"] == "stem" and not plan.skips


def test_a_layer_that_learns_comes_first():
    plan = padfree.plan(Prepared(nn.Conv2d(3, 3, 3, padding=1)), input_size=(3, 128, 128))
    rules = {match.name: match.rule for match in plan.matches}
    assert rules["prepare"] == "stem" and rules["net.conv1"] == "dense"


# -- what only acts in training --------------------------------------------------------------------------------------


class Dropping(Unit):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x):
        return super().forward(self.drop(x))


KINDS = (nn.Dropout2d, nn.Conv2d, nn.BatchNorm2d)


def test_the_pool_reads_what_the_conv_reads_in_training_too():
    sequence = nn.Sequential(nn.Dropout2d(0.5), *Unit().children())
    for block in (Dropping(), sequence):
        block = convert(Net(block)).block.train()
        drop, conv, bn = (next(m for m in block.modules() if isinstance(m, kind)) for kind in KINDS)
        x = torch.randn(4, 8, 9, 9)
        torch.manual_seed(1)
        found = block(x)
        torch.manual_seed(1)
        z = drop(x)
        assert not torch.equal(z, x)
        y = F.batch_norm(conv(z), None, None, bn.weight, bn.bias, True)
        assert_close(found, F.relu(y) + F.max_pool2d(z, 3, 2))


class Split(nn.Module):
    """The dropout is in the conv's module, its norm is not."""

    def __init__(self):
        super().__init__()
        self.inner, self.bn = nn.Sequential(nn.Dropout2d(0.5), Unit().conv), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn(self.inner(x)))


def test_a_dropout_out_of_the_blocks_sight():
    plan, why = reasons(Net(Split()), rules=("depthwise",))
    assert not plan.matches and "`block.inner.0` changes in training what the conv reads" in why


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.conv, self.bn = nn.Dropout2d(0.5), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.down = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) + self.down(self.drop(x))


def test_a_dropout_before_a_projection():
    model = padfree.convert(Net(Residual()), input_size=(3, SIDE, SIDE))
    assert [match.rule for match in model.padfree_plan.matches] == ["stem", "dense", "projection"]
    seen = []
    model.block.padfree_reduce.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.train()
    model.block.drop.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    model(images())
    assert not seen[0].any()


class Auxiliary(nn.Module):
    """The stem's activation is used again, in training only."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.unit, self.aux = Unit(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.unit(self.relu(self.bn(self.conv(x))))
        return (y, self.relu(self.aux(y))) if self.training else y


def test_a_module_that_runs_once_more_in_training():
    """Its place, that of the stem's activation, is not the tail's any more; the block that reads the stem is."""
    plan, _ = reasons(Auxiliary())
    assert [match.rule for match in plan.matches] == ["stem", "depthwise"]
    assert plan.matches[0].detail.place != "relu"


# -- activations that are formulas -----------------------------------------------------------------------------------

FORMULAS = {
    "swish": lambda y: y * torch.sigmoid(y),
    "hardswish": lambda y: y * F.relu6(y + 3) / 6,
    "maximum": lambda y: torch.maximum(y, torch.zeros_like(y)),
    "where": lambda y: torch.where(y > 0, y, 0.1 * y),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "mish": lambda y: y * F.softplus(y).tanh(),
}


class Formula(Unit):
    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x):
        return self.formula(self.bn(self.conv(x)))


@pytest.mark.parametrize("name", FORMULAS)
def test_the_sum_is_taken_behind_a_formula(name):
    model = convert(Net(Formula(FORMULAS[name])).eval())
    block, x = model.block, torch.randn(2, 8, SIDE, SIDE)
    y = block.bn(F.conv2d(x, block.conv.weight, block.conv.bias, 2, 0, 1, 8))
    expected = FORMULAS[name](y) + F.max_pool2d(x, 3, 2)
    assert_close(block(x), expected)
    with torch.no_grad():
        assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", [nn.RReLU(), nn.Softmax2d(), nn.Softsign(), nn.Tanhshrink()])
def test_the_sum_is_taken_behind_a_module(act):
    unit = Unit()
    unit.act = act
    block, x = convert(Net(unit).eval()).block, torch.randn(2, 8, SIDE, SIDE)
    y = block.bn(F.conv2d(x, block.conv.weight, block.conv.bias, 2, 0, 1, 8))
    assert_close(block(x), act(y) + F.max_pool2d(x, 3, 2))


class ChannelsLast(nn.Module):
    def __init__(self, stride=2, inputs=8, groups=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, 8, 3, stride, 1, groups=groups), nn.LayerNorm(8)

    def forward(self, x):
        return F.gelu(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def test_a_norm_and_an_activation_over_the_last_axis():
    block, x = convert(Net(ChannelsLast()), size=(3, 32, 32)).block, torch.randn(2, 8, SIDE, SIDE)
    y = F.conv2d(x, block.conv.weight, block.conv.bias, 2, 0, 1, 8)
    y = F.gelu(block.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    assert_close(block(x), y + F.max_pool2d(x, 3, 2))


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        (lambda: ChannelsLast(1, 3, 1), "reads a map laid out (N, H, W, C)"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Swish()), None),
    ],
)
def test_a_stem_without_an_activation_to_copy(stem, words):
    model = Net(Unit())
    model.stem = stem()
    plan, why = reasons(model)
    if words is None:  # the formula is a module's: it can be copied
        assert plan.matches[0].detail.act == "stem.1"
    else:
        assert [match.rule for match in plan.matches] == ["depthwise"] and words in why


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class FormulaStem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y * torch.sigmoid(y)


def test_a_stem_with_a_formula():
    model = Net(Unit())
    model.stem = FormulaStem()
    plan, why = reasons(model)
    assert [match.rule for match in plan.matches] == ["depthwise"]
    assert "its activation is a formula in a forward, without a module to copy" in why


class Gated(Unit):
    """No activation: the gate reads more than this value."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y * torch.sigmoid(y.mean((2, 3), keepdim=True))


def test_a_gate_is_no_activation():
    block, x = convert(Net(Gated()).eval()).block, torch.randn(2, 8, SIDE, SIDE)
    y = block.bn(F.conv2d(x, block.conv.weight, block.conv.bias, 2, 0, 1, 8)) + F.max_pool2d(x, 3, 2)
    assert_close(block(x), y * torch.sigmoid(y.mean((2, 3), keepdim=True)))


def test_a_norm_over_whole_maps_is_copied_fresh():
    model = Net(Unit())
    model.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, SIDE, SIDE]), nn.ReLU())
    nn.init.constant_(model.stem[1].weight, 3.0)
    nn.init.constant_(model.stem[1].bias, 7.0)
    tail = padfree.convert(model, input_size=(3, SIDE, SIDE)).block.padfree_stem
    for norm in (tail.norm1, tail.norm2):
        assert norm.weight.shape == (8, SIDE, SIDE) and (norm.weight == 1).all() and (norm.bias == 0).all()


# -- sizes -----------------------------------------------------------------------------------------------------------


class OptionA(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x):
        return F.relu(self.conv(x)) + x[:, :, ::2, ::2]


def test_a_single_pixel_does_not_stand_for_a_map():
    plan, why = reasons(Net(OptionA()), input_size=(3, 4, 4), rules=("dense",))
    assert not plan.matches and "newly combine maps of (1, 1) and (2, 2) pixels" in why


class Positioned(nn.Module):
    def __init__(self, fit):
        super().__init__()
        self.unit, self.fit, self.position = Unit(), fit, nn.Parameter(torch.zeros(1, 8, 8, 8))

    def forward(self, x):
        return self.fit(self.unit(x)) + self.position


@pytest.mark.parametrize(
    ("fit", "kind"),
    [
        (lambda y: F.interpolate(y, (8, 8), mode="bilinear", antialias=True), "_upsample_bilinear2d_aa"),
        (lambda y: F.interpolate(y, (8, 8)), "upsample_nearest2d"),
    ],
)
def test_a_map_that_would_be_stretched(fit, kind):
    plan, why = reasons(Net(Positioned(fit)), rules=("depthwise",))
    assert not plan.matches and f"newly run {kind}" in why


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.pool, self.point = nn.AvgPool2d(2, 2, divisor_override=3), nn.Conv2d(8, 16, 1)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) + self.point(self.pool(x))


def test_a_pool_with_a_divisor_of_its_own():
    plan, why = reasons(Net(Averaging()), rules=("dense", "projection"))
    assert not plan.matches and "`block.pool` divides its sums by 3" in why


# -- forwards that ask, count or mark --------------------------------------------------------------------------------

COUNT = 0


class Held:
    calls = 0


HELD = Held()
HELD.calls = 0


class Counting(Unit):
    def forward(self, x):
        global COUNT
        COUNT += 1
        return super().forward(x)


class CountingElsewhere(Unit):
    def forward(self, x):
        HELD.calls += 1
        return super().forward(x)


class Asking(Unit):
    def forward(self, x):
        y = super().forward(x)
        return y if torch.is_grad_enabled() else 2 * y


class AskingForAutocast(Unit):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if torch.is_autocast_enabled() else y


class Marking(Unit):
    def forward(self, x):
        with torch.profiler.record_function("unit"):
            return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Counting, "writes into the global `COUNT`"),
        (CountingElsewhere, "writes into the global `HELD`"),
        (Asking, "asks whether gradients are on"),
        (AskingForAutocast, "asks whether autocast is on"),
        (Marking, "marks a stretch for the profiler"),
    ],
)
def test_forwards_that_a_graph_cannot_repeat(kind, words):
    plan, why = reasons(Net(kind()), rules=("depthwise",))
    assert not plan.matches and words in why
    assert (COUNT, HELD.calls) == (0, 0)


def test_a_marked_block_below_another_one():
    model = Net(nn.Sequential(Marking(), nn.Conv2d(8, 8, 3, 2, 1)))
    plan, why = reasons(model)
    assert [match.rule for match in plan.matches] == ["stem", "dense"] and "profiler" in why


def test_blocks_that_are_asked_by_the_library_only():
    plan, _ = reasons(convert(Net(Unit())))
    assert [match.rule for match in plan.matches] == ["stem"]  # a converted block, traced again, asks for gradients


# -- plans and copies ------------------------------------------------------------------------------------------------


def test_a_plan_after_a_plan_is_carried_out_whole_or_not_at_all():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Unit(), nn.Conv2d(8, 8, 3, 2, 1))
    first = convert(model)
    plan = padfree.plan(first, input_size=(3, SIDE, SIDE), rules=("dense",))
    both = plan.apply(model).eval()
    assert both.padfree_plan.earlier is not None
    whole = padfree.convert(first, input_size=(3, SIDE, SIDE), rules=("dense",)).eval()
    whole.load_state_dict(both.state_dict())
    assert_close(both(images()), whole(images()))
    model[2] = nn.Conv2d(8, 8, 3, 1, 1)
    with pytest.raises(padfree.PadfreeError, match="make a new plan"):
        plan.apply(model, inplace=True)
    assert type(model[1]) is Unit and model[1].conv.padding == (1, 1)


def closes_over(net, kind):
    conv = net.block.conv
    if kind == "a list":
        convs = [conv]
        return lambda: sum(each.weight.sum() for each in convs)
    if kind == "a dictionary in a tuple":
        held = ({"conv": conv},)
        return lambda: held[0]["conv"].weight.sum()
    if kind == "a parameter":
        weight = conv.weight
        return lambda: weight.sum()
    if kind == "a default":
        return lambda module=conv: module.weight.sum()
    if kind == "a keyword's default":

        def by_name(*, module=conv):
            return module.weight.sum()

        return by_name
    if kind == "a partial":
        return functools.partial(lambda module: module.weight.sum(), conv)
    if kind == "another function":
        inner = closes_over(net, "a list")
        return lambda: inner()

    def itself(depth=1):
        return itself(depth - 1) if depth else conv.weight.sum()

    return itself


@pytest.mark.parametrize(
    "kind",
    ["a list", "a dictionary in a tuple", "a parameter", "a default", "a keyword's default", "a partial",
     "another function", "itself"],
)  # fmt: skip
def test_functions_of_a_copy_read_the_copy(kind):
    net = Net(Unit())
    net.loss = closes_over(net, kind)
    converted = convert(net)
    converted.loss().backward()
    assert net.block.conv.weight.grad is None and converted.block.conv.weight.grad is not None
    net.loss().backward()
    assert net.block.conv.weight.grad is not None


def test_variables_that_functions_share_are_shared_by_the_copys():
    net = Net(Unit())
    block = net.block

    def swap():
        nonlocal block
        block = None

    def tell():
        return block

    net.swap, net.tell = swap, tell
    converted = convert(net)
    assert converted.tell() is converted.block
    converted.swap()
    assert converted.tell() is None and tell() is net.block


# -- who else reads --------------------------------------------------------------------------------------------------


class Tapped(nn.Module):
    """A network that also hands out, or joins to its result, what its stem makes on the way."""

    def __init__(self, tap, use):
        super().__init__()
        self.tap, self.use = tap, use
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.down = Unit()

    def forward(self, x):
        made = {"conv": self.conv(x)}
        made["bn"] = self.bn(made["conv"])
        made["act"] = self.act(made["bn"])
        y = self.down(self.pool(made["act"]))
        if self.use == "returned":
            return y, made[self.tap]
        if self.use == "joined":
            return torch.cat((F.interpolate(y, size=made[self.tap].shape[2:])[:, :8], made[self.tap]), 1)
        return y


TAPS = [("conv", "returned"), ("bn", "returned"), ("act", "returned"), ("conv", "joined"), ("act", "joined")]


@pytest.mark.parametrize(("tap", "use"), TAPS)
def test_what_is_tapped_of_a_stem_makes_no_other_network(tap, use):
    torch.manual_seed(0)
    plain, tapped = Tapped(tap, ""), Tapped(tap, use)
    tapped.load_state_dict(plain.state_dict())
    x = images()
    first, second = (convert(model, rules=("stem", "depthwise")).eval() for model in (plain, tapped))
    assert "pool.conv_pw.weight" in first.state_dict()
    assert list(first.state_dict()) == list(second.state_dict())
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        result, shown = first(x), second(x)
        kept = plain.eval().conv(x)
        if tap != "conv":
            kept = plain.bn(kept)
        kept = F.relu(kept) if tap == "act" else kept
        expected = torch.cat((F.interpolate(result, size=kept.shape[2:])[:, :8], kept), 1)
    assert_close(shown[0] if use == "returned" else shown, result if use == "returned" else expected)
    assert_close(shown[1] if use == "returned" else kept, kept)


class TappedUnit(nn.Module):
    def __init__(self, tap):
        super().__init__()
        self.tap = tap
        self.stem, self.unit = nn.Conv2d(3, 8, 3, 1, 1), Unit()

    def forward(self, x):
        unit = self.unit
        made = [unit.conv(self.stem(x))]
        made.append(unit.bn(made[0]))
        return F.relu(made[1]), made[self.tap]


@pytest.mark.parametrize("tap", [0, 1])
def test_what_is_tapped_of_a_strided_chain(tap):
    model = TappedUnit(tap).eval()
    made = padfree.convert(model, input_size=(3, SIDE, SIDE), rules=("depthwise",))
    x = images()
    with torch.no_grad():
        y = model.stem(x)
        conv = F.conv2d(y, model.unit.conv.weight, model.unit.conv.bias, 2, groups=model.unit.conv.groups)
        normed = model.unit.bn(conv)
        found = made(x)
    assert_close(found[0], F.relu(normed) + F.max_pool2d(y, 3, 2))
    assert_close(found[1], (conv, normed)[tap])
