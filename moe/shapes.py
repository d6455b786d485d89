"""Shape annotations: jaxtyping where it is installed, plain names where it is not.

Kernels and routers must import on a machine that has torch and nothing else, so nobody imports jaxtyping directly.

    t  tokens of one call        E  experts                 b  sequences
    n  assignments (rows)        k  experts per token       s  positions in a sequence
    d  width of the model        f  width of one expert     h  attention heads      v  vocabulary
"""

from __future__ import annotations

__all__ = ["Bool", "Float", "Int"]

try:
    from jaxtyping import Bool, Float, Int
except ImportError:

    class Float:  # type: ignore[no-redef]
        """Stand-in: `Float[Tensor, "t d"]` is `Tensor`."""

        def __class_getitem__(cls, item):
            return item[0]

    Bool = Int = Float  # type: ignore[misc]
