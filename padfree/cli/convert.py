"""`padfree-convert`: convert a network by name and report what changed.

padfree-convert --timm mobilenetv3_large_100
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from padfree.adapt.calibrate import calibrate
from padfree.adapt.report import Calibration
from padfree.cli import advise, int8
from padfree.cli.flags import parser
from padfree.cli.folder import batches, image_files
from padfree.cli.page import check_page, write_report
from padfree.cli.replacing import replaced
from padfree.cli.status import Status, Tell
from padfree.cli.terminal import Terminated, printing, terminable
from padfree.columns import plural
from padfree.convert import Plan, convert, plan
from padfree.errors import PadfreeError
from padfree.files.checkpoint import load_checkpoint
from padfree.files.sources import Source
from padfree.files.weights import save
from padfree.files.writing import all_or_none, check_target, replacing
from padfree.layers.new import untrained
from padfree.report.comparison import Comparison, compare
from padfree.types import Options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 2 after one line on stderr for anything the user can put right.

    An interrupt gives 130 and SIGTERM 143; neither leaves half-written files.
    """
    try:
        with terminable():
            with printing():  # --help and --version, and a closed stdout is known before any work
                arguments = parser().parse_args(argv)
                arguments.command = shlex.join(["padfree-convert", *(sys.argv[1:] if argv is None else argv)])
            _run(arguments)
    except PadfreeError as error:
        return _failed(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except Terminated:
        return _failed("terminated", 143)
    return 0


def _failed(message: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # a stderr that is full or closed cannot be told about
        if sys.stderr is not None:
            print(f"padfree-convert: {message}", file=sys.stderr, flush=True)
    return status


def _run(arguments: argparse.Namespace) -> None:
    targets = _check_targets(arguments)
    if arguments.advise is not None:
        source = _source(arguments)
        size = tuple(arguments.input_size) if arguments.input_size else source.input_size
        return advise.run(
            lambda tell: _original(arguments, source, tell), arguments.advise, _options(arguments), size, targets
        )
    # what the model's own code prints goes to stderr
    with warnings.catch_warnings(), Status() as tell, contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # the libraries' own; padfree raises instead
        source = _source(arguments)
        try:
            report, made, comparison, told = _convert(arguments, source, targets, tell)
        except SystemExit as error:
            raise PadfreeError(f"the code of {source} ended the program ({error.code})") from error
    with printing():
        _publish(report, source, made, comparison, targets, told)


def _convert(
    arguments: argparse.Namespace, source: Source, targets: dict[str, Path | None], tell: Tell
) -> tuple[dict[str, Any], Plan, Comparison | None, str]:
    """Build, plan, convert, measure and write; the content of `--json`, the plan, the figures, and what to tell."""
    files = None if arguments.calibrate is None else image_files(arguments.calibrate)
    original = _original(arguments, source, tell)
    size = tuple(arguments.input_size) if arguments.input_size else source.input_size
    made = _planned(original, arguments, size, tell)
    comparison, told, calibration, quantized = None, "", None, None
    with all_or_none():
        if not arguments.plan_only:
            tell("converting")
            converted = made.apply(original)
            tell("comparing before and after")
            comparison = compare(original, converted, made.input_size)
            told = untrained(converted) if made.preserves else ""
            if files is not None:
                calibration = _calibrated(original, converted, made, files, tell)
                told = f"{calibration}\nfine-tune it for a few epochs at a tenth to a third of the usual learning rate"
            _write_models(converted, made, source, targets, tell, arguments)
            if arguments.int8 is not None:
                tell(f"exporting to ONNX in int8, {arguments.onnx}")
                quantized = int8.write(arguments, original, converted, made, Path(arguments.onnx))
                told = f"{told}\n{quantized}".strip()
            if targets.get("report") is not None:
                tell("measuring what padding does, for the page")
                write_report(arguments, original, converted, made, comparison, source, told)
        report = _report(source, made, comparison, original)
        report["calibration"] = None if calibration is None else calibration.to_dict()
        report["int8"] = None if quantized is None else quantized.to_dict()
        if targets.get("json") is not None:
            with replacing(Path(str(targets["json"]))) as temporary:
                temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report, made, comparison, told


def _calibrated(original: nn.Module, converted: nn.Module, made: Plan, files: list[Path], tell: Tell) -> Calibration:
    """Fit the converted network in place, on the images of these files."""
    if not made.preserves:
        raise PadfreeError(
            "--calibrate fits a trained network, and this one begins fresh; give --pretrained or --checkpoint (or "
            "--init preserve, if it is trained and has no norms that show it)"
        )
    tell(f"reading {plural(len(files), 'image')}")
    images = batches(original, made.input_size, files)
    tell(f"calibrating on {plural(len(files), 'image')}")
    return calibrate(converted, images, original=original)


def _planned(original: nn.Module, arguments: argparse.Namespace, size: tuple[int, ...] | None, tell: Tell) -> Plan:
    """The plan of everything that is asked for; its `earlier` plans are those of replacements."""
    if arguments.replace_only and not arguments.replace:
        raise PadfreeError("--replace-only is about --replace, which is not asked for")
    if arguments.replace:
        tell("replacing convolutions")
    model = replaced(original, arguments.replace or (), size)
    tell("planning and verifying")
    made: Plan = model.__dict__["padfree_plan"] if arguments.replace_only else _plan(model, arguments, size)
    return made


def _original(arguments: argparse.Namespace, source: Source, tell: Tell) -> nn.Module:
    tell(f"{'getting the weights of' if arguments.pretrained else 'building'} {source}")
    original = source.create(arguments.pretrained)
    if arguments.checkpoint is not None:
        tell(f"loading {arguments.checkpoint}")
        load_checkpoint(original, arguments.checkpoint)
    return original


def _check_targets(arguments: argparse.Namespace) -> dict[str, Path | None]:
    """Where results go, looked at before any work is done. `json` is None for stdout, absent if unwanted."""
    advise.check(arguments)
    targets: dict[str, Path | None] = {}
    for name in ("report", "output", "onnx", "exported_program", "json"):
        path = getattr(arguments, name)
        if path is None:
            continue
        flag = "--" + name.replace("_", "-")
        if name != "json" and arguments.plan_only:
            raise PadfreeError(f"--plan-only converts nothing, so it has nothing to write for {flag}")
        if name != "json" and path == "-":
            raise PadfreeError(f"{flag} -: only the report can go to stdout; give a file name")
        targets[name] = None if path == "-" else check_target(path)
    if arguments.plan_only and arguments.calibrate is not None:
        raise PadfreeError("--plan-only converts nothing, so there is nothing to calibrate")
    check_page(arguments)
    int8.check(arguments)
    if not arguments.time_limit >= 0:
        raise PadfreeError(f"--time-limit {arguments.time_limit:g}: a length of time is not negative")
    arguments.time_limit = arguments.time_limit or None
    if arguments.fixed_sides and not {"onnx", "exported_program"} & targets.keys():
        raise PadfreeError("--fixed-sides is about --onnx and --exported-program, and neither is asked for")
    if targets.get("output") is not None and Path(arguments.output).suffix != ".safetensors":
        raise PadfreeError(f"--output {arguments.output}: the name must end in .safetensors")
    written = [os.path.realpath(path) for path in (*targets.values(), "/dev/stdout") if path is not None]
    if len(set(written)) < len(written):
        raise PadfreeError("two results would be written to the same file")
    return targets


def _source(arguments: argparse.Namespace) -> Source:
    libraries = ("timm", "torchvision", "bsconv", "model")
    library = next(name for name in libraries if getattr(arguments, name) is not None)
    kwargs: dict[str, Any] = {}
    if arguments.num_classes is not None:
        if arguments.num_classes < 0:
            raise PadfreeError(f"--num-classes {arguments.num_classes}: a number of classes is not negative")
        kwargs["num_classes"] = arguments.num_classes
    if library == "timm" and arguments.input_size:
        kwargs |= _timm_channels(arguments.timm, arguments.input_size[0])
    name = getattr(arguments, library)
    return Source("factory" if library == "model" else library, name, kwargs)


def _timm_channels(name: str, channels: int) -> dict[str, int]:
    """`in_chans` for timm where the size asked for has another channel count than the model's own."""
    import timm

    config = None
    with contextlib.suppress(Exception):  # an unknown tag, say, which building the model tells about
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    usual = config.input_size[0] if config is not None else 3
    return {} if channels == usual else {"in_chans": channels}


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        merge=arguments.merge,
        pool=arguments.pool,
        projection=arguments.projection,
        stem_residual=arguments.stem_residual,
        allow_resize=arguments.allow_resize,
    )


def _plan(model: nn.Module, arguments: argparse.Namespace, size: tuple[int, ...] | None) -> Plan:
    settings: dict[str, Any] = {
        "rules": _split(arguments.rules),
        "include": arguments.include,
        "exclude": arguments.exclude,
        "options": _options(arguments),
        "input_size": size,
        "check": not arguments.no_check,
        "init": arguments.init,
    }
    made = plan(model, **settings)
    if not made.matches and not arguments.plan_only:
        convert(model, **settings)  # says why there is nothing to convert
    return made


def _split(names: list[str] | None) -> tuple[str, ...] | None:
    """Rules may be given apart or with commas between."""
    return None if names is None else tuple(part for name in names for part in name.split(",") if part)


def _report(source: Source, made: Plan, comparison: Comparison | None, original: nn.Module) -> dict[str, Any]:
    """The content of `--json`; figures of a conversion that was not made are null."""
    unknown: dict[str, Any] = {"original": None, "converted": None}
    report: dict[str, Any] = {
        "model": source.name,
        "library": source.library,
        "input_size": list(made.input_size),
        "params": {**unknown, "original": sum(p.numel() for p in original.parameters())},
        "macs": unknown,
        "minimum_input": None,
        "maps": None,
        "uncounted": {},
        "notes": [],
        "init": made.init,
        "new_layers": None,
        "last_map_size": None,
        "last_map_macs": None,
        "places": [],
    }
    if comparison is not None:
        report |= {key: value for key, value in comparison.to_dict().items() if key != "model"}
    content = made.to_dict()
    report |= {name: content[name] for name in ("options", "matches", "skips", "outputs")}
    return report | {"earlier": [step.to_dict() | {"earlier": None} for step in made.steps()[:-1]]}


def _write_models(
    converted: nn.Module,
    made: Plan,
    source: Source,
    targets: dict[str, Path | None],
    tell: Tell,
    arguments: argparse.Namespace,
) -> None:
    output, onnx, program = (targets.get(name) for name in ("output", "onnx", "exported_program"))
    size, free, limit = made.input_size, not arguments.fixed_sides, arguments.time_limit
    if output is not None:
        tell(f"writing {output}")
        save(converted, output, source)
    if onnx is not None and arguments.int8 is None:
        from padfree.deploy.onnx import to_onnx

        tell(f"exporting to ONNX, {onnx}")
        to_onnx(converted.eval(), onnx, size, dynamic_sides=free, time_limit=limit)
    if program is not None:
        from padfree.deploy.program import to_exported_program

        tell(f"exporting the program {program}")
        to_exported_program(converted.eval(), program, size, dynamic_sides=free, time_limit=limit)


def _publish(
    report: dict[str, Any],
    source: Source,
    made: Plan,
    comparison: Comparison | None,
    targets: dict[str, Path | None],
    told: str,
) -> None:
    if "json" in targets and targets["json"] is None:
        print(json.dumps(report, indent=2))
        return
    from padfree.report.display import show

    for first in made.steps()[:-1]:
        show(f"{source}, first", first, None)
    show(str(source), made, comparison)
    if told:
        print(told)
    for path in targets.values():
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
