"""A limit ends what takes longer, says what was being done, and touches nothing else."""

from __future__ import annotations

import itertools
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from padfree.deploy.limits import Stage, limited
from padfree.deploy.onnx import to_onnx
from padfree.deploy.program import to_exported_program
from padfree.errors import PadfreeError


def endless(seconds: float) -> None:
    stage = Stage("beginning")

    def count() -> None:
        stage.text = "counting"
        for _ in itertools.count():
            try:
                sum(range(100))
            except Exception:  # as libraries do, which must not swallow the end
                continue

    limited(seconds, "the export of Net", stage, "do something else", count)


def test_it_ends_the_block_in_any_thread() -> None:
    with pytest.raises(
        PadfreeError, match=r"^the export of Net took longer than 0\.01 s, while (beginning|counting); do something"
    ):
        endless(0.01)
    found: list[BaseException] = []

    def work() -> None:
        try:
            endless(0.01)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(error) for error in found] == [PadfreeError]


def test_other_errors_pass_and_a_limit_that_is_kept_does_nothing() -> None:
    stage = Stage("counting")
    with pytest.raises(ZeroDivisionError):
        limited(1e9, "the work", stage, "", lambda: 1 // 0)
    for seconds in (None, 1e9, float("inf")):
        assert limited(seconds, "the work", stage, "", lambda: 7) == 7
    seen: list[Any] = []
    sys.setprofile(lambda *event: seen.append(event[1]))  # which hangs where the interpreter is left waiting
    try:
        Stage("called")
    finally:
        sys.setprofile(None)
    assert "call" in seen


@pytest.mark.parametrize("write", [to_onnx, to_exported_program])
@pytest.mark.parametrize(
    ("limit", "words"),
    [(1e-6, r"the export of Conv2d took longer than 1e-06 s, while tracing .*dynamic_sides=False")]
    + [(wrong, "time_limit is .*positive number of seconds") for wrong in (0, -1, "soon", True)],
)
def test_exports_keep_it(write: Any, limit: Any, words: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(PadfreeError, match=words):
        write(nn.Conv2d(3, 4, 3).eval(), file, (3, 8, 8), time_limit=limit)
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    assert torch.ones(1).item() == 1  # nothing of the tracer is left over
