/* Rows of packed weights as numbers again. */
#include "packed.h"

#if WIDE
#include <immintrin.h>
#endif

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
