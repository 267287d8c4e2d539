"""Settings of all tests."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# A deadline would fail tests on a machine that does other things too; the same examples in every run.
settings.register_profile("padfree", deadline=None, derandomize=True)
settings.load_profile("padfree")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; more threads would only wait for each other
