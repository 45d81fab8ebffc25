"""Compiled kernels on disk, in a folder named after everything they were made from.

Numba's own ``cache=True`` looks only at the file that holds a function and keeps stale code when a function it calls
changes in another file. Here the folder's name is a hash of all kernel sources and of the versions of Python, Numba
and this package, so a stale kernel cannot be found. A damaged file counts as absent (each carries a digest, for machine
code is run as it is read), a folder that cannot be written only costs the compilation again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import pickle
import sys
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator

from npmamba import cache

log = logging.getLogger("npmamba")
SOURCES = ("scalar.py", "cpu/*.py")


@functools.cache
def folder() -> pathlib.Path:
    """Return the folder for the kernels as they are now."""
    package = pathlib.Path(__file__).resolve().parent.parent
    sources = (source for pattern in SOURCES for source in package.glob(pattern))
    return cache.folder("cpu", numba.__version__, sources)


class _Locator(_CacheLocator):
    def get_cache_path(self) -> str:
        return str(folder())

    def ensure_cache_path(self) -> None:
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)

    def get_source_stamp(self) -> str:
        return folder().name

    def get_disambiguator(self) -> str:
        return "kernel"

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator:
        return cls()


class _Implementation(CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _Files(IndexDataCacheFile):
    """Numba's index and data files of one kernel; each data file begins with the digest of the rest."""

    def _save_data(self, name: str, data: Any) -> None:
        with self._open_for_write(self._data_path(name)) as file:
            file.write(cache.sealed(self._dump(data)))

    def _load_data(self, name: str) -> Any:
        return pickle.loads(cache.opened(pathlib.Path(self._data_path(name)).read_bytes()))


class KernelCache(FunctionCache):
    """Numba's function cache in our folder; it never raises, and says once when kernels must be compiled."""

    _impl_class = _Implementation
    _said = False

    def __init__(self, py_func: Any, name: str) -> None:
        super().__init__(py_func)
        self._name = name
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        version = f"py{sys.version_info[0]}{sys.version_info[1]}"
        self._cache_file = _Files(str(folder()), f"{stem}.{version}", folder().name)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """The folder stands for all sources, the file for the kernel's name; left are types, processor and checks."""
        return sig, codegen.magic_tuple(), bool(numba.config.BOUNDSCHECK)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled overload for `sig`, or None if it is absent or damaged."""
        try:
            if folder().is_dir() and cache.is_private(folder()):
                found = super().load_overload(sig, target_context)
                if found is not None:
                    return found
        except Exception as error:  # a torn pickle raises nearly anything; each means: compile again
            log.warning("cached kernel %s is damaged and will be compiled again (%s)", self._name, error)
            with contextlib.suppress(OSError):
                self.flush()
        if not KernelCache._said:
            KernelCache._said = True
            log.info("compiling kernels (once); they are kept in %s", folder())
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled overload, if the folder can be written."""
        try:
            self._impl.locator.ensure_cache_path()
            if cache.is_private(folder()):
                super().save_overload(sig, data)
        except Exception as error:  # no space, no permission, or a damaged index that cannot be replaced
            log.info("compiled kernels cannot be kept (%s)", error)
