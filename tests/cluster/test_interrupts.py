"""Ctrl-C, SIGTERM and SIGHUP in programs of sweeps/ and in those that call the library: small true processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raytrust.cluster.interrupts import Terminated, exit_code, raising

PROGRAM = """
import resource, subprocess, sys, time
from argparse import Namespace
from pathlib import Path
from raytrust.cli import options as cli
from raytrust.cluster.interrupts import raising

root = Path(sys.argv[1])
directory = cli.Directory("program", "a sweep", "sweep.json", ())

def work():
    with raising(once=True):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            time.sleep(1)  # the orderly end, which a second signal would cut off
            (root / "ended").write_text("in order")
    return 0

def main():
    if sys.argv[2] == "loading":
        print("ready", flush=True)
        time.sleep(60)
    if sys.argv[2] == "limits":
        child = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
        return subprocess.call([sys.executable, "-c", child])
    return directory.run(root, Namespace(address=None), work)

sys.exit(cli.start(main))
"""
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def default_signals() -> None:
    """A shell that starts the tests in the background, or nohup, has them ignore these, and children inherit that."""
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)


def start(root: Path, moment: str = "run") -> subprocess.Popen[str]:
    """The program, when it is ready for a signal. Its directory has a name that a shell would split."""
    root.mkdir()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root), moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    return program


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_every_ending_signal_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """However often it comes, and whichever comes after it."""
    root = tmp_path / "my results"
    program = start(root)
    for again in (number, number, *CODES):
        program.send_signal(again)
        time.sleep(0.1)
    output, errors = program.communicate(timeout=60)
    assert program.returncode == CODES[number]
    assert errors == ""
    word = "Interrupted" if number == signal.SIGINT else f"Ended by {number.name}"
    command = f"python -c --resume '{root}'"
    assert output == f"\n{word}; what was finished is kept. Go on with: {command}\n"
    assert (root / "ended").read_text() == "in order"


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_while_libraries_load_is_a_line(tmp_path: Path, number: signal.Signals) -> None:
    program = start(tmp_path / "results", "loading")
    program.send_signal(number)
    output, errors = program.communicate(timeout=60)
    assert program.returncode == CODES[number]
    assert output == ""
    assert errors == ("\nInterrupted.\n" if number == signal.SIGINT else f"\nEnded by {number.name}.\n")


def test_a_terminal_that_is_closed_ends_it_in_order(tmp_path: Path) -> None:
    """What it prints then goes nowhere, and is no error."""
    root = tmp_path / "results"
    root.mkdir()
    terminal, other = os.openpty()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root), "run"],
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
        preexec_fn=default_signals,
    )
    os.close(other)
    assert os.read(terminal, 100).startswith(b"ready")
    os.close(terminal)
    program.send_signal(signal.SIGHUP)  # the kernel sends it to a session whose terminal this is
    assert program.wait(60) == 129
    assert (root / "ended").read_text() == "in order"


def test_no_program_leaves_a_core_file(tmp_path: Path) -> None:
    """Nor do the processes that it starts, whatever the limit was."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "limits"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "(0, 0)\n"
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("the tests themselves run without core files")


# Within a process


@pytest.fixture(autouse=True)
def _default_signals() -> None:
    for number in CODES:
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)


def test_the_signals_are_taken_back_from_a_library() -> None:
    """As ray.init takes SIGTERM."""

    def library() -> None:
        with raising(once=True) as take:
            signal.signal(signal.SIGTERM, lambda *_: os.abort())
            take()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(Terminated) as ended:
        library()
    assert exit_code(ended.value) == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_library_that_passes_on_an_interruption_does_not_hide_which() -> None:
    """As Ray's core does."""

    def library() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    with pytest.raises(Terminated), raising(once=True):
        library()


def test_what_is_ignored_or_handled_already_stays_so() -> None:
    """nohup ignores SIGHUP."""
    calls = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda n, _: calls.append(n))
    try:
        with raising():
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
        assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_another_thread_leaves_signals_alone() -> None:
    def thread() -> None:
        with raising() as take:
            take()
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[object] = []
    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
    assert seen == [signal.SIG_DFL]
