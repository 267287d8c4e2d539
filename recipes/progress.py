"""The progress bar of a training run: epoch, loss, accuracy, images a second, time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .console import Console


class ProgressBar:
    """A bar over all epochs, on standard error, in the main process only.

    Args:
        epochs: how many there are.
        done: how many were done before.
        batches: the training loader; where it knows its length, the time left is shown.
        accelerator: says which process this is.
        shown: False for no bar.
    """

    def __init__(self, epochs: int, done: int, batches: Any, accelerator: Any, shown: bool) -> None:
        self.epochs, self.processes = epochs, accelerator.num_processes
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (shown and accelerator.is_main_process),
        )
        steps = len(batches) if hasattr(batches, "__len__") else 0
        self.task = self.bar.add_task("", total=steps * (epochs - done) or None, figures="")
        self.images, self.last_test, self.began = 0, "", 0.0

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def epoch(self, number: int) -> None:
        """An epoch begins."""
        self.images, self.began = 0, time.perf_counter()
        self.bar.update(self.task, description=f"epoch {number}/{self.epochs}")

    def advance(self, images: int) -> None:
        """A step on this many images of this process is done."""
        self.images += images
        self.bar.advance(self.task)

    def trained(self, loss: float, top1: float) -> None:
        """Show a mean loss so far and an accuracy of the last batch, in percent."""
        speed = self.images * self.processes / (time.perf_counter() - self.began)
        figures = f"loss {loss:.3f} acc {top1:.1f}%{self.last_test} {speed:,.0f} images/s"
        self.bar.update(self.task, figures=figures)

    def tested(self, top1: float) -> None:
        """Show the test accuracy, in percent, from now on."""
        self.last_test = f" test {top1:.2f}%"
