"""The table of layouts: speeds against data parallelism of the same world and round."""

from __future__ import annotations

from benchmarks.expert_parallel import layouts, table


def test_a_ratio_is_taken_round_by_round_against_ddp_of_the_same_world():
    def figures(*seconds):
        return {"tokens": 100, "seconds": list(seconds), "sent": 2**21}

    found = {"step": {"ddp": figures(1.0, 4.0, 2.0), "fsdp2": figures(2.0, 2.0, 4.0)}, "layer": {"moe, rows": figures(1.0)}}
    rows = table({2: found})
    assert [(row["layout"], row["over ddp, or rows"], row["tokens/s"], row["MiB sent"]) for row in rows] == [
        ("ddp", 1.0, 50, 2.0),
        ("fsdp2", 0.5, 50, 2.0),
        ("moe, rows", 1.0, 100, 2.0),
    ]


def test_expert_ranks_are_compared_where_there_are_as_many():
    assert list(layouts(1)) == ["ddp", "fsdp2"]
    assert "ddp, 4 expert ranks" not in layouts(2)
    assert "fsdp2, 2 expert ranks" in layouts(4)
