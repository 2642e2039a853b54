/* One new token of each of B sequences attends to all tokens of its sequence so far.
 *
 * Keys and values (K, N, E) lie in blocks of slots anywhere among the N; a table names the blocks
 * of each sequence in their order. A piece of work is a kv head and a span of tokens, for all
 * sequences one after the other: what they share is read from memory once. What a span gives
 * (largest score, sum, weighted values) depends on its tokens alone, and spans are merged in their
 * order, so neither the place of blocks nor B nor the number of threads changes a bit.
 */
#include "crew.h"
#include "jobs.h"
#include "spans.h"

typedef struct { /* a span of a sequence, as a kv head sees it */
    int64_t item, sequence, n;
    const char *keys[SPAN], *values[SPAN];
    float key_scales[SPAN], value_scales[SPAN];
} Span;

typedef struct { /* what a thread goes through */
    const Decode *d;
    int kind; /* of keys and values */
    int64_t *next, items, spans;
} Walk;

static void find_rows(const Walk *walk, Span *span) {
    const Decode *d = walk->d;
    int64_t size = walk->kind == CODED ? 1 : walk->kind == BFLOAT16 ? 2 : 4, each = d->E * size;
    int64_t head = span->item / walk->spans, first = span->item % walk->spans * SPAN;
    const int32_t *table = d->tables + span->sequence * d->W + first / d->block;
    span->n = least(d->lengths[span->sequence] - first, SPAN);
    for (int64_t t = 0, inside = first % d->block; t < span->n; inside = 0, table++) {
        int64_t slot = head * d->N + *table * d->block + inside;
        for (int64_t end = least(span->n, t + d->block - inside); t < end; t++, slot++) {
            span->keys[t] = d->keys + slot * each;
            span->values[t] = d->values + slot * each;
            if (walk->kind != CODED) continue;
            span->key_scales[t] = d->key_scales[slot];
            span->value_scales[t] = d->value_scales[slot];
        }
    }
}

/* The span behind one, or the first of `item`; whether there is one. */
static int follow(const Walk *walk, int64_t item, int64_t sequence, Span *span) {
    for (; item < walk->items; item = take(walk->next), sequence = 0)
        for (; sequence < walk->d->B; sequence++)
            if (walk->d->lengths[sequence] > item % walk->spans * SPAN) {
                span->item = item;
                span->sequence = sequence;
                find_rows(walk, span);
                return 1;
            }
    return 0;
}

/* Scores become e^(score - largest); n is filled up to a multiple of 16. */
static void exponentials(float *s, int64_t n, float scale, float *largest, float *total) {
    int64_t whole = (n + 15) / 16 * 16;
    for (int64_t t = n; t < whole; t++) s[t] = -INFINITY;
    f16 top = load_f32(s) * scale, part = {0};
    for (int64_t t = 16; t < whole; t += 16) {
        f16 x = load_f32(s + t) * scale;
        u16 more = (u16)(x > top);
        top = (f16)((more & (u16)x) | (~more & (u16)top));
    }
    float most = top[0];
    for (int i = 1; i < 16; i++) most = top[i] > most ? top[i] : most;
    for (int64_t t = 0; t < whole; t += 16)
        for (int i = 0; i < 16; i++) s[t + i] = expf_(s[t + i] * scale - most);
    for (int64_t t = n; t < whole; t++) s[t] = 0;
    for (int64_t t = 0; t < whole; t += 16) part += load_f32(s + t);
    *largest = most;
    *total = sum(part);
}

/* A query (E) as float32, in the order in which `sixteen` reads rows, and zeros behind it. */
static void spread(int type, int kind, const char *q, int64_t E, float *out) {
    for (int64_t e = 0; e < 16 * sixteens(kind, E); e++) {
        int64_t from = kind == BFLOAT16 ? e / 32 * 32 + e % 16 * 2 + e / 16 % 2 : e;
        if (from >= E) out[e] = 0;
        else out[e] = type == BFLOAT16 ? widen(((const bf16 *)q)[from]) : ((const float *)q)[from];
    }
}

