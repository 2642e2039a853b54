/* Rows of packed weights times a few rows of x, without their numbers.
 *
 * By products of bytes: a row of x becomes integers of 16 bits, relative to its largest number, each
 * in two signed bytes, x = unit * (256 * high + low). That is finer than bfloat16 for all numbers
 * that matter, and sums of integers are exact. Weights are taken as unsigned bytes, 8 bits plus 128,
 * and 4 bits as they are stored where the table is -8 to 7; what that adds is taken off at the end.
 */
#include <stdlib.h>

#include "packed.h"

#if WIDE
#include <immintrin.h>

enum { MOST_EIGHT = 6, MOST_FOUR = 6, MOST_TABLE = 3, MOST_SCALES = 1024, LONGEST = 65536 };

typedef struct {
    int8_t *high, *low; /* (wide), zeros behind the end */
    float *sums;        /* of 32 numbers each, every other one times 16; zeros behind them */
    float unit, sum;
} Fixed;

struct Inputs {
    const bf16 *x;
    int64_t M, D;
    Fixed rows[MOST_EIGHT];
};

INLINE int64_t wide_of(int64_t D) { return (D + 63) / 64 * 64; }
INLINE int64_t scales_of(int64_t D) { return (D + 511) / 512 * 16; } /* of 32 numbers, in sixteens */

INLINE __m512 numbers_at(const bf16 *x, int64_t k, int64_t D) {
    __mmask16 mask = k >= D ? 0 : D - k < 16 ? (__mmask16)((1u << (D - k)) - 1) : 0xffff;
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + k)), 16);
}

/* What is not a number, or not finite, makes `unit` NaN, and with it all that x gives. */
static void fix(const bf16 *x, int64_t D, Fixed *f) {
    __m512 most = _mm512_setzero_ps(), check = most;
    for (int64_t k = 0; k < D; k += 16) {
        __m512 value = numbers_at(x, k, D);
        most = _mm512_max_ps(most, _mm512_abs_ps(value));
        check = _mm512_fmadd_ps(value, _mm512_setzero_ps(), check);
    }
    float largest = _mm512_reduce_max_ps(most), wrong = _mm512_reduce_add_ps(check);
    int finite = wrong == 0.f && largest > 1e-30f; /* smaller ones are nothing */
    __m512 over = _mm512_set1_ps(finite ? 32639.f / largest : 0.f); /* 127 * 256 + 127 */
    f->unit = finite ? largest / 32639.f : wrong;
    int64_t sum = 0;
    for (int64_t k = 0; k < wide_of(D); k += 16) {
        __m512i value = _mm512_setzero_si512();
        if (finite) value = _mm512_cvtps_epi32(_mm512_mul_ps(numbers_at(x, k, D), over));
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
        __m512i low = _mm512_sub_epi32(value, _mm512_slli_epi32(high, 8));
        _mm_storeu_si128((__m128i *)(f->high + k), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(f->low + k), _mm512_cvtepi32_epi8(low));
        int32_t part = _mm512_reduce_add_epi32(value);
        sum += part;
        float worth = (float)part * (k & 32 ? 16.f * f->unit : f->unit);
        f->sums[k / 32] = (k % 32 ? f->sums[k / 32] : 0.f) + worth;
    }
    for (int64_t g = wide_of(D) / 32; g < scales_of(D); g++) f->sums[g] = 0.f;
    f->sum = (float)sum * f->unit;
}

Inputs *inputs_of(const bf16 *x, int64_t M, int64_t D) {
    int64_t wide = wide_of(D), size = 2 * wide + scales_of(D) * 4, first = (sizeof(Inputs) + 63) / 64 * 64;
    Inputs *made = aligned_alloc(64, first + (M * size + 63) / 64 * 64);
    if (!made) return made;
    made->x = x, made->M = M, made->D = D;
    for (int64_t m = 0; m < M; m++) {
        char *at = (char *)made + first + m * size;
        Fixed *f = made->rows + m;
        f->high = (int8_t *)at, f->low = (int8_t *)at + wide, f->sums = (float *)(at + 2 * wide);
        fix(x + m * D, D, f);
    }
    return made;
}

INLINE int by_integers(const Weight *w) { /* the table is -8 to 7 */
    for (int i = 0; i < 16; i++)
        if (w->table[i] != (float)(i - 8)) return 0;
    return 1;
}

int taken_packed(const Weight *w, int64_t M, int64_t D, int type) {
    if (type != BFLOAT16 || D > LONGEST || w->form == DENSE) return 0;
    if (w->form == EIGHT) return M <= MOST_EIGHT;
    return scales_of(D) <= MOST_SCALES && M <= (by_integers(w) ? MOST_FOUR : MOST_TABLE);
}

INLINE void finish(const Part *p, int64_t row, int64_t b, float sum) {
    const bf16 *bias = (const bf16 *)p->bias;
    ((bf16 *)p->out)[b * p->rows + row] = narrow(sum + (bias ? widen(bias[row]) : 0.f));
}

