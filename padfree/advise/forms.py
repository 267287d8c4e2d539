"""The forms of a network that are compared: the original, and what the stem's rule and the others make of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from padfree.convert import convert, is_converted, plan
from padfree.errors import PadfreeError
from padfree.record.copies import full_copy
from padfree.rules.base import rules
from padfree.types import Options

ORIGINAL, STEM, DOWNSAMPLING, BOTH = FORMS = ("original", "stem", "downsampling", "both")


@dataclass(frozen=True)
class Form:
    """One form of a network.

    Attributes:
        name: of `FORMS`.
        rules: the rules that made it.
        places: how many were rewritten.
        model: the network in eval mode on the CPU in float32; None where it would be no form of its own.
        reason: why there is no model.
    """

    name: str
    rules: tuple[str, ...]
    places: int
    model: nn.Module | None
    reason: str = ""


def forms(model: nn.Module, size: tuple[int, ...], options: Options) -> tuple[Form, ...]:
    """The original first, then the three others; the model stays untouched.

    Raises:
        NothingToConvertError: there is nothing to choose.
        PadfreeError: the model was converted before, or cannot be looked through.
    """
    if is_converted(model):
        raise PadfreeError("advise compares the forms of an original, and this network is converted: pass the original")
    original = full_copy(model).cpu().float().eval()
    default = tuple(rule.name for rule in rules())
    choices = {STEM: (STEM,), DOWNSAMPLING: tuple(name for name in default if name != STEM), BOTH: default}
    made = [Form(ORIGINAL, (), 0, original)]
    for name, chosen in choices.items():
        planned = plan(original, rules=chosen, input_size=size, options=options)
        places = len(planned.matches)
        if not places:
            made.append(Form(name, chosen, 0, None, "nothing to convert"))
        elif same := next((form.name for form in made if form.places == places and name == BOTH), None):
            made.append(Form(name, chosen, places, None, f"the same as {same}"))
        else:
            made.append(Form(name, chosen, places, planned.apply(original)))
    if all(form.model is None for form in made[1:]):
        convert(original, input_size=size, options=options)  # says why
    return tuple(made)
