// The low-rank products of adapters in a layer (layer.h): x @ A^T of each span, then hidden @ B, added to the output.

// hidden = x @ a^T for the rows of one span and sixteen ranks from `first` on.
static void shrink_tiles(const bf16 *x, int64_t x_stride, int64_t in, const bf16 *a, int64_t first, float *hidden,
                         int64_t ranks, int64_t rows) {
#if TILES
    bf16 packed[TILE_ELEMENTS] __attribute__((aligned(64)));
    float sums[256] __attribute__((aligned(64)));
    for (int64_t row = 0; row < rows; row += 4 * BLOCK_ROWS) {
        const int64_t left = rows - row;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < in; k += STEP) {
            const bf16 *source = x + row * x_stride + k;
            pack_block(a + first * in + k, in, 16, STEP, packed);
            _tile_loadd(6, packed, 64);
            _tile_loadd(4, source, x_stride * sizeof *x);
            _tile_dpbf16ps(0, 4, 6);
            if (left > 16) {
                _tile_loadd(5, source + 16 * x_stride, x_stride * sizeof *x);
                _tile_dpbf16ps(1, 5, 6);
            }
            if (left > 32) {
                _tile_loadd(4, source + 32 * x_stride, x_stride * sizeof *x);
                _tile_dpbf16ps(2, 4, 6);
            }
            if (left > 48) {
                _tile_loadd(5, source + 48 * x_stride, x_stride * sizeof *x);
                _tile_dpbf16ps(3, 5, 6);
            }
        }
        for (int block = 0; block < 4 && 16 * block < left; block++) {
            if (block == 0) _tile_stored(0, sums, 64);
            else if (block == 1) _tile_stored(1, sums, 64);
            else if (block == 2) _tile_stored(2, sums, 64);
            else _tile_stored(3, sums, 64);
            const int64_t start = row + 16 * block, count = rows - start < 16 ? rows - start : 16;
            for (int64_t r = 0; r < count; r++) memcpy(hidden + (start + r) * ranks + first, sums + 16 * r, 64);
        }
    }
#endif
}

// target[r] = x times rank r of `a`, for `count` ranks, at most four.
static inline void shrink_row(const bf16 *x, const bf16 *a, int64_t in, int64_t count, float *target) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t k = 0; k < in; k += 32) {
        const __mmask32 mask = in - k >= 32 ? ~0u : (1u << (in - k)) - 1;
        const __m512bh input = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + k);
        for (int64_t r = 0; r < count; r++) {
            const bf16 *line = a + r * in + k;
            _mm_prefetch(line + 4 * in, _MM_HINT_T0);  // the next four ranks follow in memory, and the next slot's after them
            sums[r] = _mm512_dpbf16_ps(sums[r], input, (__m512bh)_mm512_maskz_loadu_epi16(mask, line));
        }
    }
    for (int64_t r = 0; r < count; r++) target[r] = _mm512_reduce_add_ps(sums[r]);
}

static void shrink_part(const Step *step, int64_t group, const bf16 *x, int64_t x_stride, int64_t in) {
    for (const Spans *some = step->spans; some < step->spans + step->n_spans; some++) {
        const int64_t *lora = some->groups + 4 * group, ranks = lora[1];
        const int64_t chunks = blocks_of(ranks, 16);
        const bf16 *a = (const bf16 *)lora[0];
        if (!a) continue;
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < some->n_spans * chunks; item++) {
            const int64_t *span = some->spans + 4 * (item / chunks), first = item % chunks * 16;
            const int64_t last = first + 16 < ranks ? first + 16 : ranks;
            const bf16 *source = x + span[0] * x_stride, *own = a + span[2] * some->slot_elements;
            float *hidden = some->hidden + span[3] * ranks;
            if (has_tiles && span[1] >= LONG_SPAN && last - first == 16 && in % STEP == 0) {
                shrink_tiles(source, x_stride, in, own, first, hidden, ranks, span[1]);
                continue;
            }
            for (int64_t r = first; r < last; r += 4)
                for (int64_t row = 0; row < span[1]; row++)
                    shrink_row(source + row * x_stride, own + r * in, in, last - r < 4 ? last - r : 4,
                               hidden + row * ranks + r);
        }
    }
}

