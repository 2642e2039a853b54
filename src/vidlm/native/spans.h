/* What one query head, or a few that share their keys, make of a span of tokens: a score of each,
 * and the sum of their values by weight. Keys and values are float32, bfloat16 or int8.
 *
 * While it computes, each of the two asks for what comes next, so that memory is always at work:
 * scores for the values of these tokens, sums for the keys of the next span.
 */
#pragma once
#include "lanes.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

enum { SPAN = 256, WIDEST = 512, CODED = 2 }; /* tokens; numbers; beside FLOAT32 and BFLOAT16 */

typedef int8_t b16 __attribute__((vector_size(16)));
typedef int16_t w16 __attribute__((vector_size(32)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef struct { f16 a, b, c, d; } Four;
typedef const char *const *Rows; /* where each token's numbers begin */

/* ---- numbers as they are read ------------------------------------------------------------------ */

/* bfloat16: two numbers in each lane, which shift and mask make float32. Not by AVX512-BF16's
 * products of pairs: on Xeons they take twice the time of these two. */
INLINE f16 evens(u16 pairs) { return (f16)(pairs << 16); }
INLINE f16 odds(u16 pairs) { return (f16)(pairs & 0xffff0000u); }

/* The first n <= 32 numbers, zeros behind them. */
INLINE u16 load_pairs(const char *p, int64_t n) {
    u16 x = {0};
    if (n == 32) memcpy(&x, p, 64);
#if defined(__AVX512BW__)
    else x = (u16)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
#else
    else memcpy(&x, p, 2 * n);
#endif
    return x;
}

/* The first n <= 16 codes as float32, zeros behind them. */
INLINE f16 load_codes(const char *p, int64_t n) {
    b16 x = {0};
    if (n == 16) memcpy(&x, p, 16);
    else memcpy(&x, p, n);
#if defined(__AVX512F__)
    return (f16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#else
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(x, w16), i16), f16);
#endif
}

/* Sixteens of a row of E numbers; of bfloat16 they come by twos, even places and odd ones. */
INLINE int sixteens(const int kind, int64_t E) {
    return (int)(kind == BFLOAT16 ? (E + 31) / 32 * 2 : (E + 15) / 16);
}

INLINE f16 sixteen(const int kind, const char *row, int c, int64_t E) {
    if (kind == CODED) return load_codes(row + 16 * c, least(E - 16 * c, 16));
    u16 pairs = load_pairs(row + 32 * (c & ~1), least(E - 16 * (c & ~1), 32));
    return c % 2 ? odds(pairs) : evens(pairs);
}

/* The sums of sixteen vectors, side by side. */
INLINE f16 sums(const f16 *x) {
#if defined(__AVX512F__)
    __m512 a[8], b[4], c[2];
    /* which vectors meet, so that sums come out in order: halves of 2 lanes, 4, 8, and last 16 */
    for (int i = 0; i < 8; i++) {
        __m512 one = (__m512)x[i / 2 + i % 2 * 8], two = (__m512)x[i / 2 + i % 2 * 8 + 4];
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(one, two, 0x44), _mm512_shuffle_f32x4(one, two, 0xee));
    }
    for (int i = 0; i < 4; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
    return (f16)_mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
#else
    float out[16];
    for (int i = 0; i < 16; i++) out[i] = sum(x[i]);
    return load_f32(out);
#endif
}

/* The token whose line is asked for in the place of token t: four places by turns, as `Ahead`. */
INLINE int64_t apart(int64_t t) { return t % 4 * (SPAN / 4) + t / 4; }

/* ---- up to four query heads -------------------------------------------------------------------- */

/* Sums are named one by one below: what is indexed, compilers keep in memory. */
#define UP_TO_4(DO) DO(0) if (HT > 1) { DO(1) } if (HT > 2) { DO(2) } if (HT > 3) { DO(3) }

/* Scores of HT heads, whose numbers lie in q as `sixteen` reads those of a row. */
INLINE void scores_tile(const int HT, const int kind, const int64_t E, float (*q)[WIDEST], Rows row,
                        Rows ahead, int64_t n, float (*out)[SPAN]) {
    const int C = sixteens(kind, E), line = kind == CODED ? 4 : 2; /* sixteens in 64 bytes */
    f16 whole[4][WIDEST / 16], x[4][16];
    for (int h = 0; h < HT; h++)
        for (int c = 0; c < C; c++) whole[h][c] = load_f32(q[h] + 16 * c);
    for (int64_t t = 0; t < n; t += 16) {
        for (int i = 0; i < 16; i++) {
            const char *k = row[least(t + i, n - 1)];
            if (ahead)
                for (int c = 0; c < C; c += line) {
                    __builtin_prefetch(ahead[least(apart(t + i), n - 1)] + 64 * (c / line), 0, 2);
                    __builtin_prefetch(row[least(t + i + 16, n - 1)] + 64 * (c / line), 0, 3);
                }
            f16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                f16 one = sixteen(kind, k, c, E);
#define DO(h) s##h += whole[h][c] * one;
                UP_TO_4(DO)
#undef DO
            }
#define DO(h) x[h][i] = s##h;
            UP_TO_4(DO)
#undef DO
        }
        for (int h = 0; h < HT; h++) {
            f16 found = sums(x[h]);
            memcpy(out[h] + t, &found, sizeof found);
        }
    }
}

