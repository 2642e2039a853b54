/* One new token of each of B sequences attends to all tokens of its sequence so far.
 *
 * Keys and values (K, N, E) lie in blocks of slots anywhere among the N; a table names the blocks
 * of each sequence in their order. A piece of work is a kv head and a span of tokens, for all
 * sequences one after the other: what they share is read from memory once. What a span gives
 * (largest score, sum, weighted values) depends on its tokens alone, and spans are merged in their
 * order, so neither the place of blocks nor B nor the number of threads changes a bit.
 */
#include "crew.h"
#include "jobs.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

enum { SPAN = 256, WIDEST = 512 };

/* ---- float32: scores of one query head, and its weighted values ------------------------------ */

static void scores_f32(const float *q, const float *const *row, int64_t n, int64_t E, float *out) {
    for (int64_t t = 0; t < n; t++) {
        f16 acc = {0};
        int64_t e = 0;
        for (; e + 16 <= E; e += 16) acc += load_f32(q + e) * load_f32(row[t] + e);
        if (e < E) acc += some_f32(q + e, E - e) * some_f32(row[t] + e, E - e);
        out[t] = sum(acc);
    }
}

static void weigh_f32(const float *p, const float *const *row, int64_t n, int64_t E, float *out) {
    memset(out, 0, E * sizeof *out);
    for (int64_t t = 0; t < n; t++) {
        const float *v = row[t], weight = p[t];
#pragma omp simd
        for (int64_t e = 0; e < E; e++) out[e] += weight * v[e];
    }
}

/* ---- bfloat16: two numbers in each lane, which shift and mask make float32 -------------------- */
/* Not by AVX512-BF16's products of pairs: on Xeons they take twice the time of these two. */

INLINE f16 evens(u16 pairs) { return (f16)(pairs << 16); }
INLINE f16 odds(u16 pairs) { return (f16)(pairs & 0xffff0000u); }

