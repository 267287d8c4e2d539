"""rich's console, for commands whose output may be cut off."""

from __future__ import annotations

import sys
from typing import Any

import rich.console

from padfree.cli.status import on_terminal


class Console(rich.console.Console):
    """A console whose reader may go away: that is told to the caller, and not by rich's own exit status 1.

    What is drawn on stderr is drawn on terminals only, whatever the environment asks of colours.
    """

    def __init__(self, **settings: Any) -> None:
        if settings.get("stderr"):
            settings.setdefault("force_terminal", on_terminal(sys.stderr))
        super().__init__(**settings)

    def on_broken_pipe(self) -> None:
        """Let the BrokenPipeError through that rich is handling."""
        raise


def note(text: str) -> None:
    """Tell something that the user should know and need not act on: one line on standard error."""
    if sys.stderr is not None:
        print(f"padfree-recipes: note: {' '.join(text.split())}", file=sys.stderr, flush=True)
