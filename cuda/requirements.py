"""What CUDA kernels need beside this package: each piece is found, or named with the command that installs it.

Every function returns what it found, as text, or raises `CudaUnavailableError`. `npmamba doctor` shows them all;
`require_device` and `require_compiler` ask before anything is launched or compiled.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from typing import Any

OLDEST_ARCHITECTURE = (8, 0)
"""Compute capability of the first devices with asynchronous copies and bfloat16 (Ampere, 2020)."""
_CUPY = {"cupy-cuda13x": "cuda13", "cupy-cuda12x": "cuda12"}


class CudaUnavailableError(RuntimeError):
    """CUDA kernels cannot run here.

    The message is one sentence: what is missing or wrong, and the command that mends it.

    Attributes
    ----------
    problem, remedy : str
        The sentence's two halves.
    missing : bool
        Whether something is only not there, rather than broken or of the wrong version.
    """

    def __init__(self, problem: str, remedy: str, *, missing: bool = False) -> None:
        super().__init__(f"CUDA kernels cannot run: {problem}; to mend it: {remedy}")
        self.problem, self.remedy, self.missing = problem, remedy, missing


def version(package: str) -> str | None:
    """Return the version of an installed package, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release() -> tuple[int, int] | None:
    """Return the CUDA release that the driver supports, None without a driver; needs no CUDA package."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def extra() -> str:
    """Return the extra of this package that fits the driver, or else the CuPy that is installed."""
    found = release()
    if found is not None:
        return "cuda13" if found >= (13, 0) else "cuda12"
    return next((name for package, name in _CUPY.items() if version(package)), "cuda13")


def _install() -> str:
    return f"pip install 'npmamba[{extra()}]'"


# --- to run kernels ---


def driver() -> str:
    """Look for NVIDIA's driver."""
    found = release()
    if found is None:
        remedy = "install NVIDIA's driver, https://www.nvidia.com/drivers"
        raise CudaUnavailableError("there is no NVIDIA driver (libcuda) on this machine", remedy, missing=True)
    if found < (12, 0):
        problem = f"the NVIDIA driver supports CUDA {found[0]}.{found[1]}, and CUDA 12 is the oldest that will do"
        raise CudaUnavailableError(problem, "install a newer driver, https://www.nvidia.com/drivers")
    return f"CUDA {found[0]}.{found[1]}"


def cupy_package() -> str:
    """Look for CuPy, built for a CUDA that the driver supports."""
    name = next((name for name in (*_CUPY, "cupy") if version(name)), None)
    if name is None:
        raise CudaUnavailableError("CuPy is not installed", _install(), missing=True)
    found = release()
    if found is not None and name in _CUPY and found[0] < int(_CUPY[name][4:]):
        problem = f"{name} needs a driver for CUDA {_CUPY[name][4:]}, and this one supports CUDA {found[0]}.{found[1]}"
        raise CudaUnavailableError(problem, f"pip uninstall -y {name} && {_install()}")
    return f"{name} {version(name)}"


def device() -> str:
    """Look for a device that CuPy can use and that is new enough."""
    cupy = _import("cupy")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    except RuntimeError as error:  # what CuPy's own errors derive from
        remedy = "see what nvidia-smi lists, and whether CUDA_VISIBLE_DEVICES hides it"
        raise CudaUnavailableError(f"CuPy can use no CUDA device ({error})", remedy) from None
    name, capability = properties["name"].decode(), (properties["major"], properties["minor"])
    if capability < OLDEST_ARCHITECTURE:
        problem = f"{name} has compute capability {capability[0]}.{capability[1]}"
        raise CudaUnavailableError(problem, "use a device of 8.0 or later, on which the kernels can run")
    more = f", the first of {count}" if count > 1 else ""
    return f"{name}, {properties['totalGlobalMem'] / 2**30:.0f} GiB, sm_{capability[0]}{capability[1]}{more}"


# --- to compile kernels that are not kept yet ---


