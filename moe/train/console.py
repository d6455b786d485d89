"""What a person sees of a run: a live line at a terminal, plain lines elsewhere, and a summary at the end."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any

from rich import console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from moe.train.inspect import health_line, inspect


class Warnings(logging.Handler):
    """Prints what the package warns of, above the live line where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


class Terminal(console.Console):
    """Falls silent when its reader leaves, as `head` does; the run goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Prints on the first rank; silent on the others."""

    def __init__(self, *, first: bool) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal's encoding lacks
        self.terminal = Terminal(quiet=not first, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        log = logging.getLogger("moe")
        log.handlers, log.propagate = [Warnings()], False

    def say(self, text: str) -> None:
        self.terminal.print(text, markup=False)

    @contextmanager
    def progress(self, done: int, steps: int) -> Iterator[None]:
        """A live bar while the loop runs, if this is a terminal."""
        if not self.terminal.is_terminal or self.terminal.quiet:
            yield
            return
        fixed = Column(no_wrap=True)
        bar = [BarColumn(24)] if self.terminal.width >= 120 else []  # where it would push the figures off the line
        columns = (
            *bar,
            MofNCompleteColumn(table_column=fixed),
            TimeRemainingColumn(table_column=fixed),
            TextColumn("left  {task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        )
        with Progress(*columns, console=self.terminal) as self.bar:
            self.task = self.bar.add_task("steps", total=steps, completed=done, figures="")
            yield
        self.bar = None

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def step(self, row: dict[str, Any]) -> None:
        lr = "" if self.bar is not None else f"  lr {row['lr']:.2e}"  # the live line has to fit 80 columns
        figures = f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}{lr}  {row['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in row:
            figures += f"  mfu {row['mfu']:.1%}"
        if row.get("layers"):
            figures += f"  load {max(layer['max_over_mean'] for layer in row['layers'].values()):.2f}x"
        if not row["applied"]:
            figures += "  SKIPPED: loss or gradient was not finite"
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], figures=figures)
            return
        self.say(f"step {row['step']:>6}  {figures}")

    def validation(self, row: dict[str, Any]) -> None:
        churn = f"  churn {row['churn']:.1%}" if "churn" in row else ""
        self.say(
            f"step {row['step']:>6}  validation loss {row['validation_loss']:.4f}  perplexity {row['perplexity']:.2f}  "
            f"bits per byte {row['bits_per_byte']:.3f}{churn}"
        )

    def summary(self, folder: Path, sample: str) -> None:
        """The end of a run: how the loss went, how the experts were used, what the model writes, where it all lies."""
        facts = inspect(folder)
        validation = facts["validation"]["last"]
        self.say(f"\nloss {facts['loss']['first']:.4f} → {facts['loss']['last']:.4f} in {facts['steps']['done']} steps")
        self.say(f"validation {validation['validation_loss']:.4f}, {validation['bits_per_byte']:.3f} bits per byte")
        self.say(f"speed {facts['tokens_per_second']:,.0f} tokens/s")
        self.say(health_line(facts["layers"]))
        if sample:
            self.say(f"sample\n{indent(sample, '    ')}")
        self.say(f"run {folder.resolve()}")
