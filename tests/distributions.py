"""``python tests/distributions.py FOLDER`` checks what ``uv build`` has written there: nothing is missing, nothing is added.

The source distribution holds all that git does not ignore, so that the tests can be run from it; the wheel holds the package, the
pytest plugin and the licence.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_WHEEL = ("cancelable_deps/", "cancelable_deps_pytest.py")


def not_ignored() -> set[str]:
    """Return the files of the checkout that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def in_sdist(path: Path) -> set[str]:
    """Return the names of the files, without the folder that they are all in."""
    with tarfile.open(path) as archive:
        return {member.name.split("/", 1)[1] for member in archive if member.isfile()}


def in_wheel(path: Path) -> set[str]:
    """Return the names of the files; those of the metadata without their folder."""
    with zipfile.ZipFile(path) as archive:
        return {name if name.startswith(IN_WHEEL) else name.split("/", 1)[1] for name in archive.namelist()}


def difference(what: str, found: set[str], expected: set[str]) -> list[str]:
    """Return a line for each file that is missing or added."""
    return [f"{what} lacks {name}" for name in sorted(expected - found)] + [
        f"{what} holds {name}, too" for name in sorted(found - expected)
    ]


def faults(folder: Path) -> list[str]:
    """Return what is wrong with the one source distribution and the one wheel in a folder."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    files = not_ignored()
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    return difference(sdist.name, in_sdist(sdist), files | {"PKG-INFO"}) + difference(
        wheel.name, in_wheel(wheel), {name for name in files if name.startswith(IN_WHEEL)} | metadata
    )


if __name__ == "__main__":
    sys.exit("\n".join(faults(Path(sys.argv[1]))) or None)
