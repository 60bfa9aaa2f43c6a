"""The floors of docs/architecture.md, checked on the source: who may import whom, type-checking imports included."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "graftwork": ROOT / "clients/python/graftwork",
    "graftwork_plugins": ROOT / "plugins/graftwork_plugins",
    "graftwork_server": ROOT / "server/graftwork_server",
}
MOST_FILES = 13
"""Python files in a folder."""
FLOORS: dict[str, list[tuple[str, ...]]] = {
    "graftwork_server": [
        ("errors", "names", "types", "config", "config_sources", "logs", "durable", "printable", "process"),
        ("wire",),
        ("text",),
        ("kernels",),
        ("base",),
        ("layers",),
        ("engine",),
        ("hub",),
        ("tuning",),
        ("front",),
        ("__main__", "engine_main", "tuner_main", "helper_main"),
    ],
}
"""From the ground up. A room imports from floors below its own and from itself; the ground's files from each other."""
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors"}
RPC = {"grpc", "grpc_status", "grpc_health", "grpc_reflection", "google"}
DATABASE = {"sqlalchemy", "alembic", "sqlite3"}
OF_OTHERS = [f"graftwork_server.{room}" for room in ("kernels", "base", "layers", "engine")]
# (files, modules they must not import, whether imports inside functions count too)
RULES: list[tuple[str, str, set[str], bool]] = [
    ("graftwork", "", {"graftwork_plugins", "graftwork_server"} | HEAVY, True),
    ("graftwork_plugins", "", {"graftwork_server", "graftwork"} | RPC | DATABASE, True),
    ("graftwork_plugins", "", HEAVY, False),
    *(
        ("graftwork_server", room, {"pluggy", "graftwork"} | RPC | DATABASE, True)
        for room in ("kernels", "base", "layers", "engine")
    ),
    # Nothing heavy in the front's process: what stands above the engine reaches it by messages alone.
    ("graftwork_server", "hub", HEAVY | RPC | {"pluggy", *OF_OTHERS}, True),
    ("graftwork_server", "front", HEAVY | {"pluggy"} | DATABASE | (set(OF_OTHERS) - {"graftwork_server.base"}), True),
    ("graftwork_server", "tuning", RPC | DATABASE | {"pluggy"}, True),
    *(("graftwork_server", f"tuning/{room}", HEAVY | set(OF_OTHERS), True) for room in ("data", "jobs")),
    *(
        ("graftwork_server", file, HEAVY | RPC | DATABASE | {"pluggy"}, True)
        for file in ("types.py", "errors.py", "wire")
    ),
    ("graftwork_server", "text", HEAVY | RPC, True),
]


def modules(package: str) -> dict[str, Path]:
    """Files by dotted name, a package's face by the package's; generated code and the testing kit left out."""
    folder = PACKAGES[package]
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        # v1 is generated; the testing kit is for test code and no part of what the contract imports.
        if "v1" not in parts and "testing" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(path: Path, inside_functions: bool = True, type_checking: bool = True) -> dict[str, int]:
    """Dotted names that a file imports, with the line."""
    names: dict[str, int] = {}

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not type_checking:
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            names.update({alias.name: node.lineno for alias in node.names})
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names[node.module] = node.lineno
            names.update({f"{node.module}.{alias.name}": node.lineno for alias in node.names})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def arrows(files: Mapping[str, Path]) -> Iterator[tuple[str, str, str]]:
    """(importer, imported, "file:line") among `files`. `from package import module` is an arrow to the module."""
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets: set[str] = set()
            if isinstance(node, ast.Import):
                targets = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = {target if target in files else node.module for target in wanted}
            for target in sorted(targets & files.keys() - {name}):
                yield name, target, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def floor_of(module: str) -> int:
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return next((number for number, rooms in enumerate(FLOORS[package]) if room in rooms), -1)


def climbing(files: Mapping[str, Path]) -> list[str]:
    """Each import from a higher floor."""
    return [
        f"{place} {importer} imports {target}, which stands above it"
        for importer, target, place in arrows(files)
        if floor_of(importer) < floor_of(target)
    ]


def circle(files: Mapping[str, Path]) -> list[str]:
    """A circle of imports, arrow by arrow; empty if there is none."""
    targets: dict[str, dict[str, str]] = {}
    for importer, target, place in arrows(files):
        targets.setdefault(importer, {})[target] = place
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            round_trip = [*way[way.index(module) :], module]
            return [f"{targets[a][b]} {a} imports {b}" for a, b in itertools.pairwise(round_trip)]
        if module in done:
            return []
        for target in targets.get(module, ()):
            if found := walk(target, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in targets if (found := walk(module, []))), [])


def violations(source: Mapping[str, int] | set[str], forbidden: set[str]) -> set[str]:
    return {name for name in source for ban in forbidden if name == ban or name.startswith(ban + ".")}


def test_every_file_stands_on_a_floor() -> None:
    homeless = [name for name in modules("graftwork_server") if "." in name and floor_of(name) < 0]
    assert not homeless, f"no floor is named for {homeless}"


def test_nobody_imports_from_a_higher_floor() -> None:
    assert not (found := climbing(modules("graftwork_server"))), "\n".join(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    assert not (found := circle(modules(package))), "\n".join(found)


@pytest.mark.parametrize("top", ["clients", "plugins", "server", "benchmarks", "examples", "tools"])
def test_folders_are_small(top: str) -> None:
    folders = [folder for folder in (ROOT / top).rglob("*") if folder.is_dir() and folder.name != "v1"]
    full = {
        str(f.relative_to(ROOT)): n for f in [*folders, ROOT / top] if (n := len(list(f.glob("*.py")))) > MOST_FILES
    }
    assert not full


@pytest.mark.parametrize(
    ("package", "part", "forbidden", "deep"), RULES, ids=[f"{r[0]}/{r[1] or '*'}-{i}" for i, r in enumerate(RULES)]
)
def test_import_rule(package: str, part: str, forbidden: set[str], deep: bool) -> None:
    target = PACKAGES[package] / part
    files = [file for file in modules(package).values() if target in (file, *file.parents)]
    assert files, f"the rule for {target} checks nothing"
    found = {
        f"{file.relative_to(ROOT)}:{names[name]}": name
        for file in files
        for names in [imported(file, deep, type_checking=False)]
        for name in violations(names, forbidden)
    }
    assert not found


def test_the_rules_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from graftwork_server import hub\ndef f():\n    import torch.nn\n")
    assert violations(imported(bad), {"torch", "graftwork_server.hub"}) == {"torch.nn", "graftwork_server.hub"}
    assert violations(imported(bad, inside_functions=False), {"torch"}) == set()


def test_floors_and_circles_can_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    low, high = tmp_path / "low.py", tmp_path / "high.py"
    low.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from graftwork_server.front import high\n")
    high.write_text("def f():\n    from graftwork_server.wire.low import x\n")
    files = {"graftwork_server.wire.low": low, "graftwork_server.front.high": high}
    assert climbing(files) == [
        "low.py:3 graftwork_server.wire.low imports graftwork_server.front.high, which stands above it"
    ]
    assert [line.partition(" ")[0] for line in circle(files)] == ["low.py:3", "high.py:2"]


def test_nothing_is_pickled() -> None:
    """No product file imports pickle or calls torch.load or torch.save (threats.md)."""
    for folder in PACKAGES.values():
        for file in folder.rglob("*.py"):
            assert not violations(imported(file), {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}), file
            calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)}
            assert not calls & {"torch.load", "torch.save", "eval", "exec", "np.load"}, file
