/* Weights in 8 and 4 bits.
 *
 * EIGHT  a row is D signed bytes and one float32 scale
 * FOUR   a row is blocks of 64 numbers in 32 bytes, the last block filled up with anything: byte i has
 *        number i in its lower and number i + 32 in its upper half, each the place in a table of 16
 *        values; `group` numbers in a row, a multiple of 32, share a scale of `scale_type`
 */
#pragma once
#include "jobs.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define WIDE 1
#endif

enum { DENSE = 0, EIGHT = 1, FOUR = 2 };

/* Bytes of a row of weights; `size` is that of a number where they are not packed. */
INLINE int64_t row_bytes(const Weight *w, int64_t D, int64_t size) {
    return w->form == DENSE ? D * size : w->form == EIGHT ? D : (D + 63) / 64 * 32;
}

INLINE float scale_at(const Weight *w, int64_t index) {
    return w->scale_type == BFLOAT16 ? widen(((const bf16 *)w->scale)[index])
                                     : ((const float *)w->scale)[index];
}

/* Rows [from, to) as numbers of `type`, (to - from, D). */
void unpack_rows(const Weight *w, int64_t from, int64_t to, int64_t D, int type, char *out);

/* Whether products with M rows of x are taken from the codes: where it is less work than unpacking. */
int taken_packed(const Weight *w, int64_t M, int64_t D, int type);

/* x (M, D) in bfloat16, as products with codes take it. */
typedef struct Inputs Inputs;
Inputs *inputs_of(const bf16 *x, int64_t M, int64_t D); /* NULL where there is no memory; to be freed */

/* Rows [from, to) times all rows of x. */
void packed_rows(const Part *p, int64_t from, int64_t to, const Inputs *x, Ahead *ahead);
