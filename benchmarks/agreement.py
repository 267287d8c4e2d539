"""Do the ONNX files of converted models compute what PyTorch computes?

    python -m benchmarks.agreement --json agreement.json
    python -m benchmarks.agreement --names timm:mobilenetv3_large_100

The fixed sample of `benchmarks.coverage` is converted, written as ONNX (opset 18, free batch and sides; fixed sides
where the network is tied to its size) and run by ONNX Runtime on other batch sizes and sides than it was traced with.
Random weights let the maps of a deep network fade until its output no longer depends on the image, and then anything
agrees; so norms take the statistics of random images first. Two figures a model: the largest difference between the
outputs over the largest output, and over the largest difference that another image makes. With `--json` a run that is
stopped goes on where it was. The exit status is 1 if a first figure is over 1e-4 or a second over 1e-2.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.catalogue import SAMPLE, input_size
from benchmarks.clock import machine, progress, write

LIMIT, LIMIT_OF_CHANGE = 1e-4, 1e-2
PROCESSES = 2


def measure(name: str) -> dict[str, Any]:
    """Convert, export and compare one model; what cannot be exported is a row with its reason."""
    import torch

    import padfree
    from padfree.errors import NothingToConvertError
    from padfree.files.sources import Source

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    begun = time.perf_counter()
    row: dict[str, Any] = {"name": name, "status": "agrees"}
    source = Source.from_dict(name)
    try:
        made = padfree.convert(source.create(), input_size=input_size(source))
        size = made.padfree_plan.input_size
        _settle_norms(made, size)
        with tempfile.TemporaryDirectory() as folder:
            row |= _compare(made, size, Path(folder) / "model.onnx")
    except NothingToConvertError as error:
        row |= {"status": "nothing to convert", "reason": str(error).splitlines()[0]}
    except padfree.PadfreeError as error:
        row |= {"status": "refused", "reason": str(error).splitlines()[0]}
    except Exception as error:  # a file that does not run is the worst disagreement
        row |= {"status": "off", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    if "difference" in row and not (row["difference"] <= LIMIT and row["of the change"] <= LIMIT_OF_CHANGE):
        row["status"] = "off"  # NaN is off too
    return row | {"seconds": round(time.perf_counter() - begun, 1)}


def _compare(model: Any, size: tuple[int, ...], path: Path) -> dict[str, Any]:
    """The largest relative difference at two batch sizes, and at a second side where sides are free."""
    import onnxruntime
    import torch

    import padfree
    from padfree.deploy.onnx import to_onnx

    why = ""
    try:
        to_onnx(model, path, size)
    except padfree.PadfreeError as error:
        why = str(error).splitlines()[0]
        to_onnx(model, path, size, dynamic_sides=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    channels, height, width = size
    other = (2, channels, height + 32, width + 64)
    if not why and not _takes(model, other):
        why = f"the network itself does not take {height + 32}x{width + 64}"
    shapes = [(1, *size), (3, *size)] + ([] if why else [other])
    worst = torch.stack([_difference(model, session, shape) for shape in shapes]).amax(0)  # keeps NaN
    difference, of_change = worst.tolist()
    return {"sides": "fixed" if why else "free", "difference": difference, "of the change": of_change, "reason": why}


def _takes(model: Any, shape: tuple[int, ...]) -> bool:
    """Whether the network itself runs on other images than it was converted for."""
    import torch

    try:
        with torch.no_grad():
            model(torch.zeros(shape))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def _settle_norms(model: Any, size: tuple[int, ...]) -> None:
    """Give batch norms the statistics of two random batches; all else stays in eval mode (detectors want targets)."""
    import torch

    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a plain mean over batches
            module.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(2, *size))
    model.eval()


def _difference(model: Any, session: Any, shape: tuple[int, ...]) -> Any:
    """The largest difference over the largest output, and over the largest change by another image (else NaN)."""
    import torch

    generator = torch.Generator().manual_seed(1)
    image, another = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    with torch.no_grad():
        expected, moved = (
            [leaf for leaf in torch.utils._pytree.tree_leaves(model(x)) if isinstance(leaf, torch.Tensor)]
            for x in (image, another)
        )
    found = map(torch.as_tensor, session.run(None, {session.get_inputs()[0].name: image.numpy()}))
    figures = []
    for mine, changed, theirs in zip(expected, moved, found, strict=True):
        off = (mine - theirs).abs().max()
        figures.append(torch.stack([off / mine.abs().max(), off / (mine - changed).abs().max()]))
    return torch.stack(figures).amax(0)


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown report."""
    compared = [row for row in rows if "difference" in row]
    agreeing = sum(row["status"] == "agrees" for row in rows)
    lines = [
        f"{len(rows)} models, {len(compared)} written and compared, {agreeing} agree to {LIMIT:g} "
        f"({sum(row['sides'] == 'free' for row in compared)} with free sides).",
        "",
        "| model | sides | difference / largest output | difference / change by another image | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cell = f"{row['status']}: {row.get('reason', '')} |"
        if "difference" in row:
            cell = f"{row['difference']:.1e} | {row['of the change']:.1e}"
        lines.append(f"| {row['name']} | {row.get('sides', '')} | {cell} | {row['seconds']} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print; 1 if a file is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--names", nargs="+", metavar="SOURCE", default=SAMPLE, help='such as "timm:resnet18"')
    parser.add_argument("--json", metavar="FILE", help="every figure; also what a stopped run goes on from")
    arguments = parser.parse_args()
    known = Path(arguments.json) if arguments.json else None
    rows: list[dict[str, Any]] = json.loads(known.read_text())["rows"] if known and known.exists() else []
    left = [name for name in arguments.names if name not in {row["name"] for row in rows}]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
        for done in concurrent.futures.as_completed([pool.submit(measure, name) for name in left]):
            rows.append(done.result())
            progress(f"{len(rows)}/{len(arguments.names)} {rows[-1]}")
            write({"machine": machine(), "rows": rows}, arguments.json)
    rows.sort(key=lambda row: list(arguments.names).index(row["name"]) if row["name"] in arguments.names else -1)
    print(table(rows))
    return int(any(row["status"] == "off" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
