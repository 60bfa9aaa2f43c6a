"""The server's settings: what each one is, what it may be, and its default.

Where they come from is config_sources.py's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

DEMO_MODEL = Path(__file__).parent / "demo_model"
"""The small model on board."""

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


def parse_listen(listen: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[V6]:PORT`. Raises ValueError if it is neither."""
    host, colon, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        raise ValueError(f"{listen!r} is no HOST:PORT; an IPv6 address goes in brackets, such as [::1]:8470")
    if not is_port(port):
        raise ValueError(f"{listen!r} has no port from 0 to 65535 after the last colon")
    return (host[1:-1] if bracketed else host), int(port)


def is_port(text: str) -> bool:
    """Whether `text` is a number from 0 to 65535."""
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535