/* Rows [row, row + R) of 8 bits times rows [b0, b0 + B) of x. */
INLINE void eight(const int R, const int B, const Part *p, int64_t row, const Inputs *in, int64_t b0,
                  Ahead *ahead) {
    int64_t D = in->D;
    const Fixed *x = in->rows + b0;
    const uint8_t *w = (const uint8_t *)p->weight.data + row * D;
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i high[4][2], low[4][2];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) high[r][b] = low[r][b] = _mm512_setzero_si512();
    for (int64_t k = 0; k < D; k += 64) {
        __mmask64 mask = D - k < 64 ? (1ull << (D - k)) - 1 : ~0ull;
        fetch_ahead(ahead, R);
        for (int r = 0; r < R; r++) {
            __m512i bytes = _mm512_maskz_loadu_epi8(mask, w + r * D + k);
            bytes = _mm512_xor_si512(bytes, flip);
            for (int b = 0; b < B; b++) {
                __m512i h = _mm512_loadu_si512(x[b].high + k), l = _mm512_loadu_si512(x[b].low + k);
                high[r][b] = _mm512_dpbusd_epi32(high[r][b], bytes, h);
                low[r][b] = _mm512_dpbusd_epi32(low[r][b], bytes, l);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            int64_t upper = _mm512_reduce_add_epi32(high[r][b]);
            double whole = (double)(256 * upper + _mm512_reduce_add_epi32(low[r][b]));
            float sum = (float)(whole * x[b].unit - 128. * x[b].sum);
            finish(p, row + r, b0 + b, sum * ((const float *)p->weight.scale)[row + r]);
        }
}

/* The same of 4 bits whose table is -8 to 7. A register has twice 32 numbers, the second ones where
 * they are in their bytes, 16 times what they stand for. `scale` (R, scales) has one for each 32,
 * every other one a sixteenth. */
INLINE void four(const int R, const int B, const Part *p, int64_t row, const Inputs *in, int64_t b0,
                 const float *scale, int64_t scales, Ahead *ahead) {
    int64_t stride = row_bytes(&p->weight, in->D, 0), blocks = stride / 32;
    const Fixed *x = in->rows + b0;
    const uint8_t *codes = (const uint8_t *)p->weight.data + row * stride;
    const __m512i halves = _mm512_inserti64x4(_mm512_set1_epi8(15), _mm256_set1_epi8((char)0xf0), 1);
    __m512 acc[4][2];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) acc[r][b] = _mm512_setzero_ps();
    for (int64_t i = 0; i < blocks; i++, codes += 32) {
        if (i % 2 == 0) fetch_ahead(ahead, R);
        for (int r = 0; r < R; r++) {
            __m256i bytes = _mm256_loadu_si256((const __m256i *)(codes + r * stride));
            __m512i both = _mm512_and_si512(_mm512_broadcast_i64x4(bytes), halves);
            const float *s = scale + r * scales + 2 * i;
            __m512 at = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(s[0]), _mm512_set1_ps(s[1]));
            for (int b = 0; b < B; b++) {
                __m512i high = _mm512_loadu_si512(x[b].high + 64 * i);
                __m512i low = _mm512_loadu_si512(x[b].low + 64 * i);
                __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), both, high);
                sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), both, low);
                acc[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), at, acc[r][b]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            f16 off = {0};
            for (int64_t g = 0; g < scales; g += 16)
                off += load_f32(x[b].sums + g) * load_f32(scale + r * scales + g);
            float sum = _mm512_reduce_add_ps(acc[r][b]) * x[b].unit - 8.f * _mm512_reduce_add_ps((__m512)off);
            finish(p, row + r, b0 + b, sum);
        }
}

/* 64 numbers of R rows of 4 bits: products of pairs with values of the table, times their scales. */
INLINE void four_step(const int R, const int B, const uint8_t *codes, int64_t stride, __m512i table,
                      const float *scale, int64_t scales, __m512bh (*at)[2],
                      __m512 (*acc)[2]) {
    for (int r = 0; r < R; r++) {
        __m512i places = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + r * stride)));
        __m512bh first = (__m512bh)_mm512_permutexvar_epi16(places, table);
        __m512bh second = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(places, 4), table);
        __m512 s0 = _mm512_set1_ps(scale[r * scales]), s1 = _mm512_set1_ps(scale[r * scales + 1]);
        for (int b = 0; b < B; b++) {
            __m512 zero = _mm512_setzero_ps();
            acc[r][b] = _mm512_fmadd_ps(_mm512_dpbf16_ps(zero, first, at[b][0]), s0, acc[r][b]);
            acc[r][b] = _mm512_fmadd_ps(_mm512_dpbf16_ps(zero, second, at[b][1]), s1, acc[r][b]);
        }
    }
}

