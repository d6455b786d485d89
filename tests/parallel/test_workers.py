"""run_ranks: results by rank, the failing rank's traceback, nothing left behind."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.workers import WorkerError, run_ranks


def total(rank: int, world: int, scale: float) -> torch.Tensor:
    x = torch.full((3,), rank * scale)
    dist.all_reduce(x)
    return x


def fails_on_one(rank: int, world: int, bad: int) -> None:
    if rank == bad:
        raise ValueError("seven of nine")
    dist.barrier()


def dies_on_one(rank: int, world: int, bad: int) -> None:
    if rank == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleeps(rank: int, world: int) -> None:
    time.sleep(60)


def environment(rank: int, world: int) -> tuple:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("A_TEST_SAYS"), torch.get_num_threads()


def aborts_until(rank: int, world: int, path: str, times: int) -> int:
    if rank == 1:
        with open(path, "a+") as file:
            file.write("x")
            file.seek(0)
            if len(file.read()) <= times:
                file.close()
                os.abort()
    return rank


def nothing(rank: int, world: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_come_back_by_rank(world):
    results = run_ranks(world, total, 2.0)
    assert len(results) == world
    for result in results:
        torch.testing.assert_close(result, torch.full((3,), 2.0 * sum(range(world))))


def test_a_failing_rank_is_named_with_its_traceback():
    with pytest.raises(WorkerError, match=r"(?s)^rank 1: .*fails_on_one.*seven of nine"):
        run_ranks(3, fails_on_one, 1)


def test_a_killed_rank_is_named_before_those_that_missed_it():
    with pytest.raises(WorkerError, match=r"^rank 2: died with exit code -9"):
        run_ranks(3, dies_on_one, 2)


def test_an_abort_is_tried_once_more_and_named_if_it_comes_again(tmp_path):
    with pytest.warns(UserWarning, match="tried once more: rank 1: died with exit code -6"):
        assert run_ranks(2, aborts_until, str(tmp_path / "once"), 1) == [0, 1]
    with pytest.warns(UserWarning, match="tried once more"), pytest.raises(WorkerError, match=r"^rank 1: died with exit code -6"):
        run_ranks(2, aborts_until, str(tmp_path / "always"), 2)


def test_a_hang_ends_at_the_timeout_and_shows_where():
    with pytest.raises(WorkerError, match=r"(?s)rank 0.*in sleeps"):
        run_ranks(2, sleeps, timeout=1)


def test_ranks_see_the_environment_of_the_test_and_one_thread(monkeypatch):
    run_ranks(1, nothing)
    monkeypatch.setenv("A_TEST_SAYS", "hello")
    assert run_ranks(2, environment) == [("0", "2", "hello", 1), ("1", "2", "hello", 1)]


def test_no_process_survives():
    assert not any(psutil.pid_exists(pid) for pid in run_ranks(3, nothing))
