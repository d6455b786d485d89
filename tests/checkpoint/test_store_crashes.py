"""A save that is killed, damaged or out of space costs that save alone."""

from __future__ import annotations

import re
import resource
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe import faults
from moe.checkpoint.store import Store
from moe.errors import CheckpointError, MoeError, NoSpace
from moe.parallel.mesh import Mesh
from tests.workers import WorkerError, run_ranks


def mesh_of(rank: int, world: int) -> Mesh:
    return Mesh(rank, world, rank, torch.device("cpu"), 1, timedelta(seconds=30), dist.group.WORLD)


def state_of(step: int, size: int = 64) -> dict[str, torch.Tensor]:
    """Tensors whose values tell the step (rounded down) and the name."""
    names = ("model.a", "model.b", "optimizer.exp_avg.a", "optimizer.exp_avg.b")
    return {name: torch.full((size,), step + number / 8) for number, name in enumerate(names)}


def loaded(store: Store, **options) -> tuple[int, int]:
    """The step of the values that came, which must be one, and that of the scalars."""
    state = state_of(-1)
    scalars = store.load(state, **options)
    step = int(state["model.a"][0])
    assert all(torch.equal(tensor, state_of(step)[name]) for name, tensor in state.items())
    return step, scalars["step"]


def save_steps(rank, world, folder, *steps):
    store = Store(folder, mesh_of(rank, world), keep=2)
    for step in steps:
        store.save(step, state_of(step), {"step": step})