INLINE Four four(const int kind, const char *row) {
    return (Four){sixteen(kind, row, 0, 64), sixteen(kind, row, 1, 64), sixteen(kind, row, 2, 64),
                  sixteen(kind, row, 3, 64)};
}

INLINE void put_pairs(f16 even, f16 odd, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = i % 2 ? odd[i / 2] : even[i / 2];
}

INLINE void put_four(const int kind, const Four *x, float *out) {
    if (kind == CODED) memcpy(out, x, sizeof *x);
    else {
        put_pairs(x->a, x->b, 32, out);
        put_pairs(x->c, x->d, 32, out + 32);
    }
}

/* Sums of 64 numbers, which begin `from` bytes behind the beginning of each row. */
INLINE void weigh_tile(const int HT, const int kind, float (*p)[SPAN], Rows row, int64_t n, int64_t from,
                       Rows ahead, int64_t more, float *out, int64_t stride) {
    Four s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    for (int64_t t = 0; t < n; t++) {
        if (more) {
            __builtin_prefetch(ahead[least(apart(t), more - 1)] + from, 0, 2);
            if (kind == BFLOAT16) __builtin_prefetch(ahead[least(apart(t), more - 1)] + from + 64, 0, 2);
        }
        Four v = four(kind, row[t] + from);
#define DO(h) \
    { float w = p[h][t]; s##h.a += w * v.a; s##h.b += w * v.b; s##h.c += w * v.c; s##h.d += w * v.d; }
        UP_TO_4(DO)
#undef DO
    }
#define DO(h) put_four(kind, &s##h, out + h * stride);
    UP_TO_4(DO)
#undef DO
}

/* Sums of one head of the numbers [e, E), fewer than 64. */
INLINE void weigh_rest(const int kind, const float *p, Rows row, int64_t n, int64_t e, int64_t E,
                       float *out) {
    for (int64_t many; e < E; e += many) {
        f16 a = {0}, b = {0};
        many = least(E - e, kind == CODED ? 16 : 32);
        for (int64_t t = 0; t < n; t++) {
            if (kind == CODED) a += p[t] * load_codes(row[t] + e, many);
            else {
                u16 pairs = load_pairs(row[t] + 2 * e, many);
                a += p[t] * evens(pairs);
                b += p[t] * odds(pairs);
            }
        }
        if (kind == CODED) memcpy(out + e, &a, many * sizeof *out);
        else put_pairs(a, b, many, out + e);
    }
}

/* ---- by kind, number of heads and width -------------------------------------------------------- */

#define WIDTHS(HT) CASE(HT, 64) CASE(HT, 80) CASE(HT, 96) CASE(HT, 128)

#define SCORES(name, kind)                                                                             \
    static void name(int64_t heads, float (*q)[WIDEST], Rows row, Rows ahead, int64_t n, int64_t E,    \
                     float (*out)[SPAN]) {                                                             \
        WIDTHS(1) WIDTHS(2) WIDTHS(3) WIDTHS(4)                                                        \
        for (int64_t h = 0; h < heads; h++)                                                            \
            scores_tile(1, kind, E, q + h, row, h ? 0 : ahead, n, out + h);                            \
    }
#define CASE(HT, WIDTH) \
    if (heads == HT && E == WIDTH) { scores_tile(HT, BFLOAT16, WIDTH, q, row, ahead, n, out); return; }
SCORES(scores_bf16, BFLOAT16)
#undef CASE
#define CASE(HT, WIDTH) \
    if (heads == HT && E == WIDTH) { scores_tile(HT, CODED, WIDTH, q, row, ahead, n, out); return; }
SCORES(scores_codes, CODED)
#undef CASE

#define WEIGH(name, kind, size)                                                                        \
    static void name(int64_t heads, float (*p)[SPAN], Rows row, int64_t n, int64_t E, Rows ahead,      \
                     int64_t more, float *out, int64_t stride) {                                       \
        int64_t e = 0;                                                                                 \
        for (; e + 64 <= E; e += 64) switch (heads) {                                                  \
            CASE(1, kind, size) CASE(2, kind, size) CASE(3, kind, size) CASE(4, kind, size)            \
        }                                                                                              \
        for (int64_t h = 0; h < heads; h++) weigh_rest(kind, p[h], row, n, e, E, out + h * stride);    \
    }
#define CASE(HT, kind, size) \
    case HT: weigh_tile(HT, kind, p, row, n, e * size, ahead, more, out + e, stride); break;
WEIGH(weigh_bf16, BFLOAT16, 2)
WEIGH(weigh_codes, CODED, 1)
#undef CASE

static void scores_f32(const float *q, Rows row, int64_t n, int64_t E, float *out) {
    for (int64_t t = 0; t < n; t++) {
        const float *k = (const float *)row[t];
        f16 acc = {0};
        int64_t e = 0;
        for (; e + 16 <= E; e += 16) acc += load_f32(q + e) * load_f32(k + e);
        if (e < E) acc += some_f32(q + e, E - e) * some_f32(k + e, E - e);
        out[t] = sum(acc);
    }
}

static void weigh_f32(const float *p, Rows row, int64_t n, int64_t E, float *out) {
    memset(out, 0, E * sizeof *out);
    for (int64_t t = 0; t < n; t++) {
        const float *v = (const float *)row[t], weight = p[t];
#pragma omp simd
        for (int64_t e = 0; e < E; e++) out[e] += weight * v[e];
    }
}
