"""Compare the files of a wheel and a source archive with the tree: ``compare_files.py WHEEL SDIST``."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

LINKED = ("autodiff", "cuda")
SHIPPED = (".py", ".md", "py.typed")


def tracked(root: Path) -> set[str]:
    """Return the package's files as git knows them, under the names they are installed by."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    found = set()
    for name in filter(None, listed.stdout.split("\0")):
        top = name.partition("/")[0]
        if name.endswith(SHIPPED) and "/" in name and top in ("npmamba", *LINKED):
            found.add(f"npmamba/{name}" if top in LINKED else name)
    return found


def main(wheel: str, archive: str) -> int:
    expected = tracked(Path(__file__).resolve().parent.parent)
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = {name for name in opened.namelist() if ".dist-info/" not in name}
    with tarfile.open(archive) as opened:
        in_archive = {member.name.partition("/")[2] for member in opened if member.isfile()}
    wrong = [f"the wheel lacks {name}" for name in sorted(expected - in_wheel)]
    wrong += [f"the wheel holds {name}, which the tree does not" for name in sorted(in_wheel - expected)]
    wrong += [f"the source archive lacks {name}" for name in sorted(expected - in_archive)]
    print("\n".join(wrong) or f"{len(expected)} files, in the tree, the wheel and the source archive alike")  # noqa: T201
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
