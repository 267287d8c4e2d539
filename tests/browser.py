"""A headless browser, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "no chromium here (apt-get install chromium)"


def browse(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the browser with a profile in `folder` and flags of its own; the address is the last of them."""
    assert BROWSER is not None
    settings = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [BROWSER, *settings, profile, "--virtual-time-budget=2000", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
