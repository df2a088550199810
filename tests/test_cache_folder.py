"""Where caches are kept, and who may read them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clex_local.store.cache_folder import cache_folder, make_cache_folder

pytestmark = pytest.mark.runtime


def test_tests_use_none_of_the_user(monkeypatch):
    ours = cache_folder()
    code = "from clex_local.store.cache_folder import cache_folder; print(cache_folder())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == str(ours)
    monkeypatch.delenv("CLEX_CACHE")
    assert ours != cache_folder()


def test_folder_is_made_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "a" / "b"))
    assert cache_folder() == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    for _ in range(2):
        folder = make_cache_folder()
        assert folder == cache_folder()
        assert folder.is_dir()
        assert sys.platform == "win32" or folder.stat().st_mode & 0o777 == 0o700


def test_variable_may_be_relative_and_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", "~/kept")
    assert cache_folder() == Path.home() / "kept"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLEX_CACHE", "kept")
    folder = cache_folder()
    assert folder == tmp_path / "kept"


def test_without_the_variable_it_is_among_the_users_caches(tmp_path, monkeypatch):
    pytest.importorskip("platformdirs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for empty in (None, ""):
        monkeypatch.delenv("CLEX_CACHE") if empty is None else monkeypatch.setenv("CLEX_CACHE", empty)
        found = cache_folder()
        assert found.name == "clex-local" or found.parent.name == "clex-local"
        assert sys.platform != "linux" or found == tmp_path / "clex-local"
