/* Blocks of W x^T in bfloat16 by the matrix unit of newer Xeons (AMX).
 *
 * A tile is 16 rows of 64 bytes: 16 rows of weights, 32 numbers of each, as they lie in memory. x is
 * what has to be laid out anew (pack): pairs of numbers, a column for each row of x. The same sums
 * in the same order for every number of rows and of tiles.
 */
#pragma once
#include "lanes.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1

enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl: Linux asks to be asked */

static int tiles_allowed(void) {
    static int known; /* 0 not asked, 1 no, 2 yes; two threads that ask at once learn the same */
    int state = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!state) {
        state = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? 1 : 2;
        __atomic_store_n(&known, state, __ATOMIC_RELAXED);
    }
    return state == 2;
}

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} Shape;

/* Tiles 0-3 take sums, 4 and 5 weights, 6 and 7 x, with `first` and `second` columns. */
static void shape_tiles(int64_t first, int64_t second) {
    Shape shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        int64_t columns = i == 4 || i == 5 ? 16 : second && (i & 1) ? second : first;
        shape.rows[i] = 16;
        shape.bytes[i] = (uint16_t)(4 * columns);
    }
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* gcc takes the next line to read 8 bytes of it */
    _tile_loadconfig(&shape);
}

/* Numbers of a packed group of `columns` rows of x. */
INLINE int64_t packed_size(int64_t D, int64_t columns) { return (D + 31) / 32 * 32 * columns; }

/* 16 rows of 16 pairs -> 16 pairs by 16 rows. */
INLINE void turn_pairs(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    /* r[4g + c]: columns c, c + 4, c + 8, c + 12 of rows 4g to 4g + 3, a lane each */
    for (int c = 0; c < 4; c++) {
        __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        __m512i b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        __m512i e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[c + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[c + 4] = _mm512_shuffle_i32x4(d, e, 0x88);
        t[c + 12] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

/* Steps [from, to) of 32 numbers of `columns` rows of x -> (step, pair, column) pairs. */
static void pack(const bf16 *x, int64_t D, int64_t columns, int64_t from, int64_t to, bf16 *out) {
    for (int64_t step = from; step < to; step++) {
        int64_t k = step * 32, n = least(32, D - k);
        uint32_t *at = (uint32_t *)(out + k * columns);
        for (int64_t m = 0; m < columns; m++) {
            uint32_t pairs[16] = {0};
            memcpy(pairs, x + m * D + k, n * 2);
            for (int p = 0; p < 16; p++) at[p * columns + m] = pairs[p];
        }
    }
}

/* What one call multiplies with: x packed in groups of 16 rows, and how many of them. */
typedef struct { const bf16 *packed; int64_t M, D; } Packed;

/* Sums (16, columns) of the tile -> y (column, rows), without the first `skip` rows. */
INLINE void unload(const float *sums, int64_t columns, const bf16 *bias, bf16 *y, int64_t stride,
                   int64_t skip) {
    for (int64_t m = 0; m < columns; m++)
        for (int64_t r = skip; r < 16; r++)
            y[m * stride + r] = narrow(sums[r * 16 + m] + (bias ? widen(bias[r]) : 0.f));
}

/* The last, shorter step of 16 rows, filled up with zeros. */
INLINE const bf16 *padded(const bf16 *w, int64_t D, int64_t n, bf16 *room) {
    for (int r = 0; r < 16; r++) {
        memset(room + 32 * r, 0, 64);
        memcpy(room + 32 * r, w + r * D, n * 2);
    }
    return room;
}

/* A tile of 16 rows of weights: numbers [k, k + 32) of each. */
#define LOAD(tile, w)                                                               \
    if (k + 32 <= D) _tile_loadd(tile, (w) + k, D * 2);                             \
    else _tile_loadd(tile, padded((w) + k, D, D - k, room), 64)

/* One or two times 16 rows of weights times up to 16 rows of x. */
INLINE void times_16(const int T, const bf16 *w, const bf16 *x, int64_t D, int64_t columns,
                     float (*sums)[256], Ahead *ahead) {
    bf16 room[512] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < D; k += 32) {
        fetch_ahead(ahead, 16 * T);
        _tile_loadd(6, x + k * columns, columns * 4);
        LOAD(4, w);
        _tile_dpbf16ps(0, 4, 6);
        if (T == 1) continue;
        LOAD(5, w + 16 * D);
        _tile_dpbf16ps(1, 5, 6);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
}

/* The same times 16 rows of x and `columns` more. */
INLINE void times_32(const int T, const bf16 *w, const bf16 *x, const bf16 *more, int64_t D,
                     int64_t columns, float (*sums)[256], Ahead *ahead) {
    bf16 room[512] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < D; k += 32) {
        fetch_ahead(ahead, 16 * T);
        _tile_loadd(6, x + k * 16, 64);
        _tile_loadd(7, more + k * columns, columns * 4);
        LOAD(4, w);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (T == 1) continue;
        LOAD(5, w + 16 * D);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}
#undef LOAD

/* Rows [from, to) of a weight (rows >= 16, D); the last tile ends where the weight ends. */
static void block_tiles(const bf16 *weight, const bf16 *bias, bf16 *out, int64_t rows, int64_t from,
                        int64_t to, const Packed *x, Ahead *ahead) {
    float sums[4][256] __attribute__((aligned(64)));
    int64_t M = x->M, D = x->D;
    for (int64_t m = 0; m < M; m += 32) {
        int64_t first = least(16, M - m), second = M - m > 16 ? least(16, M - m - 16) : 0;
        const bf16 *at = x->packed + packed_size(D, m);
        const bf16 *more = at + packed_size(D, 16);
        if (M > 32 || !m) shape_tiles(first, second);
        for (int64_t o = from; o < to;) {
            int64_t many = (to - o) / 16, T = many >= 2 ? 2 : 1;
            int64_t start = many ? o : rows - 16; /* a last part of fewer rows: 16 that end there */
            const bf16 *w = weight + start * D;
            if (second && T == 2) times_32(2, w, at, more, D, second, sums, ahead);
            else if (second) times_32(1, w, at, more, D, second, sums, ahead);
            else if (T == 2) times_16(2, w, at, D, first, sums, ahead);
            else times_16(1, w, at, D, first, sums, ahead);
            for (int64_t i = 0; i < T; i++) {
                const bf16 *b = bias ? bias + start + 16 * i : 0;
                bf16 *y = out + m * rows + start + 16 * i;
                unload(sums[second ? 2 * i : i], first, b, y, rows, o - start);
                if (second) unload(sums[2 * i + 1], second, b, y + 16 * rows, rows, o - start);
            }
            o += many ? 16 * T : to - o;
        }
    }
}
#endif
