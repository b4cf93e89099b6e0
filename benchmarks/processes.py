"""Processes that cannot take this one with them: each has a group of its own, a time limit, and is heard line by line.

What a process found, it tells in lines that hold a mark and JSON; all else that it prints is there to be shown. One
that is late is interrupted, so that it can say where it stood, and then killed with all that it started. So are those
that are left when this process ends, however it does.
"""

import contextlib
import functools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

MARK = "@@ "
# Seconds from the interruption to the kill.
GRACE = 8.0
_KEPT_LINES = 60
_running: set[subprocess.Popen] = set()
_stopped = threading.Event()

_GUARD = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        exit: its exit code; that of a signal is negative.
        stopped: why it was stopped, if it was.
        output: the last lines that it printed.
        seconds: how long it took.
    """

    exit: int
    stopped: str
    output: str
    seconds: float

    @property
    def failure(self) -> str:
        """Why it did not end well, and the last that it printed; empty where it did."""
        if not self.stopped and self.exit == 0:
            return ""
        return f"{self.stopped or _describe(self.exit)}: {self.output[-800:].strip() or 'it printed nothing'}"


def tell(**message: Any) -> None:
    """Tell something to the process that started this one."""
    print(MARK + json.dumps(message), flush=True)


def run(
    command: Sequence[str],
    seconds: float,
    hear: Callable[[dict[str, Any]], None] = lambda message: None,
    show: Callable[[str], None] = lambda line: None,
    silence: float = math.inf,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Run a command until it ends, or is stopped.

    Args:
        command: the command.
        seconds: how long it may take.
        hear: a function that is called with what it tells.
        show: a function that is called with every other line.
        silence: for how many seconds it may print nothing.
        environment: variables beside those of this process.
    """
    began = time.monotonic()
    process = _start(command, environment or {})
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    stopped, deadline, heard = "", began + seconds, began
    # How it is stopped, and how long it has then to say what it has to say.
    stops = [(signal.SIGINT, GRACE), (signal.SIGKILL, 1.0)]
    try:
        while (line := _next(process, lines, min(deadline, heard + silence))) is not None:
            if line:
                heard = time.monotonic()
                _pass_on(line, kept, hear, show)
            elif not stops:
                break
            else:
                late = "out of time" if time.monotonic() >= deadline else f"nothing heard for {silence:.0f} s"
                stopped = stopped or late
                number, wait = stops.pop(0)
                _signal(process, number)
                deadline, silence = time.monotonic() + wait, math.inf
    finally:
        _signal(process, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver can keep it for ever
            process.wait(GRACE)
        _running.discard(process)
        _guard("-", process.pid)
    return Ended(process.returncode or 0, stopped, "".join(kept), time.monotonic() - began)


def side_by_side(work: Callable[[Any], None], parts: Iterable[Any], workers: int) -> None:
    """Do the parts of some work, so many at a time, in the order given; an interruption ends their processes too."""
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work, part) for part in parts]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise


def stop_all() -> None:
    """Kill all processes that run, and let no other begin."""
    _stopped.set()
    for process in list(_running):
        _signal(process, signal.SIGKILL)


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    if _stopped.is_set():
        raise RuntimeError("all processes were stopped")
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _running.add(process)
    _guard("+", process.pid)
    return process


def _read(process: subprocess.Popen, lines: queue.SimpleQueue) -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _next(process: subprocess.Popen, lines: queue.SimpleQueue, deadline: float) -> str | None:
    """The next line, an empty one when it is late, None at the end, also where others hold the output open."""
    while True:
        ended = process.poll() is not None
        try:
            return lines.get(timeout=max(min(deadline - time.monotonic(), 0.5), 0))
        except queue.Empty:
            if ended:
                return None
            if time.monotonic() >= deadline:
                return ""


def _pass_on(line: str, kept: deque, hear: Callable, show: Callable) -> None:
    text, marked, message = line.partition(MARK)
    if marked:
        # One that was killed in the middle of a line is no news.
        with contextlib.suppress(json.JSONDecodeError):
            hear(json.loads(message))
        line = text
    if line.strip():
        kept.append(line)
        show(line)


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and to all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _describe(code: int) -> str:
    """Name an exit code.

    >>> _describe(-6), _describe(3)
    ('ended by SIGABRT', 'exit code 3')
    """
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _guard(sign: str, group: int) -> None:
    """Tell the guard which groups there are: it kills them when its input ends, which is when this process does."""
    with contextlib.suppress(BrokenPipeError), _guarding:
        guard = _guard_process()
        guard.stdin.write(f"{sign}{group}\n")
        guard.stdin.flush()


_guarding = threading.Lock()


@functools.cache
def _guard_process() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _GUARD], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
