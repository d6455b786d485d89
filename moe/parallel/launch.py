"""Starting ranks and ending them: torchrun's own agent with the settings that work, and one clear reason per failure.

`launch` is what `moe train --nproc N` calls. A plain `torchrun -m moe train …` works as well; where it may restart over
several machines, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, or ranks meet the addresses of dead ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from moe.errors import CollectiveTimeout, MoeError, Preempted

PARENT = "moe-study-"  # begins the name of a run that a study started; the study's process follows
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # each asks for a checkpoint and an orderly end
SAVE_SECONDS = 120  # from the request to stop to SIGKILL: a checkpoint must fit
FAILURE_SECONDS = 10  # for the ranks that survive another one's failure to say what they saw
# what collectives raise that did not end, or whose connection broke: of gloo, then of NCCL
_TIMED_OUT = (
    *("Timed out waiting", "Application timeout"),
    *("Watchdog caught collective operation timeout", "NCCL communicator was aborted", "retrieving ncclUniqueId"),
)
_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("remote process exited", "ncclRemoteError"),
)
_HINTS: dict[int, str] = {
    signal.SIGKILL: ", perhaps by the system for want of memory",
    signal.SIGABRT: ", perhaps by NCCL's watchdog because another rank was silent",
}
_FOLDER = "MOE_LAUNCH"  # where ranks leave their verdicts; set by `launch` for its ranks


def launch(arguments: Sequence[str], nproc: int, *, restarts: int = 0, program: Sequence[str] = ("-m", "moe", "train")) -> int:
    """Run `python -m moe train ARGUMENTS` on nproc ranks of this machine and return the exit code of the whole.

    The code is 0, that of the rank that failed first (see `moe.errors`), 75 for a run that was asked to stop and saved, or
    128 + signal where it could not. A rank that dies or fails for a passing reason starts all of them again, up to `restarts` times.
    """
    folder = Path(tempfile.mkdtemp(prefix="moe-launch-"))
    try:
        os.environ.update(_environment(nproc, folder))
        agent = _agent([*program, *arguments], nproc, restarts, folder)
        return _run(agent, nproc, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_rank(body: Callable[[], object]) -> NoReturn:
    """Run one rank's work, tell the launcher (or stderr) in a sentence why it failed, and end the process."""
    code = 0
    try:
        body()
    except KeyboardInterrupt:
        code = _report(MoeError("interrupted before the run could save"), 130)
    except MoeError as error:
        code = _report(error, error.exit_code)
    except BaseException as error:  # torch's CheckpointException is no Exception
        code = _report(error, 1)
    epilogue(code)


def epilogue(code: int) -> NoReturn:
    """End this rank: meet the others if all went well, flush, and leave without destructors.

    A process that used DTensor on gloo aborts in its destructors now and then, after everything was done right.
    """
    dist = sys.modules.get("torch.distributed")
    if code == 0 and dist is not None and dist.is_initialized():
        from moe.parallel.deadline import meet

        meet()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parent(name: str | None) -> int | None:
    """The process whose end is to stop this one, by the name of the run: the number that follows PARENT, else who started it."""
    if name is None or not name.startswith(PARENT):
        return None if name is None else os.getppid()
    return int(name.removeprefix(PARENT))  # it may have ended before this process could look


