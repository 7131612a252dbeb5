"""Kernels run without a GPU: Triton's interpreter, with its bfloat16 mended and hidden faults made
visible.

Triton reads TRITON_INTERPRET when it is imported, so the tests of this folder need a process of
their own, which `tests/test_interpreted.py` starts; other runs pass the folder by. What holds here:

- bfloat16 products, roundings and casts are those of a GPU. The interpreter as it comes multiplies
  the bit patterns and truncates; arithmetic that it would still get wrong raises.
- Programs run in a shuffled order, so that one that needs another to have run before it fails.
- Memory that was not written is NaN, as is everything computed from it.
- The GPU that launch tables ask for is the `arch` fixture's: an H100 (90) unless a test says
  otherwise.

What no test here can see: races inside a program, tensor-core rounding, the compiler's mistakes,
registers and shared memory.
"""

import os
import types

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


class PretendedGPU:
    """What Triton's `driver.active` is asked for by code that picks its launch configuration."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@pytest.fixture(autouse=True)
def arch(request):
    """The pretended GPU's architecture; `@pytest.mark.parametrize("arch", [80], indirect=True)`
    sets another.
    """
    from triton.runtime.driver import driver

    arch = getattr(request, "param", 90)
    driver.set_active(PretendedGPU(arch))
    return arch


@pytest.fixture(autouse=True)
def everywhere(unwritten_memory_is_nan):
    """Kernels leave nothing unwritten."""


def mend(builder):
    """Replaces methods of the interpreter's builder (module docstring)."""
    from triton import language as tl
    from triton.runtime import interpreter

    def is_bfloat16(handle):
        return handle.dtype.scalar == tl.bfloat16

    def widened(handle):  # bfloat16 is kept as its 16 bits in a uint16
        if not is_bfloat16(handle):
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def rounded(handle):
        """float32 to the nearest bfloat16, ties to even."""
        value = np.ascontiguousarray(handle.data, np.float32)
        bits = value.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = np.where(np.isnan(value), 0x7FC0, bits).astype(np.uint16)
        return interpreter.TensorHandle(bits.reshape(np.shape(handle.data)), tl.bfloat16)

    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp
    arithmetic, set_dim, set_idx = builder.binary_op, builder.set_grid_dim, builder.set_grid_idx

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return rounded(source)
        if is_bfloat16(source) and to.scalar == tl.float32:
            return widened(source)
        return cast(self, source, to)

    def create_fp_to_fp(self, source, to, rounding):
        nearest = rounding != interpreter._ir.ROUNDING_MODE.RTZ
        if nearest and source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return rounded(source)
        return convert(self, source, to, rounding)

    def binary_op(self, left, right, op):
        if is_bfloat16(left) or is_bfloat16(right):
            raise TypeError(f"{op.__name__} of bfloat16 in the interpreter: cast to float32 first")
        return arithmetic(self, left, right, op)

    def set_grid_dim(self, *dims):
        set_dim(self, *dims)
        self.order = np.random.default_rng(0).permutation(int(np.prod(dims)))

    def set_grid_idx(self, *index):
        turn = np.ravel_multi_index(index, self.grid_dim)
        set_idx(self, *(int(i) for i in np.unravel_index(self.order[turn], self.grid_dim)))

    for method in (create_dot, cast_impl, create_fp_to_fp, binary_op, set_grid_dim, set_grid_idx):
        setattr(builder, method.__name__, method)

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):  # Triton 3.6 cannot count to a one-element array
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index

    patch_lang, language = interpreter._patch_lang, types.SimpleNamespace()
    language.__globals__, language.patched = {"tl": tl, "core": tl.core}, False

    def patch_once(fn):
        """For a launch, not for each call of a helper inside it, which would be a third of its
        time.
        """
        if language.patched:
            return interpreter._LangPatchScope()
        scope, language.patched = patch_lang(language), True
        restore = scope.restore

        def restore_language():
            restore()
            language.patched = False

        scope.restore = restore_language
        return scope

    interpreter._patch_lang = patch_once


if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder

    mend(InterpreterBuilder)
