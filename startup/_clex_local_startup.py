"""Lets every program of this environment find the patched llama.cpp; ``clex_local.pth`` imports it as Python starts.

llama-cpp-python that was installed without a library of its own gets ours as soon as anything imports ``llama_cpp``.
Bindings that have a library, and ``LLAMA_CPP_LIB_PATH``, are left alone until somebody imports ``clex_local``.
"""

import os
import sys


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        wanted = name == "llama_cpp.llama_cpp" and "LLAMA_CPP_LIB_PATH" not in os.environ
        if wanted and not any(os.path.isdir(os.path.join(folder, "lib")) for folder in path or ()):
            try:
                import clex_local  # noqa: F401, it sees to the rest
            except Exception as error:  # what the bindings then miss, they say themselves
                print(f"clex_local: {type(error).__name__}: {error}", file=sys.stderr)
        return None  # the others find it


sys.meta_path.insert(0, _Finder)
