"""Hangs of a GPU, played on a CPU: the host asks a stand-in for the device that never gets as far, and a real rank is stopped."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from moe.errors import CollectiveTimeout
from moe.parallel import deadline, launch
from moe.parallel.host_copy import to_host
from moe.parallel.layout import Layout
from moe.parallel.mesh import start
from tests.workers import run_ranks

CUDA = torch.device("cuda", 0)


def hangs(rank: int, world: int, how: str, folder: str) -> str:
    """Rank 1 is silent; on the others the device never comes to the end of what it waits for."""
    start(Layout(device="cpu", timeout=1))
    deadline.ROLL_CALL_SECONDS = 1
    deadline.mark = lambda device: lambda: False
    Path(folder, str(rank)).write_text(str(os.getpid()))
    said = ""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else time.sleep(4)
    else:
        try:
            to_host(torch.ones(1))
        except CollectiveTimeout as error:
            said = str(error)
        if how == "stopped" and rank == 0:
            time.sleep(0.5)  # rank 2 has heard its answer by then
            os.kill(int(Path(folder, "1").read_text()), signal.SIGCONT)
    dist.destroy_process_group()
    return said


@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_rank_that_is_silent_while_others_wait_for_their_gpu_is_named_within_the_timeout(tmp_path, how):
    began = time.monotonic()
    said = run_ranks(3, hangs, how, str(tmp_path))
    assert said[0].startswith("a collective before ")
    assert said[0].endswith(" did not end within parallel.timeout=1 s: no answer from rank 1 within 1 s")
    assert said[2].endswith("rank 0 does not answer, or knows who does not")
    assert time.monotonic() - began < 20


def test_a_device_that_is_late_but_comes_is_waited_for(monkeypatch):
    answers = iter([False, False, True])
    monkeypatch.setattr(deadline, "mark", lambda device: lambda: next(answers))
    monkeypatch.setattr(deadline, "_limit", 5.0)
    assert to_host(torch.ones(2)).tolist() == [1, 1]
    assert next(answers, None) is None


def test_on_a_cpu_nothing_is_asked():
    assert deadline.mark(torch.device("cpu")) is None


def test_nccl_gives_up_after_our_own_wait_and_the_roll_call():
    for seconds in (1, 600):
        ours = timedelta(seconds=seconds)
        assert deadline.of_groups(ours, torch.device("cpu")) == ours
        assert deadline.of_groups(ours, CUDA) >= 2 * ours + timedelta(seconds=2 * deadline.ROLL_CALL_SECONDS)


def reason(codes: dict[int, int], verdicts: list | None = None, nproc: int = 3, late: tuple[int, ...] = ()) -> dict:
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=10 if rank in late else 0) for rank, code in codes.items()}
    return launch._reason(nproc, failures, verdicts or [])


def test_ranks_that_nccls_watchdog_aborts_are_a_timeout_and_the_silent_one_is_named():
    found = reason({0: -signal.SIGABRT, 2: -signal.SIGABRT, 1: -signal.SIGKILL}, late=(1,))
    assert (found["code"], found["again"]) == (CollectiveTimeout.exit_code, True)
    assert found["message"] == (
        "a collective did not end: ranks 0, 2 were killed by SIGABRT, as NCCL's watchdog does, and rank 1 said nothing"
    )
    everyone = reason(dict.fromkeys(range(3), -signal.SIGABRT))
    assert everyone["message"].endswith("and each waited for another one")


def test_our_sentence_comes_before_an_abort():
    verdict = {"rank": 0, "code": 7, "message": "no answer from rank 1", "traceback": "", "time": 1.0, "hung": True}
    assert reason({0: 7, 2: -signal.SIGABRT}, [verdict])["message"] == "no answer from rank 1"


def test_one_abort_is_that_ranks_own_and_a_kill_is_not_blamed_on_its_victims():
    assert reason({1: -signal.SIGABRT, 0: -signal.SIGTERM, 2: -signal.SIGTERM})["message"].startswith(
        "rank 1 was killed by SIGABRT, perhaps"
    )
    found = reason({1: -signal.SIGKILL, 0: -signal.SIGABRT, 2: -signal.SIGABRT}, late=(0, 2))
    assert found["message"].startswith("rank 1 was killed by SIGKILL")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE)", "did not end: no roll was called"),
        ("NCCL communicator was aborted on rank 0.", "did not end: no roll was called"),
        ("NCCL error: remote process exited or there was a network error", "lost its connection"),
        ("Timed out waiting 1000ms for recv operation to complete", "did not end: no roll was called"),
    ],
)
def test_texts_of_nccl_and_gloo_become_our_sentence(monkeypatch, capsys, text, says):
    monkeypatch.delenv("MOE_LAUNCH", raising=False)
    monkeypatch.setattr(deadline, "_roll_call", None)
    assert launch._report(dist.DistBackendError(text), 1) == CollectiveTimeout.exit_code
    assert says in capsys.readouterr().err


def test_the_launcher_hears_of_a_bounded_wait_as_of_a_hang(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_LAUNCH", str(tmp_path))
    monkeypatch.setenv("RANK", "2")
    assert launch._report(CollectiveTimeout("no answer from rank 1"), CollectiveTimeout.exit_code) == CollectiveTimeout.exit_code
    (verdict,) = launch._verdicts(tmp_path)
    assert (verdict["rank"], verdict["hung"], verdict["message"], verdict["traceback"]) == (2, True, "no answer from rank 1", "")
