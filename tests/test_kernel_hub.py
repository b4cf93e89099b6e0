"""The kernels as the Kernel Hub has them: what it asks of sources, and two copies of the ops in one process."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPOSITORY = "someone/tarflow-kernels"


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """The folder that is published."""
    folder = tmp_path_factory.mktemp("hub") / "layout"
    command = [sys.executable, ROOT / "tools" / "kernel_hub.py", folder, "--repo-id", REPOSITORY]
    subprocess.run(command, check=True)
    return folder


def sources(layout):
    return sorted((layout / "torch-ext" / "tarflow_kernels").rglob("*.py"))


@pytest.mark.parametrize(
    "command",
    [
        # A member named long is Python 2's, as vermin sees it.
        "vermin --target=3.9- --no-tips --violations --exclude=long",
        # Syntax, and annotations that would have to be evaluated.
        "ruff check --isolated --target-version=py39 --select=FA102",
    ],
    ids=lambda command: command.split()[0],
)
def test_its_sources_are_for_python_3_9(layout, command):
    program, *flags = command.split()
    program = Path(sys.executable).with_name(program)
    ended = subprocess.run([program, *flags, *sources(layout)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_its_sources_import_torch_triton_and_by_relative_names_themselves(layout):
    imported = set()
    for path in sources(layout):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "triton"}


@pytest.mark.parametrize("backend", ["cpu", "cuda", "rocm", "xpu"])
def test_the_ops_of_every_build_have_a_namespace_of_their_own(layout, backend):
    build = layout / "build" / f"torch-{backend}"
    metadata = ast.literal_eval((build / "metadata.json").read_text())
    assert metadata["backend"] == {"type": backend}
    assert metadata["id"].startswith(f"_tarflow_kernels_{backend}_")
    assert f"ops = torch.ops.{metadata['id']}\n" in (build / "_ops.py").read_text()


def test_a_folder_that_is_there_is_left_alone(layout):
    ended = subprocess.run([sys.executable, ROOT / "tools" / "kernel_hub.py", layout], capture_output=True, text=True)
    assert ended.returncode
    assert "FileExistsError" in ended.stderr


BESIDE_THE_INSTALLED_PACKAGE = """
import kernels, pytest, torch
import tarflow_kernels as installed
assert pytest.main(["tests", "-m", "kernels_ci", "-p", "no:cacheprovider"]) == 0
(loaded,) = kernels.get_loaded_kernels()
x, mu, alpha = torch.randn(3, 2, 5, 4)
for package in (loaded.module, installed):
    expected = package.reference.affine_forward(x.double(), mu.double(), alpha.double())
    torch.testing.assert_close(package.affine_forward(x, mu, alpha), expected, check_dtype=False)
print(loaded.module.__file__, installed.__file__, sep="\\n")
print(*(getattr(torch.ops, name).affine_forward.default for name in (loaded.metadata.id, "tarflow")), sep="\\n")
"""


def test_it_passes_its_tests_beside_the_installed_package(layout):
    environment = os.environ | {"LOCAL_KERNELS": f"{REPOSITORY}={layout}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BESIDE_THE_INSTALLED_PACKAGE]
    ended = subprocess.run(command, cwd=layout, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    served, installed, *ops = ended.stdout.splitlines()[-4:]
    assert served == str(layout / "build" / "torch-cpu" / "__init__.py") != installed
    assert ops[0].startswith("_tarflow_kernels_cpu_")
    assert ops[1] == "tarflow.affine_forward.default"
