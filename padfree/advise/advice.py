"""`advise`: what each form of a network costs, and which to take.

    print(padfree.advise(timm.create_model("mobilenetv4_conv_small"), runtime="onnxruntime"))

Time is compared with that of the original, in turns, on one thread of the CPU. What networks of the same form differ by
when they are built again is measured beside it (the control: the original against itself), and is what a difference
must exceed to count. Nothing is said of accuracy.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from padfree.advise.forms import BOTH, DOWNSAMPLING, ORIGINAL, STEM, Form, forms
from padfree.advise.runtimes import Runtime, runtime
from padfree.advise.timing import Clock, Timings, interleaved, milliseconds, ratio
from padfree.errors import PadfreeError
from padfree.geometry import size_text
from padfree.record.copies import kept_random_state
from padfree.record.inputs import check_input_size, check_model, default_input_size
from padfree.record.recording import record
from padfree.record.trees import first_line
from padfree.report.macs import count_macs
from padfree.report.smallest import minimum_input
from padfree.types import Options

_CONTROL = "control"
_LEAST_ERROR = 0.01  # of a ratio: what a quiet machine's quartiles may hide
_BUILDS = 3
_COLUMNS = 80


@dataclass(frozen=True)
class Ratio:
    """Time over the original's: the median of all turns, and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One form of the network.

    Attributes:
        form: "original", "stem", "downsampling" or "both".
        rules: what `convert(model, rules=...)` makes it with.
        places: how many are rewritten.
        params: number of parameters.
        macs: multiply-adds of one image as fvcore counts them; None where it cannot.
        milliseconds: of one call, the median.
        time: as a ratio to the original's.
        minimum_input: the least square side in pixels that it takes; None where it was not found.
        reason: why it was not measured; the figures are None then.
    """

    form: str
    rules: tuple[str, ...]
    places: int
    params: int | None = None
    macs: int | None = None
    milliseconds: float | None = None
    time: Ratio | None = None
    minimum_input: int | None = None
    reason: str = ""

    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        if self.time is None:
            return (self.form, str(self.places), self.reason)  # the reason stands in the columns behind
        macs = "?" if self.macs is None else f"{self.macs / 1e6:,.1f}M"
        smallest = "?" if self.minimum_input is None else str(self.minimum_input)
        params = f"{(self.params or 0) / 1e6:.2f}M"
        return (self.form, str(self.places), params, macs, f"{self.milliseconds:.2f}", str(self.time), smallest)


@dataclass(frozen=True)
class Advice:
    """What the forms of a network cost in one runtime, and which to take.

    Attributes:
        model: the network's class.
        input_size: (C, H, W).
        batch: images a call.
        runtime: where time was measured.
        rows: the forms, the original first.
        control: the original against itself, built again.
        recommended: the form to take.
        reason: why.
    """

    model: str
    input_size: tuple[int, ...]
    batch: int
    runtime: str
    rows: tuple[Row, ...]
    control: Ratio
    recommended: str
    reason: str

    @property
    def rules(self) -> tuple[str, ...]:
        """What `convert(model, rules=...)` makes the recommended form with; empty for the original."""
        return next(row.rules for row in self.rows if row.form == self.recommended)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        data = asdict(self)
        data["input_size"] = list(self.input_size)
        data["rows"] = [{**row, "rules": list(row["rules"])} for row in data["rows"]]
        return data

    def __str__(self) -> str:
        head = ("form", "places", "params", "MACs", "ms", "time", "smallest")
        lines = [head, *(row.cells() for row in self.rows)]
        widths = [max(len(line[at]) for line in lines if len(line) == len(head)) for at in range(len(head))]
        table = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines
        ]
        chosen = self.recommended if not self.rules else f"{self.recommended} (rules {' '.join(self.rules)})"
        return "\n".join(
            [
                f"{self.model} at {size_text(self.input_size)}, batch {self.batch}, {self.runtime}, one thread",
                *table,
                f"control: the original against itself {self.control}",
                f"recommended: {chosen}",
                *textwrap.wrap(self.reason, _COLUMNS, initial_indent="  ", subsequent_indent="  "),
                "  (time alone was looked at, not accuracy)",
            ]
        )


def advise(
    model: nn.Module,
    *,
    runtime: str | Runtime = "fused",
    input_size: tuple[int, ...] | None = None,
    batch: int = 1,
    options: Options | None = None,
    rounds: int = 9,
    seconds: float = 0.05,
    clock: Clock = time.process_time,
) -> Advice:
    """Measure the forms of a network, and say which pays.

    Args:
        model: an unconverted network; it stays untouched. Weights do not matter.
        runtime: "fused" (`padfree.fuse`), "eager" or "onnxruntime".
        input_size: (C, H, W); default as for `padfree.convert`.
        batch: images a call.
        options: how the rules rewrite.
        rounds: turns of each form, in each of three builds.
        seconds: about how long one turn takes.
        clock: what tells the time.

    Raises:
        NothingToConvertError: the network has no other form.
        PadfreeError: the runtime is unknown, not installed or does not take the network; an argument is wrong; the
            network was converted already.
    """
    check_model(model)
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise PadfreeError(f"batch is {batch!r}; it takes a positive number of images")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise PadfreeError(f"rounds is {rounds!r}; it takes a positive number of turns")
    where = _runtime(runtime)
    size = default_input_size(model) if input_size is None else check_input_size(input_size)
    with kept_random_state(), _one_thread():
        made = forms(model, size, options or Options())
        timings = _measured(made, where, size, batch, rounds, seconds, clock)
    rows = tuple(_row(form, made[0], size, timings) for form in made)
    control = Ratio(**ratio(timings, _CONTROL, ORIGINAL))
    recommended, reason = recommend(rows, control)
    return Advice(type(model).__name__, size, batch, where.name, rows, control, recommended, reason)


_runtime: Callable[[str | Runtime], Runtime] = runtime  # `advise` calls an argument of its own by that name


def recommend(rows: tuple[Row, ...], control: Ratio) -> tuple[str, str]:
    """The form to take, and why: the fullest of those that are as fast as the fastest, if that is not the original.

    Two forms are equally fast if they differ by no more than the control's error.
    """
    error = max(_LEAST_ERROR, abs(control.median - 1), control.high - control.median, control.median - control.low)
    times = {row.form: row.time.median for row in rows if row.time is not None}
    fastest = min(times, key=lambda name: times[name])
    even = {name for name in times if times[name] <= times[fastest] + error and times[name] <= 1 + error}
    chosen = next(name for name in (BOTH, DOWNSAMPLING, STEM, ORIGINAL) if name in even)
    margin = f"within {error:.2f}, what the control differs by"
    if chosen == ORIGINAL:
        others = ", ".join(f"{name} {value:.2f}" for name, value in times.items() if name != ORIGINAL)
        return chosen, f"every other form takes longer than the original: {others} ({margin})"
    reason = f"it takes {times[chosen]:.2f} of the original's time"
    if chosen != fastest:
        reason += f", as fast as {fastest} ({times[fastest]:.2f}) {margin}"
    if chosen != BOTH and BOTH in times:
        part, other = ("the stem's tail", DOWNSAMPLING) if chosen == DOWNSAMPLING else ("the rest", STEM)
        added = times[BOTH] - times[other]
        counts = {row.form: row.macs for row in rows}
        both, alone = counts[BOTH], counts[other]
        macs = "" if both is None or alone is None else f" and {(both - alone) / 1e6:+,.1f}M multiply-adds"
        reason += f"; {part} would add {added:+.2f}{macs}" if other in times else ""
    return chosen, reason


def _measured(
    made: tuple[Form, ...],
    where: Runtime,
    size: tuple[int, ...],
    batch: int,
    rounds: int,
    seconds: float,
    clock: Clock,
) -> Timings:
    builders = {form.name: where.prepare(form.model, size, batch) for form in made if form.model is not None}
    builders[_CONTROL] = builders[ORIGINAL]
    timings: Timings = {name: [] for name in builders}
    for _ in range(_BUILDS):
        try:
            found = interleaved({name: build() for name, build in builders.items()}, rounds, seconds, clock)
        except PadfreeError:
            raise
        except Exception as error:  # the model's own code, and the runtime's
            raise PadfreeError(
                f"the network does not run in {where.name} on batches of {batch}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        for name, times in found.items():
            timings[name] += times
    return timings


def _row(form: Form, original: Form, size: tuple[int, ...], timings: Timings) -> Row:
    row = (form.name, form.rules, form.places)
    if form.model is None or original.model is None:
        return Row(*row, reason=form.reason)
    return Row(
        *row,
        params=sum(parameter.numel() for parameter in form.model.parameters()),
        macs=count_macs(form.model, size).macs,
        milliseconds=milliseconds(timings)[form.name],
        time=Ratio(**ratio(timings, form.name, ORIGINAL)),
        minimum_input=minimum_input(record(original.model, size), record(form.model, size)),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
