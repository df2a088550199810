#include "server-clex-request.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

static constexpr size_t BYTES_PER_MS = 8;

static const std::string BODY =
    R"({"error":{"message":"the request did not arrive in time","type":"invalid_request_error","code":408}})";

static const std::string ANSWER =
    "HTTP/1.1 408 Request Timeout\r\n"
    "Content-Type: application/json; charset=utf-8\r\n"
    "Content-Length: " + std::to_string(BODY.size()) + "\r\n"
    "Connection: close\r\n"
    "\r\n" + BODY;

// A status line of an answer; one that asks for the body is none.
static bool begins_answer(const char * ptr, size_t size) {
    static const char version[] = "HTTP/1.1 ";
    static constexpr size_t n = sizeof(version) - 1;

    return size > n && std::memcmp(ptr, version, n) == 0 && ptr[n] != '1';
}

server_clex_request::server_clex_request(httplib::Stream & connection, time_t timeout, std::function<void()> late) :
    connection(connection), late(std::move(late)), deadline(clock::now() + std::chrono::seconds(std::min(timeout, TIMEOUT))) {}

void server_clex_request::arrived(size_t size) {
    deadline += std::chrono::milliseconds(size/BYTES_PER_MS);
}

void server_clex_request::end() {
    error_ = httplib::Error::Timeout;
    if (!answered) {
        late();
        connection.write(ANSWER.data(), ANSWER.size());
    }
    ended = true;
}

ssize_t server_clex_request::read(char * ptr, size_t size) {
    if (ended) {
        return -1;
    }
    if (limited) {
        const auto left = std::chrono::duration_cast<std::chrono::microseconds>(deadline - clock::now()).count();
        if (left <= 0) {
            end();
            return -1;
        }
        connection.set_read_timeout(left/1000000, left%1000000);
    }

    const ssize_t n = connection.read(ptr, size);
    if (n > 0) {
        arrived(n);
    } else if (n < 0 && limited && (connection.get_error() == httplib::Error::Timeout || clock::now() >= deadline)) {
        end();
    } else {
        error_ = connection.get_error();
    }
    return n;
}

void server_clex_request::consume_buffered(size_t size) {
    connection.consume_buffered(size);
    arrived(size);
}

ssize_t server_clex_request::write(const char * ptr, size_t size) {
    if (ended) {
        return -1;
    }
    answered = answered || begins_answer(ptr, size);
    return connection.write(ptr, size);
}

void server_clex_request::set_read_timeout(time_t sec, time_t usec) {
    limited = false;
    connection.set_read_timeout(sec, usec);
}