// y[R rows, 64 columns] += hidden @ b, the products of all ranks kept in registers.
#define EXPAND(R)                                                                                                     \
    static inline void expand_##R(bf16 *y, int64_t y_stride, const float *hidden, int64_t ranks, const bf16 *b,      \
                                  int64_t rank, int64_t columns) {                                                   \
        __m512 sums[R][4];                                                                                            \
        for (int row = 0; row < R; row++)                                                                             \
            for (int i = 0; i < 4; i++) sums[row][i] = widen_16(y + row * y_stride + 16 * i);                        \
        for (int64_t r = 0; r < rank; r++) {                                                                          \
            const bf16 *line = b + r * columns;                                                                       \
            __m512 weights[4];                                                                                        \
            for (int i = 0; i < 4; i++) weights[i] = widen_16(line + 16 * i);                                        \
            _mm_prefetch(line + 128, _MM_HINT_T0);                                                                    \
            _mm_prefetch(line + 160, _MM_HINT_T0);                                                                    \
            for (int row = 0; row < R; row++) {                                                                       \
                const __m512 factor = _mm512_set1_ps(hidden[row * ranks + r]);                                       \
                for (int i = 0; i < 4; i++) sums[row][i] = _mm512_fmadd_ps(factor, weights[i], sums[row][i]);        \
            }                                                                                                         \
        }                                                                                                             \
        for (int row = 0; row < R; row++)                                                                             \
            for (int i = 0; i < 4; i++) narrow_16(y + row * y_stride + 16 * i, sums[row][i]);                        \
    }
EXPAND(1)
EXPAND(4)

static void expand_columns(bf16 *y, int64_t y_stride, const float *hidden, int64_t ranks, const bf16 *b, int64_t rank,
                           int64_t columns, int64_t rows, int64_t start, int64_t end) {
    int64_t column = start;
    for (; column + 64 <= end; column += 64) {
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4)
            expand_4(y + row * y_stride + column, y_stride, hidden + row * ranks, ranks, b + column, rank, columns);
        for (; row < rows; row++)
            expand_1(y + row * y_stride + column, y_stride, hidden + row * ranks, ranks, b + column, rank, columns);
    }
    for (; column < end; column++)
        for (int64_t row = 0; row < rows; row++) {
            float sum = widen(y[row * y_stride + column]);
            for (int64_t r = 0; r < rank; r++) sum += hidden[row * ranks + r] * widen(b[r * columns + column]);
            y[row * y_stride + column] = narrow(sum);
        }
}

static void expand_part(const Step *step, int64_t group, bf16 *y, int64_t y_stride) {
    for (const Spans *some = step->spans; some < step->spans + step->n_spans; some++) {
        const int64_t *lora = some->groups + 4 * group, *members = (const int64_t *)lora[2];
        if (!lora[0]) continue;
        int64_t chunks = 0;
        for (int64_t m = 0; m < lora[3]; m++) chunks += blocks_of(members[5 * m + 4], COLUMN_CHUNK);
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < some->n_spans * chunks; item++) {
            const int64_t *span = some->spans + 4 * (item / chunks), *member = members;
            int64_t chunk = item % chunks;
            for (;; member += 5) {
                const int64_t own = blocks_of(member[4], COLUMN_CHUNK);
                if (chunk < own) break;
                chunk -= own;
            }
            const int64_t rank = member[2], columns = member[4], start = chunk * COLUMN_CHUNK;
            expand_columns(y + span[0] * y_stride + member[3], y_stride, some->hidden + span[3] * lora[1] + member[1],
                           lora[1], (const bf16 *)member[0] + span[2] * some->slot_elements, rank, columns, span[1], start,
                           start + COLUMN_CHUNK < columns ? start + COLUMN_CHUNK : columns);
        }
    }
}
