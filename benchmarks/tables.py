"""The published table: totals, what stopped models, and one CSV row per model."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import padfree
from benchmarks.measure import FIT, Result

FAULTS = ("crash", "broken", "keys", "timeout")
Row = dict[str, Any]


def totals(rows: Sequence[Row]) -> list[str]:
    """The sweep in a few lines; the faults are counted even where there are none."""
    status = Counter(row["status"] for row in rows)
    candidates = [row for row in rows if row["candidates"]]
    depthwise = [row for row in rows if row["dw_sites"]]
    converted = status["full"] + status["part"]
    sharing = [row["shared_keys"] for row in rows if row["shared_keys"]]
    within = [row for row in candidates if row["status"] in ("full", "part")]
    return [
        f"{len(rows)} models, {len(candidates)} of them with something to convert, "
        f"{len(depthwise)} with strided depthwise convolutions",
        f"converted: {converted} ({status['full']} fully, {status['part']} in part); "
        f"of those with something to convert: {len(within)} ({sum(row['status'] == 'full' for row in within)} fully)",
        "converted when only the domains of depthwise convolutions may be: "
        f"{sum(bool(row['depthwise_alone']) for row in depthwise)}",
        f"refused with a reason: {status['refused']}; nothing to convert: {status['nothing']}; "
        f"not built or run by their library: {status['unbuilt']}",
        f"strided convolutions: {sum(row['sites'] for row in rows)}, "
        f"named by a plan: {sum(row['located'] for row in rows)}; depthwise ones: "
        f"{sum(row['dw_sites'] for row in rows)}, named: {sum(row['dw_located'] for row in rows)}",
        "methods beside forward that raise, since they would not agree with it: "
        f"{sum(row['siblings'] for row in rows)} in {sum(bool(row['siblings']) for row in rows)} models; "
        f"that neither raise nor agree: {sum(row['status'] == 'broken' for row in rows)} models at most",
        f"feature extractors that share weights with their classifier: {len(sharing)}; "
        f"that do not, both converted: {len(sharing) - sharing.count(FIT)}",
        f"crashes: {status['crash']}; broken by conversion: {status['broken']}; "
        f"old keys or order changed: {status['keys']}; over time: {status['timeout']}",
    ]


def misfits(row: Row) -> bool:
    """Whether the converted features of a row's model and its converted classifier do not fit each other."""
    return row.get("shared_keys", "") not in ("", FIT)


def write_tables(rows: Sequence[Row], folder: Path) -> None:
    """Write coverage.md and coverage.csv into `folder`."""
    columns = [column.name for column in fields(Result)]
    with (folder / "coverage.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "missing": " ".join(row["missing"])})
    (folder / "coverage.md").write_text(_page(rows), encoding="utf-8")


def _page(rows: Sequence[Row]) -> str:
    lines = [
        "# Coverage",
        "",
        f"Written by `python -m benchmarks.coverage` with padfree {padfree.__version__}, {_versions()},",
        "on meta tensors, at every model's default input size, with all rules. One line per model: "
        "[coverage.csv](coverage.csv).",
        "",
        *(f"- {line}" for line in totals(rows)),
        "",
        "A converted model was rebuilt from its plan, run before and after, given a training step, deep-copied and",
        "pickled; converting it again found nothing; its old keys, their order and their shapes were compared.",
        "",
        "*Something to convert*: a stride-2 convolution with an odd kernel of at least 3, or a 3x3 stride-2 max-pool.",
        "*Fully*: every place that the method defines a rewrite for. Outside it are places that are padding-free",
        "already, patchify stems, blurs with fixed filters, and convolutions that only subsample the keys and values",
        "of an attention; the plan names them too. *In part*: some places were left alone, the first one's reason is",
        "in the CSV.",
        "",
        "| library | models | fully | in part | refused | nothing to convert | not built | faults |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for library in ("timm", "torchvision", "bsconv"):
        status = Counter(row["status"] for row in rows if row["name"].startswith(f"{library}:"))
        cells = [status[key] for key in ("full", "part", "refused", "nothing", "unbuilt")]
        faults = sum(status[fault] for fault in FAULTS)
        lines.append("| " + " | ".join(map(str, (library, status.total(), *cells, faults))) + " |")
    lines += ["", "## Why places were left alone", "", "| models | first reason |", "|---|---|"]
    reasons = Counter(_kind(row["reason"]) for row in rows if row["status"] in ("part", "refused") and row["reason"])
    lines += [f"| {number} | {reason} |" for reason, number in reasons.most_common(30)]
    faults_found = [f"{row['status']}: `{row['name']}`: {row['reason']}" for row in rows if row["status"] in FAULTS]
    faults_found += [f"features: `{row['name']}`: {row['shared_keys']}" for row in rows if misfits(row)]
    if faults_found:
        lines += ["", "## Faults", "", *(f"- {fault}" for fault in faults_found)]
    return "\n".join(lines) + "\n"


def _kind(reason: str) -> str:
    """A reason without its names and sizes, so that equal ones count together."""
    text = re.sub(r"`[^`]*`", "`...`", reason)
    return re.sub(r"\d+(\.\d+)?", "n", text).replace("|", "\\|")[:160]


def _versions() -> str:
    import timm
    import torch
    import torchvision

    return f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
