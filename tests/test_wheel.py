"""The wheel holds both packages whole, under the version that they say."""

import email
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tarflow

ROOT = Path(__file__).parents[1]
PACKAGES = {"tarflow": ROOT / "tarflow", "tarflow_kernels": ROOT / "kernels" / "tarflow_kernels"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy, without network: a build leaves files behind, and takes those that it finds there."""
    setuptools = importlib.metadata.version("setuptools")
    if int(setuptools.split(".")[0]) < 77:
        pytest.skip(f"the wheel is built by setuptools>=77, and this is {setuptools}")
    folder = tmp_path_factory.mktemp("wheel")
    for source in ("tarflow", "kernels/tarflow_kernels"):
        shutil.copytree(ROOT / source, folder / "source" / source, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "source")
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", *command, folder / "source"], check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_it_holds_every_file_of_both_packages_and_nothing_else(wheel):
    files = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files
    assert {"tarflow/py.typed", "tarflow_kernels/py.typed", "tarflow/data/fashion_mnist_subset.npz"} <= files


def test_its_version_is_that_of_the_package(wheel):
    assert _metadata(wheel)["Version"] == tarflow.__version__


def test_it_brings_the_command_and_both_licences(wheel):
    (commands,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "tarflow = tarflow.cli:main" in wheel.read(commands).decode()
    assert _metadata(wheel).get_all("License-File") == ["LICENSE", "tarflow/data/LICENSE.fashion-mnist"]


def _metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))
