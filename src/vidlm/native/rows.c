/* What is done to each row by itself, in one pass over memory: norms, rotation, storing. Where plain
 * torch rounds a result to bfloat16 before the next step, so does this. */
#include "crew.h"
#include "jobs.h"

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

/* A row as int8: the largest number becomes 127 or -127, and what one is worth is returned. Numbers
 * are compared as bits, in whose order NaN is above all: its row is worth NaN. */
#define ENCODE(NAME, T, BITS, WIDE)                                                              \
    INLINE float NAME(const T *x, int8_t *to, int64_t E) {                                       \
        uint32_t top = 0;                                                                        \
        _Pragma("omp simd reduction(max : top)") for (int64_t e = 0; e < E; e++) {               \
            uint32_t bits = BITS(x[e]) & 0x7fffffff;                                             \
            top = bits > top ? bits : top;                                                       \
        }                                                                                        \
        float most = number_of(top);                                                             \
        float scale = (most < 1e-30f ? 1e-30f : most) * (1.f / 127), inverse = 1.f / scale;      \
        _Pragma("omp simd") for (int64_t e = 0; e < E; e++) {                                    \
            float code = rintf(WIDE(x[e]) * inverse);                                            \
            to[e] = (int8_t)(int32_t)(code == code ? code : 0.f);                                \
        }                                                                                        \
        return scale;                                                                            \
    }

INLINE float number_of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t bits_f32(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
INLINE uint32_t bits_bf16(bf16 x) { return (uint32_t)x << 16; }

ENCODE(encode_f32, float, bits_f32, )
ENCODE(encode_bf16, bf16, bits_bf16, widen)

INLINE float encode(const char *x, int8_t *to, int64_t E, int type) {
    return type == BFLOAT16 ? encode_bf16((const bf16 *)x, to, E)
                            : encode_f32((const float *)x, to, E);
}

/* All heads of one token. */
static void heads(const Heads *h, int64_t row, int64_t size, int type) {
    const char *c = h->cos ? h->cos + row * size : 0, *s = h->cos ? h->sin + row * size : 0;
    if (h->out)
        for (int64_t i = row * h->H; i < (row + 1) * h->H; i++)
            turn(h->q + i * size, c, s, h->out + i * size, h->E, type);
    if (h->k)
        for (int64_t i = 0; i < h->K; i++) {
            int64_t from = (row * h->K + i) * size, slot = i * h->N + h->slots[row];
            if (h->key_scales) {
                float turned[CODED_MOST];
                int8_t *keys = (int8_t *)h->keys, *values = (int8_t *)h->values;
                const char *k = c ? (char *)turned : h->k + from;
                if (c) turn(h->k + from, c, s, (char *)turned, h->E, type);
                h->key_scales[slot] = encode(k, keys + slot * h->E, h->E, type);
                h->value_scales[slot] = encode(h->v + from, values + slot * h->E, h->E, type);
                continue;
            }
            turn(h->k + from, c, s, h->keys + slot * size, h->E, type);
            memcpy(h->values + slot * size, h->v + from, size);
        }
}

EXPORT int vidlm_heads(const Heads *h, int type, int threads) {
    if (h->k && !slots_inside(h->slots, h->T, h->N)) return OUTSIDE;
    int64_t size = h->E * (type == BFLOAT16 ? 2 : 4);
    ROWS(h->T, size * (h->H + 2 * h->K), heads(h, row, size, type))
    return DONE;
}

/* ---- numbers of what is stored as int8 ----------------------------------------------------------- */

#define DECODE(NAME, T, NARROW)                                                                  \
    INLINE void NAME(const int8_t *codes, float scale, T *out, int64_t E) {                      \
        _Pragma("omp simd") for (int64_t e = 0; e < E; e++) out[e] = NARROW((float)codes[e] * scale); \
    }

DECODE(decode_f32, float, )
DECODE(decode_bf16, bf16, narrow)

enum { TOKENS = 64 }; /* tokens of a head that are decoded one behind the other */

static void decoded(const Codes *c, int64_t stretch, int64_t each, int type) {
    int64_t head = stretch / each, from = stretch % each * TOKENS;
    for (int64_t s = from; s < least(from + TOKENS, c->S); s++) {
        int64_t slot = head * c->N + (c->slots ? c->slots[s] : c->start + s), to = (head * c->S + s) * c->E;
        const int8_t *codes = c->codes + slot * c->E;
        if (type == BFLOAT16) decode_bf16(codes, c->scales[slot], (bf16 *)c->out + to, c->E);
        else decode_f32(codes, c->scales[slot], (float *)c->out + to, c->E);
    }
}

EXPORT int vidlm_decoded(const Codes *c, int type, int threads) {
    if (c->slots && !slots_inside(c->slots, c->S, c->N)) return OUTSIDE;
    int64_t each = (c->S + TOKENS - 1) / TOKENS;
    ROWS(c->K * each, TOKENS * c->E * (type == BFLOAT16 ? 3 : 5), decoded(c, row, each, type))
    return DONE;
}
