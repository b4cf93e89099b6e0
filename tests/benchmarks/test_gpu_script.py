"""Ten minutes on a card are not wasted: whatever a kernel does to its process, the rest is measured, and it is named.

The processes of the stages are played by small scripts that crash, hang and tell as a kernel on a card might.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import device as devices
import fallbacks
import gpu
import processes
import records
import report
import smoke
import stages
from row import Contender, Row

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
CONFIG = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
KERNEL = "causal_attention_forward:bfloat16,d64,n1024"
MACHINE = {"device": "a card", "driver": "1", "torch": "2", "triton": "3", "python": "3", "commit": "abc"}

PLAYER = """
import json, os, sys, time
job = json.loads(sys.argv[1])
def tell(**message):
    print("@@ " + json.dumps(message), flush=True)
"""


def make_row(name, *contenders):
    draw, expect = lambda device: torch.ones(2), lambda inputs: (inputs,)
    return Row(name, "model", {"B": 1}, torch.float32, 8.0, 8.0, dict.fromkeys(contenders), draw, expect)


def timed(row, seconds=1.0, **entry):
    """A record of a row as a process tells it."""
    entry = {
        "p20": seconds,
        "p50": seconds,
        "p80": seconds,
        "percent_of_limit": 50.0,
        "configs": {KERNEL: CONFIG},
        **entry,
    }
    return {"name": row, "machine": MACHINE, "measured": "now", "contenders": {"triton": entry}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(play)`` is a run whose processes do what a few lines say, of two cases and two rows."""
    monkeypatch.setattr(devices, "describe", lambda device: MACHINE)
    monkeypatch.setattr(stages, "cases", lambda device: dict.fromkeys(("good", "bad")))
    table = [make_row("bad", "triton", "SDPA"), make_row("good", "triton", "SDPA")]
    monkeypatch.setattr(stages, "all_rows", lambda device: table)
    monkeypatch.setattr(stages, "tuned", dict)
    monkeypatch.setattr(processes, "GRACE", 0.5)

    def make(play, **options):
        script = tmp_path / "play.py"
        script.write_text(PLAYER + dedent(play))
        return stages.Run(CPU, tmp_path / "results.json", [sys.executable, "-S", str(script)], **options)

    return make


BAD, GOOD = (make_row(name, "triton", "SDPA").name for name in ("bad", "good"))

# Smoke ----------------------------------------------------------------------------------------------------------------

SMOKE = f"""
if job["case"] == "bad":
    tell(launching={KERNEL!r}, config={CONFIG})
    print("about to launch", flush=True)
    HOW
tell(found="out", error=0.1, allowed=0.2)
"""
HANG, CRASH = "time.sleep(600)", "os.abort()"


@pytest.mark.parametrize(
    ("how", "said", "tried"),
    [
        (CRASH, "ended by SIGABRT", fallbacks.LEVELS),
        (HANG, "nothing heard for 5 s", ("as chosen", "small tiles")),
        ("sys.exit('out is wrong')", "out is wrong", fallbacks.LEVELS),
    ],
    ids=["crash", "hang", "wrong"],
)
def test_a_kernel_that_fails_is_named_with_its_configuration_and_costs_no_other(run, capsys, how, said, tried):
    assert stages.smoke(run(SMOKE.replace("HOW", how), silence={"smoke": 5.0}), seconds=120)
    found = run("").results()["smoke"]
    assert found["good"]["passed"]
    assert found["good"]["errors"] == {"out": [0.1, 0.2]}
    assert not found["bad"]["passed"]
    assert found["bad"]["configs"] == {KERNEL: CONFIG}
    assert tuple(found["bad"]["failed"]) == tried
    assert all(said in reason for reason in found["bad"]["failed"].values())
    assert "about to launch" in found["bad"]["failed"]["as chosen"]
    printed = capsys.readouterr().out
    assert f"bad: FAILED as chosen, in {json.dumps({KERNEL: CONFIG})}: " in printed
    assert "smoke: 1 of 2 cases passed" in printed


