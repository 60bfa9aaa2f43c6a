"""The documents say what the code has: hooks, commands, settings, error reasons, links, and code that compiles."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from tests.test_imports import FLOORS

from graftwork.cli.app import app
from graftwork_plugins import hookspecs
from graftwork_plugins.testing import StrategyBattery
from graftwork_server.config import ServerConfig
from graftwork_server.wire.engine import EngineMessage, FrontMessage
from graftwork_server.wire.tuning import StartTuning, TunerEvent

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


NAMED = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/|[\w.-]+(?:/[\w.-]+)+|[\w.-]+\.(?:py|proto|c|h|md|toml|txt))`")
"""Folders, paths, and files of the repository's kinds, in backticks."""
HOMES = ("", "server/graftwork_server")
"""What the paths of documents begin at."""
OF_USERS = {"my_strategy.py", "staging/", "cache/", "cache/tokenizers/", "additional_chat_templates/NAME.jinja"}
"""Files of plugin authors, of artifacts, and folders of a data directory."""
PAGES = sorted((ROOT / "docs").glob("*.md"))
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def lost_files(text: str) -> set[str]:
    """Files and folders that a text names and that are not there."""
    named = set(NAMED.findall(text)) - OF_USERS
    return {name for name in named if not any((ROOT / home / name).exists() for home in HOMES)}


def section(text: str, title: str) -> str:
    """What stands under a heading of the second level."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("document", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_files_that_are_named_are_there(document: Path) -> None:
    assert not lost_files(document.read_text())


def test_a_moved_file_is_found() -> None:
    text = "`engine/engine.py` `engine/gone.py` `gone/` `tests/gone.json` `Engine.step` `config.json` `gone.md` `a b.h`"
    assert lost_files(text) == {"engine/gone.py", "gone/", "tests/gone.json", "gone.md"}
    assert lost_files("`record.py` alone, without its folder") == {"record.py"}


def test_pages_are_short() -> None:
    lines = {page.name: len(page.read_text().splitlines()) for page in PAGES}
    assert lines.pop("architecture.md") <= 120
    references = {"operations.md", "plugins.md"}  # tables of settings, reasons and hooks
    assert {name: count for name, count in lines.items() if count > 150 and name not in references} == {}


def test_every_page_is_on_the_map() -> None:
    assert {page.name for page in PAGES} - {"architecture.md"} <= set(_LINK.findall(ARCHITECTURE))


def test_the_map_has_every_room_and_the_floors_are_in_order() -> None:
    rooms = [room for floor in FLOORS["graftwork_server"] for room in floor]
    server = ROOT / "server/graftwork_server"
    names = {room + "/" if (server / room).is_dir() else room + ".py" for room in rooms}
    assert names <= set(NAMED.findall(section(ARCHITECTURE, "The map")))
    floors = [floor[0] for floor in FLOORS["graftwork_server"][1:-1]]  # between the ground and the top
    told = re.findall(r"`(\w+)`", section(ARCHITECTURE, "Floors").partition(", the top.")[0])
    assert told == floors


@pytest.mark.parametrize("life", ["A request's life", "A tuning job's life"])
def test_lives_have_eight_steps_with_files(life: str) -> None:
    steps = re.split(r"^\d\. ", section(ARCHITECTURE, life), flags=re.MULTILINE)[1:]
    assert len(steps) == 8
    assert all(NAMED.findall(step) for step in steps)


def test_to_change_x_open_y() -> None:
    rows = [row for row in section(CONTRIBUTING, "To change X, open Y").splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 20
    assert not [row for row in rows if not NAMED.findall(row)]


def test_every_state_of_an_adapter_is_drawn() -> None:
    record = (ROOT / "server/graftwork_server/engine/adapters/record.py").read_text()  # which imports torch
    states = re.findall(r'^    [A-Z]+ = "([a-z ]+)"$', record, re.MULTILINE)
    drawn = section((ROOT / "docs/adapters.md").read_text(), "States").split("```")[1]
    assert len(states) > 5
    assert not [state for state in states if state not in drawn]


def test_every_message_is_listed() -> None:
    messages = {kind.__name__ for union in (FrontMessage, EngineMessage, TunerEvent) for kind in get_args(union)}
    listed = set(re.findall(r"`(\w+)`", (ROOT / "docs/processes.md").read_text()))
    assert messages | {StartTuning.__name__} <= listed
