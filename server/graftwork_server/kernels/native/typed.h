// Kernels in one element type T, included once for float and once for bfloat16 by kernels.c.
// LOAD(element) -> float, STORE(float) -> element, FINITE(element) -> whether it is, NAME(kernel) -> the kernel's name for this type.
// Arithmetic is float32 throughout; results are rounded to T once.

static inline float NAME(dot)(const float *restrict a, const T *restrict b, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sum += a[i] * LOAD(b[i]);
    return sum;
}

// y += scaled LoRA deltas. For each span s of rows that belong to one adapter:
//   hidden[s] = x[rows of s] @ a[slot of s]^T;  y[rows of s, columns of member m] += hidden[s][:, ranks of m] @ b[m][slot]
// x [*, in] and y [*, x] are row-major with the given strides; a [slots, ranks, in]; a member's b [slots, rank, columns].
// spans: n_spans x {first row, rows, slot, first row in hidden}; members: n_members x {address of b, first rank, rank,
// first column, columns}; slot_elements: from one slot of a or b to the next; hidden: float [rows of all spans, ranks], scratch.
void NAME(lora)(const T *restrict x, int64_t x_stride, T *restrict y, int64_t y_stride, const int64_t *restrict spans,
                int64_t n_spans, const T *restrict a, int64_t in, int64_t ranks, const int64_t *restrict members,
                int64_t n_members, int64_t slot_elements, float *restrict hidden, int64_t threads) {
    const int64_t rank_chunks = (ranks + RANK_CHUNK - 1) / RANK_CHUNK;
    int64_t chunks = 0;
    for (int64_t m = 0; m < n_members; m++) chunks += (members[5 * m + 4] + COLUMN_CHUNK - 1) / COLUMN_CHUNK;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < n_spans * rank_chunks; item++) {
            const int64_t *span = spans + 4 * (item / rank_chunks);
            const int64_t first = item % rank_chunks * RANK_CHUNK;
            const int64_t last = first + RANK_CHUNK < ranks ? first + RANK_CHUNK : ranks;
            float input[in];
            for (int64_t row = 0; row < span[1]; row++) {
                const T *source = x + (span[0] + row) * x_stride;
                for (int64_t i = 0; i < in; i++) input[i] = LOAD(source[i]);
                for (int64_t r = first; r < last; r++)
                    hidden[(span[3] + row) * ranks + r] = NAME(dot)(input, a + span[2] * slot_elements + r * in, in);
            }
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < n_spans * chunks; item++) {
            const int64_t *span = spans + 4 * (item / chunks);
            int64_t chunk = item % chunks;
            const int64_t *member = members;
            for (;; member += 5) {
                const int64_t own = (member[4] + COLUMN_CHUNK - 1) / COLUMN_CHUNK;
                if (chunk < own) break;
                chunk -= own;
            }
            const int64_t rank = member[2], columns = member[4], start = chunk * COLUMN_CHUNK;
            const int64_t end = start + COLUMN_CHUNK < columns ? start + COLUMN_CHUNK : columns;
            const T *b = (const T *)member[0] + span[2] * slot_elements;
            for (int64_t row = 0; row < span[1]; row++) {
                const float *h = hidden + (span[3] + row) * ranks + member[1];
                T *target = y + (span[0] + row) * y_stride + member[3];
                int64_t column = start;
                for (; column + TILE <= end; column += TILE) {
                    float sum[TILE];
                    for (int i = 0; i < TILE; i++) sum[i] = LOAD(target[column + i]);
                    for (int64_t r = 0; r < rank; r++) {
                        const T *line = b + r * columns + column;
                        for (int i = 0; i < TILE; i++) sum[i] += h[r] * LOAD(line[i]);
                    }
                    for (int i = 0; i < TILE; i++) target[column + i] = STORE(sum[i]);
                }
                for (; column < end; column++) {
                    float sum = LOAD(target[column]);
                    for (int64_t r = 0; r < rank; r++) sum += h[r] * LOAD(b[r * columns + column]);
                    target[column] = STORE(sum);
                }
            }
        }
    }
}