class StopSignal:
    """Whether this rank was asked to stop: by SIGTERM, SIGINT or SIGUSR1, or by the end of the launcher that started it.

    The handler only sets a flag; ranks agree on it after a step (`mesh.agree(stop.asked)`). A second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self._asked = False
        self._parent = _parent(os.environ.get("TORCHELASTIC_RUN_ID"))
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = signal.Signals[name]
                self._before[number] = signal.signal(number, self._ask)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether to save and stop after this step."""
        return self._asked or (self._parent is not None and os.getppid() != self._parent)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self._asked and os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopping after this step, with a checkpoint\n")  # print may be interrupted within itself
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _environment(nproc: int, folder: Path) -> dict[str, str]:
    """Variables of the agent and its ranks; what the user has set stays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // nproc))}
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    wanted |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    kept = {name: os.environ.get(name, value) for name, value in wanted.items()}
    return kept | {
        _FOLDER: str(folder),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join((*SIGNALS, "SIGHUP", "SIGQUIT")),
    }


def _agent(command: list[str], nproc: int, restarts: int, folder: Path) -> Any:
    """Torchrun's agent for one machine; its rendezvous is a file, so it listens nowhere."""
    import logging

    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    class Agent(LocalElasticAgent):
        """Says why it restarts, does not repeat a failure that would repeat itself, and gives ranks the time to save."""

        def _monitor_workers(self, *args: Any, **kwargs: Any) -> Any:
            result: Any = super()._monitor_workers(*args, **kwargs)
            if result.is_failed():
                reason = _reason(nproc, result.failures, _verdicts(folder))
                if not reason["again"]:
                    self._remaining_restarts = 0
                if self._remaining_restarts > 0:
                    again = f"starting all {nproc} ranks again, {self._remaining_restarts} restart(s) left"
                    _say(reason | {"message": f"{reason['message']}; {again}"}, "warning")
                    shutil.rmtree(folder / "verdicts", ignore_errors=True)
            return result

        def _start_workers(self, *args: Any, **kwargs: Any) -> Any:
            started = super()._start_workers(*args, **kwargs)
            context: Any = self._pcontext
            close = context.close  # called by itself, without arguments, when a rank has failed
            context.close = lambda death_sig=signal.SIGTERM, timeout=FAILURE_SECONDS: close(death_sig, timeout)
            return started

        def _stop_workers(self, *args: Any, **kwargs: Any) -> None:
            self._shutdown(timeout=FAILURE_SECONDS)

        def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = SAVE_SECONDS) -> None:
            super()._shutdown(death_sig if death_sig == signal.SIGKILL else signal.SIGTERM, timeout)

    for name in logging.root.manager.loggerDict:  # what it has to say is said here, once
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    parameters = RendezvousParameters("c10d", str(folder / "rendezvous"), "moe", 1, 1, local_addr="127.0.0.1", store_type="file")
    spec = WorkerSpec(
        role="moe",
        local_world_size=nproc,
        entrypoint=sys.executable,
        args=tuple(command),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=restarts,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    agent = Agent(spec, DefaultLogsSpecs(log_dir=str(folder / "log")))
    agent._shutdown_timeout = SAVE_SECONDS
    return agent


def _run(agent: Any, nproc: int, folder: Path) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException

    try:
        result = agent.run()
    except SignalException as asked:
        verdicts = _verdicts(folder)
        stopped = [verdict for verdict in verdicts if verdict["code"] == Preempted.exit_code]
        reason = stopped[0] if stopped else _first(verdicts)
        if reason is None:
            reason = {"code": 128 + asked.sigval, "message": f"stopped by {signal.Signals(asked.sigval).name} before the run could save"}
    else:
        if not result.is_failed():
            return 0
        reason = _reason(nproc, result.failures, _verdicts(folder))
    _say(reason)
    return reason["code"]


def _report(error: BaseException, code: int) -> int:
    """Leave this rank's verdict for the launcher, which prints the one that counts; without a launcher, print it."""
    trace = "" if isinstance(error, MoeError) else "".join(traceback.format_exception(error))
    rank = os.environ.get("RANK", "0")
    hung = isinstance(error, CollectiveTimeout)
    if _says(error, *_TIMED_OUT):
        from moe.parallel.deadline import roll_call

        hung, error = True, CollectiveTimeout(f"a collective in {_place(error)} did not end: {roll_call()}")
    elif _says(error, *_LOST):
        error = CollectiveTimeout(f"a collective in {_place(error)} lost its connection: another rank died or left")
    if isinstance(error, CollectiveTimeout):
        code, trace = error.exit_code, ""
    message = str(error) if isinstance(error, MoeError) else f"rank {rank} failed: {type(error).__name__}: {_line(error)}"
    verdict = {"rank": int(rank), "code": code, "message": message, "traceback": trace, "time": time.time(), "hung": hung}
    if _FOLDER not in os.environ:
        _say(verdict)
        return code
    verdicts = Path(os.environ[_FOLDER]) / "verdicts"
    verdicts.mkdir(exist_ok=True)
    partial = verdicts / f"{rank}.partial"
    partial.write_text(json.dumps(verdict))
    partial.rename(verdicts / f"{rank}.json")
    return code


def _verdicts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "verdicts").glob("*.json"))]


def _first(verdicts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The cause among verdicts: lost peers are consequences, rank 0 knows best who is missing, then the earliest counts."""

    def order(verdict: dict[str, Any]) -> tuple[bool, bool, float]:
        return verdict["code"] == CollectiveTimeout.exit_code, verdict["rank"] != 0, verdict["time"]

    return min(verdicts, key=order, default=None)


def _reason(nproc: int, failures: dict[int, Any], verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Message and code of what went wrong, and whether a fresh start could go better."""
    passing = {"code": 1, "again": True}
    spoken = {verdict["rank"] for verdict in verdicts}
    if hung := _first([verdict for verdict in verdicts if verdict["hung"]]):
        return hung | {"again": True}
    noticed = min(failure.timestamp for failure in failures.values())  # those that end later are ended by the agent
    dead = {r: f.exitcode for r, f in failures.items() if r not in spoken and f.timestamp <= noticed + 2 and f.exitcode != -signal.SIGTERM}
    aborted = sorted(rank for rank, failure in failures.items() if rank not in spoken and failure.exitcode == -signal.SIGABRT)
    if len(aborted) > 1 and dead.keys() <= {*aborted}:
        silent = sorted(set(range(nproc)) - {*aborted} - spoken)
        others = f"rank {_list(silent)} said nothing" if silent else "each waited for another one"
        message = f"a collective did not end: ranks {_list(aborted)} were killed by SIGABRT, as NCCL's watchdog does, and {others}"
        return {"code": CollectiveTimeout.exit_code, "again": True, "message": message}
    for rank, exitcode in dead.items():
        return passing | {"message": f"rank {rank} {_death(exitcode)}"}
    reason = _first(verdicts)
    left = set(range(nproc)) - failures.keys() - spoken
    if left and (reason is None or reason["code"] == CollectiveTimeout.exit_code):
        return passing | {"message": f"rank {min(left)} left with exit code 0 before the others had finished"}
    if reason is None:
        return passing | {"message": "the ranks ended without giving a reason"}
    return reason | {"again": reason["code"] in (1, CollectiveTimeout.exit_code)}


def _death(exitcode: int) -> str:
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}{_HINTS.get(-exitcode, '')}"
    return f"ended with exit code {exitcode} and no reason given"


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _says(error: BaseException, *signs: str) -> bool:
    """Whether an error of a collective has one of these signs; torch has no class for them."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _place(error: BaseException) -> str:
    """The innermost place of this package that an exception passed through, after `run_rank`."""
    from moe.parallel.deadline import place

    return place(traceback.StackSummary.from_list([f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]))


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else "no message"


def _say(verdict: dict[str, Any], kind: str = "error") -> None:
    prefix = "" if verdict["code"] == Preempted.exit_code else f"{kind}: "
    print(f"{verdict.get('traceback', '')}{prefix}{verdict['message']}", file=sys.stderr, flush=True)
