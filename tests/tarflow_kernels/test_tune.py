"""The tuner: what it keeps is what a launcher finds, and nothing else of the file is lost."""

import json

import pytest

from tarflow_kernels import tune

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from tarflow_kernels import resources
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
    resources.compile_only(resources.TARGETS["sm_90"], lambda: problem.make("meta")())
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
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(tune, "tune", lambda problem, candidates: (candidates[-1], f"{len(candidates)} candidates"))
    with resources.pretend(resources.TARGETS["sm_90"]):
        tune.main(["--op", "affine_map_backward", "--seconds", str(seconds), "--workers", "2"])
    found = {key for path in folder.iterdir() for key in json.loads(path.read_text())}
    assert found == written
    assert capsys.readouterr().out.count("out of time" if not written else "9 candidates") == 4


def test_there_is_nothing_to_tune_without_a_gpu(monkeypatch):
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(f"torch.{kind}.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        tune.main([])
