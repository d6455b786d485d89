"""A checkpoint made by an enemy runs no code, leaves its folder nowhere and allocates nothing unasked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.checkpoint.manifest import Chunk, _digest, incomplete, read_manifest
from moe.checkpoint.store import Store
from moe.checkpoint.weights import load_weights
from moe.errors import CheckpointError

SHARD = "__0_0.distcp"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    Store(tmp_path / "run").save(1, {"model.a": torch.arange(4.0), "model.b": torch.ones(2, 3)}, {"step": 1})
    return tmp_path / "run" / "step-00000001"


def load(checkpoint: Path) -> dict[str, Any]:
    state = {"model.a": torch.zeros(4), "model.b": torch.zeros(2, 3)}
    Store(checkpoint.parent).load(state)
    return state


def forge(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and sign it again, as an enemy would."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text())["manifest"]
    change(body)
    for entry in body["files"]:
        file = checkpoint / entry["name"]
        if file.is_file() and not file.is_symlink() and entry.get("forge", True):
            entry |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        entry.pop("forge", None)
    path.write_text(json.dumps({"sha256": _digest(body), "manifest": body}))


def test_a_payload_in_the_pickled_metadata_is_never_opened(checkpoint, tmp_path):
    canary = tmp_path / "canary"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match=r"\.metadata has"):
        load(checkpoint)
    forge(checkpoint, lambda body: None)
    assert torch.equal(load(checkpoint)["model.a"], torch.arange(4.0))
    assert not canary.exists()


def test_a_payload_in_place_of_a_tensor_does_not_run(checkpoint, tmp_path):
    canary = tmp_path / "canary"
    buffer = io.BytesIO()
    torch.save(Payload(canary), buffer)
    (checkpoint / SHARD).write_bytes(buffer.getvalue())

    def point(body):
        for tensor in body["tensors"].values():
            tensor["chunks"][0][3:] = [0, len(buffer.getvalue())]

    forge(checkpoint, point)
    with pytest.raises(CheckpointError, match="is no tensor: UnpicklingError"):
        load(checkpoint)
    assert not canary.exists()


def test_a_compressed_tensor_is_refused_before_it_swells(checkpoint):
    bomb, plain = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(1 << 22), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member.filename))
    (checkpoint / SHARD).write_bytes(bomb.getvalue())

    def point(body):
        for tensor in body["tensors"].values():
            tensor["chunks"][0][3:] = [0, len(bomb.getvalue())]

    forge(checkpoint, point)
    with pytest.raises(CheckpointError, match="is compressed"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "a/b", "..", "", "a\0b"])
def test_a_file_outside_the_folder_is_refused(checkpoint, name):
    (checkpoint.parent / "secret").write_bytes((checkpoint / SHARD).read_bytes())
    forge(checkpoint, lambda body: body["files"][1].update(name=name, forge=False))
    with pytest.raises(CheckpointError, match="is not a plain file name"):
        load(checkpoint)


def test_links_and_pipes_are_refused(checkpoint):
    secret = checkpoint.parent / "secret"
    (checkpoint / SHARD).rename(secret)
    (checkpoint / SHARD).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"cannot be opened: .* \(it is a link\)"):
        load(checkpoint)
    (checkpoint / SHARD).unlink()
    os.mkfifo(checkpoint / SHARD)
    with pytest.raises(CheckpointError, match="is not a plain file"):
        load(checkpoint)


HUGE = 1 << 40


def chunk_of(body) -> list[Any]:
    return body["tensors"]["model.a"]["chunks"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: chunk_of(body).__setitem__(3, HUGE), "past the end"),
        (lambda body: chunk_of(body).__setitem__(3, -1), "-1 is not a count"),
        (lambda body: chunk_of(body).__setitem__(4, 8), "in only 8 bytes"),
        (lambda body: chunk_of(body).__setitem__(2, 7), "IndexError"),
        (lambda body: chunk_of(body).__setitem__(0, [2]), "reaches outside its shape"),
        (lambda body: chunk_of(body).__setitem__(1, [2]), "holds 2 of the 4 elements of model.a"),
        (lambda body: chunk_of(body).__setitem__(1, [HUGE]), "reaches outside its shape"),
        (lambda body: body["tensors"]["model.a"].update(shape=[HUGE], chunks=[[[0], [HUGE], 1, 0, 100]]), "in only 100 bytes"),
        (lambda body: body["tensors"]["model.a"].update(shape=[HUGE]), f"holds 4 of the {HUGE} elements"),
        (lambda body: body["tensors"]["model.a"].update(shape=[True]), "True is not a count"),
        (lambda body: body["tensors"]["model.a"].update(dtype="object"), "KeyError"),
        (lambda body: body["tensors"]["model.a"].update(dtype="float16"), "is float16 in the checkpoint and float32"),
        (lambda body: chunk_of(body).__setitem__(slice(3, 5), body["tensors"]["model.b"]["chunks"][0][3:]), "holds torch.float32 of shape"),
        (lambda body: body.update(format=2), "format 2, and this version of moe reads format 1; update moe"),
        (lambda body: body.update(complete=False), "is not complete"),
        (lambda body: body.pop("tensors"), "KeyError"),
    ],
)
def test_a_manifest_that_lies_is_refused(checkpoint, change, message):
    forge(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[]", '{"manifest": 3}', "\x00", "1" * 10_000])
def test_a_manifest_that_is_not_one_is_refused(checkpoint, text):
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        load(checkpoint)


def test_a_hundred_thousand_names_are_refused_in_one_line(checkpoint):
    def multiply(body):
        entry = body["tensors"]["model.a"]
        body["tensors"] |= {f"model.{number}": entry for number in range(100_000)}

    forge(checkpoint, multiply)
    with pytest.raises(CheckpointError, match=r"is in the checkpoint only.* and 99995 more") as caught:
        load(checkpoint)
    assert len(str(caught.value)) < 1000


def test_a_manifest_of_absurd_size_is_refused_unread(checkpoint):
    with (checkpoint / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no space
    with pytest.raises(CheckpointError, match="more than any manifest needs"):
        read_manifest(checkpoint)


def test_weights_that_lead_outside_are_refused(tmp_path):
    (tmp_path / "weights").mkdir()
    index = tmp_path / "weights" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load_weights(tmp_path / "weights")
    index.write_text(json.dumps({"weight_map": {"a": "model.bin"}}))
    (tmp_path / "weights" / "model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_weights(tmp_path / "weights")
    assert not (tmp_path / "canary").exists()


def test_the_payload_used_here_does_run_where_it_is_unpickled(checkpoint, tmp_path):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    script = f"import pickle; pickle.load(open({str(checkpoint / '.metadata')!r}, 'rb'))"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("chunks", "wrong"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 3))], None),
        ([((0, 0), (4, 2)), ((0, 2), (4, 1))], None),
        ([((0, 0), (2, 3)), ((3, 0), (1, 3))], "expert 2 is missing"),
        ([((0, 0), (2, 3)), ((1, 0), (2, 3))], "expert 1 is there 2 times"),  # as many elements as there should be
        ([((0, 0), (4, 2)), ((0, 1), (4, 1))], "expert 0 is there 2 times"),
        ([], "expert 0 is missing"),
    ],
)
def test_experts_that_are_missing_or_there_twice_are_named(chunks, wrong):
    found = incomplete("model.layers.0.moe.experts.up", (4, 3), [Chunk(offsets, sizes, 0, 0, 0) for offsets, sizes in chunks])
    assert (found is None) == (wrong is None)
    assert wrong is None or found.endswith(wrong)
    assert incomplete("optimizer.step", (), [Chunk((), (), 0, 0, 0)]) is None
    assert incomplete("empty", (0, 3), []) is None
