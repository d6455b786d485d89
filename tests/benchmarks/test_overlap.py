"""The table of chunks: times against those in one piece, round by round."""

from __future__ import annotations

from benchmarks.overlap import table


def test_a_ratio_is_taken_round_by_round_against_one_piece():
    rows = table({"rows": {"1": [6.0, 4.0, 10.0], "2": [3.0, 4.0, 4.0]}}, 2)
    assert [(row["overlap"], row["ms"], row["times as fast"]) for row in rows] == [(1, 6.0, 1.0), (2, 4.0, 2.0)]
