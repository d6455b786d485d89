"""One process of a study: an ordinary `moe train` in an ordinary run folder, from its preparation to what it left."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.checkpoint import shelf
from moe.config import dump, load
from moe.errors import DataError, NonFinite, Preempted
from moe.parallel.launch import PARENT
from moe.recipe import Recipe
from moe.scaling.results import RUNS, Row, Status, check_unedited
from moe.studies.grid import Run, tokens_a_step
from moe.studies.spec import Means
from moe.studies.warm_start import Origin, remove, words
from moe.train.folder import write_whole
from moe.train.metrics import read

TOKENS, LOG = "tokens", "train.log"
STOP_SECONDS = 120  # for all processes that were asked to stop to save
_FULL = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "memoryerror")
_LAST = 400  # characters of a log that say why


def quoted(folder: Path) -> str:
    """A path as a word of the command line holds it, whatever YAML would make of its letters."""
    return json.dumps(str(folder), ensure_ascii=False)


class Outcome(NamedTuple):
    """How a process ended."""

    status: Status
    why: str | None


class Job(NamedTuple):
    """What a process is to do: a run to its end, a trunk as far as `steps`, or to make a dense twin sparse."""

    id: str
    recipe: Recipe | None  # None: a conversion
    steps: int
    run: Run | None  # None: a trunk or a conversion
    work: float  # seconds that it is thought to take
    origin: Origin | None = None  # what a conversion makes

    def words(self, study: Path) -> list[str]:
        """The verb of moe and what it is given."""
        if self.origin is not None:
            return words(study, self.origin)
        folder = study / RUNS / self.id
        return ["train", str(folder / "recipe.yaml"), f"run.folder={quoted(folder)}", f"train.steps={self.steps}"]

    def log(self, study: Path) -> Path:
        """What the process says; a conversion's folder is not there until it is whole."""
        return study / RUNS / (f"{self.id}.log" if self.origin is not None else f"{self.id}/{LOG}")


class Process:
    """A job that is under way, holding its run's lock."""

    def __init__(self, job: Job, study: Path, lock: Any, *, threads: int, seconds: float, device: str | None) -> None:
        self.job, self.log, self.lock, self.limit = job, job.log(study), lock, seconds
        self.start, self.late, self.asked, self.killed_before = time.monotonic(), False, False, _killed_by_system()
        # with this name in its environment a run saves and stops once its parent is gone
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCHELASTIC_RUN_ID": f"{PARENT}{os.getpid()}"}
        self.device = device
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with self.log.open("ab") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moe", *job.words(study)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the study, which passes it on
                pass_fds=[lock.fileno()],  # so that the lock outlives a study that is killed
            )

    def ended(self) -> bool:
        """Whether the process is no more; ends it if its time is over."""
        if self.process.poll() is not None:
            return True
        if time.monotonic() - self.start > self.limit:
            self.late = True
            self._signal(signal.SIGKILL)
            self.process.wait()
        return self.process.returncode is not None

    def stop(self) -> None:
        """Ask for a checkpoint and an orderly end."""
        self.asked = True
        self._signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Wait for a process that was asked to stop, and end it if it does not."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def outcome(self) -> Outcome | None:
        """How it ended; None if it was asked to stop, saved, and can go on."""
        code = self.process.returncode
        if self.late:
            return Outcome("timed out", f"did not end within {self.limit:.0f} s")
        if code == 0:
            return Outcome("done", None)
        if self.asked or code == Preempted.exit_code:
            return None
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            text = log.read().decode(errors="replace")
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), f"exit code {code}")[-_LAST:]
        if code == NonFinite.exit_code:
            return Outcome("diverged", last)
        if any(words in text.lower() for words in _FULL):
            return Outcome("out of memory", last)
        if code == -signal.SIGKILL and _killed_by_system() > self.killed_before:
            return Outcome("out of memory", "killed by the system, whose memory was full")
        return Outcome("failed", f"killed by {signal.Signals(-code).name}" if code < 0 else last)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def devices() -> list[str]:
    """The GPUs of this machine, as processes are told of them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")][:count] if named else [str(number) for number in range(count)]


def workers_of(means: Means) -> int:
    """How many runs go on at once: as many as the cores allow, and where there are GPUs one each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_cores = max(1, (means.cores or cores) // means.threads)
    return min(by_cores, len(devices()) or by_cores)


def _killed_by_system() -> int:
    """How many processes this machine has killed for want of memory."""
    try:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counts.get("oom_kill", 0))


def take(study: Path, name: str) -> Any | None:
    """The lock of a run, as an open file; None while another process has it, even one whose study is gone."""
    folder = study / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{name}.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def locked(study: Path, name: str) -> bool:
    """Whether another process has a run's lock."""
    if not (study / RUNS / f"{name}.lock").exists():
        return False
    lock = take(study, name)
    if lock is not None:
        lock.close()
    return lock is None


