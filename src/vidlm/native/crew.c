/* See crew.h. */
#include "crew.h"

#include <time.h>

enum {
    PATIENCE = 1000 * 1000,      /* ns; a piece of work takes 100 us at most */
    SHORTEST = 20 * 1000 * 1000, /* ns to work alone after the first wait, doubled with each */
    LONGEST = 320 * 1000 * 1000,
};

/* Shared by all callers of a process: it is the machine they tell of. */
static int64_t alone_until, alone_for;

int64_t work_done(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int hands(int threads) {
    if (threads <= 1) return 1;
    int64_t until = __atomic_load_n(&alone_until, __ATOMIC_RELAXED);
    return until && work_done() < until ? 1 : threads;
}

void hands_came(int64_t done) {
    int64_t now = work_done(), rest = __atomic_load_n(&alone_for, __ATOMIC_RELAXED);
    if (now - done > PATIENCE) {
        rest = rest ? 2 * rest : SHORTEST;
        if (rest > LONGEST) rest = LONGEST;
        __atomic_store_n(&alone_for, rest, __ATOMIC_RELAXED);
        __atomic_store_n(&alone_until, now + rest, __ATOMIC_RELAXED);
    } else if (rest) { /* in time again: trust comes back by halves */
        __atomic_store_n(&alone_for, rest / 2 < SHORTEST ? 0 : rest / 2, __ATOMIC_RELAXED);
    }
}

/* Whether calls are shared by threads at all. */
EXPORT int vidlm_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
