"""What a calibration did, step by step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CalibrationStep:
    """One step.

    Attributes:
        name: what `calibrate(steps=...)` calls it.
        places: number of places that it changed.
        kept: False where it made the network worse on the held-back images, and was undone, or where the outputs ended
            worse with it, and it was taken back, which `notes` say.
        before, after: relative error of the outputs on the held-back images; without the original network, of the
            step's own places; NaN where there is none.
        own_before, own_after: relative error of the step's own places there.
        seconds: how long it took.
        notes: what was left alone, and why.
    """

    name: str
    places: int
    kept: bool
    before: float
    after: float
    own_before: float
    own_after: float
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.places:
            return f"{self.name:<12} nothing to do"
        errors = "" if math.isnan(self.after) else f", error {self.before:.3f} -> {self.after:.3f}"
        own = "" if math.isnan(self.own_after) else f", its own {self.own_before:.3f} -> {self.own_after:.3f}"
        undone = "" if self.kept else ", undone"
        return (
            f"{self.name:<12} {self.places} place{'s' * (self.places != 1)}{errors}{own}{undone}, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Calibration:
    """What `padfree.calibrate` did.

    Relative errors are |y - y'| / |y' - mean of y'| over the held-back images, y' being what is wanted: 0 is the same,
    1 is no better than a constant.

    Attributes:
        model: class name of the network.
        images: number of images learnt from.
        held_back: number of images that every step was measured on.
        before, after: relative error of the outputs to those of the original network; NaN without it.
        steps: what was done, in order.
        seconds: how long it took.
        notes: what holds for all of it.
    """

    model: str
    images: int
    held_back: int
    before: float
    after: float
    steps: tuple[CalibrationStep, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; what is not known is null."""
        data: dict[str, Any] = _plain(asdict(self))
        return data

    def __str__(self) -> str:
        error = "" if math.isnan(self.after) else f": error {self.before:.3f} -> {self.after:.3f}"
        counts = f"{self.images} images, {self.held_back} held back"
        lines = [f"calibrated {self.model} on {counts}, in {self.seconds:.1f} s{error}"]
        for step in self.steps:
            lines.append(f"  {step}")
            lines += [f"    {note}" for note in step.notes]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