/* The same of 4 bits and any table. */
INLINE void by_table(const int R, const int B, const Part *p, int64_t row, const Inputs *in,
                     int64_t b0, const float *scale, int64_t scales, Ahead *ahead) {
    int64_t D = in->D;
    const bf16 *x = in->x + b0 * D;
    int64_t stride = row_bytes(&p->weight, D, 0);
    const uint8_t *codes = (const uint8_t *)p->weight.data + row * stride;
    __m256i sixteen = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p->weight.table));
    __m512i table = _mm512_broadcast_i64x4(sixteen); /* twice: the fifth bit of a place is ignored */
    __m512 acc[4][2];
    __m512bh at[2][2];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) acc[r][b] = _mm512_setzero_ps();
    int64_t k = 0, whole = D / 64 * 64;
    for (; k < whole; k += 64, codes += 32) {
        for (int b = 0; b < B; b++)
            for (int h = 0; h < 2; h++)
                at[b][h] = (__m512bh)_mm512_loadu_si512(x + b * D + k + 32 * h);
        if (k % 128 == 0) fetch_ahead(ahead, R);
        four_step(R, B, codes, stride, table, scale + k / 32, scales, at, acc);
    }
    if (k < D) {
        uint64_t mask = (1ull << (D - k)) - 1;
        for (int b = 0; b < B; b++)
            for (int h = 0; h < 2; h++)
                at[b][h] = (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)(mask >> 32 * h),
                                                              x + b * D + k + 32 * h);
        four_step(R, B, codes, stride, table, scale + k / 32, scales, at, acc);
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            finish(p, row + r, b0 + b, _mm512_reduce_add_ps(acc[r][b]));
}

/* R rows of weights times all rows of x. */
#define ROWS_OF(CALL, R)                       \
    {                                          \
        int64_t m = 0;                         \
        for (; m + 2 <= M; m += 2) CALL(R, 2); \
        for (; m < M; m++) CALL(R, 1);         \
    }

static void eight_block(const Part *p, int64_t from, int64_t to, const Inputs *x, Ahead *ahead) {
#define CALL(R, B) eight(R, B, p, row, x, m, ahead)
    int64_t row = from, M = x->M;
    for (; row + 4 <= to; row += 4) ROWS_OF(CALL, 4)
    for (; row < to; row++) ROWS_OF(CALL, 1)
#undef CALL
}

/* A row's scales, one for each 32 numbers. */
static void widen_scales(const Weight *w, int64_t row, int64_t D, float *out) {
    int64_t groups = (D + w->group - 1) / w->group, many = w->group / 32, all = wide_of(D) / 32;
    if (many == 1 && w->scale_type == BFLOAT16) {
        const bf16 *from = (const bf16 *)w->scale + row * groups;
        for (int64_t g = 0; g < groups; g += 16) _mm512_storeu_ps(out + g, numbers_at(from, g, groups));
        return;
    }
    for (int64_t g = 0, i = 0; g < groups; g++) {
        float scale = scale_at(w, row * groups + g);
        for (int64_t end = least(i + many, all); i < end; i++) out[i] = scale;
    }
}

static void four_block(const Part *p, int64_t from, int64_t to, const Inputs *x, Ahead *ahead) {
#define WHOLE(R, B) four(R, B, p, row, x, m, scale, scales, ahead)
#define TABLE(R, B) by_table(R, B, p, row, x, m, scale, scales, ahead)
    int64_t row = from, M = x->M, scales = scales_of(x->D);
    int whole = by_integers(&p->weight);
    const __m512 worth = _mm512_mask_blend_ps(0xaaaa, _mm512_set1_ps(1.f), _mm512_set1_ps(1.f / 16));
    float scale[4 * MOST_SCALES];
    memset(scale, 0, 4 * scales * sizeof *scale);
    while (row < to) {
        int64_t rows = to - row >= 4 ? 4 : 1;
        for (int64_t r = 0; r < rows; r++) widen_scales(&p->weight, row + r, x->D, scale + r * scales);
        for (int64_t i = 0; whole && i < rows * scales; i += 16)
            _mm512_storeu_ps(scale + i, _mm512_mul_ps(_mm512_loadu_ps(scale + i), worth));
        if (whole && rows == 4) ROWS_OF(WHOLE, 4)
        else if (whole) ROWS_OF(WHOLE, 1)
        else if (rows == 4) ROWS_OF(TABLE, 4)
        else ROWS_OF(TABLE, 1)
        row += rows;
    }
#undef WHOLE
#undef TABLE
}

void packed_rows(const Part *p, int64_t from, int64_t to, const Inputs *x, Ahead *ahead) {
    if (p->weight.form == EIGHT) eight_block(p, from, to, x, ahead);
    else four_block(p, from, to, x, ahead);
}
#else
int taken_packed(const Weight *w, int64_t M, int64_t D, int type) {
    return (void)w, (void)M, (void)D, (void)type, 0;
}
Inputs *inputs_of(const bf16 *x, int64_t M, int64_t D) { return (void)x, (void)M, (void)D, NULL; }
void packed_rows(const Part *p, int64_t from, int64_t to, const Inputs *x, Ahead *ahead) {
    (void)p, (void)from, (void)to, (void)x, (void)ahead; /* never called: none is taken */
}
#endif
