"""BACKWARD AND STEP: what differs between ways of holding parameters. One file an engine."""

from __future__ import annotations

__all__ = ["ENGINES"]

ENGINES = {
    "ddp": "moe.engines.ddp:DDP",
    "fsdp2": "moe.engines.fsdp2:FSDP2",
    "deepspeed": "moe.engines.deepspeed:DeepSpeed",
}