def test_a_safer_configuration_that_works_is_reported_and_is_where_rows_begin(run, capsys):
    this = run(SMOKE.replace("HOW", "job['level'] < 2 and os.abort()"))
    assert stages.smoke(this, seconds=60)
    bad = this.results()["smoke"]["bad"]
    assert (bad["passed"], bad["level"], list(bad["failed"])) == (True, 2, ["as chosen", "one stage"])
    assert "bad: passed with four warps; failed as chosen, one stage" in capsys.readouterr().out
    assert stages.known_levels(this.results()) == {"causal_attention_forward:bfloat16": 2}


@pytest.mark.parametrize("how", [CRASH, f"sys.exit({devices.LOST!r})"], ids=["crash", "illegal access"])
def test_a_kernel_that_brings_down_every_process_is_launched_no_more(run, how):
    this = run(SMOKE.replace("HOW", how))
    stages.smoke(this, seconds=60)
    (level,) = stages.known_levels(this.results()).values()
    with pytest.raises(RuntimeError, match="none of its configurations works"):
        fallbacks.safer(CONFIG, level)


def test_a_hang_that_was_tried_once_begins_at_the_last_resort(run):
    this = run(SMOKE.replace("HOW", HANG), silence={"smoke": 5.0})
    stages.smoke(this, seconds=8)
    assert stages.known_levels(this.results()) == {"causal_attention_forward:bfloat16": 3}


def test_smoke_ends_in_time_and_goes_on_with_what_is_left(run, capsys):
    began = time.monotonic()
    assert not stages.smoke(run(SMOKE.replace("HOW", HANG)), seconds=4)
    assert time.monotonic() - began < 20
    assert run("").results()["smoke"].keys() == {"good"}
    assert stages.smoke(run("assert job['case'] == 'bad'"), seconds=60)


def test_a_case_tells_what_it_found_and_ends_with_what_is_wrong(monkeypatch, capsys):
    def case(device):
        yield "out", 0.1, 0.2
        yield "grad", float("nan"), 0.2

    monkeypatch.setattr(smoke, "cases", lambda device: {"case": case})
    with pytest.raises(SystemExit, match=r"^grad is wrong: error nan, of which 2\.0e-01 is allowed$"):
        smoke.run("case", CPU)
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first.removeprefix(processes.MARK)) == {"found": "out", "error": 0.1, "allowed": 0.2}
    assert '"found": "grad"' in second


@pytest.mark.parametrize("case", smoke.cases(CPU))
def test_every_case_passes_where_the_kernels_are_those_of_plain_torch(case):
    smoke.run(case, CPU)


# Rows -----------------------------------------------------------------------------------------------------------------

ROWS = f"""
for name, past in job["pasts"].items():
    tell(row=name)
    for contender in ("triton", "SDPA", "timing"):
        if contender in past["skipped"]:
            continue
        tell(contender=contender)
        if contender == "triton":
            tell(launching={KERNEL!r}, config={CONFIG})
        if name == {BAD!r}:
            HOW
    tell(record={timed("ROW")} | {{"name": name, "past": past}})
"""


def test_a_row_that_brings_its_process_down_is_measured_with_the_next_safer_configuration(run):
    this = run(ROWS.replace("HOW", "contender == 'triton' and past['level'] < 2 and os.abort()"))
    assert stages.rows(this, seconds=60)
    found = this.results()["rows"]
    assert found[BAD]["past"]["level"] == 2
    assert "ended by SIGABRT" in found[BAD]["past"]["failed"]["one stage"]
    assert found[GOOD]["past"] == {"level": 0, "failed": {}, "skipped": {}}


def test_a_row_without_any_configuration_that_works_is_measured_for_the_others(run):
    this = run(ROWS.replace("HOW", "contender == 'triton' and os.abort()"))
    assert stages.rows(this, seconds=60)
    skipped = this.results()["rows"][BAD]["past"]["skipped"]["triton"]
    assert all(level in skipped for level in fallbacks.LEVELS)


