from __future__ import annotations

import importlib
import inspect
import json
import os

import pytest

from moe.data.sources import SOURCES, JsonLines, Source, Stdlib, Text, build
from moe.errors import ConfigError, DataError, MoeError


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_only_keyword_options_a_weight_and_a_sentence(name):
    module, _, attribute = SOURCES[name].partition(":")
    source = getattr(importlib.import_module(module), attribute)
    assert issubclass(source, Source)
    assert source.name == name
    assert source.__doc__
    parameters = inspect.signature(source).parameters
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert parameters["weight"].default == 1.0


def test_stdlib_is_source_text_without_tests_and_tables():
    stdlib = Stdlib()
    assert {"abc.py", "json/decoder.py", "encodings/__init__.py"} <= set(stdlib.files)
    assert stdlib.files == sorted(stdlib.files)
    folders = {part for file in stdlib.files for part in file.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}
    assert "encodings/cp037.py" not in stdlib.files
    documents = list(stdlib.documents())
    assert 7e6 < sum(len(d.encode()) for d in documents) < 14e6
    assert any(d.startswith("# Copyright 2007 Google, Inc.") for d in documents)  # abc.py


def test_stdlib_is_found_from_a_virtual_environment_too():
    assert (Stdlib().root / "abc.py").samefile(inspect.getsourcefile(importlib.import_module("abc")))


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["one\ntwo\r\n\n \nthree", "four\n"]),
        ("paragraph", ["one\ntwo\r\n", "three", "four\n"]),
        ("line", ["one", "two\r", "", " ", "three", "four"]),
    ],
)
def test_a_document_is_a_file_a_paragraph_or_a_line(tmp_path, document, expected):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\n\n \nthree")
    (tmp_path / "b.txt").write_bytes(b"four\n")
    assert list(Text(paths=[str(tmp_path / "*.txt")], document=document).documents()) == expected


def test_files_come_in_the_order_of_paths_then_names_and_once(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / name).write_text(name)
    source = Text(paths=[str(tmp_path / "c"), str(tmp_path / "*")])
    assert list(source.documents()) == ["c", "a", "b"]


def test_jsonl_reads_a_field_and_skips_blank_lines(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "a\\nb"}\n\n{"body": "é"}', encoding="utf-8")
    assert list(JsonLines(paths=[str(tmp_path / "x.jsonl")], field="body").documents()) == ["a\nb", "é"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"x\.jsonl:2 is not JSON"),
        ("[1]", r"x\.jsonl:2 has no text in field 'text' \(it has: list\)"),
        ('{"txt": "a"}', r"x\.jsonl:2 has no text in field 'text' \(it has: txt\); add field:"),
        ('{"text": 3}', r"x\.jsonl:2 has no text in field 'text'"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        list(JsonLines(paths=[str(tmp_path / "x.jsonl")]).documents())


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file matches '.*\*\.md' of source text \(looked from "):
        Text(paths=[str(tmp_path / "*.md")])
    with pytest.raises(DataError, match=r"is a folder; name its files, for example "):
        Text(paths=[str(tmp_path)])
    with pytest.raises(ConfigError, match="source text has an empty list of paths"):
        Text(paths=[])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 \(.*byte 0xe9\); convert it first"):
        list(Text(paths=[str(tmp_path / "latin.txt")]).documents())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_named(tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(DataError, match=r"cannot read .*secret\.txt: Permission denied"):
        list(Text(paths=[str(tmp_path / "secret.txt")]).documents())


def test_a_file_that_vanishes_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    source = Text(paths=[str(tmp_path / "a.txt")])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: No such file"):
        list(source.documents())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("stdlb", "unknown source 'stdlb'; did you mean stdlib"),
        ({"name": "text", "path": ["x"]}, "source text has no option 'path'; did you mean paths"),
        ({"name": "jsonl"}, "source jsonl needs paths; add paths: to it"),
        ({"name": "stdlib", "weight": 0}, "source stdlib has weight 0; give a positive number"),
        ({"name": "stdlib", "weight": float("nan")}, "source stdlib has weight nan"),
    ],
)
def test_a_wrong_description_is_one_sentence(source, message):
    with pytest.raises(ConfigError, match=message):
        build(source)


def test_hugging_face_reads_a_data_set_or_names_the_extra(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "é"}\n', encoding="utf-8")
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(MoeError, match=r"needs the package `datasets`; install the extra: pip install 'moe\[hf\]'"):
            build({"name": "huggingface", "dataset": str(tmp_path)})
        return
    source = build({"name": "huggingface", "dataset": str(tmp_path)})
    assert list(source.documents()) == ["a", "é"]
    with pytest.raises(DataError, match=r"has no text in field 'body' \(it has: text\)"):
        list(build({"name": "huggingface", "dataset": str(tmp_path), "field": "body"}).documents())
    with pytest.raises(DataError, match="cannot read the data set"):
        list(build({"name": "huggingface", "dataset": str(tmp_path), "split": "absent"}).documents())
