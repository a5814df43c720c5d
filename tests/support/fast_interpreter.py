"""Make Triton's interpreter some times faster: it patches its language anew at every call within a kernel."""

from triton.runtime import interpreter

_patch = interpreter._patch_lang
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


def install():
    """Take effect; harmless when called twice."""
    interpreter._patch_lang = _patch_once
