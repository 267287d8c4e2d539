"""What is advised, with clocks that say what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import padfree
from padfree.advise.advice import recommend
from padfree.advise.forms import FORMS
from padfree.advise.results import Ratio, Row
from padfree.advise.runtimes import RUNTIMES, Runtime
from padfree.advise.timing import interleaved, ratio
from padfree.cli import main
from padfree.errors import NothingToConvertError, PadfreeError

SIZE = (3, 32, 32)


class Bench:
    """A clock that only calls move on, each by its own time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.calls.append(name)

        return run


def network() -> nn.Module:
    """A stem, a depthwise and a dense downsampling."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1)),
        nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
    )


def test_turns_are_taken_and_ratios_are_turn_by_turn() -> None:
    bench = Bench()
    timings = interleaved(
        {"a": bench.call("a", 0.25), "b": bench.call("b", 0.5)}, rounds=2, seconds=0.5, clock=bench.clock
    )
    assert timings == {"a": [0.25, 0.25], "b": [0.5, 0.5]}
    assert "".join(bench.calls) == "aabb" + "a" + "aabb" + "bbaa"  # to begin with; one to know how long; two turns
    assert ratio({"x": [1, 4, 9, 4], "y": [1, 2, 3, 1]}, "x", "y") == {"median": 2.5, "low": 1.25, "high": 3.75}
    assert ratio({"x": [3], "y": [2]}, "x", "y") == {"median": 1.5, "low": 1.5, "high": 1.5}


@pytest.mark.parametrize(
    ("times", "control", "expected", "words"),
    [
        ({"stem": 1.1, "downsampling": 0.9, "both": 0.8}, (1, 1, 1), "both", "it takes 0.80"),
        ({"stem": 1.1, "downsampling": 0.9, "both": 0.905}, (1, 1, 1), "both", "as fast as downsampling (0.90)"),
        ({"stem": 1.1, "downsampling": 0.9, "both": 1.2}, (1, 1, 1), "downsampling", "tail would add +0.30 and +3.0M"),
        ({"stem": 1.1, "downsampling": 1.05, "both": 1.2}, (1, 1, 1), "original", "every other form takes longer"),
        ({"stem": 1.1, "downsampling": 1.05, "both": 1.2}, (0.97, 0.91, 1), "downsampling", "as fast as original"),
        ({"stem": 1.1, "downsampling": 1.05, "both": 1.2}, (1.06, 1.06, 1.06), "downsampling", "within 0.06"),
        ({"stem": 1.1, "downsampling": 1.05, "both": 1.2}, (1.06, 1.06, 1.06), "downsampling", "too busy to tell less"),
        ({"stem": 0.8, "downsampling": 0.9, "both": 1.0}, (1, 1, 1), "stem", "the rest would add +0.20"),
        ({"stem": 0.8}, (1, 1, 1), "stem", "it takes 0.80"),
        ({"downsampling": 1.02}, (1, 1, 1), "original", "downsampling 1.02"),
    ],
)
def test_the_fullest_of_the_fastest_is_recommended(
    times: dict[str, float], control: tuple[float, float, float], expected: str, words: str
) -> None:
    macs = {"original": 10, "stem": 12, "downsampling": 9, "both": 12}
    rows = [Row("original", (), 0, 1, 10_000_000, 1.0, Ratio(1, 1, 1), 5)]
    for form in ("stem", "downsampling", "both"):
        time = Ratio(*[times[form]] * 3) if form in times else None
        rows.append(Row(form, (form,), 1, 1, macs[form] * 1_000_000, 1.0, time, 5, "" if time else "nothing"))
    chosen, reason = recommend(tuple(rows), Ratio(*control))
    assert chosen == expected and words in reason


def by_macs(bench: Bench, seen: list[nn.Module]) -> Runtime:
    """A runtime in which a network takes a second for each of its convolutions, and none is run."""

    def prepare(model: nn.Module, size: tuple[int, ...], batch: int) -> Callable[[], Callable[[], object]]:
        assert not model.training and (size, batch) == (SIZE, 2)
        seen.append(model)
        convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
        return lambda: bench.call("", float(convs))

    return Runtime("seconds", prepare)


def test_the_forms_are_measured_and_the_network_stays() -> None:
    model = network().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bench, seen, threads = Bench(), [], torch.get_num_threads()  # type: ignore[var-annotated]
    generator = torch.get_rng_state()
    advice = padfree.advise(
        model, runtime=by_macs(bench, seen), input_size=SIZE, batch=2, rounds=2, seconds=0, clock=bench.clock
    )
    assert [row.form for row in advice.rows] == list(FORMS)
    assert [row.places for row in advice.rows] == [0, 1, 2, 3]
    plain = 4
    expected = [1.0, (plain + 2) / plain, (plain + 1) / plain, (plain + 3) / plain]  # tail: two, dense shortcut: one
    assert [row.time.median for row in advice.rows] == expected  # type: ignore[union-attr]
    assert advice.control == Ratio(1, 1, 1)
    assert advice.recommended == "original" and advice.rules == ()
    assert [row.params for row in advice.rows] == [sum(p.numel() for p in each.parameters()) for each in seen[:4]]
    assert next(row.macs for row in advice.rows) == padfree.compare(model, seen[3], SIZE).macs.original
    assert [row.minimum_input for row in advice.rows][::3] == [1, padfree.compare(model, seen[3], SIZE).minimum_input]
    assert model.training and not padfree.is_converted(model) and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # alone: the stem is a form measured before, and each place takes what its own layers add
    stem, depthwise, dense = advice.places
    assert [row.form for row in advice.places] == ["0.0", "1.0", "2.0"]
    assert [row.rules for row in advice.places] == [("stem",), ("depthwise",), ("dense",)]
    assert [row.places for row in advice.places] == [1, 1, 1]
    assert stem.time == advice.rows[1].time and stem.reason == "the same as stem"
    assert [row.time.median for row in (depthwise, dense)] == [1.0, (plain + 1) / plain]  # type: ignore[union-attr]
    assert [row.params for row in (depthwise, dense)] == [
        sum(p.numel() for p in each.parameters()) for each in seen[4:]
    ]
    for row, only in ((depthwise, "1.0"), (dense, "2.0")):
        alone = padfree.compare(model, padfree.convert(model, input_size=SIZE, include=[only]), SIZE)
        assert (row.macs, row.minimum_input) == (alone.macs.converted, alone.minimum_input)
    text = str(advice)
    assert "one place alone:\n  0.0 " in text
    assert max(map(len, text.splitlines())) <= 80 and "recommended: original" in text
    assert json.loads(json.dumps(advice.to_dict()))["rows"][3]["rules"] == ["depthwise", "dense", "projection", "stem"]


class Merging(nn.Module):
    """Two branches that downsample, and are summed: one place. Its module is named like a form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.both = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.other = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return (self.both(x) + self.other(x)).mean((2, 3))


