"""What is set on a CUDA device, and that it is set back: the flags are the process's, with or without such a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_toys import Square

from raytrust.jobs import runner
from raytrust.jobs.job import Place
from raytrust.jobs.store import JobStore
from raytrust.networks.device import exact, usable

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
newer = pytest.mark.skipif(not hasattr(CUDNN, "conv"), reason="needs a torch that has a precision for each operation")


def asked(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except RuntimeError:
        return "refused"


def state() -> dict[str, Any]:
    found = {
        "matmul": asked(lambda: MATMUL.allow_tf32),
        "cudnn": asked(lambda: CUDNN.allow_tf32),
        "all": asked(torch.get_float32_matmul_precision),
        "deterministic": CUDNN.deterministic,
        "benchmark": CUDNN.benchmark,
        "workspace": os.environ.get(VARIABLE),
    }
    if hasattr(CUDNN, "conv"):
        found |= {n: o.fp32_precision for n, o in (("m", MATMUL), ("c", CUDNN.conv), ("r", CUDNN.rnn))}
    return found


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = state()
    yield
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32, CUDNN.deterministic, CUDNN.benchmark = True, False, False
    if hasattr(CUDNN, "conv"):
        MATMUL.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision = (before[n] for n in "mcr")


def expect_exact() -> None:
    found = state()
    assert (found["matmul"], found["cudnn"], found["all"]) == (False, False, "highest")
    assert (found["deterministic"], found["benchmark"]) == (True, False)
    assert found["workspace"]
    if hasattr(CUDNN, "conv"):
        assert [found[n] for n in "mcr"] == ["ieee"] * 3


def nothing() -> None:
    pass


def older() -> None:
    MATMUL.allow_tf32, CUDNN.benchmark = True, True


def word() -> None:
    torch.set_float32_matmul_precision("medium")
    CUDNN.allow_tf32 = False


def one_of_two() -> None:
    CUDNN.conv.fp32_precision = "ieee"


@pytest.mark.parametrize("choose", [nothing, older, word, pytest.param(one_of_two, marks=newer)])
def test_all_is_as_it_was_after_the_block(choose: Callable[[], None]) -> None:
    choose()
    before = state()
    with exact("cuda:0"):
        expect_exact()
    assert state() == before
    with pytest.raises(ZeroDivisionError), exact(torch.device("cuda")):
        raise ZeroDivisionError
    assert state() == before


def test_a_workspace_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    with exact("cuda"):
        assert os.environ[VARIABLE] == ":16:8"
    assert os.environ[VARIABLE] == ":16:8"


def test_on_the_cpu_nothing_is_set() -> None:
    before = state()
    with exact("cpu"):
        assert state() == before


def test_a_job_on_cuda_is_done_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = Square.run
    monkeypatch.setattr(Square, "run", lambda *args: (expect_exact(), seen.append(args[2].device), run(*args))[-1])
    before = state()
    (outcome,) = runner.work(JobStore(tmp_path, "none"), [Square(3)], Place(device="cuda"))
    assert outcome.reason is None, outcome.reason
    assert seen == ["cuda"]
    assert state() == before


def test_which_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, named in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert usable("auto") == named
        assert usable("cpu") == "cpu"
    assert usable("cuda") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"\AExpected device='cuda' to be one that torch can use\.\Z"):
        usable("cuda")
