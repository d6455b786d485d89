"""Layout: how the ranks of a job are used, and whether a world of a given size can be used so."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe.config import Settings


class Layout(Settings):
    """How ranks are used."""

    ranks: int | None = Field(None, gt=0)  # the world size this recipe is meant for; null for any
    device: Literal["auto", "cpu", "cuda"] = "auto"
    replicas: int = Field(1, gt=0)  # fsdp2: copies of the sharded model (HSDP)
    timeout: int = Field(600, gt=0)  # seconds a collective may take before the run stops with the silent rank's name
