"""Each rule of `mutators` makes the change that it names, and none touches what it must not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutators import Mutant, mutants

from npmamba.cpu import conv_tile


def of(source: str, kind: str, path: str = "npmamba/cpu/x.py") -> list[str]:
    return [mutant.apply(source) for mutant in mutants(path, source) if mutant.kind == kind]


@pytest.mark.parametrize(
    ("kind", "source", "wanted"),
    [
        ("arithmetic", "y = a * b + c", ["y = ((a * b) - (c))", "y = ((a) + (b)) + c"]),
        ("arithmetic", "y = (a + b) * c", ["y = (((a + b)) + (c))", "y = (((a) - (b))) * c"]),
        ("comparison", "y = a < b", ["y = ((a) <= (b))"]),
        ("comparison", "y = 0 <= a < b", ["y = 0 < a < b", "y = 0 <= a <= b"]),
        ("boolean", "y = a and b and c", ["y = ((a) or (b) or (c))"]),
        ("sign", "y = -x", ["y = (x)"]),
        ("constant", "y = 1", ["y = 2", "y = 0"]),
        ("constant", "y = 0.5", ["y = (0.5 * 1.25)"]),
        ("constant", "y = True", ["y = False"]),
        ("condition", "y = a if b else c", ["y = a if (not (b)) else c"]),
        ("swap", "y = fma(a, b, c)", ["y = fma(a, c, b)"]),
        ("swap", "y = load(a, b)", []),
        ("range", "y = range(n)", ["y = range((n) + 1)", "y = range((n) - 1)"]),
        ("index", "y = load(x, (b, t))", ["y = load(x, ((b) + 1, t))", "y = load(x, (b, (t) + 1))"]),
        ("index", "y = x[i:]", ["y = x[(i) + 1:]"]),
        ("dropped", "y += x", ["pass"]),
        ("dropped", "y = y + x", ["pass"]),
        ("dropped", "y = x", []),
        ("dropped", "store(x,\n  i)", ["pass\n"]),
        ("dropped", "prefetch(x, i)", []),
        ("jump", "for i in x: break", ["for i in x: continue"]),
    ],
)
def test_a_rule_makes_the_change_that_it_names(kind, source, wanted):
    assert of(source, kind) == wanted


@pytest.mark.parametrize(
    "source",
    [
        '"""Text: 1 + 1."""',
        "def f(x: Read[2]) -> Write[1]: ...",
        "@njit(nogil=True)\ndef f(x): ...",
        "raise ValueError(f'{1 + 1}' + '2')",
        "f'{a + 1}'",
        "inner = njit(nogil=True)",
    ],
)
def test_text_and_what_only_the_compiler_sees_are_left_alone(source):
    assert mutants("npmamba/cpu/x.py", source) == []


def test_functions_that_only_run_compiled_are_left_alone():
    source = "def load(a):\n    return a + b\ndef emit(a):\n    return a + b"
    assert {mutant.function for mutant in mutants("npmamba/cpu/simd.py", source)} == {"load"}


def test_every_mutant_of_a_kernel_is_another_program_of_as_many_lines_with_a_name_of_its_own():
    source = Path(conv_tile.__file__).read_text()
    every = mutants("npmamba/cpu/conv_tile.py", source)
    assert len(every) > 300
    assert len({mutant.name for mutant in every}) == len(every)
    for mutant in every:
        changed = mutant.apply(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant.name
        assert changed.count("\n") == source.count("\n"), mutant.name
        assert_only_its_statement_changed(mutant, source, changed)


def assert_only_its_statement_changed(mutant: Mutant, source: str, changed: str) -> None:
    pairs = enumerate(zip(source.splitlines(), changed.splitlines(), strict=True), 1)
    lines = [number for number, (before, after) in pairs if before != after]
    assert mutant.line <= lines[0], mutant.name
    assert lines[-1] <= mutant.last, mutant.name
