#pragma once

#include <functional>

// What llama-server's process does before anything else, and at its end.
//
// It takes as many file descriptors as it may have, since each connection is one. With LLAMA_CLEX_END_WITH_STDIN in the
// environment it ends when its standard input does: the system closes the other end of a pipe however its owner ends. The
// servers that a router starts have a pipe from the router, which they watch themselves.
void server_clex_process_start();

// Have the first signal that asks the process to end (SIGINT, SIGTERM; on Windows Ctrl-C) call a function, in a thread of its own: in a
// handler it could wait for a lock that the thread below it holds. The second one ends the process at once.
void server_clex_process_on_signal(std::function<void()> stop);

// whether that signal has come: then requests end
bool server_clex_process_is_stopping();

// It is about to stop: RPC servers that hang are no longer waited for.
void server_clex_process_stops();
