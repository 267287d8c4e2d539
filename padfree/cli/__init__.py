"""The command `padfree-convert`."""

from padfree.cli.convert import main

__all__ = ["main"]
