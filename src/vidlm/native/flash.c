/* Attention of many queries by the matrix unit of newer Xeons (AMX), in bfloat16.
 *
 * Everything is kept the other way round, queries side by side in the lanes of a register: scores
 * are K Q^T and what is found is V^T P^T. So the largest score and the sum of a query, which run over
 * keys, are taken lane by lane, and the exponentials of two keys are the pair that the next product
 * takes. Keys are read as they lie; V^T is laid out once for each head, Q^T once for each 32 queries.
 * Softmax over blocks of keys in float32, as in Online softmax (Milakov and Gimelshein, arXiv
 * 1805.02867), but scores are first taken relative to the largest of the first block alone: any
 * number near the largest does, and only where a later score is so much larger that a sum leaves
 * float32's range is that query done again with the largest kept up to date.
 */
#include <stdlib.h>

#include "tiles.h"

typedef struct { /* strides in numbers; a head's E numbers lie side by side */
    const bf16 *q, *keys, *values;
    bf16 *out;
    int64_t B, n, S, H, K, E, causal;
    int64_t q_batch, q_token, q_head;
    int64_t k_batch, k_token, k_head;
    int64_t v_batch, v_token, v_head;
    int64_t o_batch, o_token, o_head;
    int64_t parts; /* how many pieces of work the queries of a group of heads are */
    const int32_t *table; /* NULL, or the blocks of keys and values in which the tokens lie */
    int64_t block;        /* tokens of a block, a multiple of 16 */
    int64_t done;         /* set to 1 where this machine can */
} Flash;

#if TILES
#define HIDDEN -1e30f /* far below every score, and finite: the first key is seen by all queries */
#define LARGE 1e30f
enum { ROWS = 32, KEYS = 64, MOST = 256 }; /* queries and keys of a block; the widest head */

/* What one thread works in, for one group of heads. */
typedef struct {
    bf16 *keys, *values; /* (S16, width) or as they lie; V^T (tall, S32) */
    int64_t stride, width, tall, S32;
    const int32_t *table; /* where keys lie in blocks */
    bf16 *tail; /* the last keys, filled up to 16 with zeros */
} Room;

/* Where token s of a sequence is. */
INLINE int64_t place(const Flash *f, const int32_t *table, int64_t s) {
    return table ? table[s / f->block] * f->block + s % f->block : s;
}

