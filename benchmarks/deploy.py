"""Which runtimes take a padding-free network, and is it as fast there as its original?

    python -m benchmarks.deploy                                    # everything that is installed
    python -m benchmarks.deploy --networks timm:resnet18 --runtimes "ONNX Runtime" ncnn
    python -m benchmarks.deploy --form downsampling-only           # with the original's stem
    python -m benchmarks.deploy --report --page docs/deploy.md     # measure nothing, write the tables of the page

The paper's four networks and three of timm's, original and padding-free, in every runtime that is installed (extra
`deploy`), in float32 and in int8 where the runtime has it: do they convert, do their outputs agree with PyTorch's, how
large is the file, how long does one image take. A cell is measured in a process of its own, on one core; cells are kept
in `--json` as they are finished, one a line, and a run that is stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.clock import progress
from benchmarks.deploy_cell import Cell
from benchmarks.deploy_page import FORMS, WHOLE, page, write
from benchmarks.deploy_runtimes import RUNTIMES
from benchmarks.latency import PAPER, network

TIMM = ("timm:mobilenetv3_small_100", "timm:mobilenetv4_conv_small", "timm:efficientnet_lite0")


def known(path: Path) -> list[Cell]:
    """The cells of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def keep(cells: Sequence[Cell], path: Path) -> None:
    """Write them under another name first, so that a stop never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    part.replace(path)


def measured(key: Cell, limit: float, flags: Sequence[str]) -> Cell:
    """One cell, measured in another process; one that crashes or takes too long is a cell that says so."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        command = [sys.executable, "-m", "benchmarks.deploy_cell", json.dumps(key), str(out), *flags]
        try:
            done = subprocess.run(command, timeout=limit, capture_output=True, text=True, errors="replace")
        except subprocess.TimeoutExpired:
            return {"key": key, "failed": {"process": f"not finished after {limit:g} s"}}
        if out.is_file():
            cell: Cell = json.loads(out.read_text())
            return cell
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"key": key, "failed": {"process": f"status {done.returncode}: {said[-1][:200] if said else 'no word'}"}}


def wanted(networks: Sequence[str], runtimes: Sequence[str], side: int, form: str = WHOLE) -> list[Cell]:
    """The keys of what was asked for and can be measured here; the rest is named."""
    keys: list[Cell] = []
    for runtime in runtimes:
        missing = RUNTIMES[runtime].missing()
        if missing:
            progress(f"{runtime}: left out: not installed ({missing})")
            continue
        keys += [
            {"network": name, "side": side, "runtime": runtime, "bits": bits}
            | ({} if form == WHOLE else {"form": form})
            for bits in RUNTIMES[runtime].bits
            for name in networks
        ]
    return keys


def told(cell: Cell) -> str:
    """A cell in one line."""
    if cell["failed"]:
        return "; ".join(f"{name}: {reason}" for name, reason in cell["failed"].items())
    if "ratio" not in cell:
        return "converts"
    return f"{cell['ratio']['median']:.3f} (control {cell['control']['median']:.3f})"


def main() -> int:
    """Measure, print, and write the page's tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", type=network, metavar="NAME", default=(*PAPER, *TIMM))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), metavar="NAME")
    parser.add_argument("--side", type=int, default=224, help="pixels; the paper's networks have 32 and 224")
    parser.add_argument(
        "--form", choices=FORMS, default=WHOLE, help="measured beside the original (default: %(default)s)"
    )
    parser.add_argument("--builds", default="3", help="of each session (default: %(default)s)")
    parser.add_argument("--rounds", default="9", help="turns a build (default: %(default)s)")
    parser.add_argument("--seconds", default="0.05", help="about the length of a turn (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=900, help="seconds a cell may take (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/deploy.jsonl"), metavar="FILE")
    parser.add_argument("--restart", action="store_true", help="measure again what --json holds of what is asked for")
    parser.add_argument("--report", action="store_true", help="measure nothing: report what --json holds")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the marks of this page")
    arguments = parser.parse_args()
    cells = known(arguments.json)
    keys = [] if arguments.report else wanted(arguments.networks, arguments.runtimes, arguments.side, arguments.form)
    if arguments.restart:
        cells = [cell for cell in cells if cell["key"] not in keys]
    left = [key for key in keys if key not in [cell["key"] for cell in cells]]
    flags = ["--builds", arguments.builds, "--rounds", arguments.rounds, "--seconds", arguments.seconds]
    begun = time.monotonic()
    for number, key in enumerate(left, 1):
        cells.append(measured(key, arguments.limit, flags))
        keep(cells, arguments.json)
        minutes = (time.monotonic() - begun) / 60
        name = " ".join(map(str, key.values()))
        rest = minutes / number * (len(left) - number)
        progress(f"{number}/{len(left)} {name}: {told(cells[-1])} ({minutes:.1f} min, about {rest:.0f} to go)")
    if not cells:
        raise SystemExit(f"{arguments.json} holds nothing, and nothing was measured")
    text = page(cells)
    if arguments.page:
        write(arguments.page, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
