"""What tests cannot do under ``make sanitize``."""

from __future__ import annotations

import os

import pytest

SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")

skip_without_memory = pytest.mark.skipif(SANITIZED, reason="AddressSanitizer ends the program when memory runs out")
skip_without_openmp = pytest.mark.skipif(SANITIZED, reason="the sanitized library is built without OpenMP")
