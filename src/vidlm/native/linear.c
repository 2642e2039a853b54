/* y = x W^T + b for a few rows of x, in which every weight is read from memory once.
 *
 * Decoding is bound by that reading. The weights of a block of rows are contiguous, so while one
 * block is multiplied the next one is fetched into the cache line after line. Each number of y is
 * one sum in one order, whatever the number of rows and threads.
 */
#include <stdlib.h>

#include "crew.h"
#include "packed.h"
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
                     T *y, int64_t stride, Ahead *ahead) {                                       \
        f16 acc[4][2] = {0};                                                                     \
        int64_t k = 0;                                                                           \
        for (; k + 16 <= D; k += 16) {                                                           \
            fetch_ahead(ahead, R * (int)sizeof(T) / 4 + 1);                                      \
            for (int b = 0; b < B; b++)                                                          \
                for (int r = 0; r < R; r++) acc[r][b] += LOAD(w + r * D + k) * LOAD(x + b * D + k);\
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
                      const bf16 *bias, bf16 *y, int64_t stride, Ahead *ahead) {
    __m512 acc[8][3];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) acc[r][b] = _mm512_setzero_ps();
    for (int64_t k = 0; k < D; k += 32) {
        __mmask32 mask = D - k < 32 ? (1u << (D - k)) - 1 : ~0u;
        __m512bh at[3];
        for (int b = 0; b < B; b++) at[b] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + b * D + k);
        fetch_ahead(ahead, R);
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
                     Ahead *ahead) {                                                             \
        const T *weight = (const T *)part->weight.data, *bias = (const T *)part->bias;           \
        Ahead own = *ahead; /* which registers hold */                                           \
        for (int64_t o = from; o < to;) {                                                        \
            const T *w = weight + o * D, *at = bias ? bias + o : 0;                              \
            T *y = (T *)part->out + o;                                                           \
            int64_t many = to - o >= R, m = 0, N = part->rows;                                   \
            if (many) {                                                                          \
                for (; m + B <= M; m += B)                                                       \
                    TILE(R, B, w, x + m * D, D, at, y + m * N, N, &own);                         \
                for (; m < M; m++) TILE(R, 1, w, x + m * D, D, at, y + m * N, N, &own);          \
            } else {                                                                             \
                for (; m < M; m++) TILE(1, 1, w, x + m * D, D, at, y + m * N, N, &own);          \
            }                                                                                    \
            o += many ? R : 1;                                                                   \
        }                                                                                        \
    }

BLOCK_OF(block_f32, float, tile_f32, 4, 2)
BLOCK_OF(block_bf16, bf16, tile_bf16, ROWS_BF16, MANY_BF16)

/* ---- all of it -------------------------------------------------------------------------------- */

typedef struct { const Part *part; int64_t from, to; const char *weight, *end; } Piece;

static Piece piece(const Part *parts, int64_t count, int64_t index, int64_t block, int64_t D,
                   int64_t size) {
    for (int64_t i = 0; i < count; i++) {
        int64_t blocks = (parts[i].rows + block - 1) / block;
        if (index < blocks) {
            int64_t from = index * block, to = least(from + block, parts[i].rows);
            int64_t width = row_bytes(&parts[i].weight, D, size);
            return (Piece){parts + i, from, to, parts[i].weight.data + from * width,
                           parts[i].weight.data + to * width};
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

/* What the threads of a call are told. */
typedef struct {
    const void *x;
    int64_t M, D;
    int type;
#if TILES
    const Packed *laid; /* or NULL */
#endif
} Rows;

/* Rows [from, to) of a matrix of numbers. */
static void dense(const Part *p, int64_t from, int64_t to, const Rows *r, Ahead *ahead) {
#if TILES
    if (r->laid && p->rows >= 16) {
        block_tiles((const bf16 *)p->weight.data, (const bf16 *)p->bias, (bf16 *)p->out, p->rows, from, to,
                    r->laid, ahead);
        return;
    }
#endif
    if (r->type == BFLOAT16) block_bf16(p, from, to, r->x, r->M, r->D, ahead);
    else block_f32(p, from, to, r->x, r->M, r->D, ahead);
}

/* The same of packed weights, which become numbers in `room`. */
static void unpacked(const Part *p, int64_t from, int64_t to, const Rows *r, char *room,
                     Ahead *ahead) {
    int64_t size = r->type == BFLOAT16 ? 2 : 4;
    int64_t first = to - from < 16 ? to - 16 : from; /* tiles are 16 rows, if there are so many */
    if (first < 0) first = 0;
    unpack_rows(&p->weight, first, to, r->D, r->type, room);
    Part numbers = *p;
    numbers.weight = (Weight){.data = room - first * r->D * size};
    dense(&numbers, from, to, r, ahead);
}

/* Each of `count` matrices times x (M, D). */
EXPORT int vidlm_linears(const Part *parts, int64_t count, const void *x, int64_t M, int64_t D,
                         int type, int threads) {
    int64_t next = 0, done = 0, rows = 0, size = type == BFLOAT16 ? 2 : 4, unpack = 0, direct = 0;
    threads = hands(threads);
    for (int64_t i = 0; i < count; i++) {
        rows += parts[i].rows;
        int taken = taken_packed(&parts[i].weight, M, D, type);
        direct += taken;
        unpack += !taken && parts[i].weight.form != DENSE;
    }
    int64_t block = BLOCK * D * size > LONG || rows < 4 * BLOCK * threads ? BLOCK / 2 : BLOCK;
    /* As many bytes of a block as there are of numbers: what is fetched ahead is the next block. */
    if (direct == count)
        for (int64_t most = BLOCK * 4; block < most && rows >= 8 * block * threads;) block *= 2;
    char *room = unpack ? malloc(threads * block * D * size) : 0;
    Inputs *inputs = direct ? inputs_of(x, M, D) : 0;
    if ((unpack && !room) || (direct && !inputs)) {
        free(room);
        free(inputs);
        return NO_MEMORY;
    }
    Rows all = {.x = x, .M = M, .D = D, .type = type};
#if TILES
    bf16 *laid = type == BFLOAT16 && direct < count ? packed(x, M, D, threads) : 0;
    Packed tiles = {laid, M, D};
    if (laid) all.laid = &tiles;
#endif
    /* Of short rows as they lie in memory so many are read at once that this is no better. */
    int four = direct == count || D * size >= 4096;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *own = unpack ? room + omp_get_thread_num() * block * D * size : 0;
        Piece now = piece(parts, count, take(&next), block, D, size);
        while (now.part) {
            Piece then = piece(parts, count, take(&next), block, D, size);
            const Weight *w = &now.part->weight;
            Ahead ahead = ahead_of(then.weight, then.end, four);
            if (w->form == DENSE)
                dense(now.part, now.from, now.to, &all, &ahead);
            else if (taken_packed(w, M, D, type))
                packed_rows(now.part, now.from, now.to, inputs, &ahead);
            else
                unpacked(now.part, now.from, now.to, &all, own, &ahead);
            now = then;
        }
        if (!omp_get_thread_num()) done = work_done();
#if TILES
        if (laid) _tile_release();
#endif
    }
    if (threads > 1) hands_came(done);
    free(room);
    free(inputs);
#if TILES
    free(laid);
#endif
    return DONE;
}
