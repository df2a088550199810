#include "server-clex-process.h"

#include "ggml-backend.h"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <utility>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <io.h>
#include <windows.h>
#else
#include <algorithm>
#include <fcntl.h>
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

static std::function<void()> on_signal;
static std::atomic<bool> is_stopping = false;

#if defined(_WIN32)

static BOOL WINAPI handle(DWORD type) { // in a thread of its own
    if (type != CTRL_C_EVENT) {
        return FALSE;
    }
    if (is_stopping.exchange(true)) {
        std::_Exit(1);
    }
    on_signal();
    return TRUE;
}

void server_clex_process_on_signal(std::function<void()> stop) {
    on_signal = std::move(stop);
    SetConsoleCtrlHandler(handle, TRUE);
}

#else

static int signal_pipe[2];

static void handle(int) {
    const int before = errno;
    if (is_stopping.exchange(true)) {
        static const char line[] = "a second signal ends the server at once\n";
        (void) !write(STDERR_FILENO, line, sizeof(line) - 1);
        _exit(1);
    }
    (void) !write(signal_pipe[1], "", 1);
    errno = before;
}

void server_clex_process_on_signal(std::function<void()> stop) {
    on_signal = std::move(stop);
    if (pipe(signal_pipe) != 0) {
        std::perror("pipe");
        std::_Exit(1);
    }
    for (const int end : signal_pipe) {
        fcntl(end, F_SETFD, FD_CLOEXEC);
    }
    std::thread([] {
        char byte;
        while (read(signal_pipe[0], &byte, 1) < 0) {
        }
        on_signal();
    }).detach();

    struct sigaction action = {};
    action.sa_handler = handle;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
}

#endif

bool server_clex_process_is_stopping() {
    return is_stopping;
}

void server_clex_process_stops() {
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (rpc == nullptr) {
        return;
    }
    auto * set_waiting = (void (*)(int (*)(const char *, int))) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_set_waiting");
    if (set_waiting) {
        set_waiting([](const char *, int) { return 1; });
    }
}
