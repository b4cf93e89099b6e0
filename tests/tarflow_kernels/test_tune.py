"""The tuner: what it keeps is what a launcher finds, and nothing else of the file is lost."""

import json

import pytest
import torch

from tarflow_kernels import tune

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from tarflow_kernels import offline
from tarflow_kernels.triton import configs

FAST, SLOW = {"BLOCK_N": 128, "num_warps": 8}, {"BLOCK_N": 16, "num_warps": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    monkeypatch.setattr(configs, "device_name", lambda: "a-card")
    configs.tuned.cache_clear()
    yield tmp_path
    configs.tuned.cache_clear()


def test_a_launcher_finds_what_was_tuned_for_its_card(folder):
    tune.save(folder, "kernel", "a-card", "bfloat16,d64,n1024", FAST)
    tune.save(folder, "kernel", "another-card", "bfloat16,d64,n256", FAST)
    with offline.pretend(offline.TARGETS["sm_90"]):
        assert configs.choose("kernel", "bfloat16,d64,n1024", SLOW) == FAST
        assert configs.choose("kernel", "bfloat16,d64,n256", SLOW) == SLOW
        assert configs.choose("another kernel", "bfloat16,d64,n1024", SLOW) == SLOW
        with configs.use("kernel", SLOW):
            assert configs.choose("kernel", "bfloat16,d64,n1024", FAST) == SLOW


def test_a_finding_leaves_the_others_where_they_were(folder):
    for key, config in (("a", SLOW), ("c", FAST), ("a", FAST)):
        tune.save(folder, "kernel", "a-card", key, config)
    assert {path.name for path in folder.iterdir()} == {"kernel,a-card.json"}
    assert json.loads((folder / "kernel,a-card.json").read_text()) == {"a": FAST, "c": FAST}


@pytest.mark.parametrize("problem", list(tune.problems()), ids=lambda problem: f"{problem.kernel} {problem.key}")
def test_what_is_tuned_is_what_launchers_look_up(problem, monkeypatch):
    asked = []
    monkeypatch.setattr(configs, "choose", lambda kernel, key, fallback: asked.append((kernel, key)) or fallback)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
    offline.compile_only(offline.TARGETS["sm_90"], lambda: problem.make("meta")())
    assert (problem.kernel, problem.key) in asked


@pytest.mark.parametrize("problem", list(tune.problems()), ids=lambda problem: f"{problem.kernel} {problem.key}")
def test_candidates_cut_along_the_diagonal(problem):
    """An attention kernel owns a multiple of what it walks by: otherwise its two loops would overlap."""
    for candidate in problem.candidates:
        m, n = candidate.get("BLOCK_M", 1), candidate.get("BLOCK_N", 1)
        assert problem.kernel == "decode_attention" or (n % m if problem.kernel.endswith("keys") else m % n) == 0


@pytest.mark.parametrize(
    ("seconds", "written"), [(600, {"bfloat16,n64", "bfloat16,n4096", "float32,n64", "float32,n4096"}), (0, set())]
)
def test_the_command_keeps_what_it_found_while_there_was_time(seconds, written, folder, monkeypatch, capsys):
    """It runs but for the timing, on a card that is not there, and compiles candidates in processes of their own."""

    def last_of(problem, candidates, time_left):
        candidates = list(candidates)
        return candidates[-1], f"{len(candidates)} candidates"

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(tune, "tune", last_of)
    with offline.pretend(offline.TARGETS["sm_90"]):
        tune.main(["--op", "affine_map_backward", "--seconds", str(seconds), "--workers", "2"])
    found = {key for path in folder.iterdir() for key in json.loads(path.read_text())}
    assert found == written
    assert capsys.readouterr().out.count("out of time" if not written else "9 candidates") == 4


def launches(seconds, wrong=()):
    """A problem whose launch takes so many seconds by configuration, on a clock that nobody waits for."""
    candidates = [{"BLOCK": block} for block in seconds]

    def launch():
        block = configs.choose("kernel", "key", {"BLOCK": 0})["BLOCK"]
        return torch.tensor(1.0 + (block in wrong))

    return tune.Problem("kernel", "key", candidates, lambda device: launch)


@pytest.fixture
def timed(monkeypatch, folder):
    """Time launches of a kernel as a table says, and return the configurations in the order in which they were."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    order = []

    def use(seconds):
        def clock(launch):
            order.append(configs.choose("kernel", "key", {"BLOCK": 0})["BLOCK"])
            return seconds[order[-1]]

        monkeypatch.setattr(tune, "_seconds", clock)
        return order

    return use


def test_the_fastest_that_is_right_wins(timed):
    timed({0: 4.0, 1: 3.0, 2: 1.0, 3: 2.0})
    problem = launches([1, 2, 3], wrong=[2])
    assert tune.tune(problem, problem.candidates)[0] == {"BLOCK": 3}


def test_what_there_is_stays_where_nothing_else_is_fit_to_be_timed(timed):
    timed({0: 4.0})
    config, line = tune.tune(launches([1, 2]), [])
    assert config is None
    assert "0 of 2 candidates timed" in line


def test_the_clock_ends_a_problem_between_two_candidates_and_keeps_the_best_so_far(timed):
    order = timed({0: 4.0, 1: 3.0, 2: 1.0})
    problem = launches([1, 2])
    config, _ = tune.tune(problem, problem.candidates, time_left=lambda: len(order) < 2)
    assert config == {"BLOCK": 1}
    assert order == [0, 1]


def test_ops_take_turns_unless_problems_are_named(capsys):
    ops = [problem.kernel.partition("_")[0] for problem in tune.in_turn(tune.problems())]
    assert ops[:8] == 2 * ["causal", "decode", "affine", "mixture"]
    assert len(ops) == len(list(tune.problems()))
    with pytest.raises(SystemExit):
        tune.main(["--problem", "affine_map"])
    assert "--problem: expected names such as" in capsys.readouterr().err


def test_named_problems_are_tuned_in_the_order_given(timed, monkeypatch, capsys):
    timed({0: 2.0, 1: 1.0})
    known = [launches([1])._replace(kernel=kernel) for kernel in ("a", "b", "c")]
    monkeypatch.setattr(tune, "problems", lambda: iter(known))
    tune.main(["--problem", "c:key", "--problem", "a:key", "--workers", "1"])
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["c", "a"]


def test_there_is_nothing_to_tune_without_a_gpu(monkeypatch):
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(f"torch.{kind}.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        tune.main([])
