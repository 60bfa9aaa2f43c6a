"""The server's settings: one schema, filled from flags, then environment, then a TOML file, then defaults.

    flag --kv-memory-bytes  >  environment GRAFTWORK_KV_MEMORY_BYTES  >  file: kv_memory_bytes  >  default

The file is named by --config or GRAFTWORK_CONFIG. What is not a setting is refused, in each of the three places.
Everything that is wrong is said at once, one line for each setting.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

DEMO_MODEL = Path(__file__).parent / "demo_model"
"""The small model on board."""
ENVIRONMENT_PREFIX = "GRAFTWORK_"
OTHER_ENVIRONMENT = frozenset(
    {"GRAFTWORK_ADDRESS", "GRAFTWORK_CONFIG", "GRAFTWORK_FAILPOINT", "GRAFTWORK_KERNELS_MARCH"}
)
"""GRAFTWORK_ variables that are no settings here: the client's address, the settings file, a test's failpoint, what the
CPU kernels are compiled for."""

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)")


def parse_size(value: Any) -> Any:
    """Bytes of a size such as "2GiB", "1.5 GB" or "4096"; what is no text stays as it is. Raises ValueError."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    unit = found and {name.lower(): size for name, size in _UNITS.items()}.get(found[2].lower())
    if found is None or unit is None:
        raise ValueError("a number of bytes is accepted, or a size such as 512MiB, 2GiB or 1.5GB")
    return round(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


Bytes = Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=1 << 50)]


class ConfigError(Exception):
    """Settings that cannot be used. Each of `problems` is one line and says where the setting came from."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def default_data_dir() -> str:
    """$XDG_DATA_HOME/graftwork, or ~/.local/share/graftwork."""
    root = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(root) / "graftwork")


class ServerConfig(BaseModel):
    """Settings of one server."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    model: str | None = None
    """Base model: a directory or a Hugging Face id. Default: the small model on board."""
    data_dir: str = Field(default_factory=default_data_dir)
    """Folder of adapters, data sets, jobs and caches. Default: $XDG_DATA_HOME/graftwork or ~/.local/share/graftwork."""
    listen: str = "127.0.0.1:8470"
    """Address to serve on, HOST:PORT. Port 0 takes a free one. Default: 127.0.0.1:8470."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the base model lives; auto takes a GPU if there is one. Default: auto."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the base weights; auto: bfloat16 where the hardware has it, else float32. Default: auto."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Bits of the base's linear layers: nf4 (4) and int8 (8) take less memory than the data type. Default: none."""
    insecure: bool = False
    """Allow a listen address that other machines can reach; there are no keys and no TLS yet. Default: false."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads of the engine. Default: 0, all cores."""
    native_kernels: Literal["auto", "off"] = "auto"
    """Kernels of the engine's own, in C for CPUs, in Triton for GPUs; off: torch's only. Default: auto."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """On a GPU, decode steps are captured as CUDA graphs and replayed; off: never. Default: auto."""
    max_sequences: int = Field(64, ge=1, le=4096)
    """Sequences that are decoded together. Default: 64."""
    max_queue: int = Field(1024, ge=1, le=100_000)
    """Sequences that wait or run at once, each of n and best_of counted; one more is answered RESOURCE_EXHAUSTED.
    Default: 1024."""
    kv_memory_bytes: Bytes = 0
    """Size of the KV cache, such as 2GiB. Default: 0, chosen by the engine."""
    prefix_cache: bool = True
    """Keep what was computed of prompts and answers for requests that begin alike. Default: true."""
    max_step_tokens: int = Field(1024, ge=16, le=1 << 20)
    """Tokens, of prompts and of decoding sequences, that one engine step takes at most. Default: 1024."""
    adapter_memory_bytes: Bytes = 0
    """Size of the device pool for loaded adapters. Default: 0, chosen by the engine."""
    host_cache_bytes: Bytes = 0
    """Host memory for adapters that were evicted from the device. Default: 0, chosen by the engine."""
    max_upload_bytes: Bytes = Field(4 << 30, ge=1)
    """Size that one adapter upload may have. Default: 4294967296 (4GiB)."""
    max_dataset_bytes: Bytes = Field(1 << 30, ge=1)
    """Size that one data set may have. Default: 1073741824 (1GiB)."""
    max_uploads: int = Field(256, ge=1, le=100_000)
    """Uploads of adapters and data sets that may be open at once. Default: 256."""
    max_uploads_per_client: int = Field(64, ge=1, le=100_000)
    """Uploads that clients of one host may have open at once. Default: 64."""
    upload_idle_seconds: float = Field(60.0, gt=0, le=86_400)
    """Seconds after which an upload that sends nothing is ended. Default: 60."""
    max_concurrent_jobs: int = Field(1, ge=1, le=64)
    """Tuning jobs that run at once; others wait. Default: 1."""
    tuning_yield_ms: int = Field(100, ge=0, le=60_000)
    """Longest wait, in milliseconds, of a tuning job between micro-batches while requests run. Default: 100."""
    messages_per_second: int = Field(0, ge=0, le=1_000_000)
    """Messages in a second that all streams together may get of generated tokens, beside the first and the last one of
    each; a message takes all tokens since the one before. Default: 0, 250 for each CPU core and at most 5000."""
    drain_seconds: float = Field(10.0, ge=0, le=3600)
    """Seconds that running requests get to finish when the server is told to end. Default: 10."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity of the log lines on stderr. Default: info."""
    log_format: Literal["text", "json"] = "text"
    """Form of the log lines. Default: text."""

    @property
    def base_name(self) -> str:
        """What people call the base model: its directory's or repository's last part."""
        return "on-board" if self.model is None else Path(self.model).name or self.model

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError("a number is accepted, not true or false")
        if type(value) in (int, float) and annotation is bool:
            raise ValueError("true or false is accepted, not a number")
        return value

    @field_validator("listen")
    @classmethod
    def _listen_is_an_address(cls, value: str) -> str:
        parse_listen(value)
        return value

    @field_validator("model", "data_dir")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must not be empty")
        return value

    @field_validator("data_dir")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        return str(Path(value).expanduser())


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


def parse_listen(listen: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[V6]:PORT`. Raises ValueError if it is neither."""
    host, colon, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        raise ValueError(f"{listen!r} is no HOST:PORT; an IPv6 address goes in brackets, such as [::1]:8470")
    if not _is_port(port):
        raise ValueError(f"{listen!r} has no port from 0 to 65535 after the last colon")
    return (host[1:-1] if bracketed else host), int(port)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535


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
        elif not _is_port(port):
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