/* V (S, E) -> V^T, 32 keys after the other: (S32 / 32, tall, 32), zeros around it. */
static void lay_values(const Flash *f, const bf16 *v, Room *room) {
    bf16 *at = room->values;
    for (int64_t s = 0; s < room->S32; s += 32)
        for (int64_t e = 0; e < room->tall; e += 16, at += 512) {
            __mmask16 mask = (__mmask16)((1u << least(16, f->E - e)) - 1);
            __m512i r[16];
            for (int64_t i = 0; i < 16; i++) { /* two keys -> pairs of their numbers */
                int64_t here = f->S - (s + 2 * i);
                const bf16 *row = v + (here > 0 ? place(f, f->table, s + 2 * i) : 0) * f->v_token + e;
                __m256i one = _mm256_maskz_loadu_epi16(here > 0 ? mask : 0, row);
                __m256i two = _mm256_maskz_loadu_epi16(here > 1 ? mask : 0, row + f->v_token);
                r[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(one),
                                       _mm512_slli_epi32(_mm512_cvtepu16_epi32(two), 16));
            }
            turn_pairs(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(at + 32 * i, r[i]);
        }
}

/* Keys as they lie where a head is whole tiles wide, else filled up with zeros; and the tail. */
static void lay_keys(const Flash *f, const bf16 *k, Room *room, bf16 *own) {
    int64_t whole = f->S / 16 * 16;
    room->keys = (bf16 *)k;
    room->stride = f->k_token;
    room->table = f->table;
    if (f->E != room->width) {
        room->keys = own;
        room->stride = room->width;
        room->table = 0;
        for (int64_t s = 0; s < whole; s++) {
            memcpy(own + s * room->width, k + place(f, f->table, s) * f->k_token, f->E * 2);
            memset(own + s * room->width + f->E, 0, (room->width - f->E) * 2);
        }
    }
    memset(room->tail, 0, 16 * room->width * 2);
    for (int64_t s = whole; s < f->S; s++)
        memcpy(room->tail + (s - whole) * room->width, k + place(f, f->table, s) * f->k_token,
               f->E * 2);
}

/* Up to 32 queries -> Q^T: for each step of 32 numbers and each half of the queries, 16 pairs by 16
 * queries. */
static void lay_queries(const Flash *f, const bf16 *q, int64_t rows, int64_t width, bf16 *out) {
    for (int64_t k = 0; k < width; k += 32)
        for (int64_t h = 0; h < 2; h++, out += 512) {
            __mmask32 mask = (__mmask32)((1ull << least(32, f->E - k)) - 1);
            __m512i r[16];
            for (int64_t i = 0; i < 16; i++) {
                int64_t row = 16 * h + i;
                r[i] = _mm512_maskz_loadu_epi16(row < rows ? mask : 0, q + row * f->q_token + k);
            }
            turn_pairs(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + 32 * i, r[i]);
        }
}

/* What was found (tall, 32) over its sums -> rows of out. */
static void give(const Flash *f, const float *found, const __m512 *total, int64_t rows, bf16 *out) {
    __m512 over[2];
    for (int h = 0; h < 2; h++) over[h] = _mm512_div_ps(_mm512_set1_ps(1.f), total[h]);
    for (int64_t e = 0; e < f->E; e += 16)
        for (int64_t h = 0; h < 2; h++) {
            __mmask16 mask = (__mmask16)((1u << least(16, f->E - e)) - 1);
            const float *at = found + e * ROWS + 16 * h;
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = (__m512i)_mm512_mul_ps(_mm512_loadu_ps(at + i * ROWS), over[h]);
            turn_pairs(r);
            for (int64_t i = 0; i < 16 && 16 * h + i < rows; i++)
                _mm256_mask_storeu_epi16(out + (16 * h + i) * f->o_token + e, mask,
                                         (__m256i)_mm512_cvtneps_pbh((__m512)r[i]));
        }
}

INLINE const bf16 *key_tile(const Flash *f, const Room *room, int64_t s, int64_t *stride) {
    int inside = s + 16 <= f->S;
    *stride = (inside ? room->stride : room->width) * 2;
    return inside ? room->keys + place(f, room->table, s) * room->stride : room->tail;
}

/* Scores (keys, 32) of keys [from, from + 32 * pairs). */
static void score(const Flash *f, const Room *room, const bf16 *q, int64_t from, int64_t pairs,
                  float *scores) {
    for (int64_t i = 0; i < pairs; i++) {
        int64_t first, second, s = from + 32 * i;
        const bf16 *a = key_tile(f, room, s, &first);
        /* Where these keys are all beyond the end, any will do: they are hidden afterwards. */
        const bf16 *b = s + 16 < f->S ? key_tile(f, room, s + 16, &second) : (second = first, a);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < room->width; k += 32) {
            _tile_loadd(4, a + k, first);
            _tile_loadd(6, q + k * ROWS, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, q + k * ROWS + 512, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, b + k, second);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        float *out = scores + i * 32 * ROWS;
        _tile_stored(0, out, ROWS * 4);
        _tile_stored(1, out + 16, ROWS * 4);
        _tile_stored(2, out + 16 * ROWS, ROWS * 4);
        _tile_stored(3, out + 16 * ROWS + 16, ROWS * 4);
    }
}

/* What was found so far (tall, 32) += V^T P^T over keys [from, from + 32 * steps). */
static void find(const Room *room, const bf16 *p, int64_t from, int64_t steps, float *found) {
    for (int64_t e = 0; e < room->tall; e += 32) {
        int two = e + 16 < room->tall;
        float *at = found + e * ROWS, *below = at + 16 * ROWS;
        _tile_loadd(0, at, ROWS * 4);
        _tile_loadd(1, at + 16, ROWS * 4);
        if (two) {
            _tile_loadd(2, below, ROWS * 4);
            _tile_loadd(3, below + 16, ROWS * 4);
        }
        const bf16 *v = room->values + from * room->tall + e * 32;
        for (int64_t i = 0; i < steps; i++, v += 32 * room->tall) {
            _tile_loadd(4, v, 64);
            _tile_loadd(6, p + i * 1024, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, p + i * 1024 + 512, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (!two) continue;
            _tile_loadd(5, v + 16 * 32, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, at, ROWS * 4);
        _tile_stored(1, at + 16, ROWS * 4);
        if (two) {
            _tile_stored(2, below, ROWS * 4);
            _tile_stored(3, below + 16, ROWS * 4);
        }
    }
}

/* Hide keys that queries [first, first + 16) do not see: those behind them, and those that are not. */
static void hide(const Flash *f, int64_t from, int64_t count, int64_t first, float *scores) {
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t last = f->causal ? f->S - f->n + first : f->S - 1; /* the last key of the first query */
    __m512i seen = _mm512_set1_epi32((int)last);
    if (f->causal)
        seen = _mm512_min_epi32(_mm512_add_epi32(seen, lanes), _mm512_set1_epi32((int)f->S - 1));
    for (int64_t k = 0; k < count; k++) {
        __mmask16 hidden = _mm512_cmplt_epi32_mask(seen, _mm512_set1_epi32((int)(from + k)));
        if (hidden)
            _mm512_mask_storeu_ps(scores + k * ROWS, hidden, _mm512_set1_ps(HIDDEN));
    }
}

/* 2^x, to 1e-4; beyond float32 it is 0 or infinite. */
INLINE __m512 power(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, 1); /* x - floor(x) */
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.07802351f), r, _mm512_set1_ps(0.22606868f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6958329f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.9999253f));
    return _mm512_scalef_ps(p, x);
}

