"""The benchmark of replacements: it goes on where it was stopped, and prints what it measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import replace


def test_it_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.rand(64, 3, 16, 16), torch.arange(64) % 10
    made: list[str] = []

    def measured(model: torch.nn.Module, make: str, data: Any, epochs: int) -> dict[str, Any]:
        if len(made) == 1:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(make)
        figures = {"params": 1234, "cpu_seconds": 0.1, "error_of_logits": 0.5, "accuracy": 90.0, "norms": 91.0}
        return {**figures, "trained_on": 92.0 + epochs}

    found, classes = replace.digits(False)
    assert found.shape == (360, 3, 32, 32) and len(classes) == 360
    monkeypatch.setattr(replace, "digits", lambda train: images)
    monkeypatch.setattr(replace, "KINDS", ("bsconv-u",))
    monkeypatch.setattr(replace, "WAYS", {"package": lambda kind: "package", "svd": lambda kind: "svd"})
    monkeypatch.setattr(replace, "measured", measured)
    monkeypatch.setattr(sys, "argv", ["replace", "--json", str(tmp_path / "r.json"), "--epochs", "1"])
    with pytest.raises(KeyboardInterrupt):
        replace.main()
    weights = (tmp_path / "r.1.0.pt").read_bytes()
    replace.main()
    assert made == ["package", "stopped", "svd"]
    assert (tmp_path / "r.1.0.pt").read_bytes() == weights
    assert "| bsconv-u, svd | 1,234 | 0.5 | 90.0 | 91.0 | 93.0 | 0.1 |" in capsys.readouterr().out