@pytest.mark.parametrize(
    ("point", "rank", "newest"),
    [
        ("before", 1, 2),
        ("shard", 0, 2),
        ("shard", 1, 2),
        ("after_shards", 0, 2),
        ("after_shards", 1, 2),
        ("after_manifest", 0, 2),
        ("after_rename", 0, 3),
        ("retention", 0, 3),
    ],
)
def test_a_kill_at_any_point_leaves_the_newest_committed_step(tmp_path, monkeypatch, caplog, point, rank, newest):
    monkeypatch.setenv("MOE_FAULTS", f"kill@point=checkpoint/{point},step=3,rank={rank}")
    with pytest.raises(WorkerError, match=f"rank {rank}: died with exit code -9"):
        run_ranks(2, save_steps, tmp_path, 1, 2, 3)
    left_over = [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert bool(left_over) == (newest == 2)

    store = Store(tmp_path, keep=2)
    assert store.steps()[0] == newest
    assert loaded(store) == (newest, newest)
    assert store.skipped == [f"{name}: its save did not finish" for name in left_over]
    assert all(name in caplog.text for name in left_over)

    store.save(4, state_of(4), {"step": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", f"step-{newest:08d}", "step-00000004"]
    assert loaded(store) == (4, 4)


def test_a_replacement_cut_short_keeps_the_old_content(tmp_path):
    store = Store(tmp_path)
    store.save(1, state_of(1), {"step": 1})
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.old-0a")
    assert loaded(Store(tmp_path)) == (1, 1)
    Store(tmp_path).save(2, state_of(2), {"step": 2})
    assert store.steps() == [2, 1]
    assert loaded(store, step=1) == (1, 1)


def test_the_same_content_is_kept_and_other_content_replaces_it_whole(tmp_path):
    store = Store(tmp_path)
    store.save(1, state_of(1), {"step": 1})
    before = (tmp_path / "step-00000001").stat().st_ino
    store.save(1, state_of(1), {"step": 1})
    assert (tmp_path / "step-00000001").stat().st_ino == before
    store.save(1, state_of(7), {"step": 7})
    assert loaded(store) == (7, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def damage(folder: Path, how: str) -> str:
    """Spoil a checkpoint and return what the message must say of it."""
    first, second = sorted(folder.glob("*.distcp"))
    manifest = folder / "manifest.json"
    if how in ("bit in a shard", "bit in the manifest"):
        path = first if "shard" in how else manifest
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return rf"{path}.*(SHA-256 \w{{16}}… where the manifest states \w{{16}}…|digest|cannot be read|outside|past|holds)"
    if how == "truncated shard":
        first.write_bytes(first.read_bytes()[:-5])
        return rf"{first} has \d+ bytes where the manifest states \d+"
    if how == "missing shard":
        second.unlink()
        return f"{second} is missing"
    if how == "swapped shards":
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
        return f"{folder}/__[01]_0.distcp has"
    if how == "empty manifest":
        manifest.write_bytes(b"")
        return f"{manifest} is empty"
    manifest.unlink()
    return f"{manifest} is missing"


DAMAGES = [
    *("bit in a shard", "bit in the manifest", "truncated shard", "missing shard"),
    *("swapped shards", "empty manifest", "missing manifest"),
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, how):
    run_ranks(2, save_steps, tmp_path, 1, 2)
    message = damage(tmp_path / "step-00000002", how)
    store = Store(tmp_path)
    assert loaded(store) == (1, 1)
    assert re.match(f"step-00000002: {message}", store.skipped[0])
    with pytest.raises(CheckpointError, match=message):
        store.load(state_of(-1), damaged="stop")
    with pytest.raises(CheckpointError, match=message):
        store.load(state_of(-1), step=2)


def load_damaged(rank, world, folder):
    store = Store(folder, mesh_of(rank, world))
    return loaded(store), store.skipped


def test_all_ranks_pass_over_a_damaged_checkpoint_together(tmp_path):
    run_ranks(2, save_steps, tmp_path, 1, 2)
    damage(tmp_path / "step-00000002", "bit in a shard")
    one, two = run_ranks(2, load_damaged, tmp_path)
    assert one == two
    assert one[0] == (1, 1)


def test_a_run_never_starts_anew_because_all_its_checkpoints_are_damaged(tmp_path):
    store = Store(tmp_path)
    store.save(1, state_of(1), {"step": 1})
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    assert store.steps() == [1]
    with pytest.raises(CheckpointError, match=r"no checkpoint that can be loaded; step-00000001: .* is missing"):
        store.load(state_of(-1))


def test_newest_and_durable_checkpoints_stay_and_damaged_ones_do_not_count(tmp_path):
    store = Store(tmp_path, keep=2, durable_every=4)
    for step in range(1, 10):
        store.save(step, state_of(step), {"step": step})
    assert store.steps() == [9, 8, 4]
    (tmp_path / "step-00000009" / "manifest.json").write_text("")
    store.save(10, state_of(10), {"step": 10})
    assert store.steps() == [10, 9, 8, 4]
    assert (tmp_path / "latest").read_text() == "step-00000010\n"


def save_in_background(rank, world, folder):
    store, state = Store(folder, mesh_of(rank, world)), state_of(1)
    store.save(1, state, {"step": 1}, background=True)
    for tensor in state.values():
        tensor.fill_(99)
    polls = []
    while not polls or polls[-1] is None:
        polls.append(store.poll())
        time.sleep(0.01)
    return polls


def test_a_background_save_holds_the_values_of_its_moment(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_FAULTS", "delay=0.05@point=checkpoint/before,rank=1")
    one, two = run_ranks(2, save_in_background, tmp_path)
    assert one == two
    assert one[0] is None
    assert one[-1] == 1
    assert loaded(Store(tmp_path)) == (1, 1)


def fail_in_background(rank, world, folder):
    store, state = Store(folder, mesh_of(rank, world)), state_of(1)
    store.save(1, state, {"step": 1})
    store.save(2, state, {"step": 2}, background=True)
    seen = None
    for _ in range(500):
        try:
            store.poll()
        except NoSpace as error:
            seen = str(error)
            break
        time.sleep(0.01)
    left = [path.name for path in Path(folder).iterdir() if "tmp" in path.name]
    store.save(3, state_of(3), {"step": 3}, background=True)
    return seen, left, store.finish()


def test_a_failure_in_the_background_is_raised_by_poll_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_FAULTS", "enospc@point=checkpoint/shard,step=2,rank=1")
    one, two = run_ranks(2, fail_in_background, tmp_path)
    assert one == two
    assert re.search(r"step 2 cannot be saved in .*: No space left on device.*; it needs 1,024 bytes and [\d,]+ are free", one[0])
    assert one[1:] == ([], 3)
    assert Store(tmp_path).steps() == [3, 1]


def save_over_the_limit(rank, world, folder):
    store = Store(folder, mesh_of(rank, world))
    store.save(1, state_of(1), {"step": 1})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    try:
        store.save(2, state_of(2, size=20_000), {"step": 2})
    except MoeError as error:
        message = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return message, sorted(path.name for path in Path(folder).iterdir()), loaded(store)


def test_a_disk_that_takes_no_more_on_one_rank_is_told_on_all(tmp_path):
    one, two = run_ranks(2, save_over_the_limit, tmp_path)
    assert one == two
    assert one[0].startswith("NoSpace: step 2 cannot be saved")
    assert "it needs 320,000 bytes" in one[0]
    assert one[1:] == (["latest", "step-00000001"], (1, 1))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True, timeout=30)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs takes root")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True, timeout=30)


def test_a_disk_that_fills_up_half_way_keeps_the_earlier_checkpoint(small_disk):
    store = Store(small_disk)
    store.save(1, state_of(1), {"step": 1})
    state = {f"model.{number}": torch.ones(1024) for number in range(600)}  # fits but for what the files add
    with pytest.raises(NoSpace, match=r"step 2 cannot be saved .*: No space left on device; it needs 2,457,600 bytes"):
        store.save(2, state, {})
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", "step-00000001"]
    store.save(2, state_of(2), {"step": 2})
    assert loaded(store) == (2, 2)


def test_a_state_larger_than_the_free_space_is_refused_before_a_byte_is_written(tmp_path):
    state = {"model.a": torch.zeros(1).expand(1 << 50)}
    with pytest.raises(NoSpace, match=r"too little free space; it needs 4,503,599,627,370,496 bytes"):
        Store(tmp_path).save(1, state, {})
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_after_the_commit_does_not_undo_it(tmp_path, monkeypatch, caplog):
    store = Store(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, state_of(step), {"step": step})
    monkeypatch.setattr(faults, "_FAULTS", faults.parse("enospc@point=checkpoint/retention"))
    store.save(3, state_of(3), {"step": 3})
    assert "step 3 is saved" in caplog.text
    assert loaded(store) == (3, 3)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"model.extra": torch.zeros(2)}, "model.extra is missing in the checkpoint"),
        ({"model.a": None}, "model.a is in the checkpoint only"),
        ({"model.a": torch.zeros(63)}, r"model.a has shape \[64\] in the checkpoint and \[63\] in this run"),
        ({"model.a": torch.zeros(64, dtype=torch.float64)}, "model.a is float32 in the checkpoint and float64 in this run"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name_and_not_passed_over(tmp_path, change, phrase):
    store = Store(tmp_path)
    for step in (1, 2):
        store.save(step, state_of(step), {"step": step})
    state = {name: tensor for name, tensor in (state_of(-1) | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"step-00000002 is of another model: {phrase}"):
        store.load(state)
    assert all(bool((tensor < 1).all()) for tensor in state.values())


def test_a_part_of_the_names_can_be_loaded_alone(tmp_path):
    store = Store(tmp_path)
    store.save(1, state_of(1), {"step": 1})
    state = {name: tensor for name, tensor in state_of(-1).items() if name.startswith("model.")}
    store.load(state, prefix="model.")
    assert all(torch.equal(tensor, state_of(1)[name]) for name, tensor in state.items())


def test_scalars_that_are_not_json_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"the scalars of step 1 are not JSON: .*complex"):
        Store(tmp_path / "new").save(1, state_of(1), {"x": 1j})
    assert not (tmp_path / "new").exists()