def test_a_hang_costs_its_time_twice_at_most(run):
    this = run(ROWS.replace("HOW", "contender == 'triton' and past['level'] < 3 and time.sleep(600)"))
    this.silence = {"rows": 5.0}
    assert stages.rows(this, seconds=60)
    past = this.results()["rows"][BAD]["past"]
    assert (past["level"], list(past["failed"])) == (3, ["as chosen"])


def test_a_rival_that_brings_the_process_down_is_not_held_against_our_kernel(run):
    this = run(ROWS.replace("HOW", "contender == 'SDPA' and os.abort()"))
    assert stages.rows(this, seconds=60)
    past = this.results()["rows"][BAD]["past"]
    assert (past["level"], list(past["skipped"])) == (0, ["SDPA"])


def test_a_row_that_cannot_be_set_up_is_given_up_with_the_reason(run):
    this = run(
        ROWS.replace('for contender in ("triton"', f'name == {BAD!r} and os.abort()\n    for contender in ("triton"')
    )
    assert stages.rows(this, seconds=60)
    found = this.results()["rows"]
    assert found[BAD]["not_measured"].startswith("ended by SIGABRT")
    assert found[GOOD]["contenders"]


def test_a_process_that_dies_before_its_first_row_is_held_against_none(run, capsys):
    this = run("sys.exit('no memory for a context')", go_on=True)
    assert not stages.rows(this, seconds=60)
    assert "no memory for a context" in capsys.readouterr().out
    assert this.results()["rows"] == {}


def test_what_there_was_no_time_for_says_so_and_is_measured_by_the_next_call_alone(run):
    assert not stages.rows(run(ROWS.replace("HOW", "time.sleep(600)")), seconds=1.5)
    late = run("").results()["rows"]
    assert {late[BAD]["not_measured"], late[GOOD]["not_measured"]} == {records.LATE}
    this = run(ROWS.replace("HOW", "pass"))
    this.keep([timed(BAD)])
    this.go_on = True
    assert stages.rows(this, seconds=60)
    assert "past" not in this.results()["rows"][BAD]
    assert "past" in this.results()["rows"][GOOD]


def test_rivals_that_are_compiled_are_measured_by_a_later_call(run):
    this = run(ROWS.replace("HOW", "pass"), go_on=True)
    without = timed(BAD)
    without["contenders"]["compiled"] = {"unavailable": records.NOT_COMPILED}
    this.keep([without, timed(GOOD)])
    assert stages.rows(this, seconds=60)
    assert "past" not in this.results()["rows"][BAD]
    this.compiled = True
    assert stages.rows(this, seconds=60)
    assert ["past" in this.results()["rows"][name] for name in (BAD, GOOD)] == [True, False]


@pytest.fixture
def contender_of(monkeypatch):
    """A contender called triton, which is right from some level on, and else fails or is wrong."""
    for ceiling in ("copy_rate", "matrix_rate"):
        monkeypatch.setattr(devices, ceiling, lambda *device: 1e9)
    monkeypatch.setattr(devices, "describe", lambda device: MACHINE)

    def make(works_from, failure):
        def prepare(inputs):
            for notes in fallbacks._notes:
                notes[KERNEL] = fallbacks.safer(CONFIG, fallbacks._at)
            if fallbacks._at < works_from and failure:
                raise failure
            wrong = fallbacks._at < works_from
            return lambda: (inputs + wrong,)

        plain = Contender(lambda inputs: lambda: (inputs,))
        contenders = {"triton": Contender(prepare), "reference": plain}
        return Row("op", "model", {"B": 1}, torch.float32, 8.0, 8.0, contenders, torch.ones(4).to, lambda x: (x,))

    return make


@pytest.mark.parametrize(
    ("failure", "said"),
    [(None, "error 1.0e+00"), (torch.OutOfMemoryError("out of memory"), "out of memory"), (RuntimeError("bad"), "bad")],
    ids=["wrong", "out of memory", "an exception"],
)
def test_our_contender_that_fails_is_measured_with_what_works_and_says_what_failed_first(contender_of, failure, said):
    entry = records.measure(contender_of(2, failure), CPU, seconds=0.01).record["contenders"]["triton"]
    assert entry["p50"] > 0
    assert (entry["level"], list(entry["failed"])) == (2, ["as chosen", "one stage"])
    assert entry["configs"] == {KERNEL: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}}
    assert all(said in reason for reason in entry["failed"].values())


