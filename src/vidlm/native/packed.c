/* Rows of packed weights: as numbers again, and times one to three rows of x without that. */
#include "packed.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#endif

/* ---- as numbers ------------------------------------------------------------------------------- */

INLINE float scale_at(const Weight *w, int64_t index) {
    return w->scale_type == BFLOAT16 ? widen(((const bf16 *)w->scale)[index])
                                     : ((const float *)w->scale)[index];
}

INLINE float scale_of(const Weight *w, int64_t row, int64_t groups, int64_t k) {
    return scale_at(w, row * groups + k / w->group);
}

/* Numbers [k, k + 64) of a row. */
INLINE void sixty_four(const Weight *w, const uint8_t *codes, int64_t row, int64_t groups, int64_t k,
                       int64_t D, float *out) {
    float low = scale_of(w, row, groups, k);
    float high = k + 32 < D ? scale_of(w, row, groups, k + 32) : 0.f;
#if WIDE
    __m512 table = _mm512_loadu_ps(w->table);
    for (int h = 0; h < 2; h++) {
        __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + 16 * h)));
        __m512 a = _mm512_permutexvar_ps(at, table); /* looks at the lower four bits alone */
        __m512 b = _mm512_permutexvar_ps(_mm512_srli_epi32(at, 4), table);
        _mm512_storeu_ps(out + 16 * h, _mm512_mul_ps(a, _mm512_set1_ps(low)));
        _mm512_storeu_ps(out + 32 + 16 * h, _mm512_mul_ps(b, _mm512_set1_ps(high)));
    }
#else
    for (int i = 0; i < 32; i++) {
        out[i] = w->table[codes[i] & 15] * low;
        out[32 + i] = w->table[codes[i] >> 4] * high;
    }
#endif
}

#define UNPACK(NAME, T, NARROW)                                                                   \
    static void NAME(const Weight *w, int64_t row, int64_t first, int64_t D, T *out) {              \
        int64_t groups = w->form == FOUR ? (D + w->group - 1) / w->group : 0;                     \
        if (w->form == EIGHT) {                                                                   \
            const int8_t *at = (const int8_t *)w->data + row * D;                                   \
            float scale = ((const float *)w->scale)[row];                                         \
            for (int64_t k = first; k < D; k++) out[k] = NARROW(at[k] * scale);                        \
            return;                                                                               \
        }                                                                                         \
        const uint8_t *codes = (const uint8_t *)w->data + row * row_bytes(w, D, 0) + first / 2;             \
        for (int64_t k = first; k < D; k += 64, codes += 32) {                                    \
            float numbers[64];                                                                    \
            sixty_four(w, codes, row, groups, k, D, numbers);                                     \
            int64_t n = least(64, D - k);                                                         \
            if (n == 64)                                                                          \
                for (int i = 0; i < 64; i++) out[k + i] = NARROW(numbers[i]);                     \
            else                                                                                  \
                for (int64_t i = 0; i < n; i++) out[k + i] = NARROW(numbers[i]);                  \
        }                                                                                         \
    }

UNPACK(unpack_f32, float, )
UNPACK(unpack_bf16, bf16, narrow)

