"""The progress of a training run: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from padfree.cli.status import on_terminal

from .console import Console


class ProgressBar:
    """A bar over all epochs with loss, accuracy, images a second and time left, in the main process only.

    It is drawn on standard error where that is a terminal; else each epoch is a line there.

    Args:
        name: of the run, for those lines.
        epochs: how many there are.
        done: how many were done before.
        batches: the training loader; where it knows its length, the time left is shown.
        accelerator: says which process this is.
        shown: False for no bar.
    """

    def __init__(self, name: str, epochs: int, done: int, batches: Any, accelerator: Any, shown: bool) -> None:
        self.name, self.epochs, self.processes = name, epochs, accelerator.num_processes
        told, drawn = shown and accelerator.is_main_process, on_terminal(sys.stderr)
        self.lines = told and not drawn and sys.stderr is not None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (told and drawn),
        )
        steps = len(batches) if hasattr(batches, "__len__") else 0
        self.task = self.bar.add_task("", total=steps * (epochs - done) or None, figures="")
        self.images, self.number, self.last_test, self.began = 0, done, "", 0.0

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def epoch(self, number: int) -> None:
        """An epoch begins."""
        self.images, self.number, self.began = 0, number, time.perf_counter()
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

    def testing(self) -> None:
        """The test images are looked at."""
        self.bar.update(self.task, description=f"epoch {self.number}/{self.epochs} test")

    def tested(self, loss: float, top1: float, images_per_s: float) -> None:
        """Show the test accuracy, in percent, from now on; elsewhere than on a terminal print the epoch's line.

        Args:
            loss: mean of the training images.
            top1: test accuracy in percent.
            images_per_s: training images a second.
        """
        self.last_test = f" test {top1:.2f}%"
        if self.lines:
            epoch = f"{self.name}: epoch {self.number}/{self.epochs}"
            line = f"{epoch}, loss {loss:.3f}, test {top1:.2f} %, {images_per_s:,.0f} images/s"
            print(line, file=sys.stderr, flush=True)
