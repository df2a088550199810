"""``python -m clex_local PROGRAM ...`` is ``python -m PROGRAM ...`` with our ``Llama`` for ``llama_cpp.Llama``."""

from __future__ import annotations

import importlib.util
import runpy
import sys

from clex_local import ClexError, install


def main() -> None:
    """Run another module as a program."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m clex_local PROGRAM [ARGUMENT...], such as python -m clex_local llama_cpp.server ...")
    try:
        install()
    except ClexError as error:
        sys.exit(f"clex_local: error: {error}")
    del sys.argv[0]
    try:
        found = importlib.util.find_spec(sys.argv[0])
    except ImportError:  # of a package that it would be in
        found = None
    if found is None:
        sys.exit(f"clex_local: error: there is no module {sys.argv[0]} here")
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
