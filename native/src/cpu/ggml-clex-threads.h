#pragma once

#include "ggml-backend.h"

#include <stdbool.h>
#include <stdint.h>

// How many of the planned threads compute a graph on the CPU: fewer while other processes want the same cores and fewer
// are faster, see native/README.md. Never more than planned, and the results do not depend on it. With the environment
// variable GGML_CLEX_THREADS_FIXED, and where the system does not tell how often a thread was preempted (all but
// Linux), it is always the planned number.

struct ggml_cgraph;
struct ggml_threadpool;

#ifdef __cplusplus
extern "C" {
#endif

// One graph that is being computed.
struct ggml_clex_graph {
    int      n_planned;
    int      n_threads;
    int      n_nodes;
    double   work;        // multiplications
    uint64_t kind;        // 0 where nothing is to be decided
    int64_t  start;       // microseconds
    int64_t  cpu;         // of this thread so far, microseconds
    int64_t  preemptions; // so far
    int64_t  single_time; // microseconds that one thread may need
    bool     given_up;
    int      alone;       // see ggml_clex_threads_fix
};

// Called by the thread that computes the graph, before and after. The number of threads to use.
int  ggml_clex_graph_begin(struct ggml_clex_graph * graph, const struct ggml_cgraph * cgraph, int n_planned);
void ggml_clex_graph_end  (struct ggml_clex_graph * graph, bool complete);

// Called by that thread when n_done of the nodes are computed: whether it shall compute the others alone.
bool ggml_clex_graph_give_up(struct ggml_clex_graph * graph, int n_done);

// Decide nothing from now on: so many threads (at most those planned), and the first of them is alone after n_nodes
// nodes, unless that is 0. n_threads = 0: decide.
GGML_BACKEND_API void ggml_clex_threads_fix(int n_threads, int n_nodes);

// Called before the first of OpenMP's threads is needed. False in a process that was forked from one that has such
// threads: GCC's library waits for them for ever there.
bool ggml_clex_may_start_threads(void);

// What the node's kernels divide their work by where that decides how sums are rounded: the planned number.
int ggml_clex_planned_threads(const struct ggml_threadpool * threadpool);

#ifdef __cplusplus
}
#endif
