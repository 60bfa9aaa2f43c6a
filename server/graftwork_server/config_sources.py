"""Where the server's settings come from: flags, then environment, then a TOML file, then defaults.

    flag --kv-memory-bytes  >  environment GRAFTWORK_KV_MEMORY_BYTES  >  file: kv_memory_bytes  >  default

The file is named by --config or GRAFTWORK_CONFIG. What is not a setting is refused, in each of the three places.
Everything that is wrong is said at once, one line for each setting. The settings themselves stand in config.py.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from graftwork_server.config import ServerConfig, is_port

ENVIRONMENT_PREFIX = "GRAFTWORK_"
OTHER_ENVIRONMENT = frozenset(
    {"GRAFTWORK_ADDRESS", "GRAFTWORK_CONFIG", "GRAFTWORK_FAILPOINT", "GRAFTWORK_KERNELS_MARCH"}
)
"""GRAFTWORK_ variables that are no settings here: the client's address, the settings file, a test's failpoint, what the
CPU kernels are compiled for."""


class ConfigError(Exception):
    """Settings that cannot be used. Each of `problems` is one line and says where the setting came from."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class LoadedConfig(BaseModel):
    """Effective settings, where each came from, and whether they are only to be printed."""

    model_config = ConfigDict(frozen=True)

    config: ServerConfig
    sources: dict[str, str]
    """Per field: "flag --x", "environment GRAFTWORK_X", "file NAME" or "default"."""
    print_only: bool

    def to_toml(self) -> str:
        """The settings as TOML, each with its source as a comment; unset ones are comments altogether."""
        lines = []
        for name, value in self.config.model_dump().items():
            entry = f"# {name} is not set" if value is None else f"{name} = {_toml_value(value)}"
            lines.append(f"{entry}  # {self.sources[name]}")
        return "\n".join(lines) + "\n"


def load_config(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> LoadedConfig:
    """Settings from flags, environment and file.

    Raises ConfigError with all that cannot be used, and SystemExit as argparse does, on --help.
    """
    known, unknown = _parser().parse_known_args(argv)
    flags = vars(known)
    print_only, port = flags.pop("print_config"), flags.pop("port")
    file = flags.pop("config") or environ.get("GRAFTWORK_CONFIG") or None

    problems = [_no_such("flag", argument.partition("=")[0], _flags()) for argument in _flags_of(unknown)]
    values: dict[str, Any] = {}
    sources = dict.fromkeys(ServerConfig.model_fields, "default")
    layers = (
        _from_file(file, problems) if file else {},
        _from_environment(environ, problems),
        _from_flags(flags),
    )
    for layer in layers:
        for name, (value, source) in layer.items():
            values[name], sources[name] = value, source
    if port is not None:
        if flags["listen"] is not None:
            problems.append("flag --port: --listen names a port already; give one of the two")
        elif not is_port(port):
            problems.append(f"flag --port: a port from 0 to 65535 is accepted (got {port!r})")
            port = "0"
        host = str(values.get("listen", ServerConfig.model_fields["listen"].default)).rpartition(":")[0]
        values["listen"], sources["listen"] = f"{host}:{port}", "flag --port"
    try:
        config = ServerConfig.model_validate(values)
    except ValidationError as error:
        problems += [_problem(one, sources) for one in error.errors(include_url=False)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return LoadedConfig(config=config, sources=sources, print_only=print_only)


def _flags_of(arguments: Sequence[str]) -> list[str]:
    """Of what no flag took, the flags, or else all: the value of an unknown flag is nothing to speak of."""
    return [argument for argument in arguments if argument.startswith("-")] or list(arguments)


def _flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def _flags() -> list[str]:
    return ["--config", "--print-config", "--port", *map(_flag_name, ServerConfig.model_fields)]


def _no_such(kind: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.8)
    hint = f"did you mean {near[0]}?" if near else "graftwork serve --help lists all"
    return f"{kind} {name}: there is no such setting; {hint}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other wrong setting, without a page of usage before it."""
        raise ConfigError([message.replace("argument ", "flag ", 1)])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="graftwork serve",
        usage="graftwork serve [--model DIR|ID] [--port N] [--data-dir DIR] [SETTING ...]",
        description="Serve one base model and its adapters over gRPC.",
        epilog="Every setting can also come from GRAFTWORK_<SETTING> or from a TOML file; flags win, then environment.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (also GRAFTWORK_CONFIG)")
    parser.add_argument("--print-config", action="store_true", help="print the effective settings and end")
    parser.add_argument("--port", metavar="N", help="port to serve on; as --listen with the host left as it is")
    for name, field in ServerConfig.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(_flag_name(name), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
            last = "N" if field.annotation in (int, float) else name.rsplit("_", 1)[-1].upper()
            metavar = "|".join(choices) if choices else "SIZE" if name.endswith("_bytes") else last
            parser.add_argument(_flag_name(name), metavar=metavar, default=None, help=text)
    return parser


Layer = dict[str, tuple[Any, str]]


def _from_flags(flags: Mapping[str, Any]) -> Layer:
    return {name: (value, f"flag {_flag_name(name)}") for name, value in flags.items() if value is not None}


def _from_environment(environ: Mapping[str, str], problems: list[str]) -> Layer:
    layer: Layer = {}
    for variable, value in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in OTHER_ENVIRONMENT:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name not in ServerConfig.model_fields or variable != variable.upper():
            known = [ENVIRONMENT_PREFIX + field.upper() for field in ServerConfig.model_fields]
            problems.append(_no_such("environment", variable, known))
        else:
            layer[name] = (value, f"environment {variable}")
    return layer


def _from_file(file: str, problems: list[str]) -> Layer:
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"file {file}: {error.strerror}")
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"file {file}: not TOML: {error}")
        return {}
    unknown = sorted(set(table) - set(ServerConfig.model_fields))
    problems += [_no_such(f"file {file}:", name, list(ServerConfig.model_fields)) for name in unknown]
    return {name: (value, f"file {file}") for name, value in table.items() if name not in unknown}


def _problem(error: Any, sources: Mapping[str, str]) -> str:
    """One wrong setting: where it came from, what is accepted, what it was. A flag and a variable name it already."""
    name = str(error["loc"][0]) if error["loc"] else ""
    source = sources.get(name, "settings")
    where = f"{source}: {name}" if source.startswith("file ") else source
    return f"{where}: {_accepted(error)} (got {error['input']!r})"


def _accepted(error: Any) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "int_parsing" | "int_type" | "int_from_float":
            return "a whole number is accepted"
        case "float_parsing" | "float_type" | "finite_number":
            return "a number is accepted"
        case "bool_parsing" | "bool_type":
            return "true or false is accepted"
        case "string_type":
            return "text is accepted"
        case "greater_than_equal":
            return f"at least {context['ge']} is accepted"
        case "less_than_equal":
            return f"at most {context['le']} is accepted"
        case "literal_error":
            return f"{context['expected']} is accepted"
        case _:
            return str(error["msg"])


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # A JSON string without non-ASCII escapes is a TOML basic string, except for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
