/* What is done to each row or number by itself, in one pass over memory: norms, rotation, storing,
 * activations. Where plain torch rounds a result to bfloat16 before the next step, so does this. */
#include "crew.h"
#include "jobs.h"

/* Rows are handed out in pieces of about this many bytes. */
enum { PIECE = 32 * 1024 };

/* DO for each `row` of COUNT, which take BYTES each. */
#define ROWS(COUNT, BYTES, DO)                                                                 \
    {                                                                                          \
        int64_t share = PIECE / (BYTES) + 1, next = 0, done = 0;                               \
        int64_t shares = ((COUNT) + share - 1) / share;                                        \
        threads = hands(threads);                                                               \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                        \
            for (int64_t piece; (piece = take(&next)) < shares;)                               \
                for (int64_t row = piece * share; row < least((piece + 1) * share, COUNT); row++) \
                    DO;                                                                        \
            if (!omp_get_thread_num()) done = work_done();                                     \
        }                                                                                      \
        if (threads > 1) hands_came(done);                                                      \
    }

/* ---- RMSNorm ---------------------------------------------------------------------------------- */

#define RMS(NAME, T, LOAD, SOME, WIDE, ROUND, NARROW)                                             \
    INLINE void NAME(const Norm *n, int64_t row, float eps) {                                    \
        int64_t D = n->D;                                                                        \
        const T *x = (const T *)n->x + row * D, *weight = (const T *)n->weight;                  \
        T *out = (T *)n->out + row * D;                                                          \
        if (n->delta) {                                                                          \
            const T *delta = (const T *)n->delta + row * D;                                      \
            T *both = (T *)n->sum + row * D;                                                     \
            for (int64_t d = 0; d < D; d++) both[d] = NARROW(WIDE(x[d]) + WIDE(delta[d]));       \
            x = both;                                                                            \
        }                                                                                        \
        f16 acc[4] = {0};                                                                        \
        int64_t d = 0;                                                                           \
        for (; d + 64 <= D; d += 64)                                                             \
            for (int i = 0; i < 4; i++) {                                                        \
                f16 v = LOAD(x + d + 16 * i);                                                    \
                acc[i] += v * v;                                                                 \
            }                                                                                    \
        for (; d < D; d += 16) {                                                                 \
            f16 v = D - d < 16 ? SOME(x + d, D - d) : LOAD(x + d);                               \
            acc[0] += v * v;                                                                     \
        }                                                                                        \
        float mean = sum((acc[0] + acc[1]) + (acc[2] + acc[3])) / (float)D;                      \
        float scale = 1.f / sqrtf(mean + eps);                                                   \
        for (d = 0; d < D; d++) out[d] = NARROW(WIDE(weight[d]) * ROUND(WIDE(x[d]) * scale));    \
    }

RMS(rms_f32, float, load_f32, some_f32, , , )
RMS(rms_bf16, bf16, load_bf16, some_bf16, widen, rounded, narrow)

EXPORT void vidlm_rms_norm(const Norm *n, float eps, int type, int threads) {
    if (type == BFLOAT16) ROWS(n->M, n->D * 8, rms_bf16(n, row, eps))
    else ROWS(n->M, n->D * 8, rms_f32(n, row, eps))
}

/* ---- rotation, and the way of keys and values into their slots --------------------------------- */

#define TURN(NAME, T, WIDE, ROUND, NARROW)                                                        \
    INLINE void NAME(const char *from, const char *cosines, const char *sines, char *to,         \
                     int64_t E) {                                                                \
        const T *x = (const T *)from, *c = (const T *)cosines, *s = (const T *)sines;            \
        T *y = (T *)to;                                                                          \
        int64_t half = E / 2;                                                                    \
        _Pragma("omp simd") for (int64_t e = 0; e < half; e++) {                                 \
            float a = WIDE(x[e]), b = WIDE(x[e + half]);                                         \
            y[e] = NARROW(ROUND(a * WIDE(c[e])) + ROUND(-b * WIDE(s[e])));                       \
            y[e + half] = NARROW(ROUND(b * WIDE(c[e + half])) + ROUND(a * WIDE(s[e + half])));   \
        }                                                                                        \
    }

TURN(turn_f32, float, , , )
TURN(turn_bf16, bf16, widen, rounded, narrow)

INLINE void turn(const char *x, const char *c, const char *s, char *y, int64_t E, int type) {
    if (!c) memcpy(y, x, E * (type == BFLOAT16 ? 2 : 4));
    else if (type == BFLOAT16) turn_bf16(x, c, s, y, E);
    else turn_f32(x, c, s, y, E);
}

