/* Activations of numbers by themselves, in one pass over memory.
 *
 * A bfloat16 is one of 65,536 numbers: what an activation makes of each is computed once and looked
 * up from then on, which takes a fraction of the time and gives the same bits. The few that most
 * numbers are lie in the first level of the cache.
 */
#include "crew.h"
#include "jobs.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

enum {
    STRETCH = 4096,   /* numbers that one thread takes at a time */
    VALUES = 1 << 16, /* of a bfloat16 */
    WORTH = 1 << 16,  /* numbers from which on a call asks a table: one of few would find it cold */
};

/* tanh(u) = 1 - 2 / (1 + e^(2u)); added to 1 it loses the digits that the plain form loses. */
INLINE float gelu_tanh(float x) {
    float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.f + (1.f - 2.f / (1.f + expf_(2.f * u))));
}

#define EACH(NAME, T, EXPRESSION)                                              \
    static void NAME(const T *x, const T *other, T *y, int64_t n) {            \
        (void)other;                                                           \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = EXPRESSION; \
    }

EACH(gelu_tanh_f32, float, gelu_tanh(x[i]))
EACH(gelu_tanh_bf16, bf16, narrow(gelu_tanh(widen(x[i]))))
EACH(quick_gelu_f32, float, x[i] * (1.f / (1.f + expf_(-(1.702f * x[i])))))
EACH(quick_gelu_bf16, bf16,
     narrow(widen(x[i]) * rounded(1.f / (1.f + expf_(-rounded(1.702f * widen(x[i])))))))
EACH(silu_mul_f32, float, x[i] / (1.f + expf_(-x[i])) * other[i])
EACH(silu_bf16, bf16, narrow(widen(x[i]) / (1.f + expf_(-widen(x[i])))))
EACH(times_bf16, bf16, narrow(widen(x[i]) * widen(other[i])))

/* y = KERNEL(x, other); y may be x. The last few numbers go through the same code as all others, so
 * that a row's result does not depend on how many rows there are. */
#define APPLY(NAME, T)                                                                            \
    INLINE void NAME(void (*kernel)(const T *, const T *, T *, int64_t), const T *x, const T *other, \
                     T *y, int64_t n) {                                                           \
        int64_t whole = n / 16 * 16, rest = n - whole;                                            \
        kernel(x, other, y, whole);                                                               \
        if (!rest) return;                                                                        \
        T one[16] = {0}, two[16] = {0};                                                           \
        memcpy(one, x + whole, rest * sizeof(T));                                                 \
        if (other) memcpy(two, other + whole, rest * sizeof(T));                                  \
        kernel(one, two, one, 16);                                                                \
        memcpy(y + whole, one, rest * sizeof(T));                                                 \
    }

APPLY(apply_f32, float)
APPLY(apply_bf16, bf16)

static void activate_f32(int kind, const float *x, const float *other, float *y, int64_t n) {
    if (kind == GELU_TANH) apply_f32(gelu_tanh_f32, x, 0, y, n);
    else if (kind == QUICK_GELU) apply_f32(quick_gelu_f32, x, 0, y, n);
    else apply_f32(silu_mul_f32, x, other, y, n);
}

/* The part of an activation that looks at one number. */
static void compute(int kind, const bf16 *x, bf16 *y, int64_t n) {
    if (kind == GELU_TANH) apply_bf16(gelu_tanh_bf16, x, 0, y, n);
    else if (kind == QUICK_GELU) apply_bf16(quick_gelu_bf16, x, 0, y, n);
    else apply_bf16(silu_bf16, x, 0, y, n);
}

/* NULL where another thread is just making it: that is no time to wait, but to compute. */
static const bf16 *table_of(int kind) {
    enum { NONE, BEGUN, READY };
    static bf16 tables[SILU_MUL + 1][VALUES + 1]; /* the last is read beside the one before it */
    static int states[SILU_MUL + 1];
    int state = __atomic_load_n(&states[kind], __ATOMIC_ACQUIRE);
    if (state == NONE && __atomic_compare_exchange_n(&states[kind], &state, BEGUN, 0,
                                                     __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
        for (int64_t i = 0; i < VALUES; i++) tables[kind][i] = (bf16)i;
        compute(kind, tables[kind], tables[kind], VALUES);
        __atomic_store_n(&states[kind], READY, __ATOMIC_RELEASE);
        state = READY;
    }
    return state == READY ? tables[kind] : 0;
}

static void look_up(const bf16 *table, const bf16 *x, bf16 *y, int64_t n) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + 32 <= n; i += 32) { /* two numbers in each lane; what is gathered are two, too */
        __m512i pairs = _mm512_loadu_si512(x + i), low = _mm512_set1_epi32(0xffff);
        __m512i even = _mm512_i32gather_epi32(_mm512_and_si512(pairs, low), table, 2);
        __m512i odd = _mm512_i32gather_epi32(_mm512_srli_epi32(pairs, 16), table, 2);
        odd = _mm512_slli_epi32(odd, 16);
        _mm512_storeu_si512(y + i, _mm512_mask_mov_epi16(odd, 0x55555555, even));
    }
#endif
    for (; i < n; i++) y[i] = table[x[i]];
}

static void activate_bf16(int kind, const bf16 *table, const bf16 *x, const bf16 *other, bf16 *y,
                          int64_t n) {
    bf16 room[STRETCH], *found = other ? room : y;
    if (table) look_up(table, x, found, n);
    else compute(kind, x, found, n);
    if (other) apply_bf16(times_bf16, found, other, y, n);
}

typedef struct {
    int kind, type;
    const bf16 *table;
    const char *x, *other;
    char *y;
    int64_t count;
} Call;

static void stretch(const Call *c, int64_t index) {
    int64_t from = index * STRETCH, n = least(STRETCH, c->count - from);
    int64_t at = from * (c->type == BFLOAT16 ? 2 : 4);
    const void *x = c->x + at, *other = c->other ? c->other + at : 0;
    void *y = c->y + at;
    if (c->type == BFLOAT16) activate_bf16(c->kind, c->table, x, other, y, n);
    else activate_f32(c->kind, x, other, y, n);
}

EXPORT void vidlm_activation(int kind, const char *x, const char *other, char *y, int64_t count,
                             int type, int threads) {
    const bf16 *table = type == BFLOAT16 && count >= WORTH ? table_of(kind) : 0;
    Call call = {kind, type, table, x, other, y, count};
    int64_t stretches = (count + STRETCH - 1) / STRETCH;
    ROWS(stretches, STRETCH * 4, stretch(&call, row))
}
