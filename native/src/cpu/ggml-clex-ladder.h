#pragma once

// How many threads compute the next graph of one kind: a decision on numbers alone, which neither starts threads nor looks
// at a clock. All times are microseconds, all speeds multiplications per microsecond.
//
//   level 0       n threads                         STEADY         measures, window after window
//   level 1       n/2                               TRYING_FEWER   one level down, for one window
//   ...           ...                               TRYING_MORE    one level up, for one window
//   lowest        1
//
//              slower than it should be                            is faster
//   STEADY l  ---------------------------->  TRYING_FEWER l+1  -------------------->  STEADY l+1
//      ^                                              | is not: hold doubles
//      '----------------------------------------------'
//              rested                                              is faster
//   STEADY l  ---------------------------->  TRYING_MORE l-1   -------------------->  STEADY l-1
//      ^                                              | is not: rest doubles
//      '----------------------------------------------'
//
// A graph that was given up ends a TRYING_MORE as one that is not faster, and leads to STEADY at the lowest level else.

#include "ggml-backend.h"

#include <cstdint>

struct ggml_clex_ladder {
    static constexpr int MAX_LEVELS = 16;

    explicit ggml_clex_ladder(int n_planned);

    // the threads of a level: half of those of the one above it
    int n_threads(int l) const { return l == lowest ? 1 : n_planned >> l; }

    // the threads for the next graph
    int threads(int64_t now);

    // what one thread is thought capable of
    double single_speed() const;

    // what became of a graph; see ggml_clex_ladder_report
    void report(double graph_work, int64_t now, int64_t graph_time, int64_t graph_cpu, int64_t graph_preemptions, bool given_up);

    int level = 0;

private:
    enum state_t { STEADY, TRYING_FEWER, TRYING_MORE } state = STEADY;

    void enter(int new_level, state_t new_state);

    // at the end of a window
    void judge_steady(double speed, int64_t now, bool preempted);
    void judge_fewer (double speed, int64_t now, int64_t took);
    void judge_more  (double speed, int64_t now, int64_t took);

    void refuse_more(int64_t now, int64_t lost);

    int n_planned;
    int lowest = 0;

    double best[MAX_LEVELS] = {}; // speeds of each level
    double last[MAX_LEVELS] = {};

    double  work = 0.0; // of the window
    int64_t time = 0, cpu = 0, preemptions = 0;

    int64_t rest, next_more  = 0; // until more threads are tried
    int64_t hold, next_fewer = 0; // until fewer are tried that were slower
};

// The same for hosts.

extern "C" {

GGML_BACKEND_API struct ggml_clex_ladder * ggml_clex_ladder_new(int n_planned);
GGML_BACKEND_API void ggml_clex_ladder_free(struct ggml_clex_ladder * ladder);

GGML_BACKEND_API int ggml_clex_ladder_threads(struct ggml_clex_ladder * ladder, int64_t now);

// How long one thread may need for the work.
GGML_BACKEND_API int64_t ggml_clex_ladder_single_time(const struct ggml_clex_ladder * ladder, double work);

// The time after which a graph of which that part is computed is given up: one thread, which may need single_time for all
// of it, goes on alone.
GGML_BACKEND_API int64_t ggml_clex_ladder_time_limit(int64_t single_time, double part);

// What became of a graph: the time it took, of which this thread computed for `cpu` and was preempted so often, and
// whether it was given up.
GGML_BACKEND_API void ggml_clex_ladder_report(struct ggml_clex_ladder * ladder, int n_threads, double work, int64_t now,
    int64_t time, int64_t cpu, int64_t preemptions, bool given_up);

}
