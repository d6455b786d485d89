"""Shape annotations: jaxtyping where it is installed, plain names where it is not.

Kernels and routers must import on a machine that has torch and nothing else, so nobody imports jaxtyping directly.

    t  tokens of one call        E  experts                 b  sequences
    n  assignments (rows)        k  experts per token       s  positions in a sequence
    d  width of the model        f  width of one expert     h  attention heads      v  vocabulary
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Bool", "Float", "Int"]

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:

        class Float:
            """Stand-in: `Float[Tensor, "t d"]` is `Tensor`."""

            def __class_getitem__(cls, item):
                return item[0]

        Bool = Int = Float
