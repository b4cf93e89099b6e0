"""The static model of an H100: it reads all of a kernel, goes where its trips say, and notices a slower loop."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton

from tarflow_kernels import cases, hopper, predict
from tarflow_kernels.hopper import Trips
from tarflow_kernels.offline import TARGETS, launches
from tarflow_kernels.triton import configs

TABLE = Path(__file__).parents[2] / "benchmarks" / "predictions" / "h100.json"


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """No card that this machine may have was ever tuned for."""
    monkeypatch.setattr(configs, "device_name", lambda: None)


@pytest.fixture(scope="module")
def code():
    """The forward kernel of attention, which has one loop with an optional part, the mask."""
    (launched,) = launches(TARGETS["sm_90"], lambda: cases.attention("meta", torch.bfloat16, 1, 1024, 64))
    return hopper.disassemble(launched.compiled.asm["cubin"])


@pytest.fixture(scope="module")
def predictions():
    return {row.name: predict.predict(row) for row in predict.rows()}


def test_every_instruction_is_read(code):
    addresses = [instruction.address for instruction in code]
    assert addresses == list(range(0, 16 * len(code), 16))
    assert {"HGMMA", "LDGSTS", "MUFU", "EXIT"} <= {instruction.name for instruction in code}


def test_a_program_goes_through_its_loop_as_often_as_it_is_told(code):
    (loop,) = hopper.find_loops(code)
    for times in (1, 2, 7):
        path = Counter(hopper.unroll(code, [Trips(times)]))
        assert path[loop.first] == path[loop.last] == times
        products = [i for i, instruction in enumerate(code) if instruction.name == "HGMMA"]
        assert {path[i] for i in products} == {times}


def test_the_optional_part_of_a_loop_is_gone_through_at_the_end(code):
    (loop,) = hopper.find_loops(code)
    path = hopper.unroll(code, [Trips(5, optional=2)])
    masked = {i for i in range(*loop) if code[i].name == "FSEL"}
    seen = [i in masked for i in path]
    rounds, last = [], 0
    for at, i in enumerate(path):
        if i == loop.last:
            rounds.append(any(seen[last:at]))
            last = at
    assert rounds == [False, False, False, True, True]


def test_trips_are_given_for_every_loop(code):
    with pytest.raises(ValueError, match="trips: expected one for each of 1 loops; got 2"):
        hopper.unroll(code, [Trips(1), Trips(1)])


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [(128, 8, 66_000, 2), (134, 8, 0, 1), (168, 4, 0, 3), (32, 4, 0, 16), (16, 1, 0, 32), (32, 4, 100_000, 2)],
)
def test_programs_fit_by_registers_threads_and_shared_memory(registers, warps, shared, programs):
    """As NVIDIA's occupancy calculator has it for compute capability 9.0."""
    assert hopper.occupancy(registers, warps, shared) == programs


def test_work_takes_time_in_proportion(code):
    path = hopper.unroll(code, [Trips(8)])

    def cycles(programs, latency=hopper.L2_LATENCY):
        return hopper.simulate(code, 4, 3, [path] * programs, latency=latency).cycles

    assert 1.8 < cycles(24) / cycles(12) < 2.2
    assert cycles(12, latency=3000) > cycles(12) > cycles(12, latency=30)


def test_what_is_busy_is_busy_no_longer_than_the_whole(code):
    path = hopper.unroll(code, [Trips(8)])
    result = hopper.simulate(code, 4, 3, [path] * 6)
    assert result.issued == 6 * len(path)
    assert max(result.issued, *result.busy.values()) <= result.cycles + hopper.L2_LATENCY
    assert abs(result.issued + sum(result.idle.values()) - result.cycles) < 2


def test_a_worse_configuration_is_predicted_to_be_slower():
    """With two stages a tile is waited for as soon as it is asked for."""
    (row,) = (row for row in predict.rows() if row.name.startswith("causal_attention, B=32"))
    kernel, config = "causal_attention_forward", {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4, "maxnreg": 168}
    taken = {}
    for stages in (2, 3):
        with configs.use(kernel, config | {"num_stages": stages}):
            taken[stages] = predict.predict(row).microseconds
    assert taken[2] > 1.05 * taken[3]


def test_nothing_is_predicted_to_be_faster_than_its_limit(predictions):
    for row in predictions.values():
        assert 0 < row.limit <= row.microseconds
        assert row.kernels


def test_kernels_are_predicted_as_the_table_says(predictions):
    """After a change that is meant: python -m tarflow_kernels.resources --model sm_90 --out TABLE."""
    committed = json.loads(TABLE.read_text())
    if triton.__version__ != committed["triton"]:
        pytest.skip(f"the table is that of triton {committed['triton']}, and this is {triton.__version__}")
    assert json.loads(json.dumps(predict.as_json(predictions))) == committed["predictions"]


def test_a_table_of_predictions_says_that_nothing_was_measured(predictions):
    title, *lines = predict.show(predictions)
    assert "predicted for an H100, not measured" in title
    assert sum("programs at a time" in line for line in lines) == sum(len(row.kernels) for row in predictions.values())
