"""With torch, Triton and pytest alone, the files that need the whole package are left out; launch/wheels.sh carries what they want."""

from __future__ import annotations

import re
from pathlib import Path

try:
    import grain  # noqa: F401
    import pydantic  # noqa: F401

    collect_ignore = []
except ImportError:
    needs_all = re.compile(r"^(from|import) moe\.(?!kernels|routers|errors|faults|shapes)", re.MULTILINE)
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if needs_all.search(path.read_text())]
