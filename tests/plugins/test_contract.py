"""The contract is what graftwork_plugins exports: pinned here, documented, and imported by no other way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import graftwork_plugins

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "plugins/graftwork_plugins"
DOCUMENT = (ROOT / "docs/plugins.md").read_text()

EXPORTS = """
    API_VERSION Artifact ArtifactError Automatic BaseInfo BaseModelHandle Choice ConfigError DatasetInfo Delta
    DeviceInfo ENCODERS Estimate FullWeights Head HeadLayout IGNORED_LABEL LowRank PROJECT PackedBatch Prefix Replace
    SavedArtifact Scale Strategy Trainable TrainingConfig TrainingRow UnsupportedBase activation_bytes all_finite
    head_of hookimpl layout_of read_json without_derived
    """.split()  # noqa: SIM905 - one name a line would fill a page
"""Names are added, never taken away, as long as API_VERSION is the same."""

ON_BOARD = {"builtin", "peft_format"}
MODULES_BESIDE: dict[str, set[str]] = {
    "server": {"manager"},
    "plugins/example": {"testing"},
    "plugins/graftwork_plugins/builtin": ON_BOARD,
    "plugins/graftwork_plugins/peft_format": ON_BOARD,
    "plugins/graftwork_plugins/testing": {"testing"},
    "tests": {"manager", "hookspecs", "testing", *ON_BOARD},
    **{folder: set() for folder in ("clients", "benchmarks", "examples", "tools")},
}
"""Modules of graftwork_plugins that the files of a folder may import from, beside the package itself."""


def modules_imported(source: str) -> Iterator[str]:
    """Modules of graftwork_plugins by the first part of their names, "" for the package."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for first, second, *_ in ([*name.split("."), ""] for name in names):
            if first == "graftwork_plugins":
                yield second if second in modules else ""


def undocumented(path: Path) -> Iterator[str]:
    """Public functions, classes and methods of a file without a docstring."""

    def walk(node: ast.AST, where: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                name = f"{where}.{child.name}"
                if ast.get_docstring(child) is None:
                    yield name
                yield from walk(child, name) if isinstance(child, ast.ClassDef) else ()

    yield from walk(ast.parse(path.read_text()), path.stem)


def test_the_exported_names_are_pinned() -> None:
    assert sorted(graftwork_plugins.__all__) == sorted(EXPORTS)
    assert all(hasattr(graftwork_plugins, name) for name in EXPORTS)


@pytest.mark.parametrize("name", EXPORTS)
def test_every_exported_name_is_documented(name: str) -> None:
    assert any(f"`{name}{end}" in DOCUMENT for end in "`(.")


@pytest.mark.parametrize("folder", MODULES_BESIDE)
def test_the_contract_is_imported_from_the_package(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if ".venv" not in path.parts]
    assert files
    found = {
        f"{path.relative_to(ROOT)} imports graftwork_plugins.{module}"
        for path in files
        for module in set(modules_imported(path.read_text())) - MODULES_BESIDE[folder] - {""}
    }
    assert not found


def test_nobody_imports_a_private_name() -> None:
    for path in PACKAGE.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        private = {alias.name for node in nodes for alias in node.names if alias.name.startswith("_")}
        assert not private, path


def test_everything_public_has_a_docstring() -> None:
    assert not [name for path in (ROOT / "plugins").rglob("*.py") for name in undocumented(path)]


def test_the_rules_can_fail(tmp_path: Path) -> None:
    source = "import torch\nfrom graftwork_plugins import heads, Head\nimport graftwork_plugins.deltas\n"
    assert list(modules_imported(source)) == ["heads", "", "deltas"]
    (tmp_path / "bad.py").write_text("class A:\n    'A.'\n    def f(self): ...\n    def _g(self): ...\n")
    assert list(undocumented(tmp_path / "bad.py")) == ["bad.A.f"]
