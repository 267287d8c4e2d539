"""The Python of docs/padding.md runs, and prints what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "padding.md"


def test_the_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    out = capsys.readouterr().out
    assert "footprint of MobileNetV3 at 3x64x64\n" in out
    assert "footprint of MobileNetV3 at 3x64x64, before -> after\n" in out
    assert "border effect of MobileNetV3 at 3x64x64 with 32 pixels around, 2 images\n" in out
    for column in ("taps", "top", "padded", "worst", "outside", "unread", "centre", "vertical", "horizontal"):
        assert re.search(rf"^  .*\b{column}\b", out, re.MULTILINE), column
