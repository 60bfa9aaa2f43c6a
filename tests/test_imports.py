"""The import rules of docs/architecture.md, checked on the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "graftwork": ROOT / "clients/python/graftwork",
    "graftwork_plugins": ROOT / "plugins/graftwork_plugins",
    "graftwork_server": ROOT / "server/graftwork_server",
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors"}
RPC = {"grpc", "grpc_status", "grpc_health", "grpc_reflection", "google"}
DATABASE = {"sqlalchemy", "alembic", "sqlite3"}
# (files, modules they must not import, whether imports inside functions count too)
RULES: list[tuple[str, str, set[str], bool]] = [
    ("graftwork", "", {"graftwork_plugins", "graftwork_server"} | HEAVY, True),
    ("graftwork_plugins", "", {"graftwork_server", "graftwork"} | RPC | DATABASE, True),
    ("graftwork_plugins", "", HEAVY, False),
    ("graftwork_server", "engine", {"pluggy", "graftwork", "graftwork_server.rpc", "graftwork_server.hub"}, True),
    ("graftwork_server", "engine", RPC | DATABASE, True),
    ("graftwork_server", "rpc", HEAVY | {"pluggy"} | DATABASE, True),
    ("graftwork_server", "hub", HEAVY | RPC | {"pluggy", "graftwork_server.rpc", "graftwork_server.engine"}, True),
    ("graftwork_server", "tuning", RPC | DATABASE | {"pluggy", "graftwork_server.rpc"}, True),
    ("graftwork_server", "types.py", HEAVY | RPC | DATABASE | {"pluggy"}, True),
    ("graftwork_server", "errors.py", HEAVY | RPC | DATABASE | {"pluggy"}, True),
    ("graftwork_server", "messages.py", HEAVY | RPC | DATABASE | {"pluggy"}, True),
    ("graftwork_server", "front.py", HEAVY | {"pluggy"}, True),
    ("graftwork_server", "text", HEAVY | RPC, True),
]


def imported(path: Path, inside_functions: bool) -> set[str]:
    """Dotted names that a file imports at run time; `if TYPE_CHECKING` blocks do not count."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def violations(source: set[str], forbidden: set[str]) -> set[str]:
    return {name for name in source for ban in forbidden if name == ban or name.startswith(ban + ".")}


@pytest.mark.parametrize(
    ("package", "part", "forbidden", "deep"), RULES, ids=[f"{r[0]}/{r[1] or '*'}-{i}" for i, r in enumerate(RULES)]
)
def test_import_rule(package: str, part: str, forbidden: set[str], deep: bool) -> None:
    target = PACKAGES[package] / part
    files = [target] if target.is_file() else sorted(target.rglob("*.py"))
    # v1 is generated; the testing kit is for test code and no part of what the contract imports.
    files = [file for file in files if "v1" not in file.parts and file.name != "testing.py"]
    assert files, f"the rule for {target} checks nothing"
    found = {str(file.relative_to(ROOT)): bad for file in files if (bad := violations(imported(file, deep), forbidden))}
    assert not found


def test_the_rules_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from graftwork_server import hub\ndef f():\n    import torch.nn\n")
    assert violations(imported(bad, True), {"torch", "graftwork_server.hub"}) == {"torch.nn", "graftwork_server.hub"}
    assert violations(imported(bad, False), {"torch"}) == set()


def test_nothing_is_pickled() -> None:
    """No product file imports pickle or calls torch.load or torch.save (threats.md)."""
    for folder in PACKAGES.values():
        for file in folder.rglob("*.py"):
            assert not violations(imported(file, True), {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}), file
            calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)}
            assert not calls & {"torch.load", "torch.save", "eval", "exec", "np.load"}, file