def numba_cuda() -> str:
    """Look for the numba-cuda these kernels are written for, and a NumPy that it can use."""
    found = version("numba-cuda")
    if found is None:
        raise CudaUnavailableError("numba-cuda is not installed", _install(), missing=True)
    if not found.startswith("0.30."):
        problem = f"the kernels are written for numba-cuda 0.30, and {found} is installed"
        raise CudaUnavailableError(problem, _install())
    numpy = importlib.import_module("numpy").__version__
    if _numbers(numpy) >= (2, 5):
        problem = f"numba-cuda 0.30 needs a NumPy older than 2.5, and {numpy} is installed"
        raise CudaUnavailableError(problem, "pip install 'numpy<2.5'")
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
        raise CudaUnavailableError("NUMBA_ENABLE_CUDASIM puts a simulator in the compiler's place", "unset it")
    _import("numba.cuda")
    return f"numba-cuda {found}"


def nvvm() -> str:
    """Look for the library that compiles to PTX."""
    path = _library("nvvm", "NVVM")
    return " ".join(filter(None, (version("nvidia-nvvm") or version("nvidia-cuda-nvcc-cu12"), path)))


def nvrtc() -> str:
    """Look for the library that knows the architectures; numba-cuda asks it."""
    path, known = _library("nvrtc", "NVRTC"), architectures()
    return f"sm_{known[0][0]}{known[0][1]} to sm_{known[-1][0]}{known[-1][1]} {path}"


def architectures() -> list[tuple[int, int]]:
    """Return the compute capabilities that can be compiled for, the oldest first."""
    status, known = _import("cuda.bindings.nvrtc").nvrtcGetSupportedArchs()
    if int(status):
        raise CudaUnavailableError(f"NVIDIA's NVRTC library lists no architectures ({status!r})", _install())
    return sorted((n // 10, n % 10) for n in known)


def nvjitlink() -> str:
    """Look for the library that makes machine code of PTX, of a CUDA that the driver supports."""
    path = _library("nvJitLink", "nvJitLink")
    made, found = _import("cuda.bindings.nvjitlink").version(), release()
    if found is not None and made[0] > found[0]:
        problem = f"nvJitLink is of CUDA {made[0]}.{made[1]}, and the driver supports CUDA {found[0]}.{found[1]}"
        raise CudaUnavailableError(problem, _install())
    writes = version("nvidia-nvvm") or version("nvidia-cuda-nvcc-cu12") or "0"
    if _numbers(writes) > tuple(made):
        problem = f"nvJitLink {made[0]}.{made[1]} does not read the PTX of NVVM {writes}"
        raise CudaUnavailableError(problem, f"{_install()} --upgrade --upgrade-strategy eager")
    return f"{made[0]}.{made[1]} {path}"


def _numbers(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def _library(name: str, shown: str) -> str:
    pathfinder = _import("cuda.pathfinder")
    try:
        return str(pathfinder.load_nvidia_dynamic_lib(name).abs_path)
    except (RuntimeError, OSError):  # not found, or found and not loadable
        raise CudaUnavailableError(f"NVIDIA's {shown} library is not installed", _install(), missing=True) from None


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CudaUnavailableError(f"{name} cannot be imported ({error})", _install()) from error


RUNTIME = (driver, cupy_package, device)
COMPILER = (numba_cuda, nvvm, nvrtc, nvjitlink)


def require_device() -> Any:
    """Return the module ``cupy``; CudaUnavailableError if kernels cannot run on its current device."""
    for piece in RUNTIME:
        piece()
    return _import("cupy")


def require_compiler(cc: tuple[int, int] | None = None) -> None:
    """Raise CudaUnavailableError if kernels cannot be compiled, or not for compute capability `cc`."""
    for piece in COMPILER:
        piece()
    if cc is not None and cc not in architectures():
        problem = f"this compiler does not know sm_{cc[0]}{cc[1]}, the architecture of the device"
        raise CudaUnavailableError(problem, f"{_install()} --upgrade --upgrade-strategy eager")
