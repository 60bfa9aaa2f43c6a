"""Compiles kernels.c for this machine, once: the library is kept under the user's cache folder.

Needs a C compiler (`cc`, or what CC names) with OpenMP. Without one the engine computes everything through torch, which
gives the same answers more slowly. GRAFTWORK_KERNELS_MARCH names another processor than this machine's, as -march takes
it: the tests run as on older ones with it, and it helps where a virtual machine says more than it can.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

log = logging.getLogger("graftwork.engine")

KV_BLOCK_TOKENS = 16
"""Tokens in a block of the KV cache. The kernels are compiled for it."""
_SOURCES = ("kernels.c", "typed.h", "tiles.h", "product.h", "low_rank.h", "layer.h", "int8.h", "nf4.h")
_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fPIC",
    "-shared",
    "-fopenmp",
    # Sums may be reordered, which vectorises them. Not -ffast-math: NaN must stay NaN, and denormals what they are.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    f"-DBLOCK={KV_BLOCK_TOKENS}",
)
_COMPILE_SECONDS = 120


def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None, with a line in the log that says why, where they cannot be had."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        log.warning("no C compiler is installed, so the CPU kernels are torch's own, which are slower")
        return None
    try:
        folder = _folder()
        path = folder / f"kernels-{_key(compiler)}.so"
        if not path.is_file():
            log.info("starting: compiling the CPU kernels for this machine; later starts find them in %s", folder)
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        log.warning("the CPU kernels cannot be compiled, so torch's own are used: %s", " ".join(words.split())[:300])
        return None


def _folder() -> Path:
    """A folder that only this user can write to: what lies there is run."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(home) / "graftwork"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others")
    return folder


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, f"-march={os.environ.get('GRAFTWORK_KERNELS_MARCH') or 'native'}")


def _key(compiler: str) -> str:
    """Of all that decides the library: source, flags, compiler, and the processor, since a home may serve several."""
    digest = hashlib.sha256(repr(_flags()).encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20)
    digest.update(version.stdout + platform.machine().encode())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        digest.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    except OSError:
        digest.update(platform.processor().encode())
    return digest.hexdigest()[:24]


def _compile(compiler: str, target: Path) -> None:
    source = Path(__file__).parent / _SOURCES[0]
    for left in target.parent.glob("tmp*"):  # by an engine that was killed in the middle
        if time.time() - left.stat().st_mtime > 2 * _COMPILE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *_flags(), "-o", str(made), str(source), "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS)
        # Another engine may have made the same one meanwhile; either is right.
        made.replace(target)