/* What is known of 32 queries, in two halves of 16: see the head of this file. */
typedef struct { __m512 top[2], total[2]; } Known;

INLINE __m512 largest(const float *scores, int64_t count) {
    __m512 most = _mm512_loadu_ps(scores), other = _mm512_loadu_ps(scores + ROWS);
    for (int64_t k = 2; k < count; k += 2) {
        most = _mm512_max_ps(most, _mm512_loadu_ps(scores + k * ROWS));
        other = _mm512_max_ps(other, _mm512_loadu_ps(scores + (k + 1) * ROWS));
    }
    return _mm512_max_ps(most, other);
}

/* Scores of a block -> P^T in pairs of keys; sums go on. */
INLINE void soften(const float *scores, int64_t count, __m512 scale, Known *known, bf16 *p) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 top[2] = {known->top[0], known->top[1]}, total[4];
    for (int i = 0; i < 4; i++) total[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += 2)
        for (int h = 0; h < 2; h++) {
            const float *at = scores + k * ROWS + 16 * h;
            __m512 a = power(_mm512_fmsub_ps(_mm512_loadu_ps(at), scale, top[h]));
            __m512 b = power(_mm512_fmsub_ps(_mm512_loadu_ps(at + ROWS), scale, top[h]));
            total[h] = _mm512_add_ps(total[h], a);
            total[2 + h] = _mm512_add_ps(total[2 + h], b);
            __m512i two = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            _mm512_storeu_si512(p + k / 32 * 1024 + k % 32 / 2 * 32 + 512 * h, two);
        }
    for (int h = 0; h < 2; h++)
        known->total[h] =
            _mm512_add_ps(known->total[h], _mm512_add_ps(total[h], total[2 + h]));
}

/* Scores of a block are at hand: the largest so far, and what was found before in its terms. */
static void raise(const Flash *f, const float *scores, int64_t count, __m512 scale, Known *known,
                  float *found) {
    for (int h = 0; h < 2; h++) {
        __m512 top = _mm512_mul_ps(largest(scores + 16 * h, count), scale);
        top = _mm512_max_ps(known->top[h], top);
        __m512 factor = power(_mm512_sub_ps(known->top[h], top));
        known->top[h] = top;
        known->total[h] = _mm512_mul_ps(known->total[h], factor);
        for (float *at = found + 16 * h; at < found + f->E * ROWS; at += ROWS)
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), factor));
    }
}

/* Queries [first, first + 32) of one head over all keys they see -> sums (tall, 32). `often`: the
 * largest score is kept up to date. */
static Known sums(const Flash *f, const Room *room, const bf16 *turned, int64_t first, int64_t end,
                  int often, float *found) {
    float scores[KEYS * ROWS] __attribute__((aligned(64)));
    bf16 p[KEYS * ROWS] __attribute__((aligned(64)));
    __m512 scale = _mm512_set1_ps(1.44269504f / sqrtf((float)f->E));
    Known known;
    for (int h = 0; h < 2; h++) {
        known.top[h] = _mm512_set1_ps(HIDDEN);
        known.total[h] = _mm512_setzero_ps();
    }
    memset(found, 0, room->tall * ROWS * 4);
    for (int64_t from = 0; from < end; from += KEYS) {
        int64_t pairs = (least(end - from, KEYS) + 31) / 32, count = 32 * pairs;
        score(f, room, turned, from, pairs, scores);
        for (int h = 0; h < 2; h++) {
            int64_t seen = f->causal ? f->S - f->n + first + 16 * h : f->S - 1;
            if (from + count - 1 > seen) hide(f, from, count, first + 16 * h, scores + 16 * h);
        }
        if (often || !from) raise(f, scores, count, scale, &known, found);
        soften(scores, count, scale, &known, p);
        find(room, p, from, pairs, found);
    }
    return known;
}

