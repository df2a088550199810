#include "server-clex-http.h"

#include "server-clex-process.h"
#include "server-common.h"

#include <atomic>
#include <system_error>
#include <utility>

// what may go wrong many times a second
static void log_once_a_minute(const char * message) {
    static std::atomic<int64_t> t_next{0};

    const int64_t t_now = ggml_time_us();
    int64_t t = t_next.load();
    if (t_now >= t && t_next.compare_exchange_strong(t, t_now + 60*1000*1000)) {
        SRV_WRN("%s", message);
    }
}

bool server_clex_enqueue(httplib::ThreadPool & pool, std::function<void()> fn) {
    try {
        return pool.enqueue(std::move(fn));
    } catch (const std::system_error &) {
        // it is in the queue
        log_once_a_minute("connections wait: no more threads can be started, see ulimit -u\n");
        return true;
    }
}

void server_clex_log_error(const httplib::Error & error, const httplib::Request * request) {
    if (error == httplib::Error::Timeout && request) {
        SRV_WRN("closed a connection from %s whose request did not arrive in time\n", request->remote_addr.c_str());
    } else if (error == httplib::Error::ExceedMaxSocketDescriptorCount) {
        log_once_a_minute("connections wait: no more files may be open, see ulimit -n\n");
    }
}

std::function<bool()> server_clex_closed_or_stopping(std::function<bool()> is_closed) {
    return [is_closed = std::move(is_closed)] { return server_clex_process_is_stopping() || is_closed(); };
}
