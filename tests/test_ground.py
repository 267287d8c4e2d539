"""The ground: what an import pulls in, what imports what, and that the metadata is complete."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import padfree

ROOT = Path(__file__).parent.parent

# The floors of the named parts; a file imports only from floors below, or beside it where no circle results.
# A module imports from what stands before it here, and from its own folder; benchmarks, tests and recipes from all.
ORDER = (
    *(
        "errors",
        "geometry",
        "columns",
        "indices",
        "types",
        "kernels",
        "record",
        "analysis",
        "layers",
        "rules",
        "rewrite",
        "verify",
        "plan",
    ),
    *("convert", "replacing", "files", "report", "borders", "deploy", "adapt", "advise", "export", "timm", "page"),
    "cli",
)


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def listed(section: str, option: str) -> list[str]:
    return [line.strip() for line in config()[section][option].splitlines() if line.strip()]


def test_import_padfree_loads_torch_alone() -> None:
    heavy = "timm torchvision bsconv fvcore rich safetensors yaml pydantic padfree.recipes padfree.cli"
    code = (
        f"import sys, padfree; print([name for name in {heavy.split()!r} if name in sys.modules]);"
        "assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def modules() -> dict[str, Path]:
    """Modules of padfree by name."""
    files = sorted((ROOT / "padfree").rglob("*.py"))
    names = (path.relative_to(ROOT).with_suffix("").parts for path in files)
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in zip(names, files, strict=True)}


def imported(path: Path) -> set[str]:
    """Modules of padfree that a file imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules().keys()


def test_imports_go_one_way() -> None:
    seen = set()
    for name, path in modules().items():
        if name == "padfree":
            continue
        place = name.split(".")[1]
        seen.add(place)
        for other in imported(path) - {"padfree"}:
            assert ORDER.index(other.split(".")[1]) <= ORDER.index(place), f"{name} imports {other} from above"
    assert seen == set(ORDER)


def test_no_import_goes_in_a_circle() -> None:
    uses = {name: imported(path) - {name, name.rpartition(".")[0]} for name, path in modules().items()}
    assert len(uses) >= 40
    while uses:
        free = {name for name, others in uses.items() if not others & uses.keys()}
        assert free, f"these import each other: { {name: others & uses.keys() for name, others in uses.items()} }"
        uses = {name: others for name, others in uses.items() if name not in free}


def test_rules_import_no_rule() -> None:
    files = [path for path in (ROOT / "padfree" / "rules").glob("*.py") if not path.name.startswith(("_", "base"))]
    assert len(files) >= 4
    for path in files:
        others = "|".join(other.stem for other in files if other != path)
        assert not re.search(
            rf"import .*padfree\.rules\.({others})|from padfree\.rules(\.| import )({others})\b", path.read_text()
        ), path


def test_every_package_is_listed() -> None:
    """A folder with code that is not listed would be missing from the wheel, and only there."""
    packages = set(listed("options", "packages"))
    found = {
        "padfree" + "".join(f".{part}" for part in path.parent.relative_to(ROOT / "padfree").parts)
        for path in (ROOT / "padfree").rglob("*.py")
    }
    found |= {
        "padfree.recipes" + "".join(f".{part}" for part in path.parent.relative_to(ROOT / "recipes").parts)
        for path in (ROOT / "recipes").rglob("*.py")
    }
    assert {"padfree", "padfree.rules", "padfree.recipes"} <= found
    assert packages == found


def test_the_version_is_one() -> None:
    assert config()["metadata"]["version"] == padfree.__version__
    assert importlib.metadata.version("padfree") == padfree.__version__
    assert f"## {padfree.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {padfree.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_requirements_and_commands() -> None:
    required = listed("options", "install_requires")
    assert required == ["torch>=2.13", "torchvision", "timm", "fvcore", "safetensors", "rich"]
    extras = set(config()["options.extras_require"])
    assert extras == {"bsconv", "recipes", "data", "onnx", "deploy", "interop", "report", "docs", "all", "test", "dev"}
    scripts = {entry.name: entry.value for entry in importlib.metadata.entry_points(group="console_scripts")}
    assert scripts["padfree-convert"] == "padfree.cli:main"
    assert scripts["padfree-recipes"] == "padfree.recipes.cli:main"


def test_the_recipe_files_are_installed() -> None:
    code = "from padfree.recipes.files import LIBRARY; print(len(list(LIBRARY.rglob('*.yaml'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert int(done.stdout) == len(list((ROOT / "recipes" / "library").rglob("*.yaml"))) >= 15


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) == 11357


def test_the_readme_has_two_commands_from_a_fresh_clone() -> None:
    lines = re.findall(r"^python3 -m venv \.venv && .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    assert lines[0].endswith("padfree-convert --timm mobilenetv3_large_100")
    assert "pytest" in lines[1]


@pytest.mark.parametrize("name", [".ci/run", ".ci/oldest"])
def test_scripts_can_be_run(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
