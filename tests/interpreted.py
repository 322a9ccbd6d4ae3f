"""Triton's interpreter without what takes most of its time and has nothing to do with the kernels."""

import functools
import inspect
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def make_quick() -> None:
    interpreter.ReduceOps.generic_reduce = by_halves
    interpreter._patch_builtin = patch_known_builtins


one_by_one = interpreter.ReduceOps.generic_reduce


def by_halves(self: Any, inputs: Any) -> Any:
    """``tl.reduce`` with an elementwise, commutative combination of its own: as a tree, not element after element."""
    if self.axis is None or self.keep_dims:
        return one_by_one(self, inputs)
    parts = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    while (length := len(parts[0])) > 1:
        halves = [
            self.to_tensor(part[half], x.dtype)
            for half in (slice(length // 2), slice(length // 2, length))
            for part, x in zip(parts, inputs, strict=True)
        ]
        combined = self.combine_fn.fn(*halves)
        parts = [x.handle.data for x in (combined if isinstance(combined, tuple) else (combined,))]
    return [self.to_tensor(part[0], x.dtype) for part, x in zip(parts, inputs, strict=True)]


@functools.cache
def builtins_of(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_known_builtins(package: Any, *how: Any) -> None:
    """Every call of a function in a kernel patches the language, and would search it for what there is to patch."""
    for name in builtins_of(package):
        if tl.core.is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, *how)
