/* How many threads a call gets on a machine that also does other things.
 *
 * The end of a call waits for every thread. Where another process has a core, the thread that should
 * run there comes when the scheduler lets it, some milliseconds later, and a call of 50 us takes a
 * hundred times as long. So a call that had to wait is taken as a sign: for a while calls do all
 * their work on the caller's thread. No result depends on the number of threads.
 */
#pragma once
#include <stdint.h>

int hands(int threads);            /* as many, or 1 while the cores are taken */
int64_t work_done(void);           /* called by thread 0 when nothing is left to take */
void hands_came(int64_t done);      /* after the call: had it to wait for the others? */
