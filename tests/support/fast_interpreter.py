"""Make Triton's interpreter some times faster, and repair what does not run with every NumPy.

It patches its language anew at every call within a kernel; once is enough. That of Triton 3.5 makes an index of an
array with a dimension, which NumPy 2.5 refuses. That of 3.9 makes integers of a bool that is spread over a block, and
refuses the mask that comes of it.
"""

import numpy as np
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_patch_tensor = interpreter._patch_lang_tensor
_splat = interpreter.InterpreterBuilder.create_splat
_patched = set()


class _Scope:
    def __init__(self, scope):
        self.scope = scope

    def restore(self):
        _patched.clear()
        self.scope.restore()


def _patch_once(function):
    """Patch the language that a function sees, unless the kernel that calls it has done so."""
    seen = id(function.__globals__)
    if seen in _patched:
        return None
    _patched.add(seen)
    return _Scope(_patch(function))


def _patch_tensor_with_index(tensor, *scope):
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


def _splat_of_the_same_type(self, type_of_block, value):
    spread = _splat(self, type_of_block, value)
    if value.data.dtype == np.bool_:
        spread.data = spread.data.astype(np.bool_)
    return spread


def install():
    """Take effect; harmless when called twice."""
    interpreter._patch_lang = _patch_once
    interpreter._patch_lang_tensor = _patch_tensor_with_index
    interpreter.InterpreterBuilder.create_splat = _splat_of_the_same_type
