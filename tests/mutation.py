"""Do our tests notice a wrong kernel? Change the sources in small ways, one at a time, and run the tests of that stem.

    python tests/mutation.py --mutants 650          # resumed where it stopped; --share 0/2 and 1/2 for two processes
    python tests/mutation.py --again                # those that survived once more, against the committed tests
    python tests/mutation.py --check                # the sources as they are: what kills these is no test of anything
    python tests/mutation.py --score                # write tests/mutation_score.json

The compiler is off (``NUMBA_DISABLE_JIT=1``), so a change takes effect without compiling anything; NumPy's warnings
kill nothing, for compiled kernels give none. Work is done in a clone. A first run of the unchanged sources finds which
tests pass, how long each takes and which lines it runs; a mutant then meets only tests that run its line, the quickest
and most telling first: a few seconds' worth of one file, and all others if it survives these. Every run is a fork of a
process that has loaded the libraries. The draw is a shuffle by the seed: more mutants are those and some more.

Why no library: mutmut leaves out decorated functions, which all kernels are; cosmic-ray starts the same command anew
for every mutant, whatever its file, and has no draw by a seed.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from mutators import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
SCORE, REASONS = ROOT / "tests/mutation_score.json", ROOT / "tests/mutation_reasons.json"
SOURCES = ["npmamba/scalar.py", "npmamba/cpu/*.py", "npmamba/reference/*.py", "npmamba/ops/*.py", "autodiff/*.py"]
TESTS = {  # the first pattern that fits; {} is the file's own name
    "npmamba/scalar.py": "scalar rms_norm cross_entropy optimizer_update dropout selective_state_update",
    "npmamba/cpu/scan_*.py": "selective_scan scan_loops",
    "npmamba/cpu/selective_scan.py": "selective_scan scan_loops",
    "npmamba/cpu/conv_tile.py": "causal_conv1d",
    "npmamba/cpu/schedule.py": "causal_conv1d selective_scan scan_loops",
    "npmamba/cpu/layout.py": "causal_conv1d selective_scan scan_loops",
    "npmamba/cpu/lines.py": "rms_norm cross_entropy",
    "npmamba/cpu/dropout.py": "dropout algebra",
    "npmamba/cpu/matmul.py": "matmul algebra",
    "npmamba/cpu/simd.py": "simd selective_scan",
    "npmamba/cpu/optimizer_update.py": "optimizer_update optim",
    "npmamba/reference/functions.py": "reference",
    "npmamba/reference/language_model.py": "reference lm",
    "npmamba/reference/*.py": "reference {}",
    "npmamba/ops/*.py": "{} badcalls",
    "autodiff/algebra.py": "algebra dropout matmul",
    "autodiff/leaves.py": "optim optimizer_update badcalls",
    "autodiff/optim.py": "optim badcalls",
    "autodiff/tree.py": "trees tape",
    "autodiff/tape.py": "tape trees algebra rarely",
    "*": "{}",
}
KERNELS = "selective_scan scan_row scan_tile schedule selective_state_update causal_conv1d conv_tile rms_norm lines"
HELD = {f"npmamba/cpu/{name}.py" for name in KERNELS.split()}
SLOWEST, FIRST, MOST = 5.0, 2.0, 10.0  # seconds: of a test, of the first few, and of all that a mutant meets
THINNED = {"test_selective_scan.py"}  # of a test of many variants, eight will do
LONG = ["threads", "million", "65535", "without_the_compiler", "largest_state"]
LIBRARIES = "numpy scipy.linalg scipy.signal scipy.integrate scipy.special numba numba.extending hypothesis.strategies"
LIBRARIES += " hypothesis.internal.conjecture.engine pytest mpmath ml_dtypes coverage safetensors.numpy"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def stem(path: str) -> list[str]:
    """Return the files whose tests a mutant of `path` must meet: those of its stem, and its own examples."""
    names = next(names for pattern, names in TESTS.items() if fnmatch.fnmatch(path, pattern))
    examples = f"npmamba/{path}" if path.startswith("autodiff/") else path
    return [*(f"tests/test_{name.format(Path(path).stem)}.py" for name in names.split()), examples]


def _too_slow(_: int, frame: Any) -> None:
    """End a test by an error, but not where locks are held, which would never be let go."""
    while frame:
        if any(name in frame.f_code.co_filename for name in ("threading.py", "queue.py", "/concurrent/", "/coverage/")):
            signal.setitimer(signal.ITIMER_PROF, 0.2)
            return
        frame = frame.f_back
    raise TimeoutError("this test is too slow to be of use here")


def _is_long(name: str) -> bool:
    """Tell whether a test says in its name that it is slow without the compiler, where threads take turns."""
    return any(word in name for word in LONG)


class Run:
    """A plugin of pytest: chooses and orders tests, gives each its time, and writes down what happened."""

    def __init__(self, chosen: dict[str, float] | None = None, coverage: Any = None) -> None:
        self.chosen, self.coverage = chosen, coverage
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_configure(self, config: Any) -> None:
        from hypothesis import Phase, settings

        # the profile of tests/conftest.py for slow kernels, with more examples; a failure need not be made small
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("few", settings.default, phases=phases, max_examples=8)
        settings.load_profile("few")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.chosen is None:
            items[:] = [item for item in items if "test_runtime" in item.nodeid or not _is_long(item.name)]
            names = [item.nodeid.partition("[")[0] for item in items]
            items[:] = [
                item for i, (item, name) in enumerate(zip(items, names, strict=True))
                if item.path.name not in THINNED or names[:i].count(name) % -(-names.count(name) // 8) == 0
            ]  # fmt: skip
        else:
            order = {name: i for i, name in enumerate(self.chosen)}
            items[:] = sorted((x for x in items if x.nodeid in order), key=lambda x: order[x.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.chosen is None:
            signal.signal(signal.SIGPROF, _too_slow)
        usual = self.chosen[nodeid] if self.chosen else SLOWEST
        seconds = 5 + 5 * usual if self.chosen else SLOWEST
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor; the alarm is for what waits
        signal.alarm(int(120 + 20 * usual) if self.chosen else 600)
        if self.coverage:
            self.coverage.switch_context(nodeid)
        self.seconds[nodeid] = -time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] += time.process_time()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self.failed.append(report.nodeid)


class Bench:
    """A clone of the committed sources, and what the unchanged ones do there."""

    def __init__(self, folder: Path, share: str) -> None:
        self.folder, self.clone = folder, folder / f"clone-{share.partition('/')[0]}"
        self.answer = self.clone.with_suffix(".json")
        folder.mkdir(parents=True, exist_ok=True)
        if not self.clone.exists():
            subprocess.run(["git", "clone", "-q", ROOT, self.clone], check=True)
        subprocess.run(["git", "fetch", "-q"], cwd=self.clone, check=True)
        subprocess.run(["git", "checkout", "-q", "origin/HEAD", "--", "tests"], cwd=self.clone, check=True)
        compiling = [sys.executable, "-m", "compileall", "-q", "npmamba", "tests"]
        subprocess.run(compiling, cwd=self.clone, check=True)
        head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=self.clone, text=True)
        self.commit = head.strip()
        self.known: dict[str, dict[str, Any]] = {}

    def forked(self, work: Callable[[], Any]) -> tuple[int, Any]:
        """Run `work` in a forked child; return the signal that ended it, or 0, and the answer, or None."""
        self.answer.unlink(missing_ok=True)
        if not (child := os.fork()):
            try:
                self._settle()
                self.answer.write_text(json.dumps(work()))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)  # whatever happened, this process must not go on as its parent
        _, status = os.waitpid(child, 0)
        try:
            os.killpg(child, signal.SIGKILL)  # what a test has started and left
        except ProcessLookupError:
            pass
        return os.WTERMSIG(status), json.loads(self.answer.read_text()) if self.answer.exists() else None

    def _settle(self) -> None:
        """Make a child of this process one that works in the clone, with limits, and is heard in a file only."""
        os.setsid()
        os.chdir(self.clone)
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        signal.alarm(300)
        sys.path[:] = [str(self.clone), *(entry for entry in sys.path if not entry.startswith(str(ROOT)))]
        os.environ["PYTHONPATH"] = str(self.clone)
        sys.modules.pop("mutators")
        log = os.open(self.clone.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)

    def pytest(self, files: list[str], run: Run, *more: str) -> int:
        import pytest

        options = "-q -n 0 -p no:cacheprovider --assert=plain --tb=no -W ignore::RuntimeWarning".split()
        return int(pytest.main([*files, *options, *more], plugins=[run]))

    def baseline(self, file: str) -> dict[str, Any]:
        """Return seconds and lines, by source, of each test of a file that passes; under "" those run by its import."""
        if file in self.known:
            return self.known[file]
        text = b"".join((self.clone / name).read_bytes() for name in (file, "tests/conftest.py", "tests/cases.py"))
        kept = self.folder / f"{Path(file).stem}-{hashlib.sha256(text + self.commit.encode()).hexdigest()[:16]}.json"
        if not kept.exists():
            say(f"unchanged sources: {file}")
            signal_, found = self.forked(lambda: self._watched(file))
            assert found is not None, f"{file}: the run of the unchanged sources was ended by signal {signal_}"
            kept.write_text(json.dumps(found))
        return self.known.setdefault(file, json.loads(kept.read_text()))

    def _watched(self, file: str) -> dict[str, Any]:
        import coverage

        watcher = coverage.Coverage(data_file=None, include=[f"{self.clone}/npmamba/*", f"{self.clone}/autodiff/*"])
        run = Run(coverage=watcher)
        watcher.start()
        self.pytest([file], run)
        watcher.stop()
        tests = {name: {"seconds": s, "lines": {}} for name, s in run.seconds.items() if name not in run.failed}
        tests[""] = {"seconds": 0.0, "lines": {}}
        data = watcher.get_data()
        for path in data.measured_files():
            for line, names in data.contexts_by_lineno(path).items():
                for name in names:
                    if name in tests:
                        tests[name]["lines"].setdefault(os.path.relpath(path, self.clone), []).append(line)
        return tests

    def tests_of(self, mutant: Mutant, telling: Counter[str]) -> list[dict[str, float]]:
        """Return the tests that run a mutant's line, each with its seconds: a few of one file, then all others."""
        reached, imported, everything = dict[str, float](), False, dict[str, float]()
        span = range(mutant.line, mutant.last + 1)
        for file in stem(mutant.path):
            for name, test in self.baseline(file).items():
                lines = test["lines"].get(mutant.path, [])
                hit = any(line in span for line in lines)
                imported |= hit and not name
                if name and test["seconds"] < SLOWEST:
                    everything[name] = test["seconds"]
                    if hit:
                        reached[name] = test["seconds"]
        chosen = everything if imported else reached  # what an import runs matters to all tests
        order = sorted(chosen, key=lambda name: (chosen[name] + 0.01) / (1 + telling[name]))
        times = itertools.accumulate(chosen[name] for name in order)
        order = [name for name, spent in zip(order, times, strict=True) if spent <= MOST]
        first, spent = dict[str, float](), 0.0
        for name in order:
            if name.partition("::")[0] == order[0].partition("::")[0] and spent + chosen[name] < FIRST:
                first[name] = chosen[name]
                spent += chosen[name]
        return [tests for tests in (first, {name: chosen[name] for name in order if name not in first}) if tests]

    def meet(self, mutant: Mutant, telling: Counter[str]) -> dict[str, Any]:
        """Put a mutant in place, run its tests, put the source back; return what became of it."""
        place, begun = self.clone / mutant.path, time.monotonic()
        source, times = place.read_text(), place.stat()
        status, by = "unreached", ""
        try:
            place.write_text(mutant.apply(source))
            os.utime(place, (begun, time.time() + 1000))  # no compiled file may pass for this one
            for tests in self.tests_of(mutant, telling):
                run = Run(tests)
                files = list(dict.fromkeys(name.partition("::")[0] for name in tests))
                ended, found = self.forked(lambda files=files, run=run: (self.pytest(files, run, "-x"), run.failed))
                code, failed = found or (1, [])
                status = "timeout" if ended in (signal.SIGPROF, signal.SIGALRM) else "survived"
                if status == "survived" and code not in (0, 5):
                    status, by = "killed", failed[0] if failed else f"import, {code}" if found else f"signal {ended}"
                    telling[by] += 1
                if status != "survived":
                    break
        finally:
            place.write_text(source)
            os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
        return {"name": mutant.name, "path": mutant.path, "line": mutant.line, "status": status, "by": by,
                "seconds": round(time.monotonic() - begun, 1)}  # fmt: skip


