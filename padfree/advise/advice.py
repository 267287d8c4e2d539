"""`advise`: what each form of a network costs, and which to take.

    print(padfree.advise(timm.create_model("mobilenetv4_conv_small"), runtime="onnxruntime"))

Time is compared with that of the original, in turns, on one thread of the CPU. What networks of the same form differ by
when they are built again is measured beside it (the control: the original against itself), and is what a difference
must exceed to count. Nothing is said of accuracy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from padfree.advise.forms import BOTH, DOWNSAMPLING, FORMS, ORIGINAL, STEM, Form, Forms
from padfree.advise.results import Advice, Ratio, Row
from padfree.advise.runtimes import Runtime, runtime
from padfree.advise.timing import Call, Clock, Timings, interleaved, milliseconds, ratio
from padfree.errors import PadfreeError
from padfree.record.copies import kept_random_state
from padfree.record.inputs import check_input_size, check_model, default_input_size
from padfree.record.recording import record
from padfree.record.trees import first_line
from padfree.report.macs import count_macs, count_params
from padfree.report.smallest import minimum_input
from padfree.types import Options

_CONTROL = "control"
_LEAST_ERROR = 0.01  # of a ratio: what a quiet machine's quartiles may hide
_BUSY = 0.05  # of a ratio: a control that differs by more says that the machine did other things
_BUILDS = 3


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
    places: bool = True,
    progress: Callable[[str], None] = lambda text: None,
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
        places: also measure each place on its own; places that shrink together are one.
        progress: called with what is being done.

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
        maker = Forms(model, size, options or Options(), progress)
        made = maker.whole_forms()
        alone = tuple(maker.place_forms()) if places else ()
        timings = _measured((*made, *alone), where, size, batch, rounds, seconds, clock, progress)
        rows = _rows((*made, *alone), size, timings, progress)
    control = Ratio(**ratio(timings, _CONTROL, ORIGINAL))
    forms, single = rows[: len(made)], rows[len(made) :]
    recommended, reason = recommend(forms, control)
    return Advice(type(model).__name__, size, batch, where.name, forms, control, recommended, reason, single)


_runtime: Callable[[str | Runtime], Runtime] = runtime  # `advise` calls an argument of its own by that name


def recommend(rows: tuple[Row, ...], control: Ratio) -> tuple[str, str]:
    """The form to take, and why: the fullest of those that are as fast as the fastest, if that is not the original.

    Two forms are equally fast if they differ by no more than the control's error.
    """
    chosen, reason, error = _recommended(rows, control)
    if error > _BUSY:
        reason += f"; the machine was too busy to tell less than {error:.2f} apart: measure again on a quiet one"
    return chosen, reason


def _recommended(rows: tuple[Row, ...], control: Ratio) -> tuple[str, str, float]:
    """The form, the reason, and by how much two forms must differ to be told apart."""
    error = max(_LEAST_ERROR, abs(control.median - 1), control.high - control.median, control.median - control.low)
    times = {row.form: row.time.median for row in rows if row.time is not None}
    fastest = min(times, key=lambda name: times[name])
    even = {name for name in times if times[name] <= times[fastest] + error and times[name] <= 1 + error}
    chosen = next(name for name in (BOTH, DOWNSAMPLING, STEM, ORIGINAL) if name in even)
    margin = f"within {error:.2f}, what the control differs by"
    if chosen == ORIGINAL:
        others = ", ".join(f"{name} {value:.2f}" for name, value in times.items() if name != ORIGINAL)
        return chosen, f"every other form takes longer than the original: {others} ({margin})", error
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
    return chosen, reason, error


def _measured(
    made: Sequence[Form],
    where: Runtime,
    size: tuple[int, ...],
    batch: int,
    rounds: int,
    seconds: float,
    clock: Clock,
    progress: Callable[[str], None],
) -> Timings:
    builders: dict[str, Callable[[], Call]] = {}
    for form in made:
        if form.model is not None:
            progress(f"preparing {form.name} for {where.name}")
            builders[form.key] = where.prepare(form.model, size, batch)
    builders[_CONTROL] = builders[ORIGINAL]
    timings: Timings = {name: [] for name in builders}
    for number in range(1, _BUILDS + 1):
        progress(f"timing {len(builders)} networks in {where.name}, {number} of {_BUILDS}")
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


def _rows(
    made: Sequence[Form], size: tuple[int, ...], timings: Timings, progress: Callable[[str], None]
) -> tuple[Row, ...]:
    """The figures of each form; a place that equals a form measured before has that one's."""
    original = made[0].model
    assert original is not None
    recording, medians = record(original, size), milliseconds(timings)
    rows: dict[str, Row] = {}
    for form in made:
        row = Row(form.name, form.rules, form.places, reason=form.reason)
        if form.model is not None:
            progress(f"counting {form.name}")
            row = replace(
                row,
                params=count_params(form.model),
                macs=count_macs(form.model, size).macs,
                milliseconds=medians[form.key],
                time=Ratio(**ratio(timings, form.key, ORIGINAL)),
                minimum_input=minimum_input(recording, record(form.model, size)),
            )
        elif form.same and form.key not in FORMS:
            row = replace(rows[form.same], form=form.name, rules=form.rules, reason=form.reason)
        rows[form.key] = row
    return tuple(rows.values())


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
