"""Each format is written here from its description, and read back."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from moe.data.corpus import prepare
from moe.data.formats import detect
from moe.data.prepare import tokenize
from moe.errors import ConfigError, DataError

END = 256
DOCUMENTS = [[72, 105, END], [1, 2, 3, 4, END], [9, END], [7, 7, 7, END]]
FLAT = [id for document in DOCUMENTS for id in document]


def nanogpt(folder):
    path = folder / "train.bin"
    path.write_bytes(struct.pack(f"<{len(FLAT)}H", *FLAT))
    return path


def modded(folder):
    path = folder / "fineweb_train_000001.bin"
    header = [20240520, 1, len(FLAT)] + [0] * 253
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(FLAT)}H", *FLAT))
    return path


def olmo(folder):
    path = folder / "part-0.npy"
    path.write_bytes(struct.pack(f"<{len(FLAT)}H", *FLAT))
    return path


def npy(folder):
    path = folder / "real.npy"
    np.save(path, np.array(FLAT, np.int32))
    return path


def megatron(folder, code=4, letter="i"):
    path = folder / "text_document.bin"
    path.write_bytes(struct.pack(f"<{len(FLAT)}{letter}", *FLAT))
    # Document 1 is stored as two sequences, and an empty document follows the last.
    lengths = [3, 2, 3, 2, 4]
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * struct.calcsize(letter)
    documents = [0, 1, 3, 4, 5, 5]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    path.with_suffix(".idx").write_bytes(index + struct.pack(f"<{len(documents)}q", *documents))
    return path


WRITERS = {"nanogpt": nanogpt, "modded": modded, "olmo": olmo, "npy": npy, "megatron": megatron}


def read(path, folder, **options):
    source = {"name": "tokens", "paths": [str(path)], "hold_out": "none", **options}
    return prepare([source], "bytes", folder / "corpus").parts[0]


def documents_of(part):
    tokens = part.tokens
    return [tokens.read(int(a), int(b - a)).tolist() for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("given", ["auto", "named"])
def test_tokens_and_documents_come_back(form, given, tmp_path):
    path = WRITERS[form](tmp_path)
    assert detect(path) == form
    part = read(path, tmp_path, format="auto" if given == "auto" else form)
    assert documents_of(part) == DOCUMENTS
    assert part.train.read(0, len(FLAT)).ids.tolist() == FLAT


def test_the_split_does_not_depend_on_the_format(tmp_path):
    keys = [read(write(tmp_path), tmp_path / form).tokens.keys.tolist() for form, write in WRITERS.items()]
    assert all(key == keys[0] for key in keys)


def test_megatron_by_prefix_by_index_and_as_uint16(tmp_path):
    path = megatron(tmp_path, code=8, letter="H")
    for number, name in enumerate((path, path.with_suffix(".idx"), path.with_suffix(""))):
        assert documents_of(read(name, tmp_path / str(number))) == DOCUMENTS


def test_several_shards_are_one_row(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.bin").write_bytes(struct.pack("<4H", number, 5, END, 6))
    part = read(tmp_path / "*.bin", tmp_path)
    assert part.tokens.read(2, 8).tolist() == [END, 6, 1, 5, END, 6, 2, 5]
    assert documents_of(part) == [[0, 5, END], [6], [1, 5, END], [6], [2, 5, END], [6]]


def test_another_end_and_another_integer(tmp_path):
    (tmp_path / "x.bin").write_bytes(struct.pack("<6I", 1, 2, 50, 3, 50, 4))
    assert documents_of(read(tmp_path / "x.bin", tmp_path, dtype="uint32", end=50)) == [[1, 2, 50], [3, 50], [4]]


def test_tokens_without_any_end_are_cut_into_pieces(tmp_path):
    (tmp_path / "x.bin").write_bytes(np.zeros(150_000, "<u2").tobytes())
    assert [len(d) for d in documents_of(read(tmp_path / "x.bin", tmp_path))] == [65536, 65536, 150_000 - 2 * 65536]


def test_our_own_folder_is_read_in_place(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    text = {"name": "text", "paths": [str(tmp_path / "a.txt")], "document": "paragraph"}
    written = tokenize([text], tmp_path / "made")
    part = read(tmp_path / "made", tmp_path)
    assert documents_of(part) == [[*b"one\n", END], [*b"two\n", END], [*b"three", END]]
    assert part.tokens.keys.tolist() == written.keys.tolist()
    assert part.tokens.shards[0].path == tmp_path / "made" / "00000.bin"


def cut(path, size=-1):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("form", "damage", "message"),
    [
        ("nanogpt", cut, r"train\.bin has 27 bytes, which is no number of uint16 tokens"),
        ("nanogpt", lambda path: cut(path, 0), r"train\.bin has 0 bytes"),
        ("olmo", cut, r"part-0\.npy has 27 bytes, which is no number of uint16 tokens"),
        ("modded", cut, r"000001\.bin has 1051 bytes instead of 1052; it was cut short or replaced"),
        ("modded", lambda path: path.write_bytes(path.read_bytes() + b"xx"), r"has 1054 bytes instead of 1052"),
        ("modded", lambda path: path.write_bytes(b"\x00" * 1052), r"does not begin like a modded-nanogpt shard \(20240520\)"),
        ("megatron", cut, r"text_document\.bin has 55 bytes instead of 56"),
        ("megatron", lambda path: cut(path.with_suffix(".idx")), r"text_document\.idx has 141 bytes instead of 142"),
        ("megatron", lambda path: cut(path.with_suffix(".idx"), 20), r"text_document\.idx has 20 bytes, fewer than the 34 of its header"),
        ("megatron", lambda path: path.with_suffix(".idx").write_bytes(b"x" * 142), r"does not begin like a Megatron index \(MMIDIDX\)"),
        ("npy", cut, r"real\.npy is no whole NumPy array"),
        ("npy", lambda path: np.save(path, np.zeros((2, 2))), r"holds float64 of shape \(2, 2\)"),
    ],
)
def test_a_truncated_or_foreign_shard_is_named_with_its_sizes(form, damage, message, tmp_path):
    path = WRITERS[form](tmp_path)
    damage(path)
    with pytest.raises(DataError, match=message):
        read(path, tmp_path, format=form)


def test_a_megatron_index_without_its_tokens_is_named(tmp_path):
    path = megatron(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read token shard .*text_document\.bin: No such file"):
        read(path.with_suffix(".idx"), tmp_path)


def test_megatron_sequences_out_of_order_are_refused(tmp_path):
    index = megatron(tmp_path).with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[34 + 4 * 5 : 34 + 4 * 5 + 8] = struct.pack("<q", 8)  # the first pointer
    index.write_bytes(content)
    with pytest.raises(DataError, match=r"text_document\.idx describes sequences that do not follow one another"):
        read(index, tmp_path)


def test_ids_outside_the_vocabulary_are_named_with_the_remedy(tmp_path):
    (tmp_path / "x.bin").write_bytes(struct.pack("<3H", 1, 50256, 2))
    with pytest.raises(DataError, match=r"x\.bin read as uint16 holds token 50256, and the tokenizer has 0 to 256; set data\.tokenizer"):
        read(tmp_path / "x.bin", tmp_path)
    np.save(tmp_path / "y.npy", np.array([1, -1], np.int64))
    with pytest.raises(DataError, match=r"y\.npy read as int64 holds token -1"):
        read(tmp_path / "y.npy", tmp_path)


def test_an_unknown_file_and_a_folder_among_files_are_refused(tmp_path):
    (tmp_path / "x.dat").write_bytes(b"abcd")
    with pytest.raises(DataError, match=r"cannot tell the token format of .*x\.dat; add format:"):
        read(tmp_path / "x.dat", tmp_path)
    with pytest.raises(DataError, match=r"no file matches"):
        read(tmp_path / "absent.bin", tmp_path)
    nanogpt(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"folder is a folder of tokens among other paths; make it a source of its own"):
        prepare([{"name": "tokens", "paths": [str(tmp_path / "train.bin"), str(tmp_path / "folder")]}], "bytes", tmp_path / "c")
    with pytest.raises(DataError, match=r"cannot read .*folder/meta\.json: No such file"):
        read(tmp_path / "folder", tmp_path)
