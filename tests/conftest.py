"""Settings of all tests, and what several of them need set up."""

import os

import pytest
import torch
from hypothesis import Phase, settings

from helpers import BACKENDS, DEVICE, INTERPRETED
from tarflow_kernels import incremental

# The tensors here are tiny: a second thread costs more than it gives, the more so beside other processes.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

# A slow first example is a compiler or a cold cache at work, not a failure; the same examples come on every run.
settings.register_profile("tarflow", deadline=None, derandomize=True)
# Interpreted kernels are slow: fewer examples, and none of the hundreds that would make a failing one smaller.
settings.register_profile(
    "interpreter", settings.get_profile("tarflow"), max_examples=50, phases=[Phase.explicit, Phase.generate]
)
# On a GPU every other example is compiled first.
settings.register_profile("gpu", settings.get_profile("tarflow"), max_examples=12)
settings.load_profile("interpreter" if INTERPRETED else "tarflow" if DEVICE == "cpu" else "gpu")

# Where no kernel runs: test_jobs.py has it collected in a process that interprets them.
collect_ignore = [] if "triton" in BACKENDS else ["tarflow_kernels/test_triton.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite in as many processes as there are cores, and what is named on the command line in one."""
    has_processes = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    whole = config.args_source is not config.ArgsSource.ARGS
    if has_processes and whole and config.option.numprocesses is None:
        config.option.numprocesses, config.option.maxprocesses = "auto", 8


@pytest.fixture(scope="module")
def on_device():
    """Tensors are made where the kernels run."""
    with torch.device(DEVICE):
        yield


@pytest.fixture
def poisoned():
    """Whatever is allocated and not written to is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def step_by_step(monkeypatch):
    """No problem of more than a few rows is too small to be inverted step by step."""
    monkeypatch.setattr(incremental, "FEW_PRODUCTS", 0)


@pytest.fixture
def double_precision():
    """Pyro's inverse of an affine transform works in the default precision alone."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
