"""What works on this machine, and why the rest does not: the findings behind ``npmamba doctor``.

Each finding names one piece, says whether it is there, and if not, the command that installs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GOOD, MISSING, BAD = "ok", "missing", "broken"


class Finding(NamedTuple):
    """One piece: its group, its name, GOOD, MISSING or BAD, what was seen, and how to mend it."""

    group: str
    name: str
    state: str
    detail: str
    remedy: str = ""


def findings() -> list[Finding]:
    """Look at everything; a probe that raises becomes a finding of its own."""
    out = []
    for group, probe in _PROBES:
        try:
            out += [Finding(group, *row) for row in probe()]
        except Exception as error:  # a broken piece must not hide the others
            out.append(Finding(group, probe.__name__.strip("_"), BAD, f"{type(error).__name__}: {error}"))
    return out


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, remedy: str) -> tuple[str, ...]:
    version = _version(name)
    return (name, GOOD, version) if version else (name, MISSING, "not installed", remedy)


def _python() -> list[tuple[str, ...]]:
    from npmamba import __version__

    where = f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform()})"
    core = [
        _package(name, f"pip install {name}")
        for name in ("numpy", "numba", "scipy", "safetensors", "ml_dtypes")
    ]
    return [("npmamba", GOOD, f"{__version__}, {Path(__file__).parent}"), ("python", GOOD, where), *core]


def blas() -> str:
    """Name NumPy's matrix library and, where it tells, its number of threads."""
    import numpy as np

    with contextlib.redirect_stdout(None):
        build: Any = np.show_config(mode="dicts")
    library = build["Build Dependencies"]["blas"]
    threads = _openblas_threads()
    return f"{library['name']} {library['version']}" + (f", {threads} threads" if threads else "")


def _openblas_threads() -> int | None:
    """Ask the OpenBLAS that NumPy carries; None where there is none."""
    import numpy as np

    folder = Path(np.__file__).parent.parent / "numpy.libs"
    for path in folder.glob("*openblas*"):
        library = ctypes.CDLL(str(path))
        for name in (
            "scipy_openblas_get_num_threads64_",
            "openblas_get_num_threads64_",
            "openblas_get_num_threads",
        ):
            if hasattr(library, name):
                return int(getattr(library, name)())
    return None


def processor() -> str:
    """Name the processor and count the cores that this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {cores()} cores"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> list[tuple[str, ...]]:
    from npmamba.cpu import cache, runtime, simd

    vector = f"{simd.BYTES * 8}-bit vectors ({simd.BYTES // 4} float32 at once)"
    return [
        ("processor", GOOD, processor()),
        ("vectors", GOOD, vector),
        ("kernel threads", GOOD, str(runtime.num_threads())),
        ("BLAS", GOOD, blas()),
        ("kernel cache", *_cache_state(cache.folder())),
    ]


def _cache_state(folder: Path) -> tuple[str, ...]:
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        return BAD, f"{folder} cannot be written", "set NPMAMBA_CACHE_DIR to a folder of yours"
    if folder.exists() and os.name != "nt" and folder.stat().st_mode & 0o022:
        return BAD, f"{folder} can be written by others and is not used", f"chmod go-w {folder}"
    kept = [path.stat().st_size for path in folder.glob("*")] if folder.is_dir() else []
    size = f"{len(kept)} files, {sum(kept) / 2**20:.1f} MiB" if kept else "empty, kernels are compiled at first use"
    return GOOD, f"{folder} ({size})"


def _extras() -> list[tuple[str, ...]]:
    app, fuzz = "pip install 'npmamba[app]'", "pip install 'npmamba[fuzz]'"
    pairs = [("rich", app), ("matplotlib", app), ("hypothesis", fuzz), ("greenlet", fuzz), ("mpmath", fuzz)]
    return [_package(name, remedy) for name, remedy in [*pairs, ("tokenizers", "pip install tokenizers")]]


def _cuda() -> list[tuple[str, ...]]:
    from npmamba.cuda import cache
    from npmamba.cuda import requirements as r

    out = [_piece("driver", r.driver), _piece("CuPy", r.cupy_package)]
    if all(state == GOOD for _, state, *_ in out):
        out.append(_piece("device", r.device))
    out.append(_piece("numba-cuda", r.numba_cuda))
    if out[-1][1] == GOOD:  # these come with it
        out += [_piece("NVVM", r.nvvm), _piece("NVRTC", r.nvrtc), _piece("nvJitLink", r.nvjitlink)]
    return [*out, ("kernel cache", *_cache_state(cache.folder()))]


def _piece(name: str, look: Callable[[], str]) -> tuple[str, ...]:
    """Return what was found of a piece that CUDA kernels need."""
    from npmamba.cuda.requirements import CudaUnavailableError

    try:
        return name, GOOD, look()
    except CudaUnavailableError as error:
        return name, MISSING if error.missing else BAD, error.problem, error.remedy


def _self_test() -> list[tuple[str, ...]]:
    return [_scan_row("selective scan", scan_error())]


def _cuda_self_test() -> list[tuple[str, ...]]:
    from npmamba.cuda import requirements

    if not any(name == "device" and state == GOOD for name, state, *_ in _cuda()):
        return []
    for piece in requirements.COMPILER:
        row = _piece("the same on CUDA", piece)
        if row[1] != GOOD:
            return [row]
    return [_scan_row("the same on CUDA", scan_error("cupy"))]


def _scan_row(name: str, error: float) -> tuple[str, ...]:
    state = GOOD if error < 1e-5 else BAD
    return name, state, f"float32 kernel against the float64 reference: {error:.1e} of the maximum"


def scan_error(library: str = "numpy") -> float:
    """Return max |kernel - reference| / max |reference| of one small random scan of NumPy or CuPy arrays."""
    import numpy as np

    from npmamba.backend import on_host
    from npmamba.ops.selective_scan import selective_scan
    from npmamba.reference import selective_scan as reference

    rng, x = np.random.default_rng(0), {}
    x["u"], x["delta"], x["z"] = rng.normal(size=(3, 2, 24, 50))
    x["B"], x["C"] = rng.normal(size=(2, 2, 16, 50))
    x["A"] = -rng.uniform(0.5, 16, size=(24, 16))
    x["D"], x["delta_bias"] = rng.normal(size=(2, 24))
    xp = importlib.import_module(library)
    single: dict[str, Any] = {name: xp.asarray(value.astype(np.float32)) for name, value in x.items()}
    y = on_host(selective_scan(**single, delta_softplus=True))
    expected = reference.forward(**x, delta_softplus=True)[0]
    return float(np.abs(y - expected).max() / np.abs(expected).max())


def declare_kernels() -> None:
    """Import every module of CPU kernels, so that `npmamba.cpu.runtime.KERNELS` lists them all."""
    from npmamba import cpu

    for module in pkgutil.iter_modules(cpu.__path__):
        importlib.import_module(f"npmamba.cpu.{module.name}")


_PROBES: list[tuple[str, Callable[[], list[tuple[str, ...]]]]] = [
    ("core", _python),
    ("cpu", _cpu),
    ("extras", _extras),
    ("cuda", _cuda),
    ("self test", _self_test),
    ("self test", _cuda_self_test),
]


def machine() -> dict[str, str]:
    """Return the few lines that tell one machine from another, for reports."""
    from npmamba import __version__

    return {
        "npmamba": __version__,
        "python": platform.python_version(),
        **{name: _version(name) or "-" for name in ("numpy", "numba")},
        "processor": processor(),
        "BLAS": blas(),
        "system": platform.platform(),
    }
