"""The wheels, of tarflow and of its kernels alone, hold their packages whole, under the version that they say."""

import email
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tarflow
import tarflow_kernels

ROOT = Path(__file__).parents[1]
KERNELS = {"tarflow_kernels": ROOT / "kernels" / "tarflow_kernels"}
PACKAGES = {"tarflow": {"tarflow": ROOT / "tarflow", **KERNELS}, "tarflow-kernels": KERNELS}
FOLDERS = {"tarflow": "", "tarflow-kernels": "kernels"}
every_wheel = pytest.mark.parametrize("name", PACKAGES)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Built of a copy, without network: a build leaves files behind, and takes those that it finds there."""
    setuptools = importlib.metadata.version("setuptools")
    if int(setuptools.split(".")[0]) < 77:
        pytest.skip(f"the wheels are built by setuptools>=77, and this is {setuptools}")
    folder = tmp_path_factory.mktemp("wheels")
    for source in ("tarflow", "kernels/tarflow_kernels"):
        shutil.copytree(ROOT / source, folder / "source" / source, ignore=shutil.ignore_patterns("__pycache__"))
    for place in FOLDERS.values():
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / place / file, folder / "source" / place)
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    opened = {}
    for name, place in FOLDERS.items():
        subprocess.run([sys.executable, "-m", "pip", *command, folder / "source" / place], check=True)
        (path,) = folder.glob(f"{name.replace('-', '_')}-*.whl")
        opened[name] = zipfile.ZipFile(path)
    yield opened
    for file in opened.values():
        file.close()


@every_wheel
def test_it_holds_every_file_of_its_packages_and_nothing_else(wheels, name):
    files = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES[name].items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {file for file in wheels[name].namelist() if ".dist-info/" not in file} == files
    assert {f"{package}/py.typed" for package in PACKAGES[name]} <= files
    assert ("tarflow/data/fashion_mnist_subset.npz" in files) == (name == "tarflow")


@every_wheel
def test_its_version_is_that_of_the_packages(wheels, name):
    assert _metadata(wheels[name])["Version"] == tarflow.__version__ == tarflow_kernels.__version__


def test_the_kernels_need_torch_alone(wheels):
    needed = _metadata(wheels["tarflow-kernels"]).get_all("Requires-Dist")
    assert [each for each in needed if "extra ==" not in each] == ["torch>=2.11"]
    assert [each for each in needed if "extra ==" in each] == ['triton>=3.6; extra == "triton"']


def test_both_are_for_the_same_pythons_torch_and_triton(wheels):
    whole, kernels = (_metadata(wheels[name]) for name in PACKAGES)
    assert whole["Requires-Python"] == kernels["Requires-Python"]
    assert set(kernels.get_all("Requires-Dist")) < set(whole.get_all("Requires-Dist"))


def test_tarflow_brings_the_command_and_both_licences(wheels):
    (commands,) = (name for name in wheels["tarflow"].namelist() if name.endswith("/entry_points.txt"))
    assert "tarflow = tarflow.cli:main" in wheels["tarflow"].read(commands).decode()
    assert _metadata(wheels["tarflow"]).get_all("License-File") == ["LICENSE", "tarflow/data/LICENSE.fashion-mnist"]


def test_the_kernels_bring_the_licence_and_no_command(wheels):
    assert _metadata(wheels["tarflow-kernels"]).get_all("License-File") == ["LICENSE"]
    assert not [name for name in wheels["tarflow-kernels"].namelist() if name.endswith("/entry_points.txt")]


def _metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))
