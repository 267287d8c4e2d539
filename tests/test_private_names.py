"""Which private names of other packages the code uses: each has its reason here, and none comes without one."""

from __future__ import annotations

import ast
from pathlib import Path

from torch import nn

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("padfree", "recipes") for path in (ROOT / folder).rglob("*.py"))

MODULES = {
    "torch.utils._python_dispatch": {"padfree/record/quick.py"},  # TorchDispatchMode is documented, its module not
    "torch.fx.experimental._config": {"padfree/deploy/program.py"},  # `backed_size_oblivious` has no public switch
}
"""Private modules, and the one file that imports each."""

ATTRIBUTES = {
    "_modules": "children under their own names, absent ones too; `named_children` leaves those out",
    "_parameters": "the table itself: a parameter is given another shape past `__setattr__`",
    "_buffers": "the same of buffers",
    "_forward_hooks": "whether a module has hooks: there is no public question",
    "_forward_pre_hooks": "the same",
    "_conv_forward": "torch's Conv2d with another weight, whatever its padding mode",
    "_schema": "whether an operator writes into what it is given (torch 2.14 has no public question)",
    "_cdata": "what tells storages on the meta device apart, all of whose addresses are 0",
    "_assert": "how torch.fx keeps an assertion, as its documentation says",
    "_reset_state": "Accelerate's state, which tests and one process after another need fresh",
    "_SubParsersAction": "argparse's type of a subcommand, for an annotation",
    "_ArgumentGroup": "argparse's type of a group of flags, for an annotation",
}
"""Private attributes of objects that are not ours, and why no public name does."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_modules_are_imported_in_one_file_each() -> None:
    found: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] != "padfree":
                for full in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    if any(private(part) for part in full.split(".")):
                        name = node.module if any(map(private, node.module.split("."))) else full
                        found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    assert found == MODULES


def test_private_attributes_are_listed() -> None:
    used: set[str] = set()
    ours: set[str] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and private(node.attr):
                (ours if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                ours.add(node.target.id)
            elif isinstance(node, ast.Assign):
                ours.update(target.id for target in node.targets if isinstance(target, ast.Name))
    assert len(used) > 50  # the code was looked at
    foreign = used - ours | used & vars(nn.Module()).keys()
    assert foreign - {"_padfree_recipe"} == set(ATTRIBUTES)
