"""`moe doctor` says what Triton needs to start."""

from __future__ import annotations

import sysconfig

from moe.train.doctor import compiler, header


def test_the_compiler_is_that_of_cc_or_the_first_found(tmp_path, monkeypatch):
    for name in ("gcc", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "mine")
    assert compiler() == str(tmp_path / "mine")
    monkeypatch.delenv("CC")
    assert compiler() == str(tmp_path / "gcc")
    (tmp_path / "gcc").unlink()
    assert compiler() is None


def test_a_header_that_is_not_there_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert header() is None
    (tmp_path / "Python.h").write_text("")
    assert header() == str(tmp_path / "Python.h")
