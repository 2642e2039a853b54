/* Rows of numbers into codes and scales as packed.h has them: what plain torch makes of them in
 * quant/packing.py, bit for bit. No sums are taken, so each number is divided and rounded as there.
 *
 * Numbers are compared as bits where a largest one is sought: in their order NaN is above all, and
 * so it is what a row or group with one is worth.
 */
#include "packed.h"

typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint8_t c16 __attribute__((vector_size(16)));

enum { HALF = 32, SIGN = 31, TABLE = 16 };

typedef struct {
    char *codes; /* the first six are a Weight, that is written here */
    int64_t form;
    char *scale;
    const float *table;
    int64_t group, scale_type;
    const char *from; /* (rows, D) */
    int64_t rows, D;
} Packing;

INLINE uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE float number_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t size_bits(float x) { return bits_of(x) & 0x7fffffff; }
INLINE float never_zero(float x) { return x == 0.f ? 1.f : x; }

INLINE float number_at(const char *x, int64_t d, int type) {
    return type == BFLOAT16 ? widen(((const bf16 *)x)[d]) : ((const float *)x)[d];
}

/* ---- eight bits ------------------------------------------------------------------------------ */

INLINE void eight(const Packing *p, const char *x, int64_t row, int type) {
    int8_t *to = (int8_t *)p->codes + row * p->D;
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t d = 0; d < p->D; d++) {
        uint32_t size = size_bits(number_at(x, d, type));
        top = size > top ? size : top;
    }
    float scale = number_of(top) / 127.f, unit = never_zero(scale);
    ((float *)p->scale)[row] = scale;
#pragma omp simd
    for (int64_t d = 0; d < p->D; d++) {
        float code = rintf(number_at(x, d, type) / unit);
        code = code > 127.f ? 127.f : code < -127.f ? -127.f : code;
        to[d] = (int8_t)(int32_t)(code == code ? code : 0.f);
    }
}

/* ---- four bits ------------------------------------------------------------------------------- */

/* That of numbers [from, to) which is furthest from zero, the first of several. */
INLINE float largest(const char *x, int64_t from, int64_t to, int type) {
    int32_t up = INT32_MIN; /* bits of positive numbers are in the order of signed integers */
    uint32_t down = 0;      /* and those of negative ones at the end of the unsigned */
#pragma omp simd reduction(max : up, down)
    for (int64_t d = from; d < to; d++) {
        uint32_t bits = bits_of(number_at(x, d, type));
        up = (int32_t)bits > up ? (int32_t)bits : up;
        down = bits > down ? bits : down;
    }
    uint32_t above = up < 0 ? 0 : (uint32_t)up, below = down >> SIGN ? down & 0x7fffffff : 0;
    if (above != below) return number_of(above > below ? above : down);
    while (size_bits(number_at(x, from, type)) != above) from++; /* both signs, or zeros alone */
    return number_at(x, from, type);
}

/* Sixteen numbers from k on, zeros behind the end. */
INLINE f16 sixteen(const char *x, int64_t k, int64_t D, int type) {
    int64_t n = D - k;
    if (n <= 0) return (f16){0};
    const bf16 *halves = (const bf16 *)x + k;
    const float *numbers = (const float *)x + k;
    if (type == BFLOAT16) return n < 16 ? some_bf16(halves, n) : load_bf16(halves);
    return n < 16 ? some_f32(numbers, n) : load_f32(numbers);
}

/* How many of the values between the table's are below each number: all of them for NaN. */
INLINE c16 places(f16 x, const float *between) {
    i16 count = (i16){0} + (TABLE - 1);
    for (int i = 0; i < TABLE - 1; i++) count += between[i] >= x; /* -1 where it is */
    return __builtin_convertvector(count, c16);
}

/* Numbers [k, k + 32) into the lower or the upper halves of their bytes. */
INLINE void half_block(const char *x, int64_t k, int64_t D, int type, float unit,
                       const float *between, uint8_t *codes) {
    uint8_t *to = codes + k / (2 * HALF) * HALF;
    int upper = k % (2 * HALF) ? 4 : 0;
    for (int i = 0; i < HALF; i += 16) {
        c16 place = places(sixteen(x, k + i, D, type) / unit, between), before = {0};
        if (D - k - i < 16) /* what is behind the end is 0 and not a zero */
            for (int j = 0; j < 16; j++) place[j] = j < D - k - i ? place[j] : 0;
        if (upper) memcpy(&before, to + i, sizeof before);
        place = before | place << upper;
        memcpy(to + i, &place, sizeof place);
    }
}

INLINE void four(const Packing *p, const char *x, int64_t row, int type, const float *between) {
    int64_t D = p->D, groups = (D + p->group - 1) / p->group;
    uint8_t *codes = (uint8_t *)p->codes + row * ((D + 63) / 64 * 32);
    float down = p->table[0], up = p->table[TABLE - 1];
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * p->group, end = least(first + p->group, D), at = row * groups + g;
        float most = largest(x, first, end, type);
        float scale = -down > up ? most / down : fabsf(most) / up;
        if (p->scale_type == BFLOAT16) {
            ((bf16 *)p->scale)[at] = narrow(scale);
            scale = rounded(scale);
        } else {
            ((float *)p->scale)[at] = scale;
        }
        for (int64_t k = first; k < end; k += HALF)
            half_block(x, k, D, type, never_zero(scale), between, codes);
    }
}

/* ---- all rows -------------------------------------------------------------------------------- */

static void pack_rows(const Packing *p, int64_t from, int64_t to, const float *between, int type) {
    for (int64_t row = from; row < to; row++) {
        const char *x = p->from + row * p->D * (type == BFLOAT16 ? 2 : 4);
        if (p->form == EIGHT) {
            if (type == BFLOAT16) eight(p, x, row, BFLOAT16);
            else eight(p, x, row, FLOAT32);
        } else {
            if (type == BFLOAT16) four(p, x, row, BFLOAT16, between);
            else four(p, x, row, FLOAT32, between);
        }
    }
}

/* `type` is that of the numbers. */
EXPORT void vidlm_pack(const Packing *p, int type, int threads) {
    enum { ROWS = 4 };
    float between[TABLE - 1] = {0};
    for (int i = 0; i < TABLE - 1 && p->form == FOUR; i++)
        between[i] = (p->table[i + 1] + p->table[i]) / 2;
    int64_t next = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t i; (i = take(&next) * ROWS) < p->rows;)
        pack_rows(p, i, least(i + ROWS, p->rows), between, type);
}
