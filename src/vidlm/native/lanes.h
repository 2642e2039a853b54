/* What all kernels share: bfloat16, sixteen lanes of float32, and how work is shared out. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else /* a compiler whose OpenMP is not that of torch: all work is the caller's */
#define omp_get_thread_num() 0
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;                  /* the upper half of a float32 */
enum { FLOAT32 = 0, BFLOAT16 = 1 };     /* how the callers name the type of all their tensors */

INLINE float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest, halves to even, NaN stays NaN: what torch does. */
INLINE bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)(x != x ? 0x7fc0 : rounded);
}

INLINE float rounded(float x) { return widen(narrow(x)); }

/* Sixteen numbers side by side; compilers map them to what registers the machine has. A sum over
 * many numbers is always kept as sixteen partial sums that are added in one fixed order, so that
 * it comes out the same whoever computes it. */
typedef float f16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

INLINE f16 load_f32(const float *p) { f16 x; memcpy(&x, p, sizeof x); return x; }
INLINE f16 load_bf16(const bf16 *p) {
    h16 x;
    memcpy(&x, p, sizeof x);
    return (f16)(__builtin_convertvector(x, u16) << 16);
}

/* The first n < 16 numbers, zeros behind them. */
INLINE f16 some_f32(const float *p, int64_t n) {
    float x[16] = {0};
    memcpy(x, p, n * sizeof *x);
    return load_f32(x);
}
INLINE f16 some_bf16(const bf16 *p, int64_t n) {
    bf16 x[16] = {0};
    memcpy(x, p, n * sizeof *x);
    return load_bf16(x);
}

INLINE float sum(f16 x) {
    float at[16];
    memcpy(at, &x, sizeof at);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) at[i] += at[i + width];
    return at[0];
}

/* e^x for x in [-87, 88], within two units of the last place; beyond them as at the end. */
INLINE float expf_(float x) {
    x = -87.f > x ? -87.f : x; /* written so that NaN stays */
    x = 88.f < x ? 88.f : x;
    float n = x * 1.442695041f;
    n = (n + 12582912.f) - 12582912.f; /* to the nearest integer: 1.5 * 2^23 has no fraction bits */
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* log 2 in two parts */
    float p = 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The next piece of work for whoever asks; shared by the threads of one call. A thread that the
 * machine stops for a while then delays one piece, not half of the work. */
INLINE int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* What will be read next: its lines are asked for one behind the other, or from four places by turns.
 * A processor guesses what comes in each page that is read, so that four keep memory busier. */
typedef struct { const char *at, *end; int64_t apart; } Ahead;

INLINE Ahead ahead_of(const char *from, const char *end, int four) {
    int64_t quarter = (end - from + 255) / 256 * 64;
    return four ? (Ahead){from, from + quarter, quarter} : (Ahead){from, end, 0};
}

/* A few more than there are may be asked for: no harm is done. */
INLINE void fetch_ahead(Ahead *a, const int lines) {
    if (a->apart)
        for (int i = 0; i < lines && a->at < a->end; i += 4, a->at += 64)
            for (int place = 0; place < 4; place++) __builtin_prefetch(a->at + place * a->apart, 0, 2);
    else
        for (int i = 0; i < lines && a->at < a->end; i++, a->at += 64) __builtin_prefetch(a->at, 0, 2);
}
