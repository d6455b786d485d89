"""Programs that measure what the README claims; each runs as `python -m benchmarks.NAME [--json FILE] [--quick]`."""