/* n numbers, 32 or 8, 16, 24 with zeros behind. */
INLINE u16 load_pairs(const bf16 *p, int64_t n) {
    u16 x = {0};
    if (n == 32) memcpy(&x, p, 64);
#if defined(__AVX512BW__)
    else x = (u16)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
#else
    else if (n == 24) memcpy(&x, p, 48);
    else if (n == 16) memcpy(&x, p, 32);
    else memcpy(&x, p, 16);
#endif
    return x;
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

/* Sums are named one by one below: what is indexed, compilers keep in memory. */
#define UP_TO_4(DO) DO(0) if (HT > 1) { DO(1) } if (HT > 2) { DO(2) } if (HT > 3) { DO(3) }

/* Scores of HT query heads (E apart); rows are C * 32 numbers or less. What is needed next is asked
 * for: the tokens behind, and in `ahead` the values. */
INLINE void scores_tile(const int HT, const int C, const bf16 *q, const bf16 *const *row,
                        const bf16 *const *ahead, int64_t n, int64_t E, float (*out)[SPAN]) {
    const int64_t rest = E - 32 * (C - 1);
    f16 even[4][WIDEST / 32], odd[4][WIDEST / 32], x[4][16];
    for (int h = 0; h < HT; h++)
        for (int c = 0; c < C; c++) {
            u16 pairs = load_pairs(q + h * E + 32 * c, c == C - 1 ? rest : 32);
            even[h][c] = evens(pairs);
            odd[h][c] = odds(pairs);
        }
    for (int64_t t = 0; t < n; t += 16) {
        for (int i = 0; i < 16; i++) {
            const bf16 *k = row[least(t + i, n - 1)];
            if (ahead)
                for (int c = 0; c < C; c++) {
                    __builtin_prefetch(ahead[least(t + i, n - 1)] + 32 * c, 0, 2);
                    __builtin_prefetch(row[least(t + i + 16, n - 1)] + 32 * c, 0, 3);
                }
            f16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
                u16 pairs = load_pairs(k + 32 * c, c == C - 1 ? rest : 32);
                f16 one = evens(pairs), two = odds(pairs);
#define DO(h) s##h += even[h][c] * one; s##h += odd[h][c] * two;
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

/* Weighted values of HT heads: 32 numbers of each row, or `many`, beginning at `from`. */
INLINE void weigh_tile(const int HT, const float (*p)[SPAN], const bf16 *const *row, int64_t n,
                       int64_t from, int64_t many, float *out, int64_t stride) {
    f16 e0 = {0}, e1 = {0}, e2 = {0}, e3 = {0}, o0 = {0}, o1 = {0}, o2 = {0}, o3 = {0};
    for (int64_t t = 0; t < n; t++) {
        u16 pairs = load_pairs(row[t] + from, many);
        f16 one = evens(pairs), two = odds(pairs);
#define DO(h) e##h += p[h][t] * one; o##h += p[h][t] * two;
        UP_TO_4(DO)
#undef DO
    }
#define DO(h) for (int64_t i = 0; i < many; i++) out[h * stride + i] = i % 2 ? o##h[i / 2] : e##h[i / 2];
    UP_TO_4(DO)
#undef DO
}

static void scores_bf16(int64_t heads, const bf16 *q, const bf16 *const *row,
                        const bf16 *const *ahead, int64_t n, int64_t E, float (*out)[SPAN]) {
    int64_t C = (E + 31) / 32;
#define CASE(HT, C) case HT * 8 + C: scores_tile(HT, C, q, row, ahead, n, E, out); return;
#define EACH_WIDTH(HT) CASE(HT, 1) CASE(HT, 2) CASE(HT, 3) CASE(HT, 4)
    if (C <= 4) switch (heads * 8 + C) { EACH_WIDTH(1) EACH_WIDTH(2) EACH_WIDTH(3) EACH_WIDTH(4) }
#undef EACH_WIDTH
#undef CASE
    for (int64_t h = 0; h < heads; h++) scores_tile(1, (int)C, q + h * E, row, ahead, n, E, out + h);
}

static void weigh_bf16(int64_t heads, const float (*p)[SPAN], const bf16 *const *row, int64_t n,
                       int64_t E, float *out, int64_t stride) {
    for (int64_t e = 0; e < E; e += 32) {
        int64_t many = least(E - e, 32);
#define CASE(HT)                                                                           \
    case HT:                                                                               \
        if (many == 32) weigh_tile(HT, p, row, n, e, 32, out + e, stride);                 \
        else weigh_tile(HT, p, row, n, e, many, out + e, stride);                          \
        break;
        switch (heads) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
    }
}

/* ---- eight bits: integers, times a number of each row ------------------------------------------ */

typedef int8_t b16 __attribute__((vector_size(16)));
typedef int16_t w16 __attribute__((vector_size(32)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef struct { f16 a, b, c, d; } Four;

/* n <= 16 codes as float32, zeros behind them. */
INLINE f16 load_codes(const int8_t *p, int64_t n) {
    b16 x = {0};
    if (n == 16) memcpy(&x, p, 16);
    else memcpy(&x, p, n);
#if defined(__AVX512F__)
    return (f16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#else
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(x, w16), i16), f16);
#endif
}

/* Scores of HT query heads, rows of C * 16 codes or less: as scores_tile. */
INLINE void code_scores(const int HT, const int C, const float (*q)[WIDEST], const int8_t *const *row,
                        const int8_t *const *ahead, int64_t n, int64_t E, float (*out)[SPAN]) {
    const int64_t rest = E - 16 * (C - 1);
    f16 whole[4][WIDEST / 16], x[4][16];
    for (int h = 0; h < HT; h++)
        for (int c = 0; c < C; c++) whole[h][c] = load_f32(q[h] + 16 * c);
    for (int64_t t = 0; t < n; t += 16) {
        for (int i = 0; i < 16; i++) {
            const int8_t *k = row[least(t + i, n - 1)];
            if (ahead)
                for (int c = 0; c < C; c += 4) {
                    __builtin_prefetch(ahead[least(t + i, n - 1)] + 16 * c, 0, 2);
                    __builtin_prefetch(row[least(t + i + 16, n - 1)] + 16 * c, 0, 3);
                }
            f16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                f16 one = load_codes(k + 16 * c, c == C - 1 ? rest : 16);
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

/* Weighted values of HT heads: 64 numbers of each row, beginning at `from`. */
INLINE void weigh_codes(const int HT, const float (*p)[SPAN], const int8_t *const *row, int64_t n,
                        int64_t from, float *out, int64_t stride) {
    Four s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    for (int64_t t = 0; t < n; t++) {
        const int8_t *v = row[t] + from;
        f16 a = load_codes(v, 16), b = load_codes(v + 16, 16);
        f16 c = load_codes(v + 32, 16), d = load_codes(v + 48, 16);
#define DO(h) { float w = p[h][t]; s##h.a += w * a; s##h.b += w * b; s##h.c += w * c; s##h.d += w * d; }
        UP_TO_4(DO)
#undef DO
    }
#define DO(h) memcpy(out + h * stride, &s##h, sizeof s##h);
    UP_TO_4(DO)
#undef DO
}

/* The same for 16 numbers or less. */
INLINE void weigh_few(const float *p, const int8_t *const *row, int64_t n, int64_t from,
                      int64_t many, float *out) {
    f16 s = {0};
    for (int64_t t = 0; t < n; t++) s += p[t] * load_codes(row[t] + from, many);
    memcpy(out, &s, many * sizeof *out);
}

static void score_codes(int64_t heads, const float (*q)[WIDEST], const int8_t *const *row,
                        const int8_t *const *ahead, int64_t n, int64_t E, float (*out)[SPAN]) {
#define CASE(HT, WIDTH) \
    if (heads == HT && E == WIDTH) { code_scores(HT, WIDTH / 16, q, row, ahead, n, WIDTH, out); return; }
#define EACH_WIDTH(HT) CASE(HT, 64) CASE(HT, 80) CASE(HT, 96) CASE(HT, 128)
    EACH_WIDTH(1) EACH_WIDTH(2) EACH_WIDTH(3) EACH_WIDTH(4)
#undef EACH_WIDTH
#undef CASE
    for (int64_t h = 0; h < heads; h++)
        code_scores(1, (int)((E + 15) / 16), q + h, row, ahead, n, E, out + h);
}

static void weigh_all_codes(int64_t heads, const float (*p)[SPAN], const int8_t *const *row, int64_t n,
                            int64_t E, float *out, int64_t stride) {
    int64_t e = 0;
#define CASE(HT) case HT: weigh_codes(HT, p, row, n, e, out + e, stride); break;
    for (; e + 64 <= E; e += 64) switch (heads) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
    for (; e < E; e += 16)
        for (int64_t h = 0; h < heads; h++)
            weigh_few(p[h], row, n, e, least(E - e, 16), out + h * stride + e);
}

/* ---- a span of one sequence -------------------------------------------------------------------- */

/* Scores become e^(score - largest); n is filled up to a multiple of 16. */
static void exponentials(float *s, int64_t n, float scale, float *largest, float *total) {
    int64_t whole = (n + 15) / 16 * 16;
    for (int64_t t = n; t < whole; t++) s[t] = -INFINITY;
    f16 top = load_f32(s) * scale, part = {0};
    for (int64_t t = 16; t < whole; t += 16) {
        f16 x = load_f32(s + t) * scale;
        u16 more = (u16)(x > top);
        top = (f16)((more & (u16)x) | (~more & (u16)top));
    }
    float most = top[0];
    for (int i = 1; i < 16; i++) most = top[i] > most ? top[i] : most;
    for (int64_t t = 0; t < whole; t += 16)
        for (int i = 0; i < 16; i++) s[t + i] = expf_(s[t + i] * scale - most);
    for (int64_t t = n; t < whole; t++) s[t] = 0;
    for (int64_t t = 0; t < whole; t += 16) part += load_f32(s + t);
    *largest = most;
    *total = sum(part);
}

static void span(const Decode *d, int type, int64_t b, int64_t head, int64_t index) {
    int64_t size = type == BFLOAT16 ? 2 : 4, E = d->E, G = d->H / d->K, stride = d->spans * (E + 2);
    int64_t first = index * SPAN, n = least(d->lengths[b] - first, SPAN);
    const char *keys[SPAN], *values[SPAN];
    const int32_t *table = d->tables + b * d->W + first / d->block;
    for (int64_t t = 0, inside = first % d->block; t < n; inside = 0, table++) {
        int64_t at = (head * d->N + *table * d->block + inside) * E * size;
        for (int64_t end = least(n, t + d->block - inside); t < end; t++, at += E * size) {
            keys[t] = d->keys + at;
            values[t] = d->values + at;
        }
    }
    float p[4][SPAN], scale = 1.f / sqrtf((float)E);
    for (int64_t g = 0, many; g < G; g += many) {
        many = type != BFLOAT16 || G == 1 ? 1 : least(G - g, 4);
        int64_t row = b * d->H + head * G + g;
        const char *q = d->q + row * E * size;
        float *out = d->scratch + row * stride + index * (E + 2);
        if (type == BFLOAT16)
            scores_bf16(many, (const bf16 *)q, (const bf16 *const *)keys,
                        g ? 0 : (const bf16 *const *)values, n, E, p);
        else
            scores_f32((const float *)q, (const float *const *)keys, n, E, p[0]);
        for (int64_t i = 0; i < many; i++) {
            float *end = out + i * stride + E;
            exponentials(p[i], n, scale, end, end + 1);
        }
        if (type == BFLOAT16)
            weigh_bf16(many, (const float(*)[SPAN])p, (const bf16 *const *)values, n, E, out, stride);
        else
            weigh_f32(p[0], (const float *const *)values, n, E, out);
    }
}

/* The same where keys and values are int8. */
static void coded_span(const Decode *d, int type, int64_t b, int64_t head, int64_t index) {
    int64_t E = d->E, G = d->H / d->K, stride = d->spans * (E + 2);
    int64_t first = index * SPAN, n = least(d->lengths[b] - first, SPAN);
    const int8_t *keys[SPAN], *values[SPAN];
    float key_scales[SPAN], value_scales[SPAN];
    const int32_t *table = d->tables + b * d->W + first / d->block;
    for (int64_t t = 0, inside = first % d->block; t < n; inside = 0, table++) {
        int64_t slot = head * d->N + *table * d->block + inside;
        for (int64_t end = least(n, t + d->block - inside); t < end; t++, slot++) {
            keys[t] = (const int8_t *)d->keys + slot * E;
            values[t] = (const int8_t *)d->values + slot * E;
            key_scales[t] = d->key_scales[slot];
            value_scales[t] = d->value_scales[slot];
        }
    }
    float p[4][SPAN], q[4][WIDEST], scale = 1.f / sqrtf((float)E);
    for (int64_t g = 0, many; g < G; g += many) {
        many = least(G - g, 4);
        int64_t row = b * d->H + head * G + g;
        float *out = d->scratch + row * stride + index * (E + 2);
        for (int64_t i = 0; i < many; i++) {
            int64_t from = (row + i) * E;
            for (int64_t e = 0; e < E; e++)
                q[i][e] = type == BFLOAT16 ? widen(((const bf16 *)d->q)[from + e]) : ((const float *)d->q)[from + e];
            for (int64_t e = E; e % 16; e++) q[i][e] = 0;
        }
        score_codes(many, (const float(*)[WIDEST])q, keys, g ? 0 : values, n, E, p);
        for (int64_t i = 0; i < many; i++) {
            float *end = out + i * stride + E;
            for (int64_t t = 0; t < n; t++) p[i][t] *= key_scales[t];
            exponentials(p[i], n, scale, end, end + 1);
            for (int64_t t = 0; t < n; t++) p[i][t] *= value_scales[t];
        }
        weigh_all_codes(many, (const float(*)[SPAN])p, values, n, E, out, stride);
    }
}

/* The spans of one query head of one sequence, in their order. */
static void merge(const Decode *d, int type, int64_t row) {
    int64_t E = d->E, count = (d->lengths[row / d->H] + SPAN - 1) / SPAN;
    const float *part = d->scratch + row * d->spans * (E + 2);
    float most = -INFINITY, total = 0, acc[WIDEST] = {0};
    for (int64_t i = 0; i < count; i++) {
        float top = part[i * (E + 2) + E];
        most = top > most ? top : most;
    }
    for (int64_t i = 0; i < count; i++, part += E + 2) {
        float factor = expf_(part[E] - most);
        total += factor * part[E + 1];
        for (int64_t e = 0; e < E; e++) acc[e] += factor * part[e];
    }
    for (int64_t e = 0; e < E; e++)
        if (type == BFLOAT16)
            ((bf16 *)d->out)[row * E + e] = narrow(acc[e] / total);
        else
            ((float *)d->out)[row * E + e] = acc[e] / total;
}

EXPORT void vidlm_decode_attention(const Decode *d, int type, int threads) {
    int64_t next = 0, merged = 0, longest = 0, done = 0;
    threads = hands(threads);
    for (int64_t b = 0; b < d->B; b++)
        longest = d->lengths[b] > longest ? d->lengths[b] : longest;
    int64_t spans = (longest + SPAN - 1) / SPAN, rows = d->B * d->H;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int64_t i; (i = take(&next)) < spans * d->K;)
            for (int64_t b = 0; b < d->B; b++)
                if (d->lengths[b] > i % spans * SPAN) {
                    if (d->key_scales) coded_span(d, type, b, i / spans, i % spans);
                    else span(d, type, b, i / spans, i % spans);
                }
        if (!omp_get_thread_num()) done = work_done();
#pragma omp barrier
        for (int64_t i; (i = take(&merged)) < rows;) merge(d, type, i);
    }
    if (threads > 1) hands_came(done);
}
