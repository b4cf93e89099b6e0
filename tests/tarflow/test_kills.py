"""A run of which processes are killed at random moments loses nothing, and ends as if nobody had disturbed it."""

import sys

import pytest

import kills


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of torchrun in /proc")
def test_a_run_whose_processes_are_killed_at_random_moments_is_that_of_an_undisturbed_one(tmp_path):
    moments = kills.run(tmp_path, kills=2, sharding="none", steps=60, seed=1)
    assert sum(moments.values()) == 2