def test_a_configuration_that_others_have_shown_to_be_needed_is_named_too(contender_of, monkeypatch):
    monkeypatch.setattr(fallbacks, "known", {fallbacks.family(KERNEL): 1})
    entry = records.measure(contender_of(0, None), CPU, seconds=0.01).record["contenders"]["triton"]
    assert (entry["known_level"], "level" in entry) == (1, False)


def test_our_contender_that_works_with_nothing_says_all_that_failed(contender_of):
    record = records.measure(contender_of(9, RuntimeError("bad")), CPU, seconds=0.01).record
    assert list(record["contenders"]["triton"]["failed"]) == list(fallbacks.LEVELS[:-1])
    assert list(records.timed(record)) == ["reference"]


def test_a_row_that_does_not_fit_into_memory_leaves_the_others(contender_of):
    def draw(device):
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    row = contender_of(0, None)
    object.__setattr__(row, "draw", draw)
    assert "99 GiB" in records.attempt(row, CPU).record["not_measured"]


def test_a_process_that_lost_its_gpu_ends_before_others_are_blamed(monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    devices.require_alive(RuntimeError("harmless"))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit, match="the GPU is lost to this process: RuntimeError: first"):
        devices.require_alive(RuntimeError("first"))


# Configurations -------------------------------------------------------------------------------------------------------


def test_configurations_become_safer_and_stay_what_kernels_take():
    """The tile that an attention kernel owns stays a multiple of the one by which it walks."""
    from tarflow_kernels.triton import attention

    for phase, candidates in attention.CANDIDATES.items():
        for level in range(len(fallbacks.LEVELS)):
            for config in (fallbacks.safer(candidate, level) for candidate in candidates):
                m, n = config["BLOCK_M"], config["BLOCK_N"]
                assert (n % m if phase == "backward_keys" else m % n) == 0
    assert fallbacks.safer(CONFIG, 0) == CONFIG
    assert fallbacks.safer(CONFIG, 3) == {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def test_levels_that_would_change_nothing_are_not_tried():
    affine = {"affine_map:float32,n64": {"BLOCK": 1024, "num_warps": 4}}
    assert fallbacks.next_level(affine, 0) == 3
    assert fallbacks.next_level({"affine_map:float32,n64": {"BLOCK": 128, "num_warps": 4}}, 0) is None
    assert fallbacks.next_level({}, 0) is None


def test_launchers_are_given_safer_configurations_unless_they_were_tuned(monkeypatch):
    from tarflow_kernels.offline import TARGETS, pretend
    from tarflow_kernels.triton import configs

    monkeypatch.setattr(configs, "tuned", lambda kernel, device: {"bfloat16,d64,n256": CONFIG})
    monkeypatch.setattr(configs, "choose", configs.choose)
    monkeypatch.setattr(fallbacks, "known", {})
    fallbacks.watch()
    fallbacks.learn([KERNEL], 2)
    with pretend(TARGETS["sm_90"]), fallbacks.noted() as notes:
        configs.choose("causal_attention_forward", "bfloat16,d64,n1024", CONFIG)
        configs.choose("causal_attention_forward", "float32,d64,n1024", CONFIG)
        configs.choose("causal_attention_forward", "bfloat16,d64,n256", CONFIG)
    assert list(notes.values()) == [fallbacks.safer(CONFIG, 2), CONFIG, CONFIG]


# Check ----------------------------------------------------------------------------------------------------------------


def test_failed_tests_are_named_also_where_one_hangs_or_brings_its_process_down(run, tmp_path, monkeypatch):
    file = tmp_path / "test_card.py"
    file.write_text(
        dedent("""
        import os, time
        def test_passes(): pass
        def test_fails(): assert 1 == 2
        def test_crashes(): os.abort()
        def test_after(): pass
        def test_hangs(): time.sleep(600)
        """)
    )
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 3)
    this = run("", tests=(file,), silence={"check": 100.0})
    assert not stages.check(this, seconds=15)
    found = this.results()["check"]
    assert found["counts"] == {"passed": 2, "failed": 1, "lost": 1}
    (failed,), (lost,) = ([n for n in found["failed"] if word in n] for word in ("test_fails", "test_crashes"))
    assert "assert 1 == 2" in found["failed"][failed]
    assert "SIGABRT" in found["failed"][lost]
    assert [name.rpartition("::")[2] for name in found["cut_off"]] == ["test_hangs"]


