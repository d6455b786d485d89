"""Ranks and command lines in a test for a tenth of a second: processes forked from a server that has torch and moe loaded.

The server never runs an operation (a fork after the first OpenMP region hangs), so tests may use torch freely in the parent.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

_PRELOAD = [
    "pytest",
    "pydantic",
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed._functional_collectives",
    "torch._dynamo",
    "moe.train.loop",
    "moe.cli",
    "moe.engines.ddp",
    "moe.engines.fsdp2",
]
_GROUP_SECONDS = 30  # a collective that takes longer is a hang
_CONSEQUENCES = ("still running", "Connection closed", "Connection reset", "Broken pipe")  # told after the causes
_LINGER_SECONDS = 0.3  # after the first failure, time for the others to say what they saw


class WorkerError(AssertionError):
    """A rank raised, died or hung; the message holds each failed rank's traceback."""


class Aborted(WorkerError):
    """A rank was ended by SIGABRT, as no line of Python does."""


def run_ranks(world: int, function: Callable, *args, timeout: float = 60) -> list:
    """Run `function(rank, world, *args)` on `world` gloo ranks and return the results by rank.

    function, args and results must pickle (a module-level function). The first failure kills every rank. The ranks meet in
    a barrier at the end, unless function has destroyed the process group itself.
    """
    try:
        return _run(world, function, *args, timeout=timeout)
    except Aborted as error:  # gloo does so now and then when a group of DTensor's is freed; an abort of ours comes again
        warnings.warn(f"tried once more: {str(error).splitlines()[0]}", stacklevel=2)
        return _run(world, function, *args, timeout=timeout)


def _run(world: int, function: Callable, *args, timeout: float) -> list:
    context = _server()
    task = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="moe-ranks-") as folder:
        ranks, pipes = [], []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            rank_args = (rank, world, folder, sender, task, dict(os.environ), list(sys.path), timeout)
            process = context.Process(target=_rank, args=rank_args, daemon=True)
            process.start()
            sender.close()
            ranks.append(process)
            pipes.append(receiver)
        try:
            outcomes = _collect(pipes, time.monotonic() + timeout + 2)
            _raise_failures(outcomes, ranks, Path(folder))
        finally:
            for process in ranks:
                process.kill()
                process.join()
                process.close()
    return [outcome[1] for outcome in outcomes]


def run_command(*words: object, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m moe WORDS` without the seconds that importing takes; exit code and output are those of a real process."""
    command = ["moe", *map(str, words)]
    with tempfile.TemporaryDirectory(prefix="moe-command-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        arguments = (command, os.environ | environment, list(sys.path), os.getcwd(), str(out), str(err))
        process = _server().Process(target=_command, args=arguments)
        process.start()
        process.join(timeout)
        late = process.is_alive()
        if late:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        code = process.exitcode
        process.close()
        if late:
            raise subprocess.TimeoutExpired(command, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _command(words: list[str], environment: dict, path: list, cwd: str, out: str, err: str) -> None:
    os.setsid()  # so that a late one can be ended with all that it started
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT), (2, err, os.O_WRONLY | os.O_CREAT)):
        opened = os.open(name, mode)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    _enter(environment, path)
    os.chdir(cwd)
    sys.argv = list(words)
    multiprocessing.current_process().name = "MainProcess"
    code: object = 0
    try:
        runpy.run_module("moe", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(code, str):
        os.write(2, f"{code}\n".encode())
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _enter(environment: dict, path: list) -> None:
    """Take the test's environment and path: the server's are those of its first use."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    importlib.reload(sys.modules["moe.faults"])  # it reads MOE_FAULTS once, when it is imported


def _server() -> multiprocessing.context.BaseContext:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _collect(pipes: list[Connection], deadline: float) -> list[tuple]:
    """One ("result", value), ("error", traceback) or ("silent", reason) a rank."""
    outcomes: list[tuple] = [("silent", "still running")] * len(pipes)
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), timeout=left):
            rank = waiting.pop(pipe)
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[rank] = ("silent", "died")
            if outcomes[rank][0] != "result":
                deadline = min(deadline, time.monotonic() + _LINGER_SECONDS)
    return outcomes


def _raise_failures(outcomes: list[tuple], ranks: list, folder: Path) -> None:
    failures = []
    for rank, (kind, text) in enumerate(outcomes):
        if kind == "result":
            continue
        if text == "died":
            ranks[rank].join(5)
            text = f"died with exit code {ranks[rank].exitcode} before it returned"
        stack = folder / f"stack-{rank}"
        failures.append(f"rank {rank}: {text}\n{stack.read_text() if stack.exists() else ''}")
    if failures:
        failures.sort(key=lambda text: any(sign in text for sign in _CONSEQUENCES))
        aborted = any(process.exitcode == -signal.SIGABRT for process in ranks)
        raise (Aborted if aborted else WorkerError)("\n".join(failures))


def _rank(rank: int, world: int, folder: str, sender: Connection, task: bytes, environment: dict, path: list, timeout: float) -> None:
    _enter(environment, path)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    import torch
    import torch.distributed as dist

    code = 0
    with open(f"{folder}/stack-{rank}", "w") as stack:
        faulthandler.dump_traceback_later(timeout, exit=True, file=stack)
        try:
            torch.set_num_threads(1)
            store = dist.FileStore(f"{folder}/store", world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=_GROUP_SECONDS))
            function, args = pickle.loads(task)
            result = function(rank, world, *args)
            if dist.is_initialized():
                dist.barrier()  # a rank that leaves early makes the others fail in their first connection
            sender.send_bytes(pickle.dumps(("result", result)))
        except BaseException:  # CheckpointException of torch is a BaseException
            code = 1
            sender.send_bytes(pickle.dumps(("error", traceback.format_exc())))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process that used DTensor on gloo aborts now and then in its destructors
