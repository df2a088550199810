#include "ggml-clex-threads.h"
#include "ggml-clex-ladder.h"

#include "ggml-impl.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <mutex>

#if !defined(_WIN32)
#include <unistd.h>
#endif

#if defined(__linux__)
#include <sys/resource.h> // RUSAGE_THREAD, which only Linux has
#endif

// Not decided but given: the threads, and the nodes after which the first of them is alone; 0: decide.
// Set up when they are needed and not when the library is loaded: whether this processor can run the library is not known then.
static std::atomic<int> & fixed_threads() {
    static std::atomic<int> n(getenv("GGML_CLEX_THREADS_FIXED") ? INT_MAX : 0);
    return n;
}

static std::atomic<int> fixed_nodes(0);

void ggml_clex_threads_fix(int n_threads, int n_nodes) {
    fixed_threads() = n_threads;
    fixed_nodes     = n_nodes;
}

#if defined(RUSAGE_THREAD)

// Products of two numbers, for which matrices are read; everything else counts little.
static double graph_work(const ggml_cgraph * cgraph) {
    double work = 1.0;
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        const ggml_tensor * node = cgraph->nodes[i];
        switch (node->op) {
            case GGML_OP_MUL_MAT:
            case GGML_OP_MUL_MAT_ID:
                work += (double) ggml_nelements(node)*node->src[0]->ne[0];
                break;
            case GGML_OP_FLASH_ATTN_EXT:
                work += (double) ggml_nelements(node->src[0])*node->src[1]->ne[1]*2;
                break;
            default:
                work += (double) ggml_nelements(node);
        }
    }
    return work;
}

namespace {

// Graphs of about the same work. One table for all contexts, since they share the cores; kinds that were not computed
// for long make room for others.
struct graph_kind {
    uint64_t         id   = 0;
    uint64_t         used = 0;
    ggml_clex_ladder ladder{1};
};

std::mutex mutex;

ggml_clex_ladder & find_ladder(uint64_t id, int n_planned) {
    static graph_kind kinds[16];
    static uint64_t   n_used = 0;
    graph_kind * kind = std::find_if(std::begin(kinds), std::end(kinds), [&](const graph_kind & k) { return k.id == id; });
    if (kind == std::end(kinds)) {
        kind = std::min_element(std::begin(kinds), std::end(kinds),
            [](const graph_kind & a, const graph_kind & b) { return a.used < b.used; });
        kind->id     = id;
        kind->ladder = ggml_clex_ladder(n_planned);
    }
    kind->used = ++n_used;
    return kind->ladder;
}

int64_t microseconds(const timeval & t) {
    return 1000000*(int64_t) t.tv_sec + t.tv_usec;
}

void read_usage(int64_t & cpu, int64_t & preemptions) {
    rusage usage = {};
    getrusage(RUSAGE_THREAD, &usage);
    cpu         = microseconds(usage.ru_utime) + microseconds(usage.ru_stime);
    preemptions = usage.ru_nivcsw;
}

} // namespace

static void decide(ggml_clex_graph * graph, const ggml_cgraph * cgraph) {
    graph->work  = graph_work(cgraph);
    // never 0; a factor of four in work makes another kind
    graph->kind  = ((uint64_t) graph->n_planned << 48) + ((uint64_t) cgraph->n_nodes << 8) + (uint64_t) (std::log2(graph->work)/2);
    graph->start = ggml_time_us();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        ggml_clex_ladder & ladder = find_ladder(graph->kind, graph->n_planned);
        graph->n_threads   = ladder.threads(graph->start);
        graph->single_time = ggml_clex_ladder_single_time(&ladder, graph->work);
    }
    read_usage(graph->cpu, graph->preemptions);
}

static void report(const ggml_clex_graph * graph) {
    int64_t cpu, preemptions;
    read_usage(cpu, preemptions);
    const int64_t now = ggml_time_us();
    const std::lock_guard<std::mutex> lock(mutex);
    ggml_clex_ladder_report(&find_ladder(graph->kind, graph->n_planned), graph->n_threads, graph->work, now,
        now - graph->start, cpu - graph->cpu, preemptions - graph->preemptions, graph->given_up);
}

#else

static void decide(ggml_clex_graph *, const ggml_cgraph *) {
}

static void report(const ggml_clex_graph *) {
}

#endif

bool ggml_clex_may_start_threads(void) {
#if defined(GGML_USE_OPENMP) && !defined(_WIN32)
    static std::atomic<pid_t> owner(0);

    const pid_t self = getpid();

    pid_t found = 0;
    return owner.compare_exchange_strong(found, self) || found == self;
#else
    return true;
#endif
}

int ggml_clex_graph_begin(ggml_clex_graph * graph, const ggml_cgraph * cgraph, int n_planned) {
    *graph = {};
    graph->n_planned = n_planned;
    graph->n_threads = n_planned;
    graph->n_nodes   = cgraph->n_nodes;
    if (n_planned > 1 && !ggml_clex_may_start_threads()) {
        static std::atomic<bool> said(false);
        if (!said.exchange(true)) {
            // an error, although it goes on: it costs most of the speed, and warnings are not shown unless asked for
            GGML_LOG_ERROR("%s: this process was forked from one that computes with OpenMP threads, which do not follow:"
                " it uses one thread; fork before the first model is loaded, or start the process anew"
                " (multiprocessing: spawn)\n", __func__);
        }
        graph->n_threads = 1;
    } else if (fixed_threads() > 0) {
        graph->n_threads = std::min<int>(fixed_threads(), n_planned);
        graph->alone     = fixed_nodes;
    } else if (n_planned > 1) {
        decide(graph, cgraph);
    }
    return graph->n_threads;
}

bool ggml_clex_graph_give_up(ggml_clex_graph * graph, int n_done) {
    if (graph->kind && n_done % 4 == 0) { // not every time: on some machines it takes long to look at the clock
        const int64_t limit = ggml_clex_ladder_time_limit(graph->single_time, (double) n_done/graph->n_nodes);
        graph->given_up = ggml_time_us() - graph->start > limit;
        return graph->given_up;
    }
    return graph->alone > 0 && n_done >= graph->alone;
}

void ggml_clex_graph_end(ggml_clex_graph * graph, bool complete) {
    if (graph->kind && complete) {
        report(graph);
    }
}
