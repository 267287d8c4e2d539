"""What a model keeps for a map of one size, what runs in training only, and pools of every spelling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import Net, Unit, convert, images, refusal
from torch import Tensor, nn

import padfree
from padfree import Options


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Net(Unit())
        self.pos = nn.Parameter(torch.randn(1, 64, 8))
        self.rows = nn.Embedding(64, 8)
        self.register_buffer("chosen", torch.randperm(64)[:16])

    def tokens(self, x: Tensor) -> Tensor:
        return self.body(x).flatten(2).transpose(1, 2)


class CutTable(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        return (tokens + self.pos[:, : tokens.shape[1]]).mean(1)


class Looked(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        return (tokens + self.rows(torch.arange(tokens.shape[1], device=tokens.device))).mean(1)


class Picked(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x)[:, self.chosen]


class Gathered(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x).index_select(1, self.chosen)


class Stretched(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.body(x), 8).flatten(1)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (CutTable, "from a table of its own 64 places, and there would be 49"),
        (Looked, "`rows` reads from a table of its own 64 places, and there would be 49"),
        (Picked, "by (16,) indices of its own a map of 64 places, and there would be 49"),
        (Gathered, "by (16,) indices of its own a map of 64 places, and there would be 49"),
        (Stretched, "adaptive_avg_pool2d ((1, 8, 7, 7) to (1, 8, 8, 8)"),
    ],
)
def test_places_of_another_map_are_refused(kind: type[nn.Module], words: str) -> None:
    assert words in refusal(kind())


class TwoTables(CutTable):
    """Another table is cut before and after; that hides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.randn(1, 99, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gains[:, :10].mean()


def test_a_table_cut_anyway_does_not_hide_another() -> None:
    assert "from a table of its own 64 places, and there would be 49" in refusal(TwoTables())


class IndexedAnew(Tokens):
    """Only a map of another size is indexed at all, by as many indices as it has places."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        if tokens.shape[1] != 64:
            tokens = tokens[:, torch.arange(tokens.shape[1], device=x.device)]
        return tokens.mean(1)


class ByAxis(Tokens):
    """A table with a row for each line of the map has no row too many to be misread."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = nn.Parameter(torch.randn(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y + self.lines[: y.shape[-2]]


class Computed(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        return tokens[:, torch.arange(tokens.shape[1] // 2, device=x.device)].mean(1)


@pytest.mark.parametrize("kind", [ByAxis, Computed, IndexedAnew])
def test_what_follows_the_map_is_converted(kind: type[nn.Module]) -> None:
    made = convert(kind().eval())
    assert isinstance(made(images()), Tensor)


class Auxiliary(nn.Module):
    """A head that runs in training only, on a map of fixed size."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.body, self.head = Net(Unit()), nn.Linear(8 * side * side, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return (y, self.head(y.flatten(1))) if self.training else y


def test_a_branch_that_runs_in_training_only_is_tried_too() -> None:
    text = refusal(Auxiliary(8))
    assert "in train mode `head` takes" in text


class Labels(Net):
    """It cannot run in training without more arguments: nothing is known of that mode."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = super().forward(x)
        if self.training:
            assert labels is not None
            return y.mean((2, 3)), labels
        return y


class SilentTrain(Auxiliary):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)


def test_a_train_that_returns_nothing_is_not_asked() -> None:
    assert "in train mode `head` takes" in refusal(SilentTrain(8))


def test_a_training_mode_that_wants_labels_is_left_aside() -> None:
    made = convert(Labels(Unit()))
    assert made.train()(images(), torch.zeros(2))[0].shape == (2, 8)


class Pools(nn.Module):
    """A strided conv beside a pool, joined: ENet's downsampling."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(8, 8, 3, 2, 1), pool

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.cat([self.conv(x), self.pool(x)], 1))


def max_by_name(x: Tensor) -> Tensor:
    return F.max_pool2d(input=x, kernel_size=2)


def max_alone(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


def mean_alone(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


@pytest.mark.parametrize(
    ("pool", "wanted"),
    [
        (max_alone, F.max_pool2d),
        (max_by_name, F.max_pool2d),
        (mean_alone, F.avg_pool2d),
        (nn.MaxPool2d(2), F.max_pool2d),
    ],
)
def test_a_functional_pool_without_a_stride_is_followed(pool: Any, wanted: Any) -> None:
    model = Net(Pools(pool)).eval()
    made = convert(model, rules=("dense", "projection"))
    x = made.stem(images())
    torch.testing.assert_close(made(images())[:, 8:], torch.relu(wanted(x, 3, 2)))


def power_mean(x: Tensor) -> Tensor:
    return F.lp_pool2d(x, 2.0, 2)


def divided(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, divisor_override=1)


@pytest.mark.parametrize("pool", [power_mean, divided])
def test_a_pool_with_settings_of_its_own_stops_its_domain(pool: Any) -> None:
    assert "settings or sums of its own" in refusal(Net(Pools(pool)), rules=("dense", "projection"))


class Unpools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(8, 8, 3, 2, 1), nn.MaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor) -> Tensor:
        y, indices = self.pool(x)
        return F.max_unpool2d(y + self.conv(x), indices, 2)


def test_a_pool_whose_indices_are_used_stops_its_domain() -> None:
    assert "its indices are used" in refusal(Net(Unpools()), rules=("dense", "projection"))


class PaddedApart(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.conv.padding = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def test_a_plan_names_the_sizes_of_convs_padded_apart() -> None:
    model = Net(nn.Sequential(PaddedApart(), PaddedApart()))
    plan = padfree.plan(model, rules=["depthwise"], input_size=(3, 32, 32))
    assert [match.out_after for match in plan.matches] == [(15, 15), (7, 7)]
    assert plan.apply(model)(images(side=32)).shape[-2:] == (7, 7)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda x: F.leaky_relu(x, 0.2), "LeakyReLU(negative_slope=0.2)"),
        (lambda x: F.hardtanh(x), "Hardtanh(min_val=-1.0, max_val=1.0)"),
        (lambda x: F.relu6(x), "ReLU6()"),
        (lambda x: F.elu(x, alpha=0.3), "ELU(alpha=0.3)"),
        (lambda x: F.selu(x), "SELU()"),
        (lambda x: F.gelu(x, approximate="tanh"), "GELU(approximate='tanh')"),
        (lambda x: F.relu(x), "ReLU()"),
    ],
)
def test_a_stem_activation_called_as_a_function_keeps_its_settings(function: Any, wanted: str) -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.bn(self.conv(x)))  # type: ignore[no-any-return]

    net = Net(Unit())
    net.stem = Stem()  # type: ignore[assignment]
    made = convert(net, rules=("stem",))
    tail = next(module for name, module in made.named_modules() if name.endswith("padfree_stem"))
    assert repr(tail.act1) == repr(tail.act2) == wanted
    plan = padfree.plan(net, rules=["stem"], input_size=(3, 16, 16))
    assert padfree.Plan.from_dict(plan.to_dict()) == plan


def test_part_of_a_domain_of_a_plan_is_not_applied() -> None:
    import dataclasses

    from strangers import Basic

    model = Net(Basic())
    plan = padfree.plan(model, rules=["dense", "projection"], input_size=(3, 16, 16), options=Options())
    assert len(plan.matches) == 2
    with pytest.raises(padfree.errors.PlanError, match="cannot be carried out"):
        dataclasses.replace(plan, matches=plan.matches[:1]).apply(model)


def test_extra_state_that_is_no_tensor() -> None:
    class Extra(Unit):
        def get_extra_state(self) -> Any:
            return {"epoch": 3}

        def set_extra_state(self, state: Any) -> None:
            assert state == {"epoch": 3}

    made = convert(Net(Extra()))
    assert made.state_dict()["block._extra_state"] == {"epoch": 3}


def test_the_first_conv_registered_need_not_be_the_first_to_run() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(8, 2, 1)
            self.body = Net(Unit())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))  # type: ignore[no-any-return]

    assert padfree.plan(HeadFirst()).input_size == (3, 224, 224)


class Gains(Net):
    """Hooks and tables of its own functions that read the model itself."""

    def __init__(self) -> None:
        super().__init__(Unit())
        self.gain = nn.Parameter(torch.ones(()))
        self.heads = {"mean": [lambda y: self.gain * y.mean()]}
        self.block.register_forward_hook(lambda module, inputs, output: output * self.gain)


def test_functions_in_hooks_and_containers_read_the_copy() -> None:
    model = Gains()
    made = convert(model)
    (made(images()).sum() + made.heads["mean"][0](images())).backward()
    assert made.gain.grad is not None and model.gain.grad is None
    (model(images()).sum() + model.heads["mean"][0](images())).backward()
    assert model.gain.grad is not None


def test_a_forward_that_needs_its_hooks_is_told_so() -> None:
    class Taps(Net):
        def __init__(self) -> None:
            super().__init__(Unit())
            self.seen: list[Tensor] = []
            self.block.register_forward_hook(lambda module, inputs, output: self.seen.append(output))

        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            return self.seen.pop()

    assert "without its hooks" in refusal(Taps())


def test_rules_that_find_no_place_are_named() -> None:
    with pytest.raises(padfree.PadfreeError, match="no place for 'projection', the only rules asked for"):
        convert(Net(Unit()), rules=("projection",))
    with pytest.raises(padfree.PadfreeError, match="unknown rule"):
        convert(Net(Unit()), rules=[["depthwise"]])


def test_a_stem_that_runs_twice_is_told_from_two_stems() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Net(Unit())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.body(x * 0.5)  # type: ignore[no-any-return]

    reasons = {skip.name: skip.reason for skip in padfree.plan(Twins(), input_size=(3, 16, 16)).skips}
    assert "reads the input 2 times" in reasons["body.stem"]
