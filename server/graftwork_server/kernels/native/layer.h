// A decoder layer of the Llama kind in bfloat16, adapters included, as two calls: up to attention, and from there on. Between
// them the caller attends for the tokens of prompts. Everything that a decode step does is in here.
// Functions whose name ends in _part are called by all threads of a parallel region; the caller puts the barriers.

#define LONG_SPAN 16  // rows from which a span is worth tiles
#define CHUNK 256     // columns of one work item of element-wise parts

typedef struct {
    const float *input_norm, *post_norm;  // [hidden]
    const float *q_norm, *k_norm;         // [head_dim], or null
    const bf16 *qkv, *qkv_bias, *o, *o_bias, *gate_up, *gate_up_bias, *down, *down_bias;
    int64_t hidden, heads, kv_heads, head_dim, inner;
    int64_t window;                       // tokens that attention sees, 0 for all
    int64_t qkv_group, o_group, gate_up_group, down_group;  // numbers of the linear groups, for adapters
    double eps, qk_eps, scale;
} Layer;

typedef struct {
    const int64_t *groups;  // by linear group: address of a [slots, ranks, in], ranks, address of members, how many
    const int64_t *spans;   // n_spans x {first row, rows, slot, first row in hidden}
    int64_t n_spans;
    int64_t slot_elements;  // from one slot of a, or of a member's b, to the next
    float *hidden;          // [rows of all spans, most ranks of a group]
} Spans;

typedef struct {
    int64_t rows;
    const bf16 *cos, *sin;     // [rows, head_dim]
    const int64_t *attention;  // as `step` of attend
    const Spans *spans;
    int64_t n_spans;           // how many Spans
    bf16 *packed;              // room for the largest input in blocks of tiles
    bf16 *normed, *product;    // [rows + 16, hidden], [rows, hidden]
    bf16 *gate_up, *inner;     // [rows, 2 * inner], [rows + 16, inner]
    int64_t threads;
} Step;

#include "low_rank.h"

// ------------------------------------------------------------------------------------------------------------- parts

// exp(x), relative error below 2e-7 (Cephes' polynomial); what would be smaller than floats go is nearly 0, NaN stays NaN.
static inline __m512 exp_16(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// One row: y = x / sqrt(mean(x^2) + eps) * weight.
static inline void norm_row(const bf16 *x, const float *weight, bf16 *y, int64_t size, double eps) {
    float sum = 0.0f;
    for (int64_t i = 0; i < size; i++) sum += widen(x[i]) * widen(x[i]);
    const float factor = 1.0f / sqrtf(sum / size + (float)eps);
    for (int64_t i = 0; i < size; i++) y[i] = narrow(widen(x[i]) * factor * weight[i]);
}

static void norm_part(const bf16 *x, const float *weight, bf16 *y, int64_t rows, int64_t size, double eps) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) norm_row(x + row * size, weight, y + row * size, size, eps);
}

// y = a + b, rounded.
static void add_part(const bf16 *a, const bf16 *b, bf16 *y, int64_t size) {
#pragma omp for schedule(static) nowait
    for (int64_t start = 0; start < size; start += CHUNK) {
        const int64_t end = start + CHUNK < size ? start + CHUNK : size;
        int64_t i = start;
        for (; i + 16 <= end; i += 16) narrow_16(y + i, _mm512_add_ps(widen_16(a + i), widen_16(b + i)));
        for (; i < end; i++) y[i] = narrow(widen(a[i]) + widen(b[i]));
    }
}

// y = silu(gate) * up for rows of gate and up side by side.
static void silu_mul_part(const bf16 *x, bf16 *y, int64_t rows, int64_t size) {
    const int64_t chunks = blocks_of(size, CHUNK);
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < rows * chunks; item++) {
        const int64_t row = item / chunks, start = item % chunks * CHUNK;
        const int64_t end = start + CHUNK < size ? start + CHUNK : size;
        const bf16 *gate = x + 2 * row * size, *up = gate + size;
        bf16 *target = y + row * size;
        int64_t i = start;
        for (; i + 16 <= end; i += 16) {
            const __m512 value = widen_16(gate + i);
            const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exp_16(_mm512_sub_ps(_mm512_setzero_ps(), value)));
            narrow_16(target + i, _mm512_mul_ps(_mm512_div_ps(value, below), widen_16(up + i)));
        }
        for (; i < end; i++) {
            const float value = widen(gate[i]);
            target[i] = narrow(value / (1.0f + expf(-value)) * widen(up[i]));
        }
    }
}

