"""What ``lattice_remote`` offers to programs, and what that costs those who only import it."""

import subprocess
import sys

import pytest

import lattice_remote


def test_every_name_is_there() -> None:
    assert all(getattr(lattice_remote, name) is not None for name in lattice_remote.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lattice_remote.nonsense  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    """Every ``lattice`` command, in every project, imports it."""
    script = "import sys; before = set(sys.modules); import lattice_remote; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'lattice_remote'}"
