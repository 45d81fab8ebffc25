"""Fail where tests reach fewer lines or branches than they did; the settings are [tool.coverage] of pyproject.toml."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

LINES, BRANCHES = 0.999, 0.99
"""What must be reached: all but what a draw of examples may miss."""


def main() -> None:
    """Print what no test reaches, and end with what is too little."""
    python = [sys.executable, "-m", "coverage"]
    told = subprocess.run([*python, "report"], check=False).returncode
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "coverage.json")
        subprocess.run([*python, "json", "--quiet", "--fail-under=0", "-o", str(file)], check=True)
        totals = json.loads(file.read_text())["totals"]
    lines = totals["covered_lines"] / totals["num_statements"]
    branches = totals["covered_branches"] / totals["num_branches"]
    if told or lines < LINES or branches < BRANCHES:
        sys.exit(f"tests reach {lines:.2%} of lines and {branches:.2%} of branches: too little")


if __name__ == "__main__":
    main()
