"""The house is built as CONTRIBUTING.md says: layers without circles, light imports, public modules one can read.

Most of it is read from the sources: imports inside functions count, those for a type checker alone do not.
"""

import ast
import functools
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

from tarflow import Guidance, TarFlow, TarFlowConfig

ROOT = Path(__file__).parents[1]
SOURCES = {"tarflow": ROOT / "tarflow", "tarflow_kernels": ROOT / "kernels" / "tarflow_kernels"}

# From top to bottom: a module imports from its own layer and from those below.
LAYERS = {
    "commands": ["__main__", "cli", "demo"],
    "training": ["training"],
    "results": ["evaluation", "features", "pictures", "reference", "samples", "scores"],
    "models": ["model", "published", "flowpp", "image_flow", "hub", "pretrained"],
    "parts": ["decoding", "denoising", "flow", "transformer", "transforms"],
    "foundations": [
        "compatibility",
        "data",
        "datasets",
        "encoders",
        "files",
        "guidance",
        "hardware",
        "noise",
        "processes",
        "validation",
    ],
}
LAYER_OF = {module: depth for depth, modules in enumerate(LAYERS.values()) for module in modules}

# What a docstring's first line must not begin with: a clause that lacks its subject.
FRAGMENTS = ("Of ", "What ", "Where ", "As ", "In a ", "That ", "Which ", "By how ", "With which ", "To which ")


@functools.cache
def sources():
    """The syntax tree of every module, by its full name."""
    trees = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            trees[name] = (ast.parse(path.read_text(encoding="utf-8"), path), path.name == "__init__.py")
    return trees


@functools.cache
def imports():
    """What every module imports, wherever in it: modules of ours in full, all else by the library's name."""
    return {name: _imports_of(name, tree, is_package) for name, (tree, is_package) in sources().items()}


def _imports_of(name, tree, is_package):
    found = set()
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            found |= {_resolve(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {_resolve(f"{base}.{alias.name}") for alias in node.names}
    return found - {name}


def _walk(node):
    """Every node that can run: what only a type checker imports is left out."""
    yield node
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from _walk(child)


def _resolve(name):
    """The module that a dotted name stands for or lies in; of other libraries, the library."""
    if name.partition(".")[0] not in SOURCES:
        return name.partition(".")[0]
    while name not in sources():
        name = name.rpartition(".")[0]
    return name


def ours(names):
    return {name for name in names if name.partition(".")[0] in SOURCES}


def part(name):
    """The file or folder at the top of its package that a module belongs to."""
    return ".".join(name.split(".")[:2])


def assert_none(found):
    found = list(found)
    assert not found, "\n".join(["", *sorted(found)])


def assert_no_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_modules_import_each_other_in_a_circle():
    assert_no_circle({name: ours(imported) for name, imported in imports().items()})


def test_no_folders_import_each_other_in_a_circle():
    graph = {}
    for name, imported in imports().items():
        graph.setdefault(part(name), set()).update({part(other) for other in ours(imported)} - {part(name)})
    assert_no_circle(graph)


def test_nobody_imports_upwards():
    def depth(name):
        package, _, module = part(name).partition(".")
        return len(LAYERS) if package == "tarflow_kernels" else LAYER_OF[module] if module else -1

    modules = {part(name).partition(".")[2] for name in sources() if name.startswith("tarflow.")}
    assert modules <= LAYER_OF.keys(), "give it a layer here and in CONTRIBUTING.md"
    upwards = {
        f"{name} imports {other}"
        for name, imported in imports().items()
        for other in ours(imported)
        if depth(other) < depth(name)
    }
    assert_none(upwards)


def test_kernels_need_torch_and_triton_and_no_other_library():
    adapters = "tarflow_kernels.adapters"
    needed = {
        library
        for name, imported in imports().items()
        if name.startswith("tarflow_kernels") and not name.startswith(adapters)
        for library in imported - ours(imported)
    }
    assert needed - sys.stdlib_module_names == {"torch", "triton"}


def test_models_leave_triton_to_the_kernels():
    assert {name for name, imported in imports().items() if "triton" in imported and part(name) in SOURCES} == set()


BEFORE = "import sys, torch; before = set(sys.modules)"  # torch loads tqdm itself, where it is installed
AFTER = "print(*set(sys.modules) - before)"
SAVE_AND_SAMPLE = """
from tarflow import TarFlow, TarFlowConfig
from tarflow.cli import main
TarFlow(TarFlowConfig(image_size=4, patch_size=2, channels=16, head_dim=16)).save_pretrained("run")
sys.argv = ["tarflow", "sample", "run", "--num=1", "--sigma=0", "--device=cpu", "--out=out.npz"]
assert main() == 0
"""
ASK_FOR_HELP = """
from tarflow.cli import main
sys.argv = ["tarflow", "sample", "--help"]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code
"""


@pytest.mark.parametrize(
    ("program", "unwanted"),
    [
        pytest.param("import tarflow", "tyro tqdm tensorboard matplotlib PIL", id="import tarflow"),
        pytest.param(ASK_FOR_HELP, "tensorboard tarflow.training.trainer", id="tarflow sample --help"),
        pytest.param(SAVE_AND_SAMPLE, "tensorboard tarflow.training.trainer", id="tarflow sample"),
        pytest.param("import tarflow.training.trainer", "matplotlib", id="the trainer"),
        pytest.param("import tarflow_kernels", "triton tarflow", id="import tarflow_kernels"),
    ],
)
def test_nothing_is_loaded_that_is_not_used(program, unwanted, tmp_path):
    command = [sys.executable, "-c", f"{BEFORE}\n{program}\n{AFTER}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    loaded = ended.stdout.splitlines()[-1].split()
    assert set(unwanted.split()) & set(loaded) == set()


# Modules behind the public ones: kernels and their launchers, and what adapters share.
INTERNAL = ("tarflow_kernels.triton", "tarflow_kernels.adapters.common", "tarflow_kernels.adapters.made")


def files_entered(run):
    """The files of ours that a call enters."""
    run()  # what the first call sets up is not on the way
    entered = set()

    def note(frame, event, argument):
        if event == "call" and any(Path(frame.f_code.co_filename).is_relative_to(root) for root in SOURCES.values()):
            entered.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


def test_an_image_passes_few_files():
    """Each more is one more that a reader has to open."""
    model = TarFlow(TarFlowConfig(image_size=8, channels=64, num_blocks=2, layers_per_block=1, num_classes=3)).eval()
    x, labels = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    assert len(files_entered(lambda: model.log_prob(x, labels))) <= 9
    assert len(files_entered(lambda: model.sample(2, labels, Guidance(2.0)))) <= 15


def is_public(name):
    return not any(word.startswith("_") for word in name.split("."))


def public_modules():
    return {name: tree for name, (tree, _) in sources().items() if is_public(name)}


def bound_names(tree):
    """The names that a module defines, assigns or imports at its top level, and those that it exports."""
    bound, exported = set(), None
    for node in ast.walk(ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef | ast.ClassDef)], [])):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    bound |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            exported = ast.literal_eval(node.value)
    return bound, exported


