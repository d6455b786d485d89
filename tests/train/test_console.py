"""What a person sees fits a terminal of 80 columns, and warnings are sentences."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console as Terminal

from moe.train.console import Console

ROW = {
    "step": 1234,
    "loss": 10.1234,
    "grad_norm": 12.345,
    "lr": 3e-4,
    "tokens_per_second": 123456.0,
    "applied": True,
    "layers": {"0": {"max_over_mean": 1.5}, "1": {"max_over_mean": 2.25}},
}


@pytest.fixture(autouse=True)
def log():
    """The package's logger, as it was."""
    log = logging.getLogger("moe")
    handlers, propagate = log.handlers, log.propagate
    yield log
    log.handlers, log.propagate = handlers, propagate


@pytest.mark.parametrize("width", [80, 160])
def test_the_live_line_shows_step_time_and_figures_on_one_line(width: int):
    console, out = Console(first=True), io.StringIO()
    console.terminal = Terminal(file=out, force_terminal=True, width=width, color_system=None)
    with console.progress(0, 20_000):
        console.step(ROW)
        assert console.bar is not None
        options = console.terminal.options
        line = console.terminal.render_lines(console.bar.get_renderable(), options)
    assert len(line) == 1
    shown = "".join(segment.text for segment in line[0])
    for word in ("1234/20000", "left", "loss 10.1234", "grad 12.345", "123,456 tokens/s", "load 2.2"):
        assert word in shown


def test_a_plain_line_has_the_learning_rate_as_well(capsys: pytest.CaptureFixture[str]):
    console = Console(first=True)
    console.step(ROW)
    assert "lr 3.00e-04" in capsys.readouterr().out


def test_a_warning_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]):
    Console(first=True)
    logging.getLogger("moe.data.loader").warning("source %s has been read often", "text")
    assert capsys.readouterr().err == "warning: source text has been read often\n"


def test_a_summary_without_a_sample_does_not_speak_of_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path):
    facts = {
        "validation": {"last": {"validation_loss": 1.0, "bits_per_byte": 1.44}},
        "loss": {"first": 5.0, "last": 1.0},
        "steps": {"done": 3},
        "tokens_per_second": 10.0,
        "layers": {},
    }
    monkeypatch.setattr("moe.train.console.inspect", lambda folder: facts)
    Console(first=True).summary(tmp_path, "")
    assert "sample" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_an_arrow_does_not_end_a_run_on_a_terminal_without_arrows(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console = Console(first=True)
    console.say("loss 5 → 1")
    console.terminal.file.flush()
    assert raw.getvalue() == b"loss 5 ? 1\n"
