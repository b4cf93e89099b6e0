"""The Triton kernels without a GPU: interpreted, and compiled for cards that are not there, each in its own process."""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import triton
from packaging.version import Version

from tarflow_kernels import cases, offline

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INTERPRETED = ["test_scales.py", "test_triton.py", "test_mixture.py", "test_ops.py"]

# In bytes per thread, by version of Triton: where more programs side by side are predicted to be worth more.
SPILLED_ON_HOPPER = {
    "3.6.0": {
        "causal_attention_backward_queries bfloat16 N=1024 D=64": 32,
        "causal_attention_backward_keys bfloat16 N=1024 D=64": 24,
        "causal_attention_backward_queries bfloat16 N=1000 D=48": 16,
        "causal_attention_backward_keys bfloat16 N=1000 D=48": 32,
        "causal_attention_forward bfloat16 N=1000 D=96": 16,
    },
    "3.7.1": {
        "causal_attention_backward_queries bfloat16 N=1024 D=64": 32,
        "causal_attention_backward_keys bfloat16 N=1024 D=64": 16,
        "causal_attention_backward_queries bfloat16 N=1000 D=48": 32,
        "causal_attention_backward_keys bfloat16 N=1000 D=48": 24,
        "causal_attention_forward bfloat16 N=1000 D=96": 16,
    },
}
interprets = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason=f"the interpreter of triton {triton.__version__} needs numpy<2.4, and this is {numpy.__version__}",
)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All jobs, run two at a time, the longest first; a test waits for its own."""
    table = tmp_path_factory.mktemp("compiled") / "resources.json"
    commands = {"compile": ["-m", "tarflow_kernels.resources", "--workers", "1", "--out", table]}
    for name in reversed([] if interprets.args[0] else INTERPRETED):
        commands[name] = ["-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / name]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(_run, name, command, table) for name, command in commands.items()}


def _run(name, command, table):
    """Run a process, and return the table of the one that writes it; where it fails, show what it printed."""
    environment = os.environ | {"TRITON_INTERPRET": "0" if name == "compile" else "1"}
    job = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert job.returncode == 0, job.stdout[-20000:] + job.stderr[-20000:]
    return json.loads(table.read_text()) if name == "compile" else None


@pytest.fixture(scope="module")
def compiled(jobs):
    """Job B: the resources that are found, and the committed table of those found before."""
    return jobs["compile"].result(), json.loads((HERE / "resources.json").read_text())


@pytest.mark.interpreter
@interprets
@pytest.mark.parametrize("tests", INTERPRETED)
def test_every_kernel_passes_under_the_interpreter(jobs, tests):
    """Job A: the tests of all backends, on the Triton backend, in float32 and float64."""
    jobs[tests].result()


def test_kernels_take_the_registers_and_memory_that_the_table_says(compiled):
    """After a change that is meant: python -m tarflow_kernels.resources --out tests/tarflow_kernels/resources.json."""
    found, committed = compiled
    if found["triton"] != committed["triton"]:
        pytest.skip(f"the table is that of triton {committed['triton']}, and this is {triton.__version__}")
    assert found["resources"] == committed["resources"]


def test_no_kernel_spills_on_hopper_but_where_it_pays(compiled):
    found, _ = compiled
    spilled = {name: spilled for name, (_, spilled, _, _) in found["resources"]["sm_90"].items() if spilled}
    assert spilled == SPILLED_ON_HOPPER.get(triton.__version__, {})


@pytest.mark.parametrize(("target", "kilobytes"), [("sm_80", 163), ("sm_90", 227), ("sm_100", 227), ("gfx942", 64)])
def test_kernels_fit_their_cards(compiled, target, kilobytes):
    found, _ = compiled
    too_large = {name: row for name, row in found["resources"][target].items() if row[2] > kilobytes * 1024}
    assert too_large == {}


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")],
)
def test_matrices_are_multiplied_by_tensor_cores(compiled, target, instruction):
    """The best instruction of each card is used where the published models train: heads of 64 in bfloat16."""
    found, _ = compiled
    rows = found["resources"][target]
    training = [row for name, row in rows.items() if name.endswith("bfloat16 N=1024 D=64")]
    assert [used for *_, used in training] == [instruction] * 3
    attention = [row for name, row in rows.items() if "attention" in name]
    assert "-" not in {used for *_, used in attention}


def test_no_position_is_moved_before_all_threads_have_read_it():
    """No interpreter shows a race, and no card shows it surely: the order of the instructions excludes it."""
    launch = cases.embedding("meta", torch.bfloat16, 64, 1024, 12, 768, guided=True)
    [kernel] = offline.compile_only(offline.TARGETS["sm_90"], launch)
    kinds = {"ld.global": "read", "bar.sync": "wait", "atom.global.gpu.acq_rel": "count", "st.global": "write"}
    lines = kernel.asm["ptx"].splitlines()
    order = [kind for line in lines for instruction, kind in kinds.items() if instruction in line]
    reads = len(order) - order[::-1].index("read")
    assert order[reads:].index("wait") < order[reads:].index("count") < order[reads:].index("write")
    assert order.count("count") == 1
