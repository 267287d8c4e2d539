"""The one family of exceptions: whatever padfree refuses, it refuses with a `PadfreeError`."""

from __future__ import annotations


class PadfreeError(Exception):
    """A conversion, plan or file was refused; the message says what was found and what to do."""


class NothingToConvertError(PadfreeError):
    """The model was looked through and holds nothing that the selected rules rewrite."""


class PlanError(PadfreeError):
    """A plan does not fit the model it is applied to."""


class FileError(PadfreeError):
    """A weight file is damaged, truncated, foreign, or no longer fits."""


class LockedStateError(PadfreeError, AttributeError):
    """State that a rewritten block's forward was traced with may not change afterwards."""


class SiblingError(PadfreeError):
    """A method of a converted network that would not give what its forward gives."""


class Refusal(PadfreeError):
    """Internal: one place cannot be rewritten; becomes a `Skip` with this reason."""


class UntrainedWarning(UserWarning):
    """A trained network was converted, and has new layers that are not trained."""