// x [rows, in] @ w^T + bias, and the adapters' shrinks of the same input; the tiles' input is packed first.
static void linear_part(const Step *step, int64_t group, const bf16 *x, int64_t in, const bf16 *w, const bf16 *bias,
                        bf16 *y, int64_t out) {
    if (in_tiles(out)) {
        pack_part(x, in, step->rows, in, step->packed);
#pragma omp barrier
        tile_product_part(step->packed, w, bias, y, out, step->rows, in, out);
    } else {
        vector_product_part(x, in, w, bias, y, out, step->rows, in, out);
    }
    shrink_part(step, group, x, in, in);
    if (step->n_spans) {
#pragma omp barrier
        expand_part(step, group, y, out);
    }
}

// A head of one row, turned by its position (arXiv:2104.09864, the two halves of a head as pairs), normed first if asked.
static inline void rotate(bf16 *head, const float *norm, double eps, const bf16 *cos, const bf16 *sin, int64_t dim) {
    if (norm) norm_row(head, norm, head, dim, eps);
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float low = widen(head[i]), high = widen(head[half + i]);
        head[i] = narrow(low * widen(cos[i]) - high * widen(sin[i]));
        head[half + i] = narrow(high * widen(cos[half + i]) + low * widen(sin[half + i]));
    }
}

static void rotate_part(const Layer *layer, const Step *step, bf16 *qkv) {
    const int64_t dim = layer->head_dim, heads = layer->heads + layer->kv_heads, stride = heads + layer->kv_heads;
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < step->rows * heads; item++) {
        const int64_t row = item / heads, head = item % heads;
        rotate(qkv + (row * stride + head) * dim, head < layer->heads ? layer->q_norm : layer->k_norm, layer->qk_eps,
               step->cos + row * dim, step->sin + row * dim, dim);
    }
}

// ------------------------------------------------------------------------------------------------------------- attention

#define MOST_GROUPS 8
#define MOST_DIM 256
_Static_assert(BLOCK == 16, "attend_head has a block's tokens in the 16 lanes of a vector");

// Attention of one sequence's newest token for the heads that share one head of keys; as in NAME(attend), in vectors.
// q [groups, dim], keys and values [cache rows, dim], out [groups, dim]; dim a multiple of 32, at most MOST_DIM.
static void attend_head(const bf16 *q, const bf16 *keys, const bf16 *values, const int64_t *table, int64_t length,
                        int64_t start, int64_t groups, int64_t dim, float scale, bf16 *out) {
    __m512 sums[MOST_GROUPS][MOST_DIM / 16];
    float largest[MOST_GROUPS], total[MOST_GROUPS], weights[MOST_GROUPS][BLOCK] __attribute__((aligned(64)));
    for (int64_t g = 0; g < groups; g++) {
        largest[g] = -INFINITY;
        total[g] = 0.0f;
        for (int64_t i = 0; i < dim / 16; i++) sums[g][i] = _mm512_setzero_ps();
    }
    for (int64_t block = start / BLOCK; block * BLOCK < length; block++) {
        const bf16 *key = keys + table[block] * BLOCK * dim, *value = values + table[block] * BLOCK * dim;
        const int64_t from = start > block * BLOCK ? start - block * BLOCK : 0;
        const int64_t to = length - block * BLOCK < BLOCK ? length - block * BLOCK : BLOCK;
        const __mmask16 seen = (__mmask16)(((1u << to) - 1) & ~((1u << from) - 1));
        for (int64_t g = 0; g < groups; g++) {
            __m512 parts[BLOCK];
            for (int64_t t = 0; t < BLOCK; t++) {
                parts[t] = _mm512_setzero_ps();
                for (int64_t i = 0; i < dim; i += 32)
                    parts[t] = _mm512_dpbf16_ps(parts[t], (__m512bh)_mm512_loadu_si512(q + g * dim + i),
                                                (__m512bh)_mm512_loadu_si512(key + t * dim + i));
            }
            const __m512 score = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen, sums_of_16(parts), _mm512_set1_ps(scale));
            const float block_largest = _mm512_mask_reduce_max_ps(seen, score);
            const float highest = block_largest > largest[g] ? block_largest : largest[g];
            const __m512 weight = _mm512_maskz_mov_ps(seen, exp_16(_mm512_sub_ps(score, _mm512_set1_ps(highest))));
            const float factor = largest[g] == -INFINITY ? 0.0f : expf(largest[g] - highest);
            largest[g] = highest;
            total[g] = total[g] * factor + _mm512_reduce_add_ps(weight);
            _mm512_store_ps(weights[g], weight);
            for (int64_t i = 0; i < dim / 16; i++) sums[g][i] = _mm512_mul_ps(sums[g][i], _mm512_set1_ps(factor));
        }
        for (int64_t t = from; t < to; t++)
            for (int64_t i = 0; i < dim / 16; i++) {
                const __m512 line = widen_16(value + t * dim + 16 * i);
                for (int64_t g = 0; g < groups; g++)
                    sums[g][i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[g][t]), line, sums[g][i]);
            }
    }
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < dim / 16; i++)
            narrow_16(out + g * dim + 16 * i, _mm512_div_ps(sums[g][i], _mm512_set1_ps(total[g])));
}

