"""Settings of all tests."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import settings

# A deadline would fail tests on a machine that does other things too; the same examples in every run.
settings.register_profile("padfree", deadline=None, derandomize=True)
settings.load_profile("padfree")

# Recordings come and go by the hundred thousand objects; looking for cycles so often was a fifth of the time.
gc.set_threshold(100_000, 20, 100)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Every run of a test draws the same weights, alone or among others: torch's own start differs by process."""
    torch.manual_seed(0)


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; more threads would only wait for each other
