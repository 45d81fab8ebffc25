"""The page on testing one's own kernels: its examples run, and it names every law."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from npmamba.testing.conv_gradient_laws import CONV_GRADIENT_LAWS
from npmamba.testing.conv_laws import CONV_LAWS
from npmamba.testing.gradient_laws import GRADIENT_LAWS
from npmamba.testing.laws import LAWS

PAGE = Path(__file__).parent.parent / "docs" / "fuzzing.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="about a checkout, not an installed package")


def test_the_examples_run():
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=flags, encoding="utf-8")
    assert result.attempted > 10
    assert result.failed == 0


def test_every_law_is_on_the_page():
    page = PAGE.read_text()
    laws = LAWS + GRADIENT_LAWS + CONV_LAWS + CONV_GRADIENT_LAWS
    missing = [law.name for law in laws if law.name.replace("_", " ") not in page]
    assert missing == []
