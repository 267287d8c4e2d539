"""`padfree-convert --advise`: which form of a network pays, instead of converting it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from padfree.advise.advice import advise
from padfree.advise.runtimes import runtime
from padfree.cli.status import Status, Tell
from padfree.cli.terminal import printing
from padfree.errors import PadfreeError
from padfree.files.writing import replacing
from padfree.types import Options

Size = tuple[int, ...] | None
Targets = Mapping[str, Path | None]
_CONVERTING = (
    *("rules", "include", "exclude", "no_check", "calibrate", "replace", "replace_only"),
    *("plan_only", "report", "output", "onnx", "int8", "exported_program"),
)  # what asks for one conversion


def add_flag(group: argparse._ArgumentGroup) -> None:
    """`--advise [RUNTIME]`."""
    text = "measure which form pays in RUNTIME (fused, the default; eager; onnxruntime), and stop"
    group.add_argument("--advise", nargs="?", const="fused", metavar="RUNTIME", help=text)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what asks for a conversion beside advice.

    Raises:
        PadfreeError: there is such a flag.
    """
    if arguments.advise is None:
        return
    runtime(arguments.advise)  # an unknown one, or one that is not installed, is refused before anything is built
    asked = [name for name in _CONVERTING if getattr(arguments, name)]
    asked += ["init"] if arguments.init != "auto" else []
    if asked:
        flag = "--" + asked[0].replace("_", "-")
        raise PadfreeError(f"--advise compares the forms of a network and converts nothing: leave out {flag}")


def run(build: Callable[[Tell], nn.Module], where: str, options: Options, size: Size, targets: Targets) -> None:
    """Build a network, measure its forms, and print the advice or write it as JSON.

    Raises:
        PadfreeError: see `padfree.advise`; or a result cannot be written.
    """
    # what the model's own code prints goes to stderr
    with warnings.catch_warnings(), Status() as tell, contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        try:
            found = advise(build(tell), runtime=where, input_size=size, options=options, progress=tell)
        except SystemExit as error:
            raise PadfreeError(f"the code of the network ended the program ({error.code})") from error
    text = json.dumps(found.to_dict(), indent=2)
    path = targets.get("json")
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    with printing():
        print(text if "json" in targets and path is None else found)
        if path is not None:
            print(f"wrote {path}")
