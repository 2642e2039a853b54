/* y = x W^T + b for a few rows of x, in which every weight is read from memory once.
 *
 * Decoding is bound by that reading. The weights of a block of rows are contiguous, so while one
 * block is multiplied the next one is fetched into the cache line after line. Each number of y is
 * one sum in one order, whatever the number of rows and threads.
 */
#include <stdlib.h>

#include "crew.h"
#include "jobs.h"
#include "tiles.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

/* Rows of weights that a thread takes at a time: this many, or half where they are long. The block
 * that is read and the one behind it share the second-level cache. */
enum { BLOCK = 32, LONG = 400 * 1024 };

/* ---- portable: R rows of weights times B rows of x ------------------------------------------ */

#define PORTABLE(NAME, T, LOAD, SOME, STORE, WIDE)                                               \
    INLINE void NAME(const int R, const int B, const T *w, const T *x, int64_t D, const T *bias, \
                     T *y, int64_t stride, const char **ahead, const char *end) {                \
        f16 acc[4][2] = {0};                                                                     \
        int64_t k = 0;                                                                           \
        for (; k + 16 <= D; k += 16) {                                                           \
            fetch_ahead(ahead, end, R * (int)sizeof(T) / 4 + 1);                                 \
            for (int b = 0; b < B; b++)                                                          \
                for (int r = 0; r < R; r++) acc[r][b] += LOAD(w + r * D + k) * LOAD(x + b * D + k); \
        }                                                                                        \
        if (k < D)                                                                               \
            for (int b = 0; b < B; b++)                                                          \
                for (int r = 0; r < R; r++)                                                      \
                    acc[r][b] += SOME(w + r * D + k, D - k) * SOME(x + b * D + k, D - k);        \
        for (int b = 0; b < B; b++)                                                              \
            for (int r = 0; r < R; r++)                                                          \
                y[b * stride + r] = STORE(sum(acc[r][b]) + (bias ? WIDE(bias[r]) : 0.f));        \
    }

PORTABLE(tile_f32, float, load_f32, some_f32, , )
#if !defined(__AVX512BF16__)
PORTABLE(tile_bf16, bf16, load_bf16, some_bf16, narrow, widen)
enum { ROWS_BF16 = 4, MANY_BF16 = 2 };
#else
enum { ROWS_BF16 = 8, MANY_BF16 = 3 };

/* ---- AVX512-BF16: products of pairs, summed in float32 --------------------------------------- */

INLINE void tile_bf16(const int R, const int B, const bf16 *w, const bf16 *x, int64_t D,
                      const bf16 *bias, bf16 *y, int64_t stride, const char **ahead,
                      const char *end) {
    __m512 acc[8][3];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) acc[r][b] = _mm512_setzero_ps();
    for (int64_t k = 0; k < D; k += 32) {
        __mmask32 mask = D - k < 32 ? (1u << (D - k)) - 1 : ~0u;
        __m512bh at[3];
        for (int b = 0; b < B; b++) at[b] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + b * D + k);
        fetch_ahead(ahead, end, R);
        for (int r = 0; r < R; r++) {
            __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + r * D + k);
            for (int b = 0; b < B; b++) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], row, at[b]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            y[b * stride + r] = narrow(_mm512_reduce_add_ps(acc[r][b]) + (bias ? widen(bias[r]) : 0.f));
}
#endif

/* ---- a block of rows ------------------------------------------------------------------------- */

