from __future__ import annotations

import errno
import hashlib
import json
import os

import numpy as np
import pytest

from moe.data.prepare import tokenize, whole_folder
from moe.data.shards import open_tokens
from moe.data.tokenizer import open_tokenizer
from moe.errors import ConfigError, DataError, NoSpace
from tests.data.makers import Given, byte_level

TEXTS = ["hello", "", "wörld\n日本語", "x" * 50, "hello", "\ud800 half a pair"]


@pytest.mark.parametrize("kind", ["bytes", "file"])
@pytest.mark.parametrize("shard_tokens", [7, 2**20])
def test_documents_are_written_with_their_ends_keys_and_sums(kind, shard_tokens, tmp_path):
    name = "bytes" if kind == "bytes" else str(byte_level(tmp_path))
    tokens = tokenize([Given(TEXTS)], tmp_path / "out", name, shard_tokens=shard_tokens)
    tokenizer = open_tokenizer(name)
    texts = [text.encode("utf-8", "replace").decode() for text in TEXTS if text]
    ids = [[*tokenizer.encode(text), tokenizer.end] for text in texts]
    assert tokens.read(0, int(tokens.offsets[-1])).tolist() == [id for document in ids for id in document]
    assert np.diff(tokens.offsets).tolist() == [len(i) for i in ids]
    assert tokens.keys.tolist() == [int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "little") for t in texts]
    assert tokens.meta["text_bytes"] == tokens.meta["token_bytes"] == sum(len(t.encode()) for t in texts)
    assert (tokens.meta["vocab"], tokens.meta["end"]) == (tokenizer.vocab, tokenizer.end)
    assert len(tokens.shards) == -(-int(tokens.offsets[-1]) // shard_tokens)
    for shard in tokens.shards:
        assert hashlib.sha256(shard.path.read_bytes()).hexdigest() == shard.sha256


def test_any_stretch_is_read_across_shards(tmp_path):
    tokens = tokenize([Given(["abcdefghij", "klm"])], tmp_path / "out", shard_tokens=4)
    flat = [*b"abcdefghij", 256, *b"klm", 256]
    for first in range(len(flat)):
        for count in range(len(flat) - first + 1):
            assert tokens.read(first, count).tolist() == flat[first : first + count]


def test_a_large_vocabulary_is_written_in_32_bits(tmp_path):
    folder = byte_level(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 300, "content": "<last>"})
    spec["model"]["vocab"]["far"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokens = tokenize([Given(["hello"])], tmp_path / "out", str(folder))
    assert tokens.shards[0].dtype == "<u4"
    assert tokens.meta["vocab"] == 70_001


@pytest.mark.parametrize("failure", [DataError("bad line"), KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_run_leaves_nothing_behind(failure, tmp_path):
    with pytest.raises(type(failure)):
        tokenize([Given(["text"] * 10, failure)], tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_a_killed_run_left_is_hidden_and_replaced(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "00000.bin").write_bytes(b"torn")
    tokens = tokenize([Given(["a"])], tmp_path / "out")
    assert tokens.read(0, 2).tolist() == [97, 256]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    def write():
        with whole_folder(tmp_path / "out") as folder:
            (folder / "begun").write_text("x")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(NoSpace, match=r"the disk under .* is too full to write the tokens"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="the corpus is empty: given texts holds no text"):
        tokenize([Given(["", ""])], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="give sources of text to tokenise"):
        tokenize([], tmp_path / "out")
    with pytest.raises(ConfigError, match="a shard of 0 tokens cannot be written; give a positive number"):
        tokenize([Given(["a"])], tmp_path / "out", shard_tokens=0)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"out exists already; give a folder that does not, or remove it"):
        tokenize([Given(["a"])], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file/out: "):
        tokenize([Given(["a"])], tmp_path / "file" / "out")


def edit(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def shrink(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shrink(f / "00000.bin"), r"token shard .*00000\.bin has 11 bytes instead of 12; it was cut short or replaced"),
        (lambda f: (f / "00000.bin").unlink(), r"cannot read token shard .*00000\.bin: No such file"),
        (lambda f: flip(f / "00000.bin"), r"00000\.bin has changed since it was written: sha256 [0-9a-f]{12}… instead of [0-9a-f]{12}…"),
        (lambda f: flip(f / "offsets.npy"), r"offsets\.npy has changed since it was written"),
        (lambda f: shrink(f / "keys.npy"), r"keys\.npy has changed since it was written"),
        (lambda f: edit(f, tokens=5), r"offsets\.npy does not fit its shards \(6 tokens, 1 documents\)"),
        (lambda f: edit(f, version=2), r"meta\.json has version 2 of moe-tokens, and this program reads 1"),
        (lambda f: edit(f, format="other"), r"meta\.json does not describe moe-tokens"),
        (lambda f: edit(f, shards=[{}]), r"meta\.json is damaged: KeyError"),
        (lambda f: edit(f, shards=None), r"meta\.json is damaged: TypeError"),
        (lambda f: shrink(f / "meta.json"), r"meta\.json is damaged"),
        (lambda f: (f / "meta.json").write_text("[" * 100_000), r"meta\.json is damaged"),
    ],
)
def test_a_damaged_folder_is_named(damage, message, tmp_path):
    tokenize([Given(["hello"])], tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        open_tokens(tmp_path / "out")


def test_of_a_large_folder_only_the_sizes_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("moe.data.shards.FULL_CHECK_BYTES", 11)
    tokenize([Given(["hello"])], tmp_path / "out")
    flip(tmp_path / "out" / "00000.bin")
    open_tokens(tmp_path / "out")
    shrink(tmp_path / "out" / "00000.bin")
    with pytest.raises(DataError, match="has 11 bytes instead of 12"):
        open_tokens(tmp_path / "out")


def test_a_folder_from_elsewhere_may_not_name_files_outside_itself(tmp_path):
    tokenize([Given(["hello"])], tmp_path / "out")
    (tmp_path / "out" / "00000.bin").rename(tmp_path / "00000.bin")
    shards = json.loads((tmp_path / "out" / "meta.json").read_text())["shards"]
    edit(tmp_path / "out", shards=[shards[0] | {"path": "../00000.bin"}])
    with pytest.raises(DataError, match="names a shard outside of its folder"):
        open_tokens(tmp_path / "out")


def test_a_shard_that_shrinks_while_it_is_read_is_an_error_not_a_crash(tmp_path):
    tokens = tokenize([Given(["hello" * 10_000])], tmp_path / "out")
    os.truncate(tokens.shards[0].path, 1000)
    assert tokens.read(0, 5).tolist() == [*b"hello"]
    with pytest.raises(DataError, match=r"00000\.bin has 1000 bytes instead of 100002"):
        tokens.read(40_000, 100)
