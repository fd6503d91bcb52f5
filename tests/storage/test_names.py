"""Public names of ``lattice_remote``, and the cost of importing it."""

import subprocess
import sys

import pytest

import lattice_remote


def test_every_public_name_exists() -> None:
    assert all(getattr(lattice_remote, name) is not None for name in lattice_remote.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lattice_remote.nonsense  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    """Every ``lattice`` command imports the package, in every project."""
    script = "import sys; before = set(sys.modules); import lattice_remote; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'lattice_remote'}"
