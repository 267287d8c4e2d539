"""A Sequential around a strided chain: neighbours in containers of their own take part in the chain's pass."""

import copy
import io
import pickle

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.testing import assert_close

import padfree
from padfree import native
from padfree.reforward import is_rewritten, original_class
from tests.strangers import Net, Unit
from tests.test_onepass import ACTS, LAYOUTS, built, modules_only, passes
from tests.test_pointwise import FAR

SIDE = 32


def conv_norm_act(inputs, outputs, kernel=1, stride=1, act="relu", groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), ACTS[act]())


class Gate(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


def inverted(act="relu", gate=False, channels=16):
    """An inverted residual's trunk as torchvision writes it: a Sequential of Sequentials."""
    parts = [conv_norm_act(8, channels, act=act), conv_norm_act(channels, channels, 3, 2, act, groups=channels)]
    return nn.Sequential(*parts, *([Gate()] if gate else []), conv_norm_act(channels, 8, act="none"))


def lively(model):
    """Its norms with statistics and weights that differ from channel to channel."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.uniform_(-1, 1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def converted(trunk, **settings):
    torch.manual_seed(0)
    return lively(padfree.convert(Net(trunk), input_size=(3, SIDE, SIDE), rules=("depthwise",), **settings))


def image(side=SIDE, count=2, layout=torch.contiguous_format):
    x = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))
    return x.contiguous(memory_format=layout)


def kinds():
    return passes(lambda merge, leads, mixed: ("led " if leads else "") + ("mixed" if mixed else merge.name))


def expected_of(model, x):
    with torch.no_grad(), modules_only(), passes() as seen:
        found = model(x)
    assert seen == []
    return found


# -- which neighbours ------------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mobilenet_v2", ["mixed", *["led mixed"] * 3, "led AFTER_ACTIVATION"]),
        ("mobilenet_v3_large", ["mixed", "led mixed", "led AFTER_ACTIVATION", "led mixed"]),
        ("mobilenet_v3_small", ["mixed", "AFTER_ACTIVATION", "led mixed", "led AFTER_ACTIVATION"]),
        ("efficientnet_b0", ["mixed", *["led AFTER_ACTIVATION"] * 3]),
    ],
)
def test_networks_of_torchvision(name, found, layout):
    torch.manual_seed(0)
    model = lively(padfree.convert(torchvision.models.get_model(name), input_size=(3, 64, 64)))
    model, x = model.to(memory_format=layout), image(64, layout=layout)
    for _ in range(2):  # read, and remembered
        with torch.no_grad(), kinds() as seen:
            y = model(x)
        assert sorted(seen) == sorted(found[: len(seen)]) and set(found) >= set(seen)
        expected = expected_of(model, x)
        assert_close(y, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@built
@settings(max_examples=60, deadline=None)
@given(
    act=st.sampled_from(["relu", "relu6", "hardswish", "silu", "gelu", "mish"]),
    gate=st.booleans(),
    channels=st.sampled_from([8, 16, 24]),
    wrapped=st.sampled_from(["no", "twice", "flat ahead", "norm apart"]),
    layout=st.sampled_from(LAYOUTS),
    side=st.sampled_from([32, 37]),
)
def test_any_trunk(act, gate, channels, wrapped, layout, side):
    trunk = inverted(act, gate, channels)
    if wrapped == "twice":
        trunk[0] = nn.Sequential(nn.Sequential(trunk[0]))
    elif wrapped == "flat ahead":
        trunk = nn.Sequential(*trunk[0], *trunk[1:])
    elif wrapped == "norm apart":
        trunk = nn.Sequential(trunk[0][0], nn.Sequential(*trunk[0][1:]), *trunk[1:])
    model = converted(trunk).to(memory_format=layout)
    x = image(side, layout=layout)
    with torch.no_grad(), kinds() as seen:
        y = model(x)
    assert len(seen) == 1
    # an activation that is not understood is called where it stands, and so is all that follows it
    whole = act != "mish" and wrapped != "flat ahead"
    assert not whole or seen == ["led AFTER_ACTIVATION" if gate else "led mixed"]
    assert_close(y, expected_of(model, x), **FAR)


@built
def test_blocks_one_after_another():
    """MobileNetV1 as a Sequential of Sequentials: each takes part in the next one's pass, nothing runs twice."""
    torch.manual_seed(0)
    separable = [nn.Sequential(*conv_norm_act(8, 8, 3, s, groups=8), *conv_norm_act(8, 8)) for s in (2, 2, 1, 2)]
    model = lively(padfree.convert(Net(nn.Sequential(*separable)), input_size=(3, 64, 64), rules=("depthwise",)))
    calls = []
    model.block[2].register_forward_hook(lambda *_: calls.append(1))
    x = image(64)
    with torch.no_grad(), kinds() as seen:
        y = model(x)
    assert seen == ["mixed"] * 3 and calls == [1]
    assert_close(y, expected_of(model, x), **FAR)


def test_only_where_a_neighbour_can_take_part():
    plain = converted(nn.Sequential(nn.ReLU(), conv_norm_act(8, 8, 3, 2, groups=8), nn.Conv2d(8, 8, 3)))
    assert not is_rewritten(plain.block) and is_rewritten(plain.block[1])
    assert is_rewritten(converted(inverted()).block)
    root = nn.Sequential(nn.Conv2d(3, 8, 3), *inverted())
    root = padfree.convert(root, input_size=(3, SIDE, SIDE), rules=("depthwise",))
    assert type(root) is nn.Sequential and is_rewritten(root[2])


class Shouting(nn.Sequential):
    """Not what a Sequential does."""

    def forward(self, x):
        for module in self:
            x = module(x) + 1
        return x


@built
def test_sequentials_with_a_forward_of_their_own():
    outer = inverted()
    ahead = inverted()
    ahead[0] = Shouting(*ahead[0])
    for trunk in (Shouting(*outer), ahead):
        model = converted(trunk)
        x = image()
        with torch.no_grad(), kinds() as seen:
            y = model(x)
        assert seen and not any(kind.startswith("led") for kind in seen)
        assert_close(y, expected_of(model, x), **FAR)


# -- changes ---------------------------------------------------------------------------------------------------------


def plus_one(module, inputs, output):
    return output + 1


class Twice(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 2


def replaced_forward(module):
    module.forward = lambda x, usual=module.forward: usual(x) + 1


CHANGES = {
    "none": lambda m: None,
    "a hook on the expansion": lambda m: m[0].register_forward_hook(plus_one),
    "a pre-hook on the expansion": lambda m: m[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    "a hook on its convolution": lambda m: m[0][0].register_forward_hook(plus_one),
    "a hook on its norm": lambda m: m[0][1].register_forward_hook(plus_one),
    "a hook on the block": lambda m: m[1].register_forward_hook(plus_one),
    "a pre-hook on the block": lambda m: m[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
    "a hook on its activation": lambda m: m[1][2].register_forward_hook(plus_one),
    "a hook on the projection": lambda m: m[2].register_forward_hook(plus_one),
    "a hook on the whole": lambda m: m.register_forward_hook(plus_one),
    "a forward of the expansion's own": lambda m: replaced_forward(m[0]),
    "a forward of the block's own": lambda m: replaced_forward(m[1]),
    "a norm in training": lambda m: m[0][1].train(),
    "the block in training": lambda m: m[1].train(),
    "all in training": lambda m: m.train(),
    "another activation": lambda m: m[0].__setitem__(2, Twice()),
    "another expansion": lambda m: m.__setitem__(0, conv_norm_act(8, 16, act="silu").eval()),
    "a child more": lambda m: m.append(nn.ReLU6()),
    "a child less": lambda m: m.pop(2),
    "a child more inside": lambda m: m[0].append(Twice()),
    "one in between": lambda m: m.insert(1, Twice()),
    "another block": lambda m: m.__setitem__(1, conv_norm_act(16, 16, 3, 2, groups=16).eval()),
    "weights in place": lambda m: m[0][1].running_mean.add_(1),
    "double precision": lambda m: m.double(),
}


@built
@pytest.mark.parametrize("again", [False, True], ids=["before", "after a first call"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, again):
    """Against a twin that went through the same and is called module by module."""
    model = converted(inverted())
    twin, calls = copy.deepcopy(model), []
    x = torch.randn(2, 8, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        if again:
            model.block(x)
        for net in (model, twin):
            torch.manual_seed(1)
            CHANGES[change](net.block)
        x = x.to(next(model.block.parameters()).dtype)
        model.block[0][0].register_forward_hook(lambda *_: calls.append(1))
        found = model.block(x)
        assert calls == [1]
        with modules_only():
            assert_close(found, twin.block(x), **FAR)
        for a, b in zip(model.block.buffers(), twin.block.buffers(), strict=True):
            assert_close(a, b, **FAR)


@built
def test_a_change_while_the_first_modules_run():
    """A hook of the expansion's convolution hooks the block: what was read is not what is there any more."""
    model, order = converted(inverted()), []
    x = image()
    with torch.no_grad():
        expected = model(x) + 0

        def late(module, inputs, output):
            handle.remove()
            model.block[1].register_forward_hook(lambda *_: order.append("block"))

        handle = model.block[0][0].register_forward_hook(late)
        assert_close(model(x), expected, **FAR)
        assert order == ["block"]
        assert_close(model(x), expected, **FAR)
        assert order == ["block"] * 2


@built
def test_what_no_pass_takes():
    model = converted(inverted()).double()
    with torch.no_grad(), passes() as seen:
        y = model(image().double())
    assert seen == []
    assert_close(y, expected_of(model, image().double()))


# -- the container is what it was ------------------------------------------------------------------------------------


def test_the_container_keeps_its_ways():
    trunk = inverted()
    model = converted(trunk)
    block = model.block
    assert isinstance(block, nn.Sequential) and original_class(block) is nn.Sequential and len(block) == 3
    assert list(block.state_dict()) == list(trunk.state_dict())
    assert repr(block[:2]).startswith("Sequential(") and len(block[1:]) == 2
    x = torch.randn(2, 8, SIDE, SIDE)
    with torch.no_grad():
        y = block(x)
        assert_close(block[1:](block[:1](x)), y, **FAR)
        for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert type(copied) is type(block)
            assert_close(copied(x), y, **FAR)
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        assert_close(torch.load(file, weights_only=False)(x), y, **FAR)


def test_training_and_whoever_looks_on_see_the_modules():
    model = converted(inverted())
    x = image()
    with torch.no_grad():
        y = expected_of(model, x)
        graph = fx.symbolic_trace(model)
        assert not any("padfree" in str(node.target) and "sequence" in str(node.target) for node in graph.graph.nodes)
        scripted = torch.jit.script(model)
        assert "sequence" not in str(scripted.block.code)
        for other in (graph, scripted, torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
            assert_close(other(x), y, **FAR)
    model.train()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_converting_once_more_changes_nothing():
    model = converted(inverted())
    kind = type(model.block)
    assert padfree.convert(model, input_size=(3, SIDE, SIDE), rules=("depthwise",)) is model
    whole = padfree.convert(model, input_size=(3, SIDE, SIDE))  # the stem is left
    assert type(whole.block) is kind
    x = image()
    with torch.no_grad():
        assert_close(whole.eval()(x), expected_of(whole.eval(), x), **FAR)


@built
def test_a_fused_network_is_passed_as_well():
    model = converted(inverted())
    fused = padfree.fuse(model)
    with torch.no_grad(), kinds() as seen:
        y = fused(image())
    assert seen == ["mixed"]  # the expansion's norm is gone
    assert_close(y, expected_of(model, image()), **FAR)


@built
def test_a_profile_has_each_pass_once():
    model = converted(inverted())
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(image())
    names = [event.key for event in profile.key_averages() for _ in range(event.count)]
    assert names.count("padfree::depthwise") == 1


@built
def test_has_changed():
    from padfree import chains

    trunk = converted(inverted()).block
    kernel, padding, before, behind = type(trunk[1]).padfree_chain(trunk[1])
    assert (kernel, padding, behind) == (3, 0, ())
    ahead, x = (trunk[0],), torch.randn(1, 8, 9, 10)
    found = chains.read(before, (trunk[2],), (), ahead, trunk[1])
    assert found.parted and found.first == (trunk[0][0],) and found.led == tuple(trunk[0][1:])
    modules = chains.listed(before, (trunk[2],), (), ahead, trunk[1])
    assert not native.has_changed(found.watch, x, modules)
    trunk[1].register_forward_hook(plus_one)
    assert native.has_changed(found.watch, x, modules) and not native.has_changed(found.gate, x, ahead)
    trunk[0].register_forward_hook(plus_one)
    assert native.has_changed(found.gate, x, ahead) and native.has_changed(found.gate, x, (trunk[2],))
    assert not chains.read(before, (trunk[2],), (), ahead, trunk[1], again=True).parted


def test_a_unit_alone_has_no_container():
    model = padfree.convert(Net(Unit()), rules=("depthwise",))
    assert "padfree_chain" in vars(type(model.block)) and not is_rewritten(model)
