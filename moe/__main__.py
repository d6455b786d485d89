"""`python -m moe`."""

from __future__ import annotations

from moe.cli import main

if __name__ == "__main__":
    main()