def test_public_modules_say_what_they_export():
    silent, missing = [], []
    for name, tree in public_modules().items():
        bound, exported = bound_names(tree)
        if exported is None and any(map(is_public, bound)) and not name.startswith(INTERNAL):
            silent.append(name)
        if "__getattr__" not in bound:
            missing += [f"{name}.{word}" for word in exported or [] if word not in bound]
    assert_none(silent)
    assert_none(missing)


def documented(tree, name):
    """The docstrings of a module, its public functions and classes, their public methods and attributes."""
    if text := ast.get_docstring(tree):
        yield name, text
    for before, node in zip([None, *tree.body], tree.body, strict=False):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_public(node.name):
            if isinstance(node, ast.ClassDef):
                yield from documented(node, f"{name}.{node.name}")
            elif text := ast.get_docstring(node):
                yield f"{name}.{node.name}", text
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(before, ast.Assign | ast.AnnAssign):
            target = before.target if isinstance(before, ast.AnnAssign) else before.targets[0]
            if is_public(ast.unparse(target)):
                yield f"{name}.{ast.unparse(target)}", node.value.value


def test_docstrings_begin_with_what_stands_alone():
    fragments = [
        f"{place}: {text.splitlines()[0]}"
        for name, tree in public_modules().items()
        for place, text in documented(tree, name)
        if text.startswith(FRAGMENTS)
    ]
    assert_none(fragments)


def public_functions(tree, name):
    """Functions and methods that users call; kernels take what Triton gives them."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            yield from public_functions(node, f"{name}.{node.name}")
        elif isinstance(node, ast.FunctionDef) and (is_public(node.name) or node.name == "__init__"):
            if any("triton" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            yield f"{name}.{node.name}", node


def test_public_functions_are_annotated_in_full():
    bare = []
    for name, tree in public_modules().items():
        for place, node in public_functions(tree, name):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare += [f"{place}({a.arg})" for a in taken if a.annotation is None and a.arg not in ("self", "cls")]
            if node.returns is None and node.name != "__init__":
                bare.append(f"{place} ->")
    assert_none(bare)


def test_the_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tarflow|kernels|tests|benchmarks|tools|\.github|\.ci)/[\w./]+)`", text))
    assert len(named) > 30
    assert_none(path for path in named if not (ROOT / path).exists())


def test_contributing_names_every_layer():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = {row[0]: set(re.findall(r"`(\w+)`", row[1])) for row in re.findall(r"^\| (\w+) \| (.+?) \|", text, re.M)}
    assert {layer: set(modules) - {"data"} for layer, modules in LAYERS.items()}.items() <= rows.items()