/* What a span gives; `next`, if there is one, is asked for meanwhile. */
static void attend(const Walk *walk, int type, const Span *span, const Span *next) {
    const Decode *d = walk->d;
    int kind = walk->kind;
    int64_t E = d->E, G = d->H / d->K, stride = d->spans * (E + 2), n = span->n;
    int64_t size = type == BFLOAT16 ? 2 : 4, head = span->item / walk->spans;
    float p[4][SPAN], q[4][WIDEST], scale = 1.f / sqrtf((float)E);
    for (int64_t g = 0, many; g < G; g += many) {
        many = kind == FLOAT32 ? 1 : least(G - g, 4);
        int64_t row = span->sequence * d->H + head * G + g, more = next && !g ? next->n : 0;
        Rows values = g ? 0 : span->values, keys = more ? next->keys : 0;
        float *out = d->scratch + row * stride + span->item % walk->spans * (E + 2);
        for (int64_t i = 0; i < many; i++) spread(type, kind, d->q + (row + i) * E * size, E, q[i]);
        if (kind == FLOAT32) scores_f32(q[0], span->keys, n, E, p[0]);
        else if (kind == BFLOAT16) scores_bf16(many, q, span->keys, values, n, E, p);
        else scores_codes(many, q, span->keys, values, n, E, p);
        for (int64_t i = 0; i < many; i++) {
            float *end = out + i * stride + E;
            if (kind == CODED)
                for (int64_t t = 0; t < n; t++) p[i][t] *= span->key_scales[t];
            exponentials(p[i], n, scale, end, end + 1);
            if (kind == CODED)
                for (int64_t t = 0; t < n; t++) p[i][t] *= span->value_scales[t];
        }
        if (kind == FLOAT32) weigh_f32(p[0], span->values, n, E, out);
        else if (kind == BFLOAT16) weigh_bf16(many, p, span->values, n, E, keys, more, out, stride);
        else weigh_codes(many, p, span->values, n, E, keys, more, out, stride);
    }
}

static void go_through(const Walk *walk, int type) {
    Span both[2];
    int any = follow(walk, take(walk->next), 0, both);
    for (int i = 0; any; i = !i) {
        any = follow(walk, both[i].item, both[i].sequence + 1, &both[!i]);
        attend(walk, type, &both[i], any ? &both[!i] : 0);
    }
}

/* The spans of one query head of one sequence, in their order. */
static void merge(const Decode *d, int type, int64_t row) {
    int64_t E = d->E, count = (d->lengths[row / d->H] + SPAN - 1) / SPAN;
    const float *part = d->scratch + row * d->spans * (E + 2);
    float most = -INFINITY, total = 0, acc[WIDEST] = {0};
    for (int64_t i = 0; i < count; i++) {
        float top = part[i * (E + 2) + E];
        most = top > most ? top : most;
    }
    for (int64_t i = 0; i < count; i++, part += E + 2) {
        float factor = expf_(part[E] - most);
        total += factor * part[E + 1];
        for (int64_t e = 0; e < E; e++) acc[e] += factor * part[e];
    }
    for (int64_t e = 0; e < E; e++)
        if (type == BFLOAT16)
            ((bf16 *)d->out)[row * E + e] = narrow(acc[e] / total);
        else
            ((float *)d->out)[row * E + e] = acc[e] / total;
}

EXPORT int vidlm_decode_attention(const Decode *d, int type, int threads) {
    if (!tables_inside(d->tables, d->lengths, d->B, d->W, d->block, d->N)) return OUTSIDE;
    int64_t next = 0, merged = 0, longest = 0, done = 0;
    threads = hands(threads);
    for (int64_t b = 0; b < d->B; b++)
        longest = d->lengths[b] > longest ? d->lengths[b] : longest;
    int64_t spans = (longest + SPAN - 1) / SPAN, rows = d->B * d->H;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Walk walk = {d, d->key_scales ? CODED : type, &next, spans * d->K, spans};
        go_through(&walk, type);
        if (!omp_get_thread_num()) done = work_done();
#pragma omp barrier
        for (int64_t i; (i = take(&merged)) < rows;) merge(d, type, i);
    }
    if (threads > 1) hands_came(done);
    return DONE;
}
