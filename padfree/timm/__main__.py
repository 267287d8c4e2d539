"""Run a script of yours, or one of timm's, with the padding-free networks registered.

    python -m padfree.timm train.py --model padfree_mobilenetv3_large_100 ...

The script runs unchanged, as `python train.py ...` would.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import padfree.timm  # noqa: F401  (registers the names)

_USAGE = "usage: python -m padfree.timm SCRIPT.py [ARGUMENTS] (it runs with the names padfree_... known to timm)"


def main() -> None:
    """Run the script named first, with what stands behind it as its arguments."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(_USAGE, file=sys.stderr)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if not Path(script).is_file():
        print(f"padfree.timm: there is no script {script!r}; {_USAGE}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv[:] = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)  # as `python SCRIPT.py` has it
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
