/* What the kernels are told, in the order in which Python packs it, and their names. */
#pragma once
#include "lanes.h"

typedef struct { /* (rows, D) numbers, or packed as packed.h says */
    const char *data;
    int64_t form; /* DENSE, or of packed.h; the rest is for those */
    const char *scale;
    const float *table;
    int64_t group, scale_type;
} Weight;

typedef struct { /* one weight matrix; the same x goes through all of a call */
    Weight weight;
    const char *bias; /* (rows) or NULL */
    char *out;        /* (M, rows) */
    int64_t rows;
} Part;

typedef struct {
    const char *q;          /* (B, H, E) */
    const char *keys;       /* (K, N, E), of the type of q, or int8 if there are scales */
    const char *values;     /* (K, N, E) */
    const float *key_scales, *value_scales; /* (K, N) or NULL */
    const int32_t *tables;  /* (B, W) block numbers */
    const int32_t *lengths; /* (B) tokens, the new one included */
    char *out;              /* (B, H, E) */
    float *scratch;         /* (B, H, spans, E + 2): partial values, largest score, sum */
    int64_t B, H, K, E, N, W, block, spans;
} Decode;

typedef struct {
    const char *x, *delta, *weight; /* (M, D), (M, D) or NULL, (D) */
    char *sum, *out;                /* x + delta (M, D), where there is a delta; (M, D) */
    int64_t M, D;
} Norm;

typedef struct {
    const char *q, *k, *v;  /* (T, H, E), (T, K, E), (T, K, E); k and v NULL: nothing is stored */
    const char *cos, *sin;  /* (T, E); NULL: k is stored as it is */
    char *out;              /* (T, H, E), or NULL */
    char *keys, *values;    /* (K, N, E), of the type of k, or int8 if there are scales */
    float *key_scales, *value_scales; /* (K, N) or NULL */
    const int64_t *slots;   /* (T) */
    int64_t T, H, K, E, N;
} Heads;

typedef struct {
    const int8_t *codes;    /* (K, N, E) */
    const float *scales;    /* (K, N) */
    const int64_t *slots;   /* (S), or NULL: S slots from `start` on */
    char *out;              /* (K, S, E) */
    int64_t start, S, K, E, N;
} Codes;

enum { CODED_MOST = 512 }; /* numbers in a row that is stored as int8 */

enum { GELU_TANH, QUICK_GELU, SILU_MUL };

/* What kernels answer. OUTSIDE: a slot, block or length is outside its buffer, and nothing was done;
 * NO_MEMORY: there is none to unpack weights in. */
enum { OUTSIDE = -1, NO_MEMORY = 0, DONE = 1 };

/* Whether every slot is one of N. */
INLINE int slots_inside(const int64_t *slots, int64_t count, int64_t N) {
    for (int64_t i = 0; i < count; i++)
        if (slots[i] < 0 || slots[i] >= N) return 0;
    return 1;
}

/* Whether the tokens of each of B sequences, one at least, lie in slots among N. */
INLINE int tables_inside(const int32_t *tables, const int32_t *lengths, int64_t B, int64_t W,
                         int64_t block, int64_t N) {
    for (int64_t b = 0; b < B; b++) {
        int64_t length = lengths[b];
        if (length < 1 || length > W * block) return 0;
        for (int64_t i = 0; i * block < length; i++) {
            int64_t first = tables[b * W + i] * block;
            if (first < 0 || first + least(block, length - i * block) > N) return 0;
        }
    }
    return 1;
}

EXPORT int vidlm_linears(const Part *parts, int64_t count, const void *x, int64_t M, int64_t D,
                         int type, int threads);
EXPORT int vidlm_decode_attention(const Decode *d, int type, int threads);
EXPORT void vidlm_rms_norm(const Norm *n, float eps, int type, int threads);
EXPORT int vidlm_heads(const Heads *h, int type, int threads);
EXPORT int vidlm_decoded(const Codes *c, int type, int threads);
EXPORT void vidlm_activation(int kind, const char *x, const char *other, char *y, int64_t count,
                             int type, int threads);
