/* How many threads a call gets on a machine that also does other things.
 *
 * The end of a call waits for every thread. Where another process has a core, the thread that should
 * run there comes when the scheduler lets it, some milliseconds later, and a call of 50 us takes a
 * hundred times as long. So a call that had to wait is taken as a sign: for a while calls do all
 * their work on the caller's thread. No result depends on the number of threads.
 */
#pragma once
#include "lanes.h"

int hands(int threads);            /* as many, or 1 while the cores are taken */
int64_t work_done(void);           /* called by thread 0 when nothing is left to take */
void hands_came(int64_t done);      /* after the call: had it to wait for the others? */

/* Rows are handed out in pieces of about this many bytes. */
enum { PIECE = 32 * 1024 };

/* DO for each `row` of COUNT, which take BYTES each. */
#define ROWS(COUNT, BYTES, DO)                                                                 \
    {                                                                                          \
        int64_t share = PIECE / (BYTES) + 1, next = 0, done = 0;                               \
        int64_t shares = ((COUNT) + share - 1) / share;                                        \
        threads = hands(threads);                                                               \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                        \
            for (int64_t piece; (piece = take(&next)) < shares;)                               \
                for (int64_t row = piece * share; row < least((piece + 1) * share, COUNT); row++) \
                    DO;                                                                        \
            if (!omp_get_thread_num()) done = work_done();                                     \
        }                                                                                      \
        if (threads > 1) hands_came(done);                                                      \
    }