/* Lanes whose sum has left the range in which everything is as good as exact, or is no number. */
INLINE __mmask16 beyond(__m512 total) {
    return _mm512_cmp_ps_mask(total, _mm512_set1_ps(LARGE), _CMP_NLT_UQ);
}

/* Queries [first, first + rows) of one head. */
static void block(const Flash *f, const Room *room, const bf16 *q, bf16 *out, int64_t first,
                  int64_t rows) {
    float found[MOST * ROWS] __attribute__((aligned(64)));
    float again[MOST * ROWS] __attribute__((aligned(64)));
    bf16 turned[MOST * ROWS] __attribute__((aligned(64)));
    int64_t end = f->causal ? least(f->S, f->S - f->n + first + rows) : f->S;
    lay_queries(f, q + first * f->q_token, rows, room->width, turned);
    Known known = sums(f, room, turned, first, end, 0, found);
    __mmask16 wrong[2] = {beyond(known.total[0]), beyond(known.total[1])};
    if (wrong[0] | wrong[1]) { /* each query by itself, so that its neighbours change no bit of it */
        Known better = sums(f, room, turned, first, end, 1, again);
        for (int h = 0; h < 2; h++) {
            known.total[h] = _mm512_mask_mov_ps(known.total[h], wrong[h], better.total[h]);
            for (int64_t i = 16 * h; i < f->E * ROWS; i += ROWS)
                _mm512_mask_storeu_ps(found + i, wrong[h], _mm512_loadu_ps(again + i));
        }
    }
    give(f, found, known.total, rows, out + first * f->o_token);
}

static void group(const Flash *f, Room *room, bf16 *own, int64_t index) {
    int64_t G = f->H / f->K, part = index % f->parts, rest = index / f->parts;
    int64_t head = rest % f->K, b = rest / f->K;
    int64_t blocks = (f->n + ROWS - 1) / ROWS;
    /* The last queries see most and come first. */
    int64_t stop = blocks - blocks * part / f->parts, start = blocks - blocks * (part + 1) / f->parts;
    if (start == stop) return;
    lay_keys(f, f->keys + b * f->k_batch + head * f->k_head, room, own);
    lay_values(f, f->values + b * f->v_batch + head * f->v_head, room);
    for (int64_t g = head * G; g < (head + 1) * G; g++)
        for (int64_t i = start; i < stop; i++)
            block(f, room, f->q + b * f->q_batch + g * f->q_head,
                  f->out + b * f->o_batch + g * f->o_head, i * ROWS, least(ROWS, f->n - i * ROWS));
}
#endif

EXPORT void vidlm_flash(Flash *f, int threads) {
    f->done = 0;
#if TILES
    if (f->E > MOST || f->E % 2 || !tiles_allowed()) return;
    int64_t next = 0, items = f->B * f->K * f->parts;
    int64_t width = (f->E + 31) / 32 * 32, tall = (f->E + 15) / 16 * 16;
    int64_t S32 = (f->S + 31) / 32 * 32;
    size_t keys = f->E == width ? 0 : f->S * width, values = tall * S32, tail = 16 * width;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        bf16 *memory = aligned_alloc(64, (values + tail + keys + 31) / 32 * 64);
        if (memory) {
            Room room = {.values = memory, .tail = memory + values, .width = width, .tall = tall,
                         .S32 = S32};
            unsigned control = _mm_getcsr(); /* numbers next to nothing are nothing, and take no time */
            _mm_setcsr(control | _MM_FLUSH_ZERO_ON);
            shape_tiles(16, 16);
            for (int64_t i; (i = take(&next)) < items;) group(f, &room, memory + values + tail, i);
            _tile_release();
            _mm_setcsr(control);
            free(memory);
        }
    }
    f->done = next >= items; /* a thread without memory leaves its share to the others */
#endif
}

/* Whether vidlm_flash runs: not compiled for this processor, not allowed by the system, or yes. */
EXPORT int vidlm_flash_state(void) {
    enum { NOT_COMPILED, NOT_ALLOWED, RUNS };
#if TILES
    return tiles_allowed() ? RUNS : NOT_ALLOWED;
#else
    return NOT_COMPILED;
#endif
}