#if WIDE
/* Whole blocks of 64 numbers of a row; how many numbers that are. */
static int64_t unpack_blocks(const Weight *w, int64_t row, int64_t D, bf16 *out) {
    int64_t whole = D / 64 * 64, groups = w->form == FOUR ? (D + w->group - 1) / w->group : 0;
    const char *from = w->data + row * row_bytes(w, D, 0);
    __m512 table = w->form == FOUR ? _mm512_loadu_ps(w->table) : _mm512_setzero_ps();
    for (int64_t k = 0; k < whole; k += 64) {
        __m512 x[4];
        if (w->form == EIGHT) {
            __m512 scale = _mm512_set1_ps(((const float *)w->scale)[row]);
            for (int i = 0; i < 4; i++) {
                __m128i bytes = _mm_loadu_si128((const __m128i *)(from + k + 16 * i));
                x[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
            }
        } else {
            __m512 low = _mm512_set1_ps(scale_of(w, row, groups, k));
            __m512 high = _mm512_set1_ps(scale_of(w, row, groups, k + 32));
            for (int i = 0; i < 2; i++) {
                __m128i bytes = _mm_loadu_si128((const __m128i *)(from + k / 2 + 16 * i));
                __m512i at = _mm512_cvtepu8_epi32(bytes);
                x[i] = _mm512_mul_ps(_mm512_permutexvar_ps(at, table), low);
                at = _mm512_srli_epi32(at, 4);
                x[2 + i] = _mm512_mul_ps(_mm512_permutexvar_ps(at, table), high);
            }
        }
        for (int i = 0; i < 4; i += 2)
            _mm512_storeu_si512(out + k + 16 * i, (__m512i)_mm512_cvtne2ps_pbh(x[i + 1], x[i]));
    }
    return whole;
}
#else
static int64_t unpack_blocks(const Weight *w, int64_t row, int64_t D, bf16 *out) {
    (void)w, (void)row, (void)D, (void)out;
    return 0;
}
#endif

void unpack_rows(const Weight *w, int64_t from, int64_t to, int64_t D, int type, char *out) {
    for (int64_t row = from; row < to; row++) {
        bf16 *at = (bf16 *)out + (row - from) * D;
        if (type == BFLOAT16) unpack_bf16(w, row, unpack_blocks(w, row, D, at), D, at);
        else unpack_f32(w, row, 0, D, (float *)out + (row - from) * D);
    }
}

/* All rows of a matrix, whose numbers go to out (rows, D). */
EXPORT void vidlm_unpack(const Part *p, int64_t D, int type, int threads) {
    enum { ROWS = 16 };
    int64_t next = 0, size = type == BFLOAT16 ? 2 : 4;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i; (i = take(&next) * ROWS) < p->rows;)
        unpack_rows(&p->weight, i, least(i + ROWS, p->rows), D, type, p->out + i * D * size);
}

/* ---- times x ---------------------------------------------------------------------------------- */

#if WIDE
enum { MOST_SCALES = 1024 }; /* of a row */

INLINE void finish(const Part *p, int64_t row, int64_t b, float sum) {
    const bf16 *bias = (const bf16 *)p->bias;
    ((bf16 *)p->out)[b * p->rows + row] = narrow(sum + (bias ? widen(bias[row]) : 0.f));
}

/* Rows [row, row + R) of 8 bits times B rows of x. */
INLINE void eight(const int R, const int B, const Part *p, int64_t row, const bf16 *x, int64_t D,
                  int64_t b0, const char **ahead, const char *end) {
    const int8_t *w = (const int8_t *)p->weight.data + row * D;
    __m512 acc[4][MOST_PACKED], at[MOST_PACKED];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) acc[r][b] = _mm512_setzero_ps();
    int64_t k = 0, whole = D / 16 * 16;
    for (; k < whole; k += 16) {
        for (int b = 0; b < B; b++)
            at[b] = (__m512)load_bf16(x + b * D + k);
        if (k % 64 == 0) fetch_ahead(ahead, end, R);
        for (int r = 0; r < R; r++) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(w + r * D + k));
            __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
            for (int b = 0; b < B; b++) acc[r][b] = _mm512_fmadd_ps(numbers, at[b], acc[r][b]);
        }
    }
    if (k < D) {
        __mmask16 mask = (__mmask16)((1u << (D - k)) - 1);
        for (int b = 0; b < B; b++) at[b] = (__m512)some_bf16(x + b * D + k, D - k);
        for (int r = 0; r < R; r++) {
            __m128i bytes = _mm_maskz_loadu_epi8(mask, w + r * D + k);
            __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
            for (int b = 0; b < B; b++) acc[r][b] = _mm512_fmadd_ps(numbers, at[b], acc[r][b]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            finish(p, row + r, b0 + b,
                   _mm512_reduce_add_ps(acc[r][b]) * ((const float *)p->weight.scale)[row + r]);
}

/* 64 numbers of R rows of 4 bits: products of pairs with values of the table, times their scales. */
INLINE void four_step(const int R, const int B, const uint8_t *codes, int64_t stride, __m512i table,
                      const float *scale, int64_t scales, int64_t high, __m512bh (*at)[2],
                      __m512 (*acc)[MOST_PACKED]) {
    for (int r = 0; r < R; r++) {
        __m512i places = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + r * stride)));
        __m512bh first = (__m512bh)_mm512_permutexvar_epi16(places, table);
        __m512bh second = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(places, 4), table);
        __m512 s0 = _mm512_set1_ps(scale[r * scales]), s1 = _mm512_set1_ps(scale[r * scales + high]);
        for (int b = 0; b < B; b++) {
            __m512 zero = _mm512_setzero_ps();
            acc[r][b] = _mm512_fmadd_ps(_mm512_dpbf16_ps(zero, first, at[b][0]), s0, acc[r][b]);
            acc[r][b] = _mm512_fmadd_ps(_mm512_dpbf16_ps(zero, second, at[b][1]), s1, acc[r][b]);
        }
    }
}

