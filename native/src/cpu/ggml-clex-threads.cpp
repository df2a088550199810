#include "ggml-clex-threads.h"

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

static constexpr int64_t MS = 1000;

static constexpr int64_t WINDOW    =    32*MS; // over which a speed is measured, or one graph
static constexpr int64_t REST_MIN  =    32*MS; // until more threads are tried
static constexpr int64_t REST_MAX  =  1000*MS;
static constexpr int64_t HOLD_MIN  =  1000*MS; // until fewer are tried again that were slower
static constexpr int64_t HOLD_MAX  = 30000*MS;
static constexpr int64_t BLIP      =     8*MS; // that may be lost before a graph is given up
static constexpr int64_t LOSS      =    50*MS; // that must not be
static constexpr double  SLOW      = 0.8;      // of the best speed, or of a thread's time on its core
static constexpr double  FASTER    = 1.05;
static constexpr double  LONE      = 1e9;      // multiplications per second that a thread is thought capable of at first
static constexpr int     MAX_LEVEL = 16;

//
// the decision
//

// Each level has half the threads of the one above it, down to one thread.
struct ggml_clex_ladder {
    enum { STEADY, TRYING_FEWER, TRYING_MORE } state = STEADY;

    int n_planned;
    int lowest = 0;
    int level  = 0;

    double best[MAX_LEVEL] = {}; // speeds
    double last[MAX_LEVEL] = {};

    double  work = 0.0; // of the window
    int64_t time = 0, cpu = 0, preemptions = 0;

    int64_t rest = REST_MIN, next_more  = 0;
    int64_t hold = HOLD_MIN, next_fewer = 0;

    explicit ggml_clex_ladder(int n_planned) : n_planned(n_planned) {
        while (n_planned >> lowest > 1 && lowest + 1 < MAX_LEVEL) {
            ++lowest;
        }
    }

    int n_threads(int l) const { return l == lowest ? 1 : n_planned >> l; }

    void enter(int new_level, decltype(state) new_state) {
        level = new_level;
        state = new_state;
        work  = 0.0;
        time  = cpu = preemptions = 0;
    }

    int threads(int64_t now) {
        if (state == STEADY && level > 0 && now >= next_more) {
            enter(level - 1, TRYING_MORE);
        }
        return n_threads(level);
    }

    double lone_speed() const {
        return last[lowest] > 0.0 ? last[lowest] : best[0] > 0.0 ? best[0]/n_planned : LONE/1e6;
    }

    // The more threads of a trial were no better.
    void refuse_more(int64_t now, int64_t lost) {
        enter(level + 1, STEADY);
        rest      = std::min(2*rest, REST_MAX);
        next_more = now + std::max(rest, 8*lost);
    }

    void report(double graph_work, int64_t now, int64_t graph_time, int64_t graph_cpu, int64_t graph_preemptions, bool given_up) {
        if (given_up) {
            if (state == TRYING_MORE) {
                refuse_more(now, graph_time);
            } else {
                enter(lowest, STEADY);
                next_more = now + std::max(rest, 8*graph_time);
            }
            return;
        }
        work        += graph_work;
        time        += graph_time;
        cpu         += graph_cpu;
        preemptions += graph_preemptions;
        if (time < WINDOW) {
            return;
        }
        const double  speed     = work/time;
        const int64_t took      = time;
        const bool    preempted = preemptions > 0 && cpu < SLOW*time;
        last[level] = speed;
        enter(level, state);

        switch (state) {
            case STEADY: {
                best[level] = std::max(best[level], speed);
                if (level == lowest) {
                    break;
                }
                // n threads are at most n times as fast as one
                const double usual = std::max(best[level], best[0]*n_threads(level)/n_planned);
                const double other = *std::max_element(last + level + 1, last + lowest + 1);
                if (speed < SLOW*other || (now >= next_fewer && (preempted || speed < SLOW*usual))) {
                    enter(level + 1, TRYING_FEWER);
                } else if (level == 0) {
                    rest = std::max(rest/2, REST_MIN);
                }
            } break;
            case TRYING_FEWER:
                if (speed > FASTER*last[level - 1]) {
                    enter(level, STEADY);
                    best[level] = std::max(best[level], speed);
                    next_more   = now + std::max(rest, 8*took);
                    next_fewer  = now;
                    hold        = HOLD_MIN;
                } else {
                    // the speed above is what is usual now
                    enter(level - 1, STEADY);
                    best[level] = last[level];
                    next_fewer  = now + std::max(hold, 32*took);
                    hold        = std::min(2*hold, HOLD_MAX);
                }
                break;
            case TRYING_MORE:
                if (speed > FASTER*last[level + 1]) {
                    enter(level, STEADY);
                    best[level] = std::max(best[level], speed);
                    next_more   = now;
                    next_fewer  = now;
                } else {
                    refuse_more(now, took);
                }
                break;
        }
    }
};

ggml_clex_ladder * ggml_clex_ladder_new(int n_planned) {
    return new ggml_clex_ladder(n_planned);
}

void ggml_clex_ladder_free(ggml_clex_ladder * ladder) {
    delete ladder;
}

int ggml_clex_ladder_threads(ggml_clex_ladder * ladder, int64_t now) {
    return ladder->threads(now);
}

int64_t ggml_clex_ladder_lone(const ggml_clex_ladder * ladder, double work) {
    return (int64_t) (work/ladder->lone_speed()) + 1;
}

int64_t ggml_clex_patience(int64_t lone, double part) {
    return (int64_t) (2*lone*part) + std::min(std::max(lone, BLIP), LOSS);
}

void ggml_clex_ladder_report(ggml_clex_ladder * ladder, int n_threads, double work, int64_t now, int64_t time, int64_t cpu,
        int64_t preemptions, bool given_up) {
    // another context may have changed the level meanwhile
    if (n_threads == ladder->n_threads(ladder->level)) {
        ladder->report(work, now, time, cpu, preemptions, given_up);
    }
}

//
// graphs
//

// Not decided but given: the threads, and the nodes after which the first of them is alone; 0: decide.
static std::atomic<int> fixed_threads(getenv("GGML_CLEX_THREADS_FIXED") ? INT_MAX : 0);
static std::atomic<int> fixed_nodes(0);

void ggml_clex_threads_fix(int n_threads, int n_nodes) {
    fixed_threads = n_threads;
    fixed_nodes   = n_nodes;
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
graph_kind kinds[16];
uint64_t   n_used = 0;

ggml_clex_ladder & find_ladder(uint64_t id, int n_planned) {
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
        graph->n_threads = ladder.threads(graph->start);
        graph->lone      = ggml_clex_ladder_lone(&ladder, graph->work);
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
    } else if (fixed_threads > 0) {
        graph->n_threads = std::min<int>(fixed_threads, n_planned);
        graph->alone     = fixed_nodes;
    } else if (n_planned > 1) {
        decide(graph, cgraph);
    }
    return graph->n_threads;
}

bool ggml_clex_graph_give_up(ggml_clex_graph * graph, int n_done) {
    if (graph->kind && n_done % 4 == 0) { // not every time: on some machines it takes long to look at the clock
        const int64_t patience = ggml_clex_patience(graph->lone, (double) n_done/graph->n_nodes);
        graph->given_up = ggml_time_us() - graph->start > patience;
        return graph->given_up;
    }
    return graph->alone > 0 && n_done >= graph->alone;
}

void ggml_clex_graph_end(ggml_clex_graph * graph, bool complete) {
    if (graph->kind && complete) {
        report(graph);
    }
}
