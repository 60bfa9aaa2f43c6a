"""The documents say what the code has: hooks, commands, settings, error reasons, links, and code that compiles."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from graftwork.cli.app import app
from graftwork_plugins import hookspecs
from graftwork_plugins.testing import StrategyBattery
from graftwork_server.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
PRUNED = {".venv", ".git", "node_modules", "build", "dist"}
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(p in PRUNED or p.startswith(".") for p in path.relative_to(ROOT).parts)
)
README = (ROOT / "README.md").read_text()
PLUGINS = (ROOT / "docs/plugins.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def hooks() -> dict[str, Any]:
    return {name: hook for name, hook in vars(hookspecs).items() if name.startswith("graftwork_")}


def commands() -> list[str]:
    """Every command as typed, such as "adapter create"."""
    found: list[str] = []

    def walk(command: Any, path: list[str]) -> None:
        children = getattr(command, "commands", None)
        if not children:
            found.append(" ".join(path))
            return
        for name, child in children.items():
            walk(child, [*path, name])

    walk(typer.main.get_command(app), [])
    return found


def reasons() -> set[str]:
    """Every error reason that the server can give."""
    text = "\n".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    return set(re.findall(r'\breason="([A-Z_]+)"', text)) | set(re.findall(r'else "(DATASET_[A-Z_]+)"', text))


def broken_links(document: Path, text: str) -> list[str]:
    """Relative links of a document that lead nowhere; fenced code is no prose."""
    targets = [target for target in _LINK.findall(_FENCE.sub("", text)) if not re.match(r"[a-z]+:|#", target)]
    return [target for target in targets if not (document.parent / target.partition("#")[0]).exists()]


def code_blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in _FENCE.findall(text) if kind == language]


def cells_of(text: str, column: int = 0) -> set[str]:
    """What stands in backticks alone in a column of the tables of a document."""
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {row[column].strip().strip("`") for row in rows if len(row) > column}


@pytest.mark.parametrize("name", sorted(hooks()))
def test_every_hook_is_documented(name: str) -> None:
    assert len((hooks()[name].__doc__ or "").split()) > 20, f"{name} has no docstring that says who calls it and when"
    signature = ast.unparse(
        next(n for n in ast.walk(_tree()) if isinstance(n, ast.FunctionDef) and n.name == name).args
    )
    arguments = ", ".join(argument.partition(":")[0] for argument in signature.split(", ") if argument)
    assert f"### `{name}({arguments})`" in PLUGINS


def _tree() -> ast.Module:
    return ast.parse(Path(hookspecs.__file__).read_text())


def test_every_test_of_the_kit_is_documented() -> None:
    assert {name for name in dir(StrategyBattery) if name.startswith("test_")} <= cells_of(PLUGINS)


@pytest.mark.parametrize("command", commands())
def test_every_command_is_documented(command: str) -> None:
    assert re.search(rf"(graftwork |`){re.escape(command)}\b", README)


def test_commands_are_found() -> None:
    assert {"serve", "generate", "adapter create", "tune watch", "dataset check"} <= set(commands())


@pytest.mark.parametrize("name", list(ServerConfig.model_fields))
def test_every_setting_is_documented(name: str) -> None:
    flag, variable = "--" + name.replace("_", "-"), f"GRAFTWORK_{name.upper()}"
    row = next(
        (line for line in OPERATIONS.splitlines() if line.startswith(f"| `{flag}` | `{variable}` | `{name}` |")), ""
    )
    assert row, f"docs/operations.md has no row for {name}"
    default = ServerConfig.model_fields[name].default
    if isinstance(default, bool | int | float | str):
        shown = (
            str(default).lower()
            if isinstance(default, bool)
            else f"{default:g}"
            if isinstance(default, float)
            else default
        )
        assert f"| `{shown}` |" in row


def test_only_settings_are_documented() -> None:
    keys = {cell for cell in cells_of(OPERATIONS, 2) if re.fullmatch(r"[a-z_]+", cell)}
    assert keys <= set(ServerConfig.model_fields)


def test_every_error_reason_is_documented() -> None:
    documented = {cell for cell in cells_of(OPERATIONS) if re.fullmatch(r"[A-Z_]{5,}", cell)}
    assert documented == reasons()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    assert not broken_links(document, document.read_text())


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    text = "[a](there.md) [b](gone.md#part) [c](https://example.org) [d](#here)\n```\n[e](code.md)\n```\n"
    (tmp_path / "there.md").touch()
    assert broken_links(tmp_path / "x.md", text) == ["gone.md#part"]


@pytest.mark.parametrize("document", ["README.md", "docs/plugins.md"])
def test_python_blocks_compile(document: str) -> None:
    blocks = code_blocks((ROOT / document).read_text(), "python")
    assert blocks
    for block in blocks:
        compile(block, document, "exec")


NAMED = re.compile(r"`([a-z_0-9]+(?:/[a-z_0-9]+)*(?:/|\.(?:py|proto|h|c|md)))`")
HOMES = ("", "server/graftwork_server", "plugins/graftwork_plugins", "server/graftwork_server/engine", "docs")
OF_USERS = {
    "my_strategy.py",
    "staging/",
    "artifacts/",
    "jobs/",
    "datasets/",
    "cache/",
    "cache/tokenizers/",
    "data/",
    "v1/",
}
"""Files of plugin authors, and folders of a data directory."""


@pytest.mark.parametrize(
    "document", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_files_that_are_named_are_there(document: Path) -> None:
    named = set(NAMED.findall(document.read_text())) - OF_USERS
    lost = [name for name in named if not any((ROOT / home / name).exists() for home in HOMES)]
    lost = [name for name in lost if not any((ROOT / "server/graftwork_server").rglob(name))]
    assert not lost


def test_pages_are_short() -> None:
    lines = {page.name: len(page.read_text().splitlines()) for page in (ROOT / "docs").glob("*.md")}
    assert lines.pop("architecture.md") <= 120
    references = {"operations.md", "plugins.md"}  # tables of settings, reasons and hooks
    assert {name: count for name, count in lines.items() if count > 150 and name not in references} == {}
