"""Steps done one after another: what makes the network worse on the held-back images is undone.

Each step is judged when it is done: `imitate`, `recalibrate` and `classifier` by the outputs, where they are known, the
others by what they mend, place by place, since the outputs say nothing of a mended place while later ones still carry
a pool that nothing took back. Where the classifier is solved later, `imitate` and `recalibrate` are judged by the
outputs as they would be with scales and means mended. Neither judgement promises that the outputs end nearer, so they
are looked at again in the end.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from padfree.adapt.report import CalibrationStep
from padfree.adapt.work import Outcome, Work

Step = Callable[[Work], Outcome]
Values = list[tuple[Tensor, Tensor]]
Errors = tuple[float, float]

_BY_OUTPUTS = ("imitate", "recalibrate", "classifier")
_SOLVED_AGAIN = "classifier"
_WORSE = 1e-4  # of an error, by which it must grow to be one
_ROUNDING = 1e-5  # of the outputs' spread; an error below it is none


@dataclass(frozen=True)
class _Done:
    """A step that was done.

    Attributes:
        step: what the report says of it.
        before: `Work.errors` before it.
        changed: the tensors that it changed, and their values before it.
        by_scale: whether it was judged by the outputs with scales and means mended.
    """

    step: CalibrationStep
    before: Errors
    changed: Values
    by_scale: bool = False


class Judged:
    """The steps of a calibration.

    Attributes:
        work: the calibration.
        steps: what each name stands for.
        first: the outputs' relative error before the first step; NaN where it is not known.
        errors: `Work.errors` as the network is now.
    """

    def __init__(self, work: Work, steps: dict[str, Step]) -> None:
        self.work = work
        self.steps = steps
        self.errors = work.errors()
        self.first = self.errors[0]
        self._done: list[_Done] = []

    @property
    def report(self) -> tuple[CalibrationStep, ...]:
        """What was done, in order."""
        return tuple(done.step for done in self._done)

    def leave(self, name: str, why: str) -> None:
        """Note a step that is not done."""
        nothing = CalibrationStep(name, 0, True, *(math.nan,) * 4, 0.0, (why,))
        self._done.append(_Done(nothing, self.errors, []))

    def do(self, name: str, *, repaired: bool = False) -> None:
        """Do one step, and undo it where it makes the network worse.

        Args:
            name: of the step.
            repaired: whether the classifier will be solved, and there are images enough to tell what it leaves: then
                the outputs' scales and means do not count.
        """
        self._done.append(self._made(name, repaired))

    def _made(self, name: str, repaired: bool) -> _Done:
        started = time.perf_counter()
        work, before = self.work, self.errors
        kept = values(work.model)
        outcome = self.steps[name](work)
        after = work.errors() if outcome.places and name != "identity" else before
        by_outputs = bool(work.expected) and name in _BY_OUTPUTS
        pair = (before[repaired], after[repaired]) if by_outputs else (outcome.before, outcome.after)
        worse = is_worse(*pair)
        if worse:
            restore(kept)
        self.errors = before if worse else after
        shown = (before[0], after[0]) if work.expected else (outcome.before, outcome.after)
        seconds = time.perf_counter() - started
        step = CalibrationStep(
            name, outcome.places, not worse, *shown, outcome.before, outcome.after, seconds, outcome.notes
        )
        changed = [] if worse else [(tensor, value) for tensor, value in kept if not torch.equal(tensor, value)]
        return _Done(step, before, changed, by_outputs and repaired)

    def settle(self) -> None:
        """Take steps back, the last one first, while the outputs are worse than they were.

        They may be no worse than before the first step that was judged with scales and means mended, as long as one of
        these stays, nor than before the first step of all. The classifier is solved again after each.
        """
        earlier = [done for done in self._done if done.step.name != _SOLVED_AGAIN]
        last = next((done for done in self._done if done.step.name == _SOLVED_AGAIN), None)
        for index in reversed(range(len(earlier))):
            done, limit = earlier[index], self._limit(earlier)
            if not is_worse(limit, self.errors[0], _ROUNDING):
                break
            if not done.changed:
                continue
            why = f"taken back: with it the outputs ended at an error of {self.errors[0]:.3f}, from {limit:.3f}"
            if last is not None:
                restore(last.changed)
            restore(done.changed)
            self.errors = done.before
            notes = (*done.step.notes, why)
            earlier[index] = _Done(dataclasses.replace(done.step, kept=False, notes=notes), done.before, [])
            if last is not None:
                last = self._made(_SOLVED_AGAIN, repaired=False)
        self._done = [*earlier, *([] if last is None else [last])]

    def _limit(self, earlier: list[_Done]) -> float:
        """The error that the outputs may have."""
        scaled = [done.before[0] for done in earlier if done.by_scale and done.changed]
        return min([self.first, *scaled[:1]])


def is_worse(before: float, after: float, least: float = 1e-9) -> bool:
    """Whether an error grew, or is none any more; without errors nothing is worse."""
    if math.isnan(before):
        return False
    return not after <= before * (1 + _WORSE) + least


def values(model: nn.Module) -> Values:
    """The tensors of a network, each once, and copies of them."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return [(tensor, tensor.clone()) for tensor in tensors.values()]


def restore(kept: Values) -> None:
    """Give tensors the values that they had."""
    for tensor, value in kept:
        tensor.copy_(value)
