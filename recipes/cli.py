"""`padfree-recipes`: the paper's experiments from the command line."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import padfree
from padfree.cli.parser import Parser
from padfree.cli.status import Status
from padfree.columns import labelled
from padfree.errors import PadfreeError

_NAME = 34  # characters of a recipe's name that its description stands beside
EPILOG = """NAME is a recipe of `padfree-recipes list`, or the path of a recipe file.
key=value replaces a setting of it, such as optimizer.lr=0.01 (values are YAML)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 for success, 1 where a table is off, 2 after one line on stderr for anything wrong with the
        request or with a file, 130 when interrupted, 141 when the reader of the output went away.
    """
    if sys.stdout is None:  # closed by whoever started it; a file that cannot be written tells those that try
        sys.stdout = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # a full disk is told here at the latest, not by the interpreter at its end
    except PadfreeError as error:
        message = _one_line(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        message = f'needs the package {package}: pip install ".[recipes]" in the source folder of padfree'
    except KeyboardInterrupt:
        return _failed(f"interrupted{_going_on(argv)}", 130)
    except BrokenPipeError:
        _drop(sys.stdout)
        return 141
    except UnicodeEncodeError as error:
        shown = ascii(error.object[error.start : error.end])
        message = f"the output's encoding {error.encoding} cannot say {shown}; set PYTHONIOENCODING=utf-8"
    except io.UnsupportedOperation:
        message = "standard output is closed"
    except OSError as error:
        _drop(sys.stdout)
        reason = error.strerror or str(error) or type(error).__name__
        message = _one_line(f"{error.filename}: {reason}" if error.filename else reason)
    return _failed(message, 2)


def _going_on(argv: Sequence[str] | None) -> str:
    """What to do after an interrupt, by command."""
    command = next((word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("-")), "")
    hints = {
        "train": "; `--resume` goes on from the last whole epoch",
        "compare": "; the same command goes on from the last whole epoch",
    }
    return hints.get(command, "")


def _failed(message: str, status: int) -> int:
    if sys.stderr is not None:
        try:
            print(f"padfree-recipes: {message}", file=sys.stderr, flush=True)
        except OSError:
            _drop(sys.stderr)
    return status


def _run(argv: Sequence[str] | None) -> int:
    warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated", FutureWarning)  # timm's, not the user's
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes a list of settings only where they stand together; here they may follow options
    if not hasattr(arguments, "changes") or any(item.startswith("-") for item in rest):
        parser.parse_args(argv)
    else:
        arguments.changes += rest
    code: int = arguments.run(arguments)
    return code


def _drop(stream: TextIO) -> None:
    """What a stream did not take is not tried again when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="padfree-recipes", description="Recipes of the padding-free paper.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"padfree {padfree.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="names of all recipes, and what each is about")
    command.add_argument("--json", action="store_true", help="the names as a JSON list")
    command.set_defaults(run=_list)

    command = commands.add_parser("show", help="print a recipe")
    command.add_argument("name", metavar="NAME")
    command.set_defaults(run=_show)

    command = commands.add_parser("copy", help="write a recipe to a file, to edit it")
    command.add_argument("name", metavar="NAME")
    command.add_argument("file", metavar="FILE", type=Path)
    command.set_defaults(run=_copy)

    command = commands.add_parser("table", help="measured figures beside the published ones")
    rows = command.add_mutually_exclusive_group()
    rows.add_argument("--table", metavar="T", help="only this one; `bsconv` is that of BSConv's own tables")
    rows.add_argument("--recipe", metavar="NAME", help="only the rows of this recipe")
    command.add_argument("--wide", action="store_true", help="all figures, in more than 80 columns")
    command.add_argument("--json", metavar="FILE", help="write JSON (- for standard output)")
    command.set_defaults(run=_table)

    command = commands.add_parser("benchmark", help="seconds of a forward pass, original and padding-free")
    command.add_argument(
        "names",
        metavar="NETWORK",
        nargs="*",
        help="a recipe, or LIBRARY:NAME such as timm:resnet50 (default: the networks of MobileNet_123's table)",
    )
    command.add_argument("--batches", type=int, nargs="+", metavar="N", help="batch sizes (default: 16 1)")
    command.add_argument("--side", type=int, metavar="N", help="pixels of the images (default: the network's, or 224)")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="passes timed (default: %(default)s)")
    command.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    command.add_argument("--json", metavar="FILE", help="write JSON (- for standard output)")
    command.set_defaults(run=_benchmark)

    _add_training(commands)
    return parser


