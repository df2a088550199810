"""Lets every program of this environment find the patched llama.cpp; ``clex_local.pth`` imports it as Python starts.

Where no llama-cpp-python is installed, or one without a library of its own, whoever imports ``llama_cpp`` gets the
bindings that clex_local carries, with our library. Bindings that have a library are left alone until somebody imports
``clex_local``, and so are those without one while ``LLAMA_CPP_LIB_PATH`` names another.
"""

import os
import sys


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "llama_cpp":
            return None
        theirs = _found_by_others(name, path, target)
        folders = (theirs.submodule_search_locations or ()) if theirs else ()
        if theirs and (
            "LLAMA_CPP_LIB_PATH" in os.environ or any(os.path.isdir(os.path.join(folder, "lib")) for folder in folders)
        ):
            return theirs
        try:
            import clex_local  # noqa: F401, it sees to the rest
        except Exception as error:  # what the bindings then miss, they say themselves
            print(f"clex_local: {type(error).__name__}: {error}", file=sys.stderr)
        return _found_by_others(name, path, target)


def _found_by_others(name, path, target):
    finders = (finder for finder in sys.meta_path if finder is not _Finder)
    return next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)


sys.meta_path.insert(0, _Finder)
