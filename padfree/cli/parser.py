"""How both commands read their arguments."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from padfree.errors import PadfreeError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are PadfreeErrors: one line, like all others. Flags are written out."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise, where argparse would print the usage and exit."""
        raise PadfreeError(f"{message} (see {self.prog} --help)")