@contextmanager
def held(study: Path, name: str) -> Iterator[None]:
    """Hold a run's lock, waiting for it."""
    (study / RUNS).mkdir(parents=True, exist_ok=True)
    with (study / RUNS / f"{name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(study: Path, recipe: Recipe, name: str) -> Path:
    """A run's folder with its recipe and the study's corpus; DataError if another recipe stands there."""
    folder = study / RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    if not path.exists():
        write_whole(path, dump(recipe))
    check_unedited(folder)
    if recipe.origin is not None and load([path]).origin != recipe.origin:  # the study was moved since
        write_whole(path, dump(recipe))
    if not os.path.lexists(folder / TOKENS):  # a copy of a study may hold the corpus itself there
        (folder / TOKENS).symlink_to(Path("..") / ".." / TOKENS)
    return folder


def branch(study: Path, run: Run) -> bool:
    """Give a run the newest checkpoint that its trunk has for it, as its own; False if there is none."""
    assert run.trunk is not None
    trunk = study / RUNS / run.trunk.id / "checkpoints"
    steps = [step for step in shelf.committed(trunk) if step <= run.trunk.start]
    folder = make(study, run.recipe, run.id) / "checkpoints"
    if shelf.committed(folder):
        return True
    if not steps:
        return False
    folder.mkdir(exist_ok=True)
    shelf.clean(folder)
    partial = shelf.temporary(folder, steps[0])
    shutil.copytree(trunk / shelf.name_of(steps[0]), partial, copy_function=_link, dirs_exist_ok=True)
    shelf.commit(partial, steps[0])
    return True


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)  # committed checkpoints are never written into
    except OSError:
        shutil.copy2(source, destination)


def reached(study: Path, name: str) -> int:
    """The step up to which a run's newest checkpoint goes."""
    return next(iter(shelf.committed(study / RUNS / name / "checkpoints")), 0)


def step_now(study: Path, name: str) -> int:
    """The last step that a run's figures speak of."""
    path = study / RUNS / name / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b'{"step"')]
    return json.loads(lines[-1])["step"] if lines else 0


def spent(study: Path, name: str, seconds: float) -> float:
    """Note how long a process was at a run; the seconds of all that were."""
    path = study / RUNS / name / "seconds"
    with path.open("a") as file:
        file.write(f"{seconds:.2f}\n")
    return sum(float(line) for line in path.read_text().split())


def row_of(study: Path, run: Run, outcome: Outcome, corpus: str, seconds: float) -> Row:
    """The row of a run that ended, from what it left in its folder."""
    folder, tokenizer = study / RUNS / run.id, Path(run.recipe.data.tokenizer).name
    rows = list(read(folder / "metrics.jsonl"))
    training = [row for row in rows if "loss" in row]
    last = next((row for row in reversed(rows) if row.get("step") == run.recipe.train.steps and "validation_loss" in row), None)
    if outcome.status == "done" and last is None:
        outcome = Outcome("failed", "it ended without a validation at its last step")
    if outcome.status == "done" and last is not None and not last["validation_loss"] < float("inf"):
        outcome = Outcome("diverged", f"its held-out loss is {last['validation_loss']}")
    done = outcome.status == "done"
    speeds = [row["tokens_per_second"] for row in training if "tokens_per_second" in row]
    speed = statistics.median(speeds) if speeds else None
    facts = run.facts()
    environment, machine = {}, ""  # of a run that never began
    if (folder / "environment.json").exists():
        environment = json.loads((folder / "environment.json").read_text())
        machine = ", ".join([*environment["devices"], f"{environment['cpus']} cores, {environment['threads']} threads a run"])
    return Row(
        **facts,
        status=outcome.status,
        why=outcome.why,
        loss=last["validation_loss"] if done and last else None,
        bits_per_byte=last["bits_per_byte"] if done and last else None,
        step_ms=round(1000 * tokens_a_step(run.recipe) / speed, 3) if speed else None,
        tokens_per_s=speed,
        health=health_of(training[-1]) if done and training else {},
        commit=environment.get("commit"),
        machine=machine,
        corpus=corpus,
        tokenizer=tokenizer,
        seconds=round(seconds, 1),
    )


def health_of(row: dict[str, Any]) -> dict[str, float]:
    """Routing health of a training row over its sparse layers: means, but the worst layer's load and all unused experts."""
    layers = list(row.get("layers", {}).values())
    if not layers:
        return {}
    names = [name for name, value in layers[0].items() if isinstance(value, (int, float))]
    means = {name: round(statistics.fmean(layer[name] for layer in layers), 6) for name in names if name not in ("dead", "max_over_mean")}
    unused = float(sum(layer["dead"] for layer in layers))
    return {"load_max_over_mean": max(layer["max_over_mean"] for layer in layers), "unused_experts": unused} | means


def prepare_corpus(study: Path, recipe: Recipe) -> str:
    """Tokenise what all runs read, once, and return its fingerprint."""
    from moe.data.corpus import prepare

    data = recipe.data
    with held(study, TOKENS):
        try:
            return prepare(data.sources, data.tokenizer, study / TOKENS, validation=data.validation).fingerprint
        except DataError as error:
            raise DataError(str(error).replace("run.folder", "means.folder")) from None


def tidy(study: Path, name: str, *, keep: int = 0, weights: bool = False) -> None:
    """Remove a run's checkpoints but the newest `keep`, and, unless asked to keep them, its weights."""
    folder = study / RUNS / name
    for path in list(shelf.committed(folder / "checkpoints").values())[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    if not keep:
        shelf.clean(folder / "checkpoints")
    for path in folder.glob("weights.*"):  # that a kill left half written, or half removed
        shutil.rmtree(path, ignore_errors=True)
    if not weights:
        remove(folder / "weights")
