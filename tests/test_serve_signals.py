"""Signals that end the server, whenever they come."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from clex_local import serve
from clex_local.server.process import server_program
from helpers.random_gguf import make_model, random_tokens

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]

# Sends the main thread a signal at a chosen place: as soon as it is handled, or while the lock of the queue is held.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile int handled;

static void come(const char * place) {
    static volatile int came;
    if (handled && !came && getpid() == gettid() && strcmp(getenv("SIGNAL_AT"), place) == 0) {
        came = 1;
        raise(SIGTERM);
    }
}

int sigaction(int number, const struct sigaction * action, struct sigaction * before) {
    int (*next)(int, const struct sigaction *, struct sigaction *) = dlsym(RTLD_NEXT, "sigaction");
    int res = next(number, action, before);
    if (number == SIGTERM && action && action->sa_handler != SIG_DFL) {
        handled = 1;
        come("once it is handled");
    }
    return res;
}

int pthread_cond_clockwait(pthread_cond_t * cond, pthread_mutex_t * mutex, clockid_t clock,
                           const struct timespec * end) {
    int (*next)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *) =
        dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    come("while it waits for requests");
    return next(cond, mutex, clock, end);
}
"""


@pytest.mark.parametrize("place", ["once it is handled", "while it waits for requests"])
def test_a_signal_at_a_bad_moment_ends_the_server(tmp_path: Path, place: str) -> None:
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)
    model = make_model(tmp_path / "model.gguf")
    command = [server_program(), "-m", model, "--port", "0", "--no-warmup", "--threads", "1", "-c", "64"]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "SIGNAL_AT": place}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "listening on" in done.stdout + done.stderr


@pytest.mark.parametrize("of_a_folder", [False, True])
def test_an_answer_that_is_being_read_does_not_keep_the_server(tmp_path, of_a_folder):
    folder = tmp_path / "models"
    folder.mkdir()
    path = make_model(folder / "tiny.gguf", original=65536)
    prompt = list(map(int, random_tokens(20)))
    request = {"model": "tiny", "prompt": prompt, "n_predict": 60_000, "ignore_eos": True, "stream": True}
    with (
        serve(folder if of_a_folder else path, port=0, ctx=0, parallel=1, threads=1, batch=64) as server,
        httpx.stream("POST", f"{server.url}/completion", json=request, timeout=60) as stream,
    ):
        lines = stream.iter_lines()  # which ends the stream when it goes
        next(lines)
        assert server.close() == 0