// Writes the packed tokens' keys and values into the paged cache, then attends for the sequences that decode one token.
// layer: {keys, values, cache rows, kv heads, key dim, value dim}, the cache's tensors being [kv heads, rows, dim].
// step: {new_rows, tokens, decode_rows, lengths, tables, decoding, blocks of a table}: the cache row of each packed
// token; of each decoding sequence its packed row, its tokens (the new one included) and its block table.
// strides: elements from head to head and from token to token of q, key and value. out [tokens, heads, value dim].
// window: tokens that are visible, 0 for all. softcap: 0 for none. Softmax runs online over blocks (arXiv:1805.02867).
void NAME(attend)(const int64_t *restrict layer, const int64_t *restrict step, const T *restrict q, const T *restrict k,
                  const T *restrict v, T *restrict out, const int64_t *restrict strides, int64_t heads, double scale,
                  int64_t window, double softcap, int64_t threads) {
    T *keys = (T *)layer[0], *values = (T *)layer[1];
    const int64_t rows = layer[2], kv_heads = layer[3], key_dim = layer[4], value_dim = layer[5];
    const int64_t *new_rows = (const int64_t *)step[0], *decode_rows = (const int64_t *)step[2];
    const int64_t *lengths = (const int64_t *)step[3], *tables = (const int64_t *)step[4];
    const int64_t tokens = step[1], decoding = step[5], blocks = step[6], groups = heads / kv_heads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) {
            for (int64_t head = 0; head < kv_heads; head++) {
                const int64_t row = head * rows + new_rows[token];
                memcpy(keys + row * key_dim, k + head * strides[2] + token * strides[3], key_dim * sizeof(T));
                memcpy(values + row * value_dim, v + head * strides[4] + token * strides[5], value_dim * sizeof(T));
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < decoding * kv_heads; item++) {
            const int64_t sequence = item / kv_heads, head = item % kv_heads;
            const int64_t length = lengths[sequence], token = decode_rows[sequence];
            const int64_t start = window > 0 && length > window ? length - window : 0;
            float query[groups * key_dim], sums[groups * value_dim], line[key_dim > value_dim ? key_dim : value_dim];
            float scores[groups * BLOCK], largest[groups], total[groups];
            for (int64_t g = 0; g < groups; g++) {
                const T *source = q + (head * groups + g) * strides[0] + token * strides[1];
                for (int64_t i = 0; i < key_dim; i++) query[g * key_dim + i] = LOAD(source[i]) * (float)scale;
                largest[g] = -INFINITY;
                total[g] = 0.0f;
            }
            memset(sums, 0, sizeof(float) * groups * value_dim);
            for (int64_t block = start / BLOCK; block * BLOCK < length; block++) {
                const int64_t base = head * rows + tables[sequence * blocks + block] * BLOCK;
                const int64_t from = start > block * BLOCK ? start - block * BLOCK : 0;
                const int64_t to = length - block * BLOCK < BLOCK ? length - block * BLOCK : BLOCK;
                for (int64_t t = from; t < to; t++) {
                    for (int64_t i = 0; i < key_dim; i++) line[i] = LOAD(keys[(base + t) * key_dim + i]);
                    for (int64_t g = 0; g < groups; g++) {
                        float sum = 0.0f;
                        for (int64_t i = 0; i < key_dim; i++) sum += query[g * key_dim + i] * line[i];
                        scores[g * BLOCK + t] = softcap > 0 ? (float)softcap * tanhf(sum / (float)softcap) : sum;
                    }
                }
                for (int64_t g = 0; g < groups; g++) {
                    float *score = scores + g * BLOCK, highest = largest[g];
                    for (int64_t t = from; t < to; t++) highest = score[t] > highest ? score[t] : highest;
                    const float factor = expf(largest[g] - highest);
                    largest[g] = highest;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t t = from; t < to; t++) sum += score[t] = expf(score[t] - highest);
                    total[g] = total[g] * factor + sum;
                    for (int64_t i = 0; i < value_dim; i++) sums[g * value_dim + i] *= factor;
                }
                for (int64_t t = from; t < to; t++) {
                    for (int64_t i = 0; i < value_dim; i++) line[i] = LOAD(values[(base + t) * value_dim + i]);
                    for (int64_t g = 0; g < groups; g++) {
                        const float weight = scores[g * BLOCK + t];
                        for (int64_t i = 0; i < value_dim; i++) sums[g * value_dim + i] += weight * line[i];
                    }
                }
            }
            for (int64_t g = 0; g < groups; g++) {
                T *target = out + (token * heads + head * groups + g) * value_dim;
                for (int64_t i = 0; i < value_dim; i++) target[i] = STORE(sums[g * value_dim + i] / total[g]);
            }
        }
    }
}

// y = x / sqrt(mean(x^2) + eps) * weight over rows of `size` elements; x and y [rows, size], weight float [size].
void NAME(rms_norm)(const T *restrict x, const float *restrict weight, T *restrict y, int64_t rows, int64_t size,
                    double eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * size > SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const T *source = x + row * size;
        T *target = y + row * size;
        float sum = 0.0f;
        for (int64_t i = 0; i < size; i++) sum += LOAD(source[i]) * LOAD(source[i]);
        const float factor = 1.0f / sqrtf(sum / size + (float)eps);
        for (int64_t i = 0; i < size; i++) target[i] = STORE(LOAD(source[i]) * factor * weight[i]);
    }
}

// y = silu(gate) * up; both [rows, size] side by side in x [rows, 2 * size].
void NAME(silu_mul)(const T *restrict x, T *restrict y, int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * size > SERIAL)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = x + 2 * row * size, *up = gate + size;
        T *target = y + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            const float value = LOAD(gate[i]);
            target[i] = STORE(value / (1.0f + expf(-value)) * LOAD(up[i]));
        }
    }
}

// target[c][r] = source[r][c] * scale for n matrices. items: n x {address of source [rows, columns], address of target
// [columns, rows], rows, columns}; scales [n]. finite [n] becomes 0 where a target has NaN or infinite values, else 1.
void NAME(transpose)(const int64_t *restrict items, const double *restrict scales, int64_t *restrict finite, int64_t n,
                     int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
    for (int64_t i = 0; i < n; i++) {
        const T *restrict source = (const T *)items[4 * i];
        T *restrict target = (T *)items[4 * i + 1];
        const int64_t rows = items[4 * i + 2], columns = items[4 * i + 3];
        const float scale = (float)scales[i];
        int64_t bad = 0;
        if (rows == 1 && scale == 1.0f) {
            for (int64_t c = 0; c < columns; c++) {
                target[c] = source[c];
                bad |= !FINITE(source[c]);
            }
        } else {
            int64_t done = 0;
#ifdef TRANSPOSE_ROWS
            for (; done + 16 <= rows; done += 16)
                for (int64_t c = 0; c < columns; c += 16)
                    bad |= TRANSPOSE_ROWS(source + done * columns + c, columns - c, columns, target + c * rows + done, rows, scale);
#endif
            for (int64_t first = done; first < rows; first += TILE) {
                const int64_t last = first + TILE < rows ? first + TILE : rows;
                for (int64_t c = 0; c < columns; c++) {
                    for (int64_t r = first; r < last; r++) {
                        const T value = STORE(LOAD(source[r * columns + c]) * scale);
                        target[c * rows + r] = value;
                        bad |= !FINITE(value);
                    }
                }
            }
        }
        finite[i] = !bad;
    }
}