#define BLOCK_OF(NAME, T, TILE, R, B)                                                            \
    static void NAME(const Part *part, int64_t from, int64_t to, const T *x, int64_t M, int64_t D, \
                     const char *ahead, const char *end) {                                       \
        const T *weight = (const T *)part->weight, *bias = (const T *)part->bias;                \
        for (int64_t o = from; o < to;) {                                                        \
            const T *w = weight + o * D, *at = bias ? bias + o : 0;                              \
            T *y = (T *)part->out + o;                                                           \
            int64_t many = to - o >= R, m = 0, N = part->rows;                                   \
            if (many) {                                                                          \
                for (; m + B <= M; m += B)                                                       \
                    TILE(R, B, w, x + m * D, D, at, y + m * N, N, &ahead, end);                  \
                for (; m < M; m++) TILE(R, 1, w, x + m * D, D, at, y + m * N, N, &ahead, end);   \
            } else {                                                                             \
                for (; m < M; m++) TILE(1, 1, w, x + m * D, D, at, y + m * N, N, &ahead, end);   \
            }                                                                                    \
            o += many ? R : 1;                                                                   \
        }                                                                                        \
    }

BLOCK_OF(block_f32, float, tile_f32, 4, 2)
BLOCK_OF(block_bf16, bf16, tile_bf16, ROWS_BF16, MANY_BF16)

/* ---- all of it -------------------------------------------------------------------------------- */

typedef struct { const Part *part; int64_t from, to; const char *weight, *end; } Piece;

static Piece piece(const Part *parts, int64_t count, int64_t index, int64_t block, int64_t width) {
    for (int64_t i = 0; i < count; i++) {
        int64_t blocks = (parts[i].rows + block - 1) / block;
        if (index < blocks) {
            int64_t from = index * block, to = least(from + block, parts[i].rows);
            return (Piece){parts + i, from, to, parts[i].weight + from * width,
                           parts[i].weight + to * width};
        }
        index -= blocks;
    }
    return (Piece){0};
}

#if TILES
/* x packed, or NULL where tiles are not to be had. Threads share the packing of many rows. */
static bf16 *packed(const bf16 *x, int64_t M, int64_t D, int threads) {
    bf16 *out = tiles_allowed() ? aligned_alloc(64, (packed_size(D, M) * 2 + 63) / 64 * 64) : 0;
    if (!out) return out;
    int64_t next = 0, steps = (D + 31) / 32, share = 16, shares = (steps + share - 1) / share;
    int64_t groups = (M + 15) / 16;
#pragma omp parallel num_threads(threads) if (threads > 1 && M * D > 16384)
    for (int64_t i; (i = take(&next)) < shares * groups;) {
        int64_t m = i / shares * 16, from = i % shares * share;
        pack(x + m * D, D, least(16, M - m), from, least(from + share, steps),
             out + packed_size(D, m));
    }
    return out;
}
#endif

/* Each of `count` matrices times x (M, D). */
EXPORT void vidlm_linears(const Part *parts, int64_t count, const void *x, int64_t M, int64_t D,
                          int type, int threads) {
    int64_t next = 0, done = 0, rows = 0, width = D * (type == BFLOAT16 ? 2 : 4);
    threads = hands(threads);
    for (int64_t i = 0; i < count; i++) rows += parts[i].rows;
    int64_t block = BLOCK * width > LONG || rows < 4 * BLOCK * threads ? BLOCK / 2 : BLOCK;
#if TILES
    bf16 *room = type == BFLOAT16 ? packed(x, M, D, threads) : 0;
    Packed laid = {room, M, D};
#endif
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Piece now = piece(parts, count, take(&next), block, width);
        while (now.part) {
            Piece then = piece(parts, count, take(&next), block, width);
            const Part *p = now.part;
#if TILES
            if (room && p->rows >= 16)
                block_tiles((const bf16 *)p->weight, (const bf16 *)p->bias, (bf16 *)p->out, p->rows,
                            now.from, now.to, &laid, then.weight, then.end);
            else
#endif
            if (type == BFLOAT16)
                block_bf16(p, now.from, now.to, x, M, D, then.weight, then.end);
            else
                block_f32(p, now.from, now.to, x, M, D, then.weight, then.end);
            now = then;
        }
        if (!omp_get_thread_num()) done = work_done();
#if TILES
        if (room) _tile_release();
#endif
    }
    if (threads > 1) hands_came(done);
#if TILES
    free(room);
#endif
}
