"""Checkpoints: torch's DCP for sharding, our own rules for everything a file system can do to it."""
