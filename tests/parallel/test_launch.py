"""Real launches of a tiny job: a rank dies, hangs, leaves or is asked to stop, and what the user sees of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moe.errors import ConfigError
from moe.parallel.launch import StopSignal

ROOT = Path(__file__).parents[2]
PROGRAM = "import sys; from moe.parallel.launch import launch; "
PROGRAM += "sys.exit(launch(sys.argv[3:], int(sys.argv[1]), restarts=int(sys.argv[2]), program=('tests/parallel/stand_in.py',)))"
CURVE = ["3.0", "6.0", "9.0", "12.0", "15.0", "18.0"]  # three ranks: 3 * step + 3


class Job:
    """A launched stand-in: six steps on three ranks."""

    def __init__(self, folder: Path, *options: str, restarts: int = 0, faults: str = "", steps: int = 6, **environment: str):
        self.folder = folder
        command = [sys.executable, "-c", PROGRAM, "3", str(restarts), str(folder), str(steps), *options]
        env = os.environ | {"MOE_FAULTS": faults, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        env.pop("MOE_LAUNCH", None)
        self.process = subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def end(self, timeout: float = 60) -> tuple[int, str]:
        """Exit code and output; every rank must be gone by then."""
        try:
            text, _ = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
            left = [int(path.read_text()) for path in self.folder.glob("pid-*")]
            alive = [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        assert not alive, f"ranks outlived their launcher: {alive}\n{text}"
        return self.process.returncode, text

    def curve(self) -> list[str]:
        return (self.folder / "curve").read_text().split()

    def wait_for_steps(self, steps: int) -> None:
        deadline = time.monotonic() + 30
        while not ((self.folder / "curve").exists() and len(self.curve()) >= steps):
            assert time.monotonic() < deadline, "the job did not start"
            time.sleep(0.02)


def test_a_killed_rank_is_named_and_the_job_goes_on_where_it_was(tmp_path):
    job = Job(tmp_path, restarts=1, faults=f"kill@step=3,rank=1,point=after,once={tmp_path / 'once'}")
    code, text = job.end()
    assert (code, job.curve()) == (0, CURVE)
    assert "rank 1 was killed by SIGKILL" in text
    assert "starting all 3 ranks again, 1 restart(s) left" in text
    assert "Traceback" not in text


def test_ranks_that_disagree_stop_with_one_sentence_and_are_not_restarted(tmp_path):
    code, text = Job(tmp_path, restarts=2, SEED_OF_1="7").end()
    assert code == 6
    assert text.startswith("error: ranks disagree: seed is 0 on ranks 0, 2 and 7 on rank 1; ")
    assert text.count("\n") == 1
    assert not (tmp_path / "curve").exists()


def test_sigterm_to_the_launcher_saves_and_says_so(tmp_path):
    job = Job(tmp_path, "60", "slow", restarts=2, steps=100)
    job.wait_for_steps(3)
    job.process.send_signal(signal.SIGTERM)
    code, text = job.end()
    assert code == 75
    assert text.strip().splitlines()[-1] == f"stopped at step {len(job.curve())} of 100"


def test_the_job_listens_on_the_loopback_alone(tmp_path):
    job = Job(tmp_path, "60", "slow", steps=100)
    job.wait_for_steps(1)
    family = [psutil.Process(job.process.pid), *psutil.Process(job.process.pid).children(recursive=True)]
    listening = [c.laddr.ip for process in family for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    job.process.send_signal(signal.SIGINT)
    assert job.end()[0] == 75
    assert listening
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, number):
    job = Job(tmp_path, "60", "slow", restarts=2, steps=100)
    job.wait_for_steps(3)
    os.kill(int((tmp_path / "pid-2").read_text()), number)
    code, text = job.end()
    assert code == 75
    assert f"stopped at step {len(job.curve())} of 100" in text


@pytest.mark.slow
def test_ranks_stop_by_themselves_when_their_launcher_is_killed(tmp_path):
    job = Job(tmp_path, "60", "slow", steps=1000)
    job.wait_for_steps(3)
    job.process.kill()
    job.process.wait()
    deadline = time.monotonic() + 20
    pids = [int(path.read_text()) for path in tmp_path.glob("pid-*")]
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.end()


@pytest.mark.slow
def test_a_rank_that_leaves_early_fails_the_job_by_name(tmp_path):
    code, text = Job(tmp_path, faults="exit0@step=3,rank=1,point=before").end()
    assert code == 1
    assert text.strip() == "error: rank 1 left with exit code 0 before the others had finished"


@pytest.mark.slow
def test_a_bug_shows_its_traceback_once(tmp_path):
    code, text = Job(tmp_path, faults="raise@step=3,rank=1,point=before").end()
    assert code == 1
    assert text.count("Traceback") == 1
    assert text.strip().endswith("error: rank 1 failed: InjectedFault: injected at before, step 3")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_rank_is_named_and_the_job_goes_on(tmp_path, rank):
    job = Job(tmp_path, "8", restarts=1, faults=f"stop@step=3,rank={rank},point=before,once={tmp_path / 'once'}")
    code, text = job.end(120)
    assert (code, job.curve()) == (0, CURVE)
    assert ("no answer from rank 1" if rank else "rank 0 does not answer") in text


@pytest.mark.slow
def test_ranks_that_a_watchdog_aborts_are_a_timeout_and_the_silent_one_is_named(tmp_path):
    code, text = Job(tmp_path, ABORTED="1").end()
    assert code == 7
    assert text.strip().splitlines()[-1].endswith("ranks 0, 2 were killed by SIGABRT, as NCCL's watchdog does, and rank 1 said nothing")


@pytest.mark.slow
@pytest.mark.parametrize("share", ["0", "1"])
def test_plain_torchrun_recovers_too(tmp_path, share):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--max-restarts", "1"]
    env = os.environ | {"MOE_FAULTS": f"kill@step=3,rank=1,point=after,once={tmp_path / 'once'}", "PYTHONPATH": str(ROOT)}
    env |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": share, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "tests/parallel/stand_in.py", str(tmp_path), "6"], env=env, cwd=ROOT, timeout=90, check=False)
    assert done.returncode == 0
    assert (tmp_path / "curve").read_text().split() == CURVE


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(8))
def test_any_death_at_any_point_leaves_the_same_curve(tmp_path, seed):
    step, rank, point = seed % 6, seed % 3, ("before", "after")[seed % 2]
    job = Job(tmp_path, restarts=1, faults=f"kill@step={step},rank={rank},point={point},once={tmp_path / 'once'}")
    assert (job.end()[0], job.curve()) == (0, CURVE)


def test_a_stop_signal_sets_a_flag_and_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_second_interrupt_does_not_wait():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("raised", "code"), [("ConfigError('no such key')", 2), ("ValueError('odd')", 1), ("None", 0)])
def test_without_a_launcher_a_rank_prints_its_own_reason(raised, code):
    program = f"""
from moe.errors import ConfigError
from moe.parallel.launch import run_rank
def body():
    print("said before", end="")
    if {raised}: raise {raised}
run_rank(body)
"""
    env = {name: value for name, value in os.environ.items() if name not in ("MOE_LAUNCH", "RANK")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False, env=env)
    assert (done.returncode, done.stdout) == (code, "said before")
    assert ("Traceback" in done.stderr) == (code == 1)
    if code == ConfigError.exit_code:
        assert done.stderr == "error: no such key\n"