# Tune -----------------------------------------------------------------------------------------------------------------

PROBLEMS = [f"{kernel}:float32" for kernel in "abc"]


@pytest.fixture
def tuner(run, monkeypatch):
    monkeypatch.setattr(stages, "problems_in_order", lambda results: PROBLEMS)
    return run


def test_a_tuner_without_anything_to_say_is_no_failure_of_the_run(tuner, capsys):
    assert not stages.tune(tuner("sys.exit('tune: there is no GPU to tune for')"), seconds=30)
    assert "there is no GPU to tune for" in capsys.readouterr().out
    assert tuner("").results()["tune"] == {}


def test_a_problem_that_brings_the_tuner_down_is_left_and_the_next_is_tuned(tuner):
    this = tuner(
        """
        for name in job["problems"]:
            print(name.ljust(40), end="", flush=True)
            name[0] == "b" and os.abort()
            print("2.0 us 1.0 us {}", flush=True)
        """
    )
    assert stages.tune(this, seconds=30)
    found = this.results()["tune"]
    assert list(found) == PROBLEMS
    assert found[PROBLEMS[0]] == found[PROBLEMS[2]] == "2.0 us 1.0 us {}"
    assert "lost: ended by SIGABRT" in found[PROBLEMS[1]]


def test_what_there_was_no_time_to_tune_is_left_to_the_next_call(tuner):
    late = 'for name in job["problems"]: print(name, "1.0 us" if name[0] == "a" else "left alone: out of time")'
    assert not stages.tune(tuner(late), seconds=30)
    rest = 'for name in job["problems"]: print(name, "2.0 us")'
    assert stages.tune(tuner(rest), seconds=30)
    assert tuner("").results()["tune"] == dict(zip(PROBLEMS, ("1.0 us", "2.0 us", "2.0 us"), strict=True))


def test_the_worst_rows_are_tuned_first_and_ops_take_turns():
    shares = {
        KERNEL: 60.0,
        "causal_attention_backward_keys:bfloat16,d64,n1024": 20.0,
        "affine_map:float32,n4096": 90.0,
        "decode_attention:bfloat16,d64,n1024": 40.0,
    }
    rows = {name: timed(name, percent_of_limit=share, configs={name: CONFIG}) for name, share in shares.items()}
    order = stages.problems_in_order({"rows": rows})
    assert order[:4] == [list(shares)[i] for i in (1, 3, 2, 0)]
    assert len(order) == len(set(order)) > 60


def test_rows_whose_kernels_were_tuned_are_measured_again_and_keep_what_there_was(run, monkeypatch):
    this = run(ROWS.replace("HOW", "pass"))
    this.keep([timed(BAD, 3.0), timed(GOOD, 3.0, configs={"affine_map:float32,n64": CONFIG})])
    monkeypatch.setattr(stages, "tuned", lambda: {"causal_attention_forward": {"bfloat16,d64,n1024": {"BLOCK_M": 64}}})
    assert stages.again(this, seconds=30)
    found = this.results()["rows"]
    assert found[BAD]["before"]["p50"] == 3.0
    assert found[BAD]["contenders"]["triton"]["p50"] == 1.0
    assert found[GOOD]["contenders"]["triton"]["p50"] == 3.0


# Profile and the whole ------------------------------------------------------------------------------------------------