def test_what_shrinks_together_is_one_place() -> None:
    bench, seen = Bench(), []  # type: ignore[var-annotated]
    settings = {"input_size": SIZE, "batch": 2, "rounds": 1, "seconds": 0, "clock": bench.clock}
    told: list[str] = []
    advice = padfree.advise(Merging(), runtime=by_macs(bench, seen), **settings, progress=told.append)  # type: ignore[arg-type]
    (place,) = advice.places
    assert (place.form, place.places) == ("both.0 and 1 more", 2)
    assert place.reason == "the same as downsampling" and place.time == advice.rows[2].time
    assert [row.form for row in advice.rows] == list(FORMS)
    assert {"planning both", "planning both.0 and 1 more", "preparing original for seconds"} <= set(told)
    assert [text for text in told if "timing" in text] == [f"timing 3 networks in seconds, {n} of 3" for n in (1, 2, 3)]


def test_a_form_that_does_not_exist_says_so() -> None:
    bench, seen = Bench(), []  # type: ignore[var-annotated]
    model = nn.Sequential(*list(network())[1:])
    advice = padfree.advise(
        nn.Sequential(nn.Conv2d(3, 8, 4, 4), model),
        runtime=by_macs(bench, seen),
        input_size=SIZE,
        batch=2,
        rounds=1,
        seconds=0,
        clock=bench.clock,
        places=False,
    )
    assert advice.places == () and "one place alone" not in str(advice)
    assert [row.reason for row in advice.rows] == ["", "nothing to convert", "", "the same as downsampling"]
    assert len(seen) == 2 and "the same as downsampling" in str(advice)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"runtime": "abacus"}, "no runtime 'abacus' to measure in; there are fused, eager, onnxruntime"),
        ({"batch": 0}, "batch is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"input_size": (3, 32)}, "input_size"),
    ],
)
def test_a_wrong_request_is_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(PadfreeError, match=reason):
        padfree.advise(network(), **arguments)


def test_networks_without_a_choice_are_refused() -> None:
    with pytest.raises(NothingToConvertError, match="nothing to convert in Sequential"):
        padfree.advise(nn.Sequential(nn.Conv2d(3, 4, 1)), input_size=SIZE)
    with pytest.raises(PadfreeError, match="this network is converted: pass the original"):
        padfree.advise(padfree.convert(network(), input_size=SIZE))
    with pytest.raises(PadfreeError, match=r"takes a torch\.nn\.Module"):
        padfree.advise("resnet18")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_call_runs_the_network(name: str) -> None:
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model = network().eval()
    build = RUNTIMES[name].prepare(model, SIZE, 2)
    found: Any = build()()
    found = torch.as_tensor(found[0]) if isinstance(found, list) else found
    images = torch.rand((2, *SIZE), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, model(images).detach(), rtol=1e-4, atol=1e-5)


def test_a_runtime_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PadfreeError, match=r"needs onnx, onnxscript, onnxruntime: pip install"):
        padfree.advise(network(), runtime="onnxruntime")


def test_the_command_line_advises(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench()
    monkeypatch.setitem(RUNTIMES, "eager", Runtime("eager", lambda *_: lambda: bench.call("", 1.0)))
    monkeypatch.setitem(padfree.advise.__kwdefaults__, "clock", bench.clock)  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_advised.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    print('building')\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.Flatten())\n"
    )
    command = ["--model", "own_advised:make", "--input-size", "3", "16", "16", "--advise", "eager"]
    assert main([*command, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runtime"] == "eager" and report["recommended"] in FORMS and report["input_size"] == [3, 16, 16]
    assert main([*command, "--json", "advice.json"]) == 0
    assert json.loads((tmp_path / "advice.json").read_text()) == report
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Sequential at 3x16x16, batch 1, eager, one thread" and printed[-1] == "wrote advice.json"


@pytest.mark.parametrize(
    "flags",
    [
        ["--plan-only"],
        ["--output", "x.safetensors"],
        ["--rules", "stem"],
        ["--calibrate", "."],
        ["--report", "x.html"],
        ["--init", "preserve"],
    ],
)
def test_advice_converts_nothing(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--timm", "lcnet_035", "--advise", *flags]) == 2
    assert f"leave out {flags[0]}" in capsys.readouterr().err
