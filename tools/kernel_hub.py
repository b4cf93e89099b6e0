"""Assemble the kernels as the Kernel Hub of Hugging Face has them, in a new folder.

    python tools/kernel_hub.py OUT --repo-id owner/tarflow-kernels

It gets what kernel-builder builds from: the sources in ``kernels/tarflow_kernels`` that the ops need, and the files in
``tools/kernel_hub``. In ``OUT/build`` is what these become, a folder for each backend: nothing is compiled, so that
``kernels.get_local_kernel`` loads OUT as it is.
"""

import argparse
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ROOT / "tools" / "kernel_hub"
SOURCES = ROOT / "kernels" / "tarflow_kernels"
TOOLS = ("cases.py", "hopper.py", "inspect.py", "offline.py", "predict.py", "resources.py", "tune.py")
ADAPTERS = ("adapters", "implicit.py")
MADE = ("_ops.py", "py.typed", "__pycache__")  # by the builder, for types, and by Python


def assemble(out: Path, repo_id: str) -> None:
    """Write the folder; raise FileExistsError where there is one."""
    shutil.copytree(FILES, out, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [path for path in out.rglob("*") if path.is_file()]:
        path.write_text(path.read_text().replace("OWNER/tarflow-kernels", repo_id))
    package = out / "torch-ext" / SOURCES.name
    shutil.copytree(SOURCES, package, ignore=shutil.ignore_patterns(*TOOLS, *ADAPTERS, *MADE))
    general = tomllib.loads((out / "build.toml").read_text())["general"]
    version = digest(package)
    for backend in general["backends"]:
        build(package, out / "build" / f"torch-{backend}", backend, f"_{SOURCES.name}_{backend}_{version}", general)


def build(package: Path, folder: Path, backend: str, identifier: str, general: dict) -> None:
    """Write the build for a backend, whose ops are registered in the namespace ``identifier``."""
    shutil.copytree(package, folder)
    ops = (SOURCES / "_ops.py").read_text()
    (folder / "_ops.py").write_text(ops.replace("torch.ops.tarflow", f"torch.ops.{identifier}"))
    metadata = {name: general[name] for name in ("name", "version", "license")}
    metadata |= {"id": identifier, "python-depends": [], "backend": {"type": backend}}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def digest(package: Path) -> str:
    """Return the digits that tell these sources from others."""
    sha = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.is_file()):
        sha.update(f"{path.relative_to(package).as_posix()} ".encode() + path.read_bytes())
    return sha.hexdigest()[:10]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--repo-id", default="OWNER/tarflow-kernels", help="the repository to publish it in")
    arguments = parser.parse_args()
    assemble(arguments.out, arguments.repo_id)
    print(f"wrote {arguments.out}")