def test_a_profile_that_hangs_costs_itself_alone(run):
    first, *others = stages.profiles.PROFILES
    this = run(
        f"""
        (name,) = job["names"]
        name == {first!r} and time.sleep(600)
        tell(profile=name, table={{"seconds": 1.0, "launches": 2.0, "kernels": []}})
        """,
        silence={"profile": 5.0},
    )
    assert stages.profile(this, seconds=60)
    tables = this.results()["profiles"]
    assert "nothing heard" in tables[first]["unavailable"]
    assert all(tables[name]["launches"] == 2 for name in others)


def test_the_plan_gives_smoke_no_more_than_it_needs_and_loses_no_second():
    for seconds in (100, 560, 3000):
        times = gpu.schedule([], seconds)
        assert times["smoke"] <= 90
        assert sum(times.values()) == pytest.approx(seconds)
    assert list(gpu.schedule(["check", "tune"], 100)) == ["smoke", "rows", "again", "profile"]


def test_a_mistake_in_a_stage_leaves_the_others(run, monkeypatch, capsys):
    def mistaken(run, seconds):
        raise KeyError("of ours")

    monkeypatch.setattr(gpu, "STAGES", {
        "a": gpu.Stage(mistaken, 1, ""), "b": gpu.Stage(lambda run, seconds: True, 1, "")
    })  # fmt: skip
    this = run("")
    monkeypatch.setattr(gpu, "schedule", lambda skip, seconds: {"a": 1.0, "b": 1.0})
    gpu.run_stages(this, [], 2)
    assert this.results()["stages"] == {"a": False, "b": True}


def test_a_run_takes_the_place_of_what_it_repeats_and_of_nothing_else(run, monkeypatch):
    this = run("")
    this.keep(smoke={"case": {}}, check={"counts": {}}, stages={"smoke": True}, machine=MACHINE)
    monkeypatch.setattr(gpu, "STAGES", {name: gpu.Stage(lambda run, seconds: True, 1, "") for name in gpu.STAGES})
    gpu.run_stages(this, ["smoke", "rows", "tune", "again", "profile"], 2)
    assert this.results()["smoke"] == {"case": {}}
    assert this.results()["check"] == {}


def test_the_report_says_which_configuration_a_number_is_of_and_what_was_before():
    entry = {"gigabytes_per_second": 1.0, "level": 2, "failed": {"as chosen": "error 1.0e+00"}}
    row = timed("row", 1e-3, **entry) | {"before": {"p50": 2e-3}, "model": "model", "shape": {"B": 1}, "op": "op"}
    row |= {"dtype": "bfloat16", "note": "", "bound": "copy", "bytes": 1.0}
    row["ceilings"] = {"copy_bytes_per_second": 1e12, "matrix_operations_per_second": 1e12}
    page = report.page({"a-card": {"rows": {"row": row}}})
    assert "| **triton**, four warps | 1.00 ms (before tuning 2.00 ms) |" in page
    assert "- triton, as chosen, in row: error 1.0e+00" in page
    assert "| training step, of the matrix rate | ≥ 50 % | not measured |" in page


DRIVER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}, {str(ROOT / "benchmarks")!r}]
import torch
import device, gpu, stages
from row import Row

def make_row(name):
    return Row(name, "model", {{"B": 1}}, torch.float32, 8.0, 8.0, {{"triton": None}}, None, None)

device.describe = lambda device: {MACHINE}
stages.cases = lambda device: {{"case": None}}
stages.all_rows = lambda device: [make_row(f"row {{i}}") for i in range(12)]
gpu.TASKS = sys.argv.pop(1)
sys.exit(gpu.main())
"""

# Every row leaves a line, so that one can count how often it was measured.
SLOWLY = f"""
if job["task"] == "smoke":
    tell(found="out", error=0.1, allowed=0.2)
for name in job.get("pasts", ()):
    tell(row=name)
    time.sleep(0.3)  # longer than it takes on a busy machine to write what is told
    open(os.path.dirname(sys.argv[0]) + "/measured", "a").write(name + "\\n")
    tell(record={timed("ROW")} | {{"name": name}})