// The new tokens' keys and values to the cache; then, after a barrier, attention of the sequences that decode.
static void attend_part(const Layer *layer, const int64_t *cache, const int64_t *attention, const bf16 *qkv, bf16 *out) {
    bf16 *keys = (bf16 *)cache[0], *values = (bf16 *)cache[1];
    const int64_t cache_rows = cache[2], dim = layer->head_dim, kv_heads = layer->kv_heads, heads = layer->heads;
    const int64_t *new_rows = (const int64_t *)attention[0], *decode_rows = (const int64_t *)attention[2];
    const int64_t *lengths = (const int64_t *)attention[3], *tables = (const int64_t *)attention[4];
    const int64_t tokens = attention[1], decoding = attention[5], blocks = attention[6];
    const int64_t stride = (heads + 2 * kv_heads) * dim, groups = heads / kv_heads;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < kv_heads; head++) {
            const bf16 *key = qkv + token * stride + (heads + head) * dim;
            const int64_t row = head * cache_rows + new_rows[token];
            memcpy(keys + row * dim, key, dim * sizeof *key);
            memcpy(values + row * dim, key + kv_heads * dim, dim * sizeof *key);
        }
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t item = 0; item < decoding * kv_heads; item++) {
        const int64_t sequence = item / kv_heads, head = item % kv_heads, token = decode_rows[sequence];
        const int64_t length = lengths[sequence];
        const int64_t start = layer->window > 0 && length > layer->window ? length - layer->window : 0;
        attend_head(qkv + token * stride + head * groups * dim, keys + head * cache_rows * dim,
                    values + head * cache_rows * dim, tables + sequence * blocks, length, start, groups, dim,
                    (float)layer->scale, out + (token * heads + head * groups) * dim);
    }
}

// ------------------------------------------------------------------------------------------------------------- the layer

// x [rows, hidden] -> qkv [rows, (heads + 2 kv_heads) * head_dim], keys and queries turned, keys and values cached; attended
// [rows, heads * head_dim] is set for the rows that decode.
void graftwork_layer_attend(const Layer *layer, const Step *step, const int64_t *cache, const bf16 *x, bf16 *qkv,
                            bf16 *attended) {
    const int64_t out = (layer->heads + 2 * layer->kv_heads) * layer->head_dim;
#pragma omp parallel num_threads(step->threads)
    {
        TileState before;
        begin_tiles(&before);
        norm_part(x, layer->input_norm, step->normed, step->rows, layer->hidden, layer->eps);
#pragma omp barrier
        linear_part(step, layer->qkv_group, step->normed, layer->hidden, layer->qkv, layer->qkv_bias, qkv, out);
#pragma omp barrier
        rotate_part(layer, step, qkv);
#pragma omp barrier
        attend_part(layer, cache, step->attention, qkv, attended);
        end_tiles(&before);
    }
}

// attended and x -> y [rows, hidden], the layer's output. x and y may be the same.
void graftwork_layer_finish(const Layer *layer, const Step *step, const bf16 *x, const bf16 *attended, bf16 *y) {
    const int64_t size = step->rows * layer->hidden;
#pragma omp parallel num_threads(step->threads)
    {
        TileState before;
        begin_tiles(&before);
        linear_part(step, layer->o_group, attended, layer->heads * layer->head_dim, layer->o, layer->o_bias,
                    step->product, layer->hidden);
#pragma omp barrier
        add_part(x, step->product, y, size);
#pragma omp barrier
        norm_part(y, layer->post_norm, step->normed, step->rows, layer->hidden, layer->eps);
#pragma omp barrier
        linear_part(step, layer->gate_up_group, step->normed, layer->hidden, layer->gate_up, layer->gate_up_bias,
                    step->gate_up, 2 * layer->inner);
#pragma omp barrier
        silu_mul_part(step->gate_up, step->inner, step->rows, layer->inner);
#pragma omp barrier
        linear_part(step, layer->down_group, step->inner, layer->inner, layer->down, layer->down_bias, step->product,
                    layer->hidden);
#pragma omp barrier
        add_part(y, step->product, y, size);
        end_tiles(&before);
    }
}
