/* Weights in 8 and 4 bits.
 *
 * EIGHT  a row is D signed bytes and one float32 scale
 * FOUR   a row is blocks of 64 numbers in 32 bytes, the last block filled up with anything: byte i has
 *        number i in its lower and number i + 32 in its upper half, each the place in a table of 16
 *        values; `group` numbers in a row, a multiple of 32, share a scale of `scale_type`
 */
#pragma once
#include "jobs.h"

enum { DENSE = 0, EIGHT = 1, FOUR = 2 };
enum { MOST_PACKED = 3 }; /* rows of x; where there are more, unpacking is the lesser work */

/* Bytes of a row of weights; `size` is that of a number where they are not packed. */
INLINE int64_t row_bytes(const Weight *w, int64_t D, int64_t size) {
    return w->form == DENSE ? D * size : w->form == EIGHT ? D : (D + 63) / 64 * 32;
}

/* Rows [from, to) as numbers of `type`, (to - from, D). */
void unpack_rows(const Weight *w, int64_t from, int64_t to, int64_t D, int type, char *out);

/* Rows [from, to) times x (M, D) in bfloat16 without unpacking them, or 0 where that is not faster. */
int packed_rows(const Part *p, int64_t from, int64_t to, const bf16 *x, int64_t M, int64_t D,
                const char *ahead, const char *end);
