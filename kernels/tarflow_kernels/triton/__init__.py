"""The Triton kernels and their launchers, a file per op; imported when the first of them runs."""
