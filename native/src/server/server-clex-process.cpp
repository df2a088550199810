#include "server-clex-process.h"

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>

#if defined(_WIN32)
#include <io.h>
#else
#include <algorithm>
#include <sys/resource.h>
#include <unistd.h>
#endif

static constexpr int END_TIMEOUT = 20; // seconds for what is being computed to end, as clex_local.Server gives

// More than the connections that are served at once; macOS refuses "unlimited".
static constexpr long MAX_FILES = 8192;

static void raise_file_limit() {
#if !defined(_WIN32)
    rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < (rlim_t) MAX_FILES) {
        limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, MAX_FILES);
        setrlimit(RLIMIT_NOFILE, &limit);
    }
#endif
}

// Not through stdio, whose lock exit() would wait for.
static bool read_stdin() {
    char byte;
#if defined(_WIN32)
    return _read(0, &byte, 1) > 0;
#else
    const ssize_t n = read(STDIN_FILENO, &byte, 1);
    return n > 0 || (n < 0 && errno == EINTR);
#endif
}

void server_clex_process_start() {
    raise_file_limit();

    const bool wanted    = std::getenv("LLAMA_CLEX_END_WITH_STDIN");
    const bool of_router = std::getenv("LLAMA_SERVER_ROUTER_PORT");
    if (!wanted || of_router) {
        return;
    }
    std::thread([] {
        while (read_stdin()) {
        }
        std::raise(SIGTERM); // before the model is loaded it ends at once
        std::this_thread::sleep_for(std::chrono::seconds(END_TIMEOUT));
        std::_Exit(1);
    }).detach();
}
