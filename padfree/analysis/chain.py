"""conv -> norm -> act, as values of a recording."""

from __future__ import annotations

from dataclasses import dataclass

from padfree.indices import ValueId


@dataclass(frozen=True)
class Chain:
    """conv -> norm -> act: the values after each part that is there, and the modules' paths.

    `norm_last` and `act_last` say that they read (N, H, W, C), `formula` that the activation is several operations of
    a forward.
    """

    conv: ValueId
    norm: ValueId | None
    act: ValueId | None
    norm_path: str
    act_path: str
    norm_last: bool = False
    act_last: bool = False
    formula: bool = False

    def end(self, merge: str = "activation") -> ValueId:
        """The value a sum is taken at: `merge`, or where the chain ends earlier, its end."""
        levels = [self.conv, self.norm, self.act][: {"conv": 1, "norm": 2, "activation": 3}[merge]]
        return [value for value in levels if value is not None][-1]