def _add_training(commands: argparse._SubParsersAction[Parser]) -> None:
    command = commands.add_parser("train", help="train a recipe", epilog=EPILOG)
    _add_recipe(command)
    command.add_argument("--variant", default="padfree", help="what to train (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of values, order and augmentation")
    command.add_argument("--out", type=Path, help="run folder (default: runs/NAME/VARIANT-seedN)")
    command.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    command.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    command.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    command.add_argument("--quiet", action="store_true", help="nothing but the line that it ends with")
    command.set_defaults(run=_train)

    command = commands.add_parser("evaluate", help="accuracy of a run on its test images")
    command.add_argument("folder", metavar="RUN", type=Path, help="a run folder")
    command.add_argument("--checkpoint", choices=("best", "last"), default="best")
    command.add_argument("--data-root", metavar="DIR", help="where the data lie now")
    command.add_argument(
        "--condensed", action="store_true", help="learned group convolutions as the standard ones that they become"
    )
    command.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    command.add_argument("--json", metavar="FILE", help="write JSON (- for standard output)")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("compare", help="original against padfree over seeds", epilog=EPILOG)
    _add_recipe(command)
    command.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    command.add_argument("--variants", default="original,padfree", help="default: %(default)s")
    command.add_argument("--out", type=Path, help="folder (default: runs/NAME/compare)")
    command.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_compare)

    command = commands.add_parser("report", help="one HTML page about finished runs")
    command.add_argument(
        "folders", metavar="RUN", nargs="+", type=Path, help="a run folder, or one that holds them, such as `compare`'s"
    )
    command.add_argument("--out", metavar="FILE.html", type=Path, default="report.html", help="default: %(default)s")
    command.add_argument("--data-root", metavar="DIR", help="where the data lie now")
    command.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    command.set_defaults(run=_report)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME")
    command.add_argument("changes", metavar="key=value", nargs="*")


def _list(arguments: argparse.Namespace) -> int:
    from .files import descriptions, names

    print(json.dumps(names()) if arguments.json else "\n".join(labelled(descriptions().items(), longest=_NAME)))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from .files import find, load

    load(arguments.name)  # says what is wrong with it before it is shown
    sys.stdout.write(find(arguments.name).read_text(encoding="utf-8"))
    return 0


def _copy(arguments: argparse.Namespace) -> int:
    from .files import RecipeError, find, load, write_text

    load(arguments.name)  # says what is wrong with it before it is copied
    source, target = find(arguments.name), arguments.file
    if target.exists():
        raise RecipeError(f"{target} is there already; give another name")
    if not target.parent.is_dir():
        raise RecipeError(f"{target.parent} is no folder; make it first")
    write_text(target, source.read_text(encoding="utf-8"))
    return 0


def _table(arguments: argparse.Namespace) -> int:
    from .files import load
    from .report import check_json, narrow_console, show_narrow, show_wide, wide_console, write_json
    from .tables import lines, recipe_lines

    check_json(arguments.json)
    with Status() as status:

        def progress(text: str) -> None:
            status(f"counting {text}")

        if arguments.recipe is not None:
            found = list(recipe_lines(load(arguments.recipe), progress))
        else:
            found = list(lines(arguments.table, progress))
    if arguments.json is not None:
        write_json([line.to_dict() for line in found], arguments.json)
    elif arguments.wide:
        show_wide(found, wide_console())
    else:
        show_narrow(found, narrow_console())
    return int(any(line.off for line in found))


def _benchmark(arguments: argparse.Namespace) -> int:
    from .benchmark import BATCHES, lines, timings
    from .report import check_json, write_json

    check_json(arguments.json)
    with Status() as tell:
        batches = arguments.batches or BATCHES
        options = {"side": arguments.side, "repeats": arguments.repeats, "cpu": arguments.cpu, "progress": tell}
        found = list(timings(arguments.names, batches, **options))
    if arguments.json is not None:
        write_json([timing.to_dict() for timing in found], arguments.json)
    else:
        print("\n".join(lines(found)))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from .files import load
    from .train import Run, ending, train

    run = Run(
        load(arguments.name, arguments.changes),
        variant=arguments.variant,
        seed=arguments.seed,
        folder=arguments.out,
        resume=arguments.resume,
        mixed_precision=arguments.mixed_precision,
        cpu=arguments.cpu,
        quiet=arguments.quiet,
    )
    progress = train(run)
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(ending(run, progress))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from .evaluate import evaluate_run
    from .report import check_json, write_json

    check_json(arguments.json)
    with Status() as tell:
        result = evaluate_run(
            arguments.folder,
            arguments.checkpoint,
            data_root=arguments.data_root,
            cpu=arguments.cpu,
            as_condensed=arguments.condensed,
            tell=tell,
        )
    if arguments.json is not None:
        write_json(result, arguments.json)
    else:
        print(
            f"{result['recipe']} {result['variant']}, epoch {result['epoch']}: "
            f"top-1 {result['top1']:.2f} % of {result['images']} images, loss {result['loss']:.4f}"
        )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import compare_variants
    from .files import load

    recipe = load(arguments.name, arguments.changes)
    compare_variants(
        recipe,
        seeds=arguments.seeds,
        variants=tuple(arguments.variants.split(",")),
        folder=arguments.out,
        cpu=arguments.cpu,
        quiet=arguments.quiet,
    )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .run_page import report

    with Status() as status:

        def progress(text: str) -> None:
            status(f"measuring {text}")

        report(arguments.folders, arguments.out, data_root=arguments.data_root, cpu=arguments.cpu, progress=progress)
    print(f"wrote {arguments.out}")
    return 0


def _one_line(text: str) -> str:
    """The message; of an error that came out of a loading process, its last line without the error's class."""
    return " ".join(text.split()) if "Original Traceback" not in text else text.splitlines()[-1].partition(": ")[2]


if __name__ == "__main__":
    sys.exit(main())
