#pragma once

#include <cpp-httplib/httplib.h>

#include <functional>

// What llama-server does where the system's limits are reached, or a request does not arrive in time.

// let the pool do it; where no more threads can be started, those that there are
bool server_clex_enqueue(httplib::ThreadPool & pool, std::function<void()> fn);

// of httplib::Server::set_error_logger
void server_clex_log_error(const httplib::Error & error, const httplib::Request * request);

// whether a request is to be ended: its client is gone, or the server is about to stop
std::function<bool()> server_clex_closed_or_stopping(std::function<bool()> is_closed);
