#pragma once

// What llama-server's process does before anything else.
//
// It takes as many file descriptors as it may have, since each connection is one. With LLAMA_CLEX_END_WITH_STDIN in the
// environment it ends when its standard input does: the system closes the other end of a pipe however its owner ends. The
// servers that a router starts have a pipe from the router, which they watch themselves.
void server_clex_process_start();