"""


@pytest.fixture
def command(tmp_path):
    """The command with rows that take a moment each, which ``whole`` runs in a process of its own."""
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "play.py").write_text(PLAYER + SLOWLY)
    skip = ["--skip", "check,tune,again,profile"]
    return [
        sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "play.py"),
        "--device", "cpu", "--out", str(tmp_path / "out"), *skip,
    ]  # fmt: skip


@pytest.mark.parametrize("rows_before", [0, 5])
def test_a_run_killed_at_any_moment_goes_on_and_measures_one_row_twice_at_most(command, tmp_path, rows_before):
    measured = tmp_path / "measured"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and (len(measured.read_text().split("\n")) if measured.exists() else 0) <= rows_before:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_quiet(measured)
    interrupted = measured.read_text().splitlines()
    assert len(interrupted) < 12, "the process that measures has not outlived the one that started it"
    done = subprocess.run([*command, "--continue"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    results = json.loads(path.read_text())
    assert len(results["rows"]) == 12
    assert results["stages"] == {"smoke": True, "rows": True}
    assert "== smoke: done before" in done.stdout
    assert len(measured.read_text().splitlines()) <= 13


def _wait_until_quiet(path):
    """Wait until a file has not grown for a while."""
    size = -1
    while size != path.stat().st_size:
        size = path.stat().st_size
        time.sleep(0.5)


def interrupt(command, at):
    """Interrupt a run when it prints a line that begins so, and return what it printed afterwards."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(at):
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--continue goes on from here" in output


def test_an_interrupted_run_keeps_what_it_measured(command, tmp_path):
    interrupt(command, at="-- row 2")
    (path,) = (tmp_path / "out").glob("*.json")
    assert len(json.loads(path.read_text())["rows"]) >= 2


def test_an_interruption_ends_what_runs_side_by_side_and_begins_nothing_else(command, tmp_path):
    hang = f"tell(launching={KERNEL!r}, config={CONFIG})\nprint('hangs', flush=True)\ntime.sleep(600)"
    (tmp_path / "play.py").write_text(PLAYER + hang)
    interrupt(command, at="[case] hangs")


@pytest.mark.slow
def test_all_of_it_can_be_rehearsed_without_a_card(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu.py"),
        "--rehearse",
        "--seconds",
        "600",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert results["stages"] == dict.fromkeys(gpu.STAGES, True), done.stdout
    assert results["machine"]["device"].startswith("Rehearsal")
    assert all(case["passed"] for case in results["smoke"].values())
    assert all("p50" in row["contenders"][records.ours(row)] for row in results["rows"].values())


# Processes ------------------------------------------------------------------------------------------------------------


def test_what_a_process_leaves_behind_is_ended_and_nobody_waits_for_it():
    child = "import subprocess, sys; subprocess.Popen(['sleep', '600']); print(1)"
    ended = processes.run([sys.executable, "-S", "-c", child], seconds=60)
    assert (ended.exit, ended.stopped, ended.output) == (0, "", "1\n")
    assert ended.seconds < 30


def test_one_that_is_late_is_asked_first_and_says_where_it_stood():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test in the background would not hear
    child = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('in the middle')"
    ended = processes.run([sys.executable, "-S", "-c", child], seconds=4)
    assert ended.stopped == "out of time"
    assert ended.output == "in the middle\n"


def test_one_that_does_not_listen_is_killed_and_its_last_words_are_kept(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = f"{deaf}; print('half a line', end='', flush=True); time.sleep(600)"
    ended = processes.run([sys.executable, "-S", "-c", child], seconds=4)
    assert ended.output == "half a line"
    assert ended.failure == "out of time: half a line"


def test_no_process_outlives_the_one_that_started_it(tmp_path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    parent = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import processes\n"
    parent += f"processes.run([sys.executable, '-S', '-c', {child!r}], 600, show=lambda line: print(line, flush=True))"
    with subprocess.Popen([sys.executable, "-S", "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("it lives")
