#ifndef GGML_CLEX_BARRIER_H
#define GGML_CLEX_BARRIER_H

// A barrier whose threads spin for a moment and then sleep, included by ggml-cpu.c after its atomics.
//
// Spinning is fast where every thread has a core of its own. Where other processes want the same cores it is the worst
// to do: it uses up the time slices that the awaited thread, or the spinning one itself a moment later, would need.
// A wait longer than any thread with a core of its own causes is taken for a sign of that, and the next waits sleep at
// once; the more often it happens, the longer that lasts.

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#elif !defined(_WIN32)
#include <sched.h>
#include <time.h>
#endif

#define GGML_CLEX_SPIN_NS    200000 // wait that counts as a sign of other processes
#define GGML_CLEX_SPIN_STEP     128 // looks at the barrier between two looks at the clock
#define GGML_CLEX_REST_MIN       16 // barriers without spinning after the first sign
#define GGML_CLEX_REST_MAX      512
#define GGML_CLEX_CALM         2048 // barriers without a sign after which half as many are enough

// Of the process: thread pools come and go with every graph, other processes do not. The values are hints, so it does
// not matter that threads may overwrite each other's.
static atomic_int ggml_clex_resting = 0; // barriers yet to come without spinning
static atomic_int ggml_clex_rest    = GGML_CLEX_REST_MIN;
static atomic_int ggml_clex_calm    = 0; // barriers since the last sign
static atomic_int ggml_clex_asleep  = 0; // threads that sleep or are about to

static inline int64_t ggml_clex_now_ns(void) {
#if defined(_WIN32)
    return 1000*ggml_time_us();
#else
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t) now.tv_sec*1000000000 + now.tv_nsec;
#endif
}

// until *passed is no longer the value, or for no reason at all
static inline void ggml_clex_sleep(atomic_int * passed, int value) {
#if defined(__linux__)
    syscall(SYS_futex, passed, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#elif defined(_WIN32)
    GGML_UNUSED(passed);
    GGML_UNUSED(value);
    SwitchToThread();
#else
    GGML_UNUSED(passed);
    GGML_UNUSED(value);
    sched_yield();
#endif
}

static inline void ggml_clex_wake(atomic_int * passed) {
#if defined(__linux__)
    syscall(SYS_futex, passed, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#else
    GGML_UNUSED(passed);
#endif
}

static inline bool ggml_clex_spin(atomic_int * passed, int value) {
    int64_t start = 0;
    for (;;) {
        for (int i = 0; i < GGML_CLEX_SPIN_STEP; i++) {
            if (atomic_load_explicit(passed, memory_order_relaxed) != value) {
                return true;
            }
            ggml_thread_cpu_relax();
        }
        const int64_t now = ggml_clex_now_ns();
        if (start == 0) {
            start = now;
        } else if (now - start > GGML_CLEX_SPIN_NS) {
            return false;
        }
    }
}

// n_arrived and n_passed belong to this barrier alone and start at 0
static void ggml_clex_barrier(atomic_int * n_arrived, atomic_int * n_passed, int n_threads) {
    const int passed = atomic_load_explicit(n_passed, memory_order_relaxed);

    if (atomic_fetch_add_explicit(n_arrived, 1, memory_order_seq_cst) == n_threads - 1) {
        atomic_store_explicit(n_arrived, 0, memory_order_relaxed);
        atomic_fetch_add_explicit(n_passed, 1, memory_order_seq_cst);
        if (atomic_load(&ggml_clex_asleep) > 0) {
            ggml_clex_wake(n_passed);
        }
        return;
    }

    const int resting = atomic_load_explicit(&ggml_clex_resting, memory_order_relaxed);
    bool done = false;
    if (resting > 0) {
        atomic_store_explicit(&ggml_clex_resting, resting - 1, memory_order_relaxed);
    } else {
        const int rest = atomic_load_explicit(&ggml_clex_rest, memory_order_relaxed);
        done = ggml_clex_spin(n_passed, passed);
        if (!done) {
            atomic_store_explicit(&ggml_clex_resting, rest, memory_order_relaxed);
            atomic_store_explicit(&ggml_clex_rest, MIN(2*rest, GGML_CLEX_REST_MAX), memory_order_relaxed);
            atomic_store_explicit(&ggml_clex_calm, 0, memory_order_relaxed);
        } else if (rest > GGML_CLEX_REST_MIN) {
            const int calm = atomic_load_explicit(&ggml_clex_calm, memory_order_relaxed) + 1;
            atomic_store_explicit(&ggml_clex_calm, calm % GGML_CLEX_CALM, memory_order_relaxed);
            if (calm == GGML_CLEX_CALM) {
                atomic_store_explicit(&ggml_clex_rest, rest/2, memory_order_relaxed);
            }
        }
    }
    if (!done) {
        // The last thread to arrive looks for sleepers after it has let them pass, hence one of the two is seen.
        atomic_fetch_add_explicit(&ggml_clex_asleep, 1, memory_order_seq_cst);
        while (atomic_load(n_passed) == passed) {
            ggml_clex_sleep(n_passed, passed);
        }
        atomic_fetch_add_explicit(&ggml_clex_asleep, -1, memory_order_seq_cst);
    }
    atomic_thread_fence(memory_order_seq_cst);
}

#endif
