#include "ggml-clex-ladder.h"

#include <algorithm>

static constexpr int64_t MS = 1000;

static constexpr int64_t WINDOW       =    32*MS; // over which a speed is measured, or one graph
static constexpr int64_t REST_MIN     =    32*MS; // until more threads are tried
static constexpr int64_t REST_MAX     =  1000*MS;
static constexpr int64_t HOLD_MIN     =  1000*MS; // until fewer are tried again that were slower
static constexpr int64_t HOLD_MAX     = 30000*MS;
static constexpr int64_t LOSS_MIN     =     8*MS; // that may be lost before a graph is given up, at least
static constexpr int64_t LOSS_MAX     =    50*MS; // and at most
static constexpr double  SLOW         = 0.8;      // of the best speed, or of a thread's time on its core
static constexpr double  FASTER       = 1.05;
static constexpr double  SINGLE_SPEED = 1e9;      // multiplications per second that a thread is thought capable of at first

ggml_clex_ladder::ggml_clex_ladder(int n_planned) : n_planned(n_planned), rest(REST_MIN), hold(HOLD_MIN) {
    while (n_planned >> lowest > 1 && lowest + 1 < MAX_LEVELS) {
        ++lowest;
    }
}

void ggml_clex_ladder::enter(int new_level, state_t new_state) {
    level = new_level;
    state = new_state;
    work  = 0.0;
    time  = cpu = preemptions = 0;
}

int ggml_clex_ladder::threads(int64_t now) {
    if (state == STEADY && level > 0 && now >= next_more) {
        enter(level - 1, TRYING_MORE);
    }
    return n_threads(level);
}

double ggml_clex_ladder::single_speed() const {
    return last[lowest] > 0.0 ? last[lowest] : best[0] > 0.0 ? best[0]/n_planned : SINGLE_SPEED/1e6;
}

void ggml_clex_ladder::report(
        double graph_work, int64_t now, int64_t graph_time, int64_t graph_cpu, int64_t graph_preemptions, bool given_up) {
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
        case STEADY:       judge_steady(speed, now, preempted); break;
        case TRYING_FEWER: judge_fewer (speed, now, took);      break;
        case TRYING_MORE:  judge_more  (speed, now, took);      break;
    }
}

void ggml_clex_ladder::judge_steady(double speed, int64_t now, bool preempted) {
    best[level] = std::max(best[level], speed);
    if (level == lowest) {
        return;
    }
    // n threads are at most n times as fast as one
    const double usual = std::max(best[level], best[0]*n_threads(level)/n_planned);
    const double other = *std::max_element(last + level + 1, last + lowest + 1);
    if (speed < SLOW*other || (now >= next_fewer && (preempted || speed < SLOW*usual))) {
        enter(level + 1, TRYING_FEWER);
    } else if (level == 0) {
        rest = std::max(rest/2, REST_MIN);
    }
}

void ggml_clex_ladder::judge_fewer(double speed, int64_t now, int64_t took) {
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
}

void ggml_clex_ladder::judge_more(double speed, int64_t now, int64_t took) {
    if (speed > FASTER*last[level + 1]) {
        enter(level, STEADY);
        best[level] = std::max(best[level], speed);
        next_more   = now;
        next_fewer  = now;
    } else {
        refuse_more(now, took);
    }
}

// the more threads of a trial were no better
void ggml_clex_ladder::refuse_more(int64_t now, int64_t lost) {
    enter(level + 1, STEADY);
    rest      = std::min(2*rest, REST_MAX);
    next_more = now + std::max(rest, 8*lost);
}

ggml_clex_ladder * ggml_clex_ladder_new(int n_planned) {
    return new ggml_clex_ladder(n_planned);
}

void ggml_clex_ladder_free(ggml_clex_ladder * ladder) {
    delete ladder;
}

int ggml_clex_ladder_threads(ggml_clex_ladder * ladder, int64_t now) {
    return ladder->threads(now);
}

int64_t ggml_clex_ladder_single_time(const ggml_clex_ladder * ladder, double work) {
    return (int64_t) (work/ladder->single_speed()) + 1;
}

int64_t ggml_clex_ladder_time_limit(int64_t single_time, double part) {
    return (int64_t) (2*single_time*part) + std::min(std::max(single_time, LOSS_MIN), LOSS_MAX);
}

void ggml_clex_ladder_report(ggml_clex_ladder * ladder, int n_threads, double work, int64_t now, int64_t time, int64_t cpu,
        int64_t preemptions, bool given_up) {
    // another context may have changed the level meanwhile
    if (n_threads == ladder->n_threads(ladder->level)) {
        ladder->report(work, now, time, cpu, preemptions, given_up);
    }
}
