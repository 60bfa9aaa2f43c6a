"""The server's settings: one schema, filled from flags, then environment, then a TOML file, then defaults.

    flag --kv-memory-bytes  >  environment GRAFTWORK_KV_MEMORY_BYTES  >  file: kv_memory_bytes  >  default

The file is named by --config or GRAFTWORK_CONFIG. What is not a setting is refused, in each of the three places.
"""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

ENVIRONMENT_PREFIX = "GRAFTWORK_"
OTHER_ENVIRONMENT = frozenset({"GRAFTWORK_ADDRESS", "GRAFTWORK_CONFIG", "GRAFTWORK_FAILPOINT"})
"""GRAFTWORK_ variables that are no settings here: the client's address, the settings file, a test's failpoint."""

Bytes = Annotated[int, Field(ge=0, le=1 << 50)]


class ConfigError(Exception):
    """Settings that cannot be used; the text is one line and says where the setting came from."""


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
    """Bytes of the KV cache. Default: 0, chosen by the engine."""
    prefix_cache: bool = True
    """Keep what was computed of prompts and answers for requests that begin alike. Default: true."""
    max_step_tokens: int = Field(1024, ge=16, le=1 << 20)
    """Tokens, of prompts and of decoding sequences, that one engine step takes at most. Default: 1024."""
    adapter_memory_bytes: Bytes = 0
    """Bytes of the device pool for loaded adapters. Default: 0, chosen by the engine."""
    host_cache_bytes: Bytes = 0
    """Bytes of host memory for adapters that were evicted from the device. Default: 0, chosen by the engine."""
    max_upload_bytes: Bytes = Field(4 << 30, ge=1)
    """Bytes that one adapter upload may have. Default: 4294967296 (4 GiB)."""
    max_dataset_bytes: Bytes = Field(1 << 30, ge=1)
    """Bytes that one data set may have. Default: 1073741824 (1 GiB)."""
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
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"{listen!r} has no port from 0 to 65535 after the last colon")
    return (host[1:-1] if bracketed else host), int(port)


def load_config(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> LoadedConfig:
    """Settings from flags, environment and file.

    Raises ConfigError for what cannot be used, and SystemExit as argparse does, on --help and unknown flags.
    """
    flags = vars(_parser().parse_args(argv))
    print_only = flags.pop("print_config")
    file = flags.pop("config") or environ.get("GRAFTWORK_CONFIG") or None

    values: dict[str, Any] = {}
    sources = dict.fromkeys(ServerConfig.model_fields, "default")
    layers = (_from_file(file) if file else {}, _from_environment(environ), _from_flags(flags))
    for layer in layers:
        for name, (value, source) in layer.items():
            values[name], sources[name] = value, source
    try:
        config = ServerConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_line(error, sources)) from None
    return LoadedConfig(config=config, sources=sources, print_only=print_only)


def _flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graftwork serve",
        description="Serve one base model and its adapters over gRPC.",
        epilog="Every setting can also come from GRAFTWORK_<SETTING> or from a TOML file; flags win, then environment.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (also GRAFTWORK_CONFIG)")
    parser.add_argument("--print-config", action="store_true", help="print the effective settings and end")
    for name, field in ServerConfig.model_fields.items():
        text = (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(_flag_name(name), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
            metavar = "|".join(choices) if choices else name.rsplit("_", 1)[-1].upper()
            parser.add_argument(_flag_name(name), metavar=metavar, default=None, help=text)
    return parser


Layer = dict[str, tuple[Any, str]]


def _from_flags(flags: Mapping[str, Any]) -> Layer:
    return {name: (value, f"flag {_flag_name(name)}") for name, value in flags.items() if value is not None}


def _from_environment(environ: Mapping[str, str]) -> Layer:
    layer: Layer = {}
    for variable, value in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in OTHER_ENVIRONMENT:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name not in ServerConfig.model_fields or variable != variable.upper():
            raise ConfigError(f"environment {variable}: there is no such setting; graftwork serve --help lists all")
        layer[name] = (value, f"environment {variable}")
    return layer


def _from_file(file: str) -> Layer:
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file {file}: not TOML: {error}") from None
    unknown = sorted(set(table) - set(ServerConfig.model_fields))
    if unknown:
        raise ConfigError(f"file {file}: there is no setting {unknown[0]!r}; graftwork serve --help lists all")
    return {name: (value, f"file {file}") for name, value in table.items()}


def _first_line(error: ValidationError, sources: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    reason = first["msg"].removeprefix("Value error, ")
    return f"{sources.get(name, 'settings')}: {name}: {reason} (got {first['input']!r})"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # A JSON string without non-ASCII escapes is a TOML basic string, except for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
