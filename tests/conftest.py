"""Settings of all tests."""

import torch
from hypothesis import settings

# The tensors here are tiny: a second thread costs more than it gives, the more so on a busy machine.
torch.set_num_threads(1)

# A slow first example is a compiler or a cold cache at work, not a failure; the same examples come on every run.
settings.register_profile("tarflow", deadline=None, derandomize=True)
settings.load_profile("tarflow")