/* The same of 4 bits, with their scales as numbers in `scale` (R, scales). */
INLINE void four(const int R, const int B, const Part *p, int64_t row, const bf16 *x, int64_t D,
                 int64_t b0, const float *scale, int64_t scales, const char **ahead, const char *end) {
    int64_t stride = row_bytes(&p->weight, D, 0), group = p->weight.group;
    const uint8_t *codes = (const uint8_t *)p->weight.data + row * stride;
    __m256i sixteen = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p->weight.table));
    __m512i table = _mm512_broadcast_i64x4(sixteen); /* twice: the fifth bit of a place is ignored */
    __m512 acc[4][MOST_PACKED];
    __m512bh at[MOST_PACKED][2];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) acc[r][b] = _mm512_setzero_ps();
    int64_t k = 0, whole = D / 64 * 64;
    for (; k < whole; k += 64, codes += 32) {
        for (int b = 0; b < B; b++)
            for (int h = 0; h < 2; h++)
                at[b][h] = (__m512bh)_mm512_loadu_si512(x + b * D + k + 32 * h);
        if (k % 128 == 0) fetch_ahead(ahead, end, R);
        int64_t g = k / group;
        four_step(R, B, codes, stride, table, scale + g, scales, (k + 32) / group - g, at, acc);
    }
    if (k < D) {
        uint64_t mask = (1ull << (D - k)) - 1;
        for (int b = 0; b < B; b++)
            for (int h = 0; h < 2; h++)
                at[b][h] = (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)(mask >> 32 * h),
                                                              x + b * D + k + 32 * h);
        int64_t g = k / group, high = least((k + 32) / group, scales - 1) - g;
        four_step(R, B, codes, stride, table, scale + g, scales, high, at, acc);
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            finish(p, row + r, b0 + b, _mm512_reduce_add_ps(acc[r][b]));
}

/* R rows of weights times all rows of x. */
#define ROWS_OF(CALL, R)                \
    {                                   \
        int64_t m = 0;                  \
        for (; m + 3 <= M; m += 3) CALL(R, 3); \
        for (; m + 2 <= M; m += 2) CALL(R, 2); \
        for (; m < M; m++) CALL(R, 1);  \
    }

static void eight_block(const Part *p, int64_t from, int64_t to, const bf16 *x, int64_t M, int64_t D,
                        const char *ahead, const char *end) {
#define CALL(R, B) eight(R, B, p, row, x + m * D, D, m, &ahead, end)
    int64_t row = from;
    for (; row + 4 <= to; row += 4) ROWS_OF(CALL, 4)
    for (; row < to; row++) ROWS_OF(CALL, 1)
#undef CALL
}

static void four_block(const Part *p, int64_t from, int64_t to, const bf16 *x, int64_t M, int64_t D,
                       const char *ahead, const char *end) {
#define CALL(R, B) four(R, B, p, row, x + m * D, D, m, scale, scales, &ahead, end)
    int64_t row = from, scales = (D + p->weight.group - 1) / p->weight.group;
    float scale[4 * MOST_SCALES];
    for (; row < to;) {
        int64_t rows = to - row >= 4 ? 4 : 1;
        for (int64_t i = 0; i < rows * scales; i++)
            scale[i] = scale_at(&p->weight, row * scales + i);
        if (rows == 4) ROWS_OF(CALL, 4)
        else ROWS_OF(CALL, 1)
        row += rows;
    }
#undef CALL
}
#endif

int packed_rows(const Part *p, int64_t from, int64_t to, const bf16 *x, int64_t M, int64_t D,
                const char *ahead, const char *end) {
#if WIDE
    if (M > MOST_PACKED) return 0;
    if (p->weight.form == EIGHT) eight_block(p, from, to, x, M, D, ahead, end);
    else if ((D + p->weight.group - 1) / p->weight.group > MOST_SCALES) return 0;
    else four_block(p, from, to, x, M, D, ahead, end);
    return 1;
#else
    (void)p, (void)from, (void)to, (void)x, (void)M, (void)D, (void)ahead, (void)end;
    return 0;
#endif
}
