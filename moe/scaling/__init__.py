"""Scaling laws: fit them to the results of runs, and say which model a compute budget deserves."""

from __future__ import annotations

__all__ = ["LAWS"]

LAWS = {
    "chinchilla": "moe.scaling.laws:CHINCHILLA",
    "clark": "moe.scaling.laws:CLARK",
    "krajewski": "moe.scaling.laws:KRAJEWSKI",
    "abnar": "moe.scaling.laws:ABNAR",
    "ludziejewski": "moe.scaling.laws:LUDZIEJEWSKI",
    "journey": "moe.scaling.laws:JOURNEY",
}
