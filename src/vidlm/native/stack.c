/* A whole stack of decoder layers for one new token each of a few sequences, in one call.
 *
 * The kernels are those that Python would call one by one, in the same order and with the same
 * roundings; what is saved is everything between them, which a small model feels.
 */
#include "jobs.h"

typedef struct { /* weights of a layer, and where its keys and values are */
    Weight q, k, v, o, gate, up, down;
    const char *q_bias, *k_bias, *v_bias, *norm, *after;
    char *keys, *values;    /* as Heads and Decode take them */
    float *key_scales, *value_scales;
} Layer;

typedef struct {
    const Layer *layers;
    const char *last;       /* weight of the norm behind the last layer, (D) */
    char *x, *out;          /* (M, D), which is written over; (M, D) */
    const char *cos, *sin;  /* (M, E) */
    const int64_t *slots;   /* (M) */
    const int32_t *tables, *lengths;
    char *room;             /* for what passes between kernels; see below */
    float *scratch;         /* as Decode takes it */
    int64_t count, M, D, I, H, K, E, N, W, block, spans, threads, share;
} Stack;

/* Threads for work that reads so many bytes. */
static int crew(const Stack *s, int64_t bytes) {
    int64_t most = bytes / s->share;
    return (int)(most < 1 ? 1 : least(most, s->threads));
}

EXPORT int vidlm_stack(const Stack *s, float eps, int type) {
    if (!slots_inside(s->slots, s->M, s->N)) return OUTSIDE;
    if (!tables_inside(s->tables, s->lengths, s->M, s->W, s->block, s->N)) return OUTSIDE;
    int64_t size = type == BFLOAT16 ? 2 : 4, M = s->M, D = s->D, I = s->I, E = s->E;
    int64_t wide = s->H * E, narrow_ = s->K * E;
    char *normed = s->room, *q = normed + M * D * size, *k = q + M * wide * size;
    char *v = k + M * narrow_ * size, *turned = v + M * narrow_ * size;
    char *found = turned + M * wide * size, *gate = found + M * wide * size;
    char *up = gate + M * I * size, *delta = up + M * I * size;
    for (int64_t i = 0; i <= s->count; i++) {
        const Layer *layer = s->layers + i;
        int last = i == s->count;
        Norm norm = {s->x, i ? delta : 0, last ? s->last : layer->norm, s->x,
                     last ? s->out : normed, M, D};
        vidlm_rms_norm(&norm, eps, type, crew(s, 4 * M * D * size));
        if (last) break;

        Part qkv[3] = {{layer->q, layer->q_bias, q, wide},
                       {layer->k, layer->k_bias, k, narrow_},
                       {layer->v, layer->v_bias, v, narrow_}};
        if (!vidlm_linears(qkv, 3, normed, M, D, type, crew(s, (wide + 2 * narrow_) * D * size))) return NO_MEMORY;
        Heads heads = {q, k, v, s->cos, s->sin, turned, layer->keys, layer->values,
                       layer->key_scales, layer->value_scales, s->slots, M, s->H, s->K, E, s->N};
        vidlm_heads(&heads, type, crew(s, (2 * wide + 4 * narrow_) * M * size));
        Decode attend = {turned, layer->keys, layer->values, layer->key_scales, layer->value_scales,
                         s->tables, s->lengths, found, s->scratch, M, s->H, s->K, E, s->N, s->W,
                         s->block, s->spans};
        int64_t each = layer->key_scales ? 1 : size;
        vidlm_decode_attention(&attend, type, crew(s, 2 * M * s->W * s->block * narrow_ * each));
        Part o = {layer->o, 0, delta, D};
        if (!vidlm_linears(&o, 1, found, M, wide, type, crew(s, wide * D * size))) return NO_MEMORY;

        Norm after = {s->x, delta, layer->after, s->x, normed, M, D};
        vidlm_rms_norm(&after, eps, type, crew(s, 4 * M * D * size));
        Part both[2] = {{layer->gate, 0, gate, I}, {layer->up, 0, up, I}};
        if (!vidlm_linears(both, 2, normed, M, D, type, crew(s, 2 * I * D * size))) return NO_MEMORY;
        vidlm_activation(SILU_MUL, gate, up, gate, M * I, type, crew(s, 3 * M * I * size));
        Part down = {layer->down, 0, delta, D};
        if (!vidlm_linears(&down, 1, gate, M, I, type, crew(s, I * D * size))) return NO_MEMORY;
    }
    return DONE;
}
