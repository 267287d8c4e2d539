"""The forms of a network that are compared: the original, what rules make of it, and one place rewritten at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from padfree.convert import Plan, convert, is_converted, plan
from padfree.errors import PadfreeError
from padfree.record.copies import full_copy
from padfree.report.places import place_name, together
from padfree.rules.base import rules
from padfree.types import Options

ORIGINAL, STEM, DOWNSAMPLING, BOTH = FORMS = ("original", "stem", "downsampling", "both")
Key = frozenset[tuple[str, str, tuple[int, ...]]]


@dataclass(frozen=True)
class Form:
    """One form of a network.

    Attributes:
        key: what tells it from the others.
        name: of `FORMS`, or of the place that was rewritten.
        rules: the rules that made it.
        places: how many were rewritten.
        model: the network in eval mode on the CPU in float32; None where it would be no form of its own.
        reason: why there is no model.
        same: the key of the form before it that it equals.
    """

    key: str
    name: str
    rules: tuple[str, ...]
    places: int
    model: nn.Module | None
    reason: str = ""
    same: str = ""


class Forms:
    """Makes the forms of a network; the network stays untouched.

    Args:
        model: an unconverted network.
        size: (C, H, W).
        options: how the rules rewrite.
        tell: called with what is being done.

    Raises:
        PadfreeError: the model was converted before.
    """

    def __init__(self, model: nn.Module, size: tuple[int, ...], options: Options, tell: Callable[[str], None]) -> None:
        if is_converted(model):
            raise PadfreeError(
                "advise compares the forms of an original, and this network is converted: pass the original"
            )
        self.original = full_copy(model).cpu().float().eval()
        self.size, self.options, self.tell = size, options, tell
        self.whole: Plan | None = None
        self.made: dict[Key, Form] = {}

    def whole_forms(self) -> tuple[Form, ...]:
        """The original first, then the three others.

        Raises:
            NothingToConvertError: there is nothing to choose.
            PadfreeError: the model cannot be looked through.
        """
        default = tuple(rule.name for rule in rules())
        choices = {STEM: (STEM,), DOWNSAMPLING: tuple(name for name in default if name != STEM), BOTH: default}
        made = [Form(ORIGINAL, ORIGINAL, (), 0, self.original)]
        for name, chosen in choices.items():
            self.tell(f"planning {name}")
            planned = plan(self.original, rules=chosen, input_size=self.size, options=self.options)
            made.append(self._form(name, name, chosen, planned))
            self.whole = planned if name == BOTH else self.whole
        if all(form.model is None for form in made[1:]):
            convert(self.original, input_size=self.size, options=self.options)  # says why
        return tuple(made)

    def place_forms(self) -> Iterator[Form]:
        """The network with one place rewritten, by place: matches that shrink together are one."""
        assert self.whole is not None
        for number, group in enumerate(together(self.whole.matches), 1):
            name = place_name(group)
            self.tell(f"planning {name}")
            only = [f"re:{re.escape(match.name)}" for match in group]
            planned = plan(self.original, include=only, input_size=self.size, options=self.options)
            names = {match.name for match in group}
            why = next((skip.reason for skip in planned.skips if skip.name in names), "it is not rewritten alone")
            used = tuple(dict.fromkeys(match.rule for match in group))
            yield self._form(f"place {number}", name, used, planned, why)

    def _form(
        self, key: str, name: str, chosen: tuple[str, ...], planned: Plan, why: str = "nothing to convert"
    ) -> Form:
        places, matched = len(planned.matches), frozenset(match.key for match in planned.matches)
        if not places:
            return Form(key, name, chosen, 0, None, why)
        if matched in self.made:
            same = self.made[matched]
            return Form(key, name, chosen, places, None, f"the same as {same.name}", same.key)
        self.made[matched] = Form(key, name, chosen, places, planned.apply(self.original))
        return self.made[matched]
