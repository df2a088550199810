#pragma once

#include "httplib.h"

#include <chrono>
#include <functional>

// A connection while a request is read from it. The whole of it has to arrive within a time, longer by what it takes at a
// least rate, while httplib's timeout starts anew with each byte. One that does not is answered with status 408, and nothing
// more is read or written.
class server_clex_request : public httplib::Stream {
public:
    static constexpr time_t TIMEOUT = 30; // seconds

    // timeout: httplib's, in seconds, where it is less; late() is called once
    server_clex_request(httplib::Stream & connection, time_t timeout, std::function<void()> late);

    ssize_t read(char * ptr, size_t size) override;
    ssize_t write(const char * ptr, size_t size) override;

    const char * buffered_data(size_t & size) const override { return connection.buffered_data(size); }
    void consume_buffered(size_t size) override;

    bool is_readable() const override { return connection.is_readable(); }
    bool wait_readable() const override { return connection.wait_readable(); }
    bool wait_writable() const override { return connection.wait_writable(); }
    bool is_peer_alive() const override { return connection.is_peer_alive(); }

    void get_remote_ip_and_port(std::string & ip, int & port) const override { connection.get_remote_ip_and_port(ip, port); }
    void get_local_ip_and_port(std::string & ip, int & port) const override { connection.get_local_ip_and_port(ip, port); }

    socket_t socket() const override { return connection.socket(); }
    time_t duration() const override { return connection.duration(); }

    // of what is no request any more
    void set_read_timeout(time_t sec, time_t usec) override;

private:
    using clock = std::chrono::steady_clock;

    void arrived(size_t size);
    void end();

    httplib::Stream & connection;

    std::function<void()> late;

    clock::time_point deadline;

    bool limited  = true;
    bool answered = false;
    bool ended    = false;
};
