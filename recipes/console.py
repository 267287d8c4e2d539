"""rich's console, for commands whose output may be cut off."""

from __future__ import annotations

import sys

import rich.console


class Console(rich.console.Console):
    """A console whose reader may go away: that is told to the caller, and not by rich's own exit status 1."""

    def on_broken_pipe(self) -> None:
        """Let the BrokenPipeError through that rich is handling."""
        raise


def note(text: str) -> None:
    """Tell something that the user should know and need not act on: one line on standard error."""
    if sys.stderr is not None:
        print(f"padfree-recipes: note: {' '.join(text.split())}", file=sys.stderr, flush=True)
