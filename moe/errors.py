"""The error family: every failure a user can cause or meet, with the exit code a script can read.

A message is one sentence: what is wrong, the value, and what to type instead.
"""

from __future__ import annotations


class MoeError(Exception):
    """The root: `except MoeError` catches everything this package raises on purpose."""

    exit_code = 1


class ConfigError(MoeError):
    """A setting, file or argument that cannot be used as given."""

    exit_code = 2


class DataError(MoeError):
    """A corpus, token shard or tokenizer that is absent, truncated, foreign or changed."""

    exit_code = 3


class CheckpointError(MoeError):
    """A checkpoint that is incomplete, corrupt, unsafe to read or of another model."""

    exit_code = 4


class NoSpace(MoeError):
    """The disk is too full to write what the run needs."""

    exit_code = 5


class RankMismatch(MoeError):
    """Ranks that should agree (recipe, code, versions, placement) do not."""

    exit_code = 6


class CollectiveTimeout(MoeError):
    """A collective did not end: some rank is silent, slow or gone."""

    exit_code = 7


class NonFinite(MoeError):
    """Loss or gradient was not finite for too many steps in a row."""

    exit_code = 8


class OutOfMemory(MoeError):
    """A GPU has too little memory for what the recipe asks."""

    exit_code = 9


class Preempted(MoeError):
    """The run was asked to stop, saved, and can go on: run the same command again."""

    exit_code = 75