def drawn(clone: Path, seed: int, count: int) -> list[Mutant]:
    """Return the first `count` mutants of the shuffle."""
    paths = [path.relative_to(clone).as_posix() for pattern in SOURCES for path in sorted(clone.glob(pattern))]
    every = [mutant for path in paths for mutant in mutants(path, (clone / path).read_text())]
    random.Random(seed).shuffle(every)
    return every[:count]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what became of each mutant, the last time it was tried."""
    lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return {result["name"]: result for result in sorted(lines, key=lambda result: result["at"])}


def rate(found: list[dict[str, Any]], reasons: dict[str, str]) -> dict[str, Any]:
    """Count what became of some mutants."""
    status = Counter(result["status"] for result in found)
    equivalent = sum(reasons.get(x["name"], "").startswith("equivalent") for x in found if _lives(x))
    killed = status["killed"] + status["timeout"]
    return {
        "mutants": len(found), "killed": killed, "of these by time": status["timeout"], "survived": len(found) - killed,
        "of these equivalent": equivalent, "killed in percent": round(100 * killed / max(len(found), 1), 1),
        "killed in percent of those not equivalent": round(100 * killed / max(len(found) - equivalent, 1), 1),
    }  # fmt: skip


def _lives(result: dict[str, Any]) -> bool:
    return result["status"] in ("survived", "unreached")


def score(work: Bench, seed: int, count: int) -> dict[str, Any]:
    reasons = json.loads(REASONS.read_text()) if REASONS.exists() else {}
    every = results(work.folder)
    found = [every[m.name] for m in drawn(work.clone, seed, count) if m.name in every]
    paths = sorted({result["path"] for result in found})
    libraries = {name: importlib.metadata.version(name) for name in ("numpy", "numba", "hypothesis", "pytest")}
    return {
        "seed": seed, "date": date.today().isoformat(), "sources": work.commit, "compiler": "off",
        "versions": {"python": platform.python_version(), **libraries},
        "minutes": round(sum(result["seconds"] for result in found) / 60),
        "all": rate(found, reasons),
        "scan, convolution and norm kernels": rate([x for x in found if x["path"] in HELD], reasons),
        "files": {path: rate([x for x in found if x["path"] == path], reasons) for path in paths},
        "survivors": {x["name"]: reasons.get(x["name"], "no reason known") for x in found if _lives(x)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=650, help="how many of the shuffle")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "build/mutation", help="folder of the clones and results")
    parser.add_argument("--share", default="0/1", help="this process's part, such as 0/2")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    parser.add_argument("--check", action="store_true", help="let unchanged files meet the tests: all must survive")
    parser.add_argument("--again", action="store_true", help="run those again that survived")
    parser.add_argument("--score", action="store_true", help=f"write {SCORE.relative_to(ROOT)} and run nothing")
    given = parser.parse_args()
    os.environ |= {"NUMBA_DISABLE_JIT": "1", "HYPOTHESIS_PROFILE": "quick", "OPENBLAS_NUM_THREADS": "1"}
    work = Bench(given.work.resolve(), given.share)
    if given.score:
        SCORE.write_text(json.dumps(score(work, given.seed, given.mutants), indent=1) + "\n")
        return
    for name in LIBRARIES.split():
        importlib.import_module(name)
    gc.freeze()
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    part, parts = (int(x) for x in given.share.split("/"))
    past, telling = results(work.folder), Counter[str]()
    chosen = [m for m in drawn(work.clone, given.seed, given.mutants) if given.only in m.path][part::parts]
    for file in sorted({file for mutant in chosen for file in stem(mutant.path)}):
        work.baseline(file)
    if given.check:
        for path in sorted({mutant.path for mutant in chosen}):
            last = len((work.clone / path).read_text().splitlines())
            nothing = Mutant(path, 1, last, 0, 0, "", "none", "module", "nothing")
            result = work.meet(nothing, telling)
            say(f"{path}: {result['status']} {result['seconds']} s {result['by']}")
        return
    with (work.folder / f"results-{part}-{parts}.jsonl").open("a") as file:
        for mutant in chosen:
            done = past.get(mutant.name)
            if done and not (given.again and _lives(done)):
                continue
            result = {**work.meet(mutant, telling), "at": time.time()}
            say(f"{result['status']:9} {result['seconds']:5} s  {mutant.name}  [{result['by']}]")
            file.write(json.dumps(result) + "\n")
            file.flush()


if __name__ == "__main__":
    shutil.which("git") or sys.exit("git is needed")
    main()