/* All heads of one token. */
static void heads(const Heads *h, int64_t row, int64_t size, int type) {
    const char *c = h->cos ? h->cos + row * size : 0, *s = h->cos ? h->sin + row * size : 0;
    if (h->out)
        for (int64_t i = row * h->H; i < (row + 1) * h->H; i++)
            turn(h->q + i * size, c, s, h->out + i * size, h->E, type);
    if (h->k)
        for (int64_t i = 0; i < h->K; i++) {
            int64_t from = (row * h->K + i) * size, to = (i * h->N + h->slots[row]) * size;
            turn(h->k + from, c, s, h->keys + to, h->E, type);
            memcpy(h->values + to, h->v + from, size);
        }
}

EXPORT void vidlm_heads(const Heads *h, int type, int threads) {
    int64_t size = h->E * (type == BFLOAT16 ? 2 : 4);
    ROWS(h->T, size * (h->H + 2 * h->K), heads(h, row, size, type))
}

/* ---- activations -------------------------------------------------------------------------------- */

/* tanh(u) = 1 - 2 / (1 + e^(2u)); added to 1 it loses the digits that the plain form loses. */
INLINE float gelu_tanh(float x) {
    float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.f + (1.f - 2.f / (1.f + expf_(2.f * u))));
}

#define ACTIVATION(NAME, T, EXPRESSION)                                     \
    static void NAME(const T *x, const T *other, T *y, int64_t n) {         \
        (void)other;                                                        \
        _Pragma("omp simd") for (int64_t i = 0; i < n; i++) y[i] = EXPRESSION; \
    }

ACTIVATION(gelu_tanh_f32, float, gelu_tanh(x[i]))
ACTIVATION(gelu_tanh_bf16, bf16, narrow(gelu_tanh(widen(x[i]))))
ACTIVATION(quick_gelu_f32, float, x[i] * (1.f / (1.f + expf_(-(1.702f * x[i])))))
ACTIVATION(quick_gelu_bf16, bf16,
           narrow(widen(x[i]) * rounded(1.f / (1.f + expf_(-rounded(1.702f * widen(x[i])))))))
ACTIVATION(silu_mul_f32, float, x[i] / (1.f + expf_(-x[i])) * other[i])
ACTIVATION(silu_mul_bf16, bf16,
           narrow(rounded(widen(x[i]) / (1.f + expf_(-widen(x[i])))) * widen(other[i])))

/* y = act(x), or act(x) * other; y may be x. The last few numbers go through the same code as all
 * others, so that a row's result does not depend on how many rows there are. */
#define APPLY(T, KERNEL)                                                     \
    {                                                                        \
        const T *a = (const T *)x + from, *b = other ? (const T *)other + from : 0; \
        T *to = (T *)y + from;                                               \
        int64_t whole = n / 16 * 16, rest = n - whole;                       \
        KERNEL(a, b, to, whole);                                             \
        if (rest) {                                                          \
            T one[16] = {0}, two[16] = {0};                                  \
            memcpy(one, a + whole, rest * sizeof(T));                        \
            if (b) memcpy(two, b + whole, rest * sizeof(T));                 \
            KERNEL(one, two, one, 16);                                       \
            memcpy(to + whole, one, rest * sizeof(T));                       \
        }                                                                    \
    }

static void activate(int kind, const char *x, const char *other, char *y, int64_t from, int64_t n,
                     int type) {
    switch (kind * 2 + type) {
        case GELU_TANH * 2 + FLOAT32: APPLY(float, gelu_tanh_f32) break;
        case GELU_TANH * 2 + BFLOAT16: APPLY(bf16, gelu_tanh_bf16) break;
        case QUICK_GELU * 2 + FLOAT32: APPLY(float, quick_gelu_f32) break;
        case QUICK_GELU * 2 + BFLOAT16: APPLY(bf16, quick_gelu_bf16) break;
        case SILU_MUL * 2 + FLOAT32: APPLY(float, silu_mul_f32) break;
        case SILU_MUL * 2 + BFLOAT16: APPLY(bf16, silu_mul_bf16) break;
    }
}

EXPORT void vidlm_activation(int kind, const char *x, const char *other, char *y, int64_t count,
                             int type, int threads) {
    enum { STRETCH = 4096 };
    int64_t stretches = (count + STRETCH - 1) / STRETCH;
    ROWS(stretches, STRETCH * 4,
         activate(kind, x, other, y, row * STRETCH, least(STRETCH, count - row * STRETCH), type))
}
