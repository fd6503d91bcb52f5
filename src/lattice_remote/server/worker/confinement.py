"""What a process that runs lattice on a project's files may see: its private directory, and Python itself."""

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

__all__ = ["code_directories", "prepare_scratch"]


def code_directories(project: Path) -> list[str]:
    """Return where Python and its packages lie; the directory it was started in is none of them.

    Nor is one around the project: an environment may have been made where the data lies, and the tokens with it.
    """
    started_in = os.getcwd()
    standard = sysconfig.get_paths()
    paths = {*(standard[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")), *filter(None, sys.path)}
    return sorted(path for path in paths if path != started_in and not project.is_relative_to(path))


def prepare_scratch(project: Path) -> Path:
    """Make the private directory, empty, and live in it."""
    scratch = project / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    tempfile.tempdir = str(scratch)
    os.chdir(scratch)
    return scratch
