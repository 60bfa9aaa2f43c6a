// Products of bfloat16 matrices with few rows or many, y = x @ w^T: in tiles (AMX) where the processor has them, else in
// vectors (AVX512-BF16). The weights stay in the layout that torch and the tuner read; only x is brought into another.
// Functions whose name ends in _part are called by all threads of a parallel region and share its work.

#define BLOCK_ROWS 16                   // rows of x, or of w, in one tile
#define STEP 32                         // elements of the inner dimension in one tile
#define TILE_ELEMENTS (BLOCK_ROWS * STEP)
#define PANEL 32                        // rows of w that are computed together
#define VECTOR_ROWS 32                  // rows up to which the products in vectors are not slower than torch's

static inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// ------------------------------------------------------------------------------------------------------------- vectors

// Sums of sixteen vectors in one: lane i is the sum of the lanes of v[i].
static inline __m512 sums_of_16(const __m512 v[16]) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) {
        // Pairs (i, i + 8): halves of 256 bits.
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
    }
    for (int i = 0; i < 4; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    // b[i]: 128-bit lanes hold partial sums of v[i], v[i + 8], v[i + 4], v[i + 12].
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
    const __m512 d = _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
    // In every 128-bit lane now: 0, 1, 2, 3 of that lane's group; the groups are 0, 8, 4, 12.
    return _mm512_shuffle_f32x4(d, d, 0xd8);
}

#define DOTS(R)                                                                                                      \
    static inline void dots_##R(const bf16 *const x[4], const bf16 *w, int64_t in, __m512 sums[16]) {               \
        for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_ps();                                                  \
        int64_t k = 0;                                                                                               \
        for (; k + 32 <= in; k += 32) {                                                                              \
            __m512bh input[R];                                                                                       \
            for (int r = 0; r < R; r++) input[r] = (__m512bh)_mm512_loadu_si512(x[r] + k);                           \
            for (int n = 0; n < 4; n++) {                                                                            \
                const __m512bh weight = (__m512bh)_mm512_loadu_si512(w + n * in + k);                                \
                for (int r = 0; r < R; r++) sums[4 * r + n] = _mm512_dpbf16_ps(sums[4 * r + n], input[r], weight);   \
            }                                                                                                        \
        }                                                                                                            \
        if (k < in) {                                                                                                \
            const __mmask32 rest = (1u << (in - k)) - 1;                                                             \
            for (int n = 0; n < 4; n++) {                                                                            \
                const __m512bh weight = (__m512bh)_mm512_maskz_loadu_epi16(rest, w + n * in + k);                    \
                for (int r = 0; r < R; r++)                                                                          \
                    sums[4 * r + n] = _mm512_dpbf16_ps(                                                              \
                        sums[4 * r + n], (__m512bh)_mm512_maskz_loadu_epi16(rest, x[r] + k), weight);                \
            }                                                                                                        \
        }                                                                                                            \
    }
DOTS(1)
DOTS(2)
DOTS(3)
DOTS(4)

// Lanes 4 r + n of the answer: row r of x (count of them, at most 4) times row n of four rows of w.
static inline __m512 dots(int64_t count, const bf16 *const x[4], const bf16 *w, int64_t in) {
    __m512 sums[16];
    if (count == 4) dots_4(x, w, in, sums);
    else if (count == 3) dots_3(x, w, in, sums);
    else if (count == 2) dots_2(x, w, in, sums);
    else dots_1(x, w, in, sums);
    return sums_of_16(sums);
}

// The weights are read once: each four rows of w meet all rows of x while they are in the first cache.
static void vector_product_part(const bf16 *restrict x, int64_t x_stride, const bf16 *restrict w,
                                const bf16 *restrict bias, bf16 *restrict y, int64_t y_stride, int64_t rows, int64_t in,
                                int64_t out) {
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < out; n += 4) {
        __m512 offset = _mm512_setzero_ps();
        if (bias) {
            const __m128 four = _mm_set_ps(widen(bias[n + 3]), widen(bias[n + 2]), widen(bias[n + 1]), widen(bias[n]));
            offset = _mm512_broadcast_f32x4(four);
        }
        for (int64_t row = 0; row < rows; row += 4) {
            const int64_t count = rows - row < 4 ? rows - row : 4;
            const bf16 *inputs[4];
            for (int r = 0; r < count; r++) inputs[r] = x + (row + r) * x_stride;
            const __m512 results = _mm512_add_ps(dots(count, inputs, w + n * in, in), offset);
            uint64_t lines[4];
            _mm256_storeu_si256((__m256i *)lines, (__m256i)_mm512_cvtneps_pbh(results));
            for (int r = 0; r < count; r++) memcpy(y + (row + r) * y_stride + n, lines + r, sizeof *lines);
        }
    }
}

// --------------------------------------------------------------------------------------------------------------- tiles

static int has_tiles;  // set by graftwork_prepare

#ifdef WITH_TILES
#define TILES 1

typedef struct { char bytes[64]; } TileState;

// Each thread has a configuration of its own, and gets back the one that it had: torch's own libraries use the tiles too,
// and remember what they have configured.
static void begin_tiles(TileState *before) {
    if (!has_tiles) return;
    _tile_storeconfig(before);
    _tile_loadconfig(&tile_layout);
}

static void end_tiles(const TileState *before) {
    if (has_tiles) _tile_loadconfig(before);
}

// Sixteen rows of `width` elements become blocks of [16 pairs of elements][16 rows], the layout of a tile product's second
// factor; elements and rows (from `rows` on) that are not there become zeros.
static inline void pack_block(const bf16 *source, int64_t stride, int64_t rows, int64_t width, bf16 *target) {
    const __mmask32 mask = width >= STEP ? ~0u : (1u << width) - 1;
    __m512i lines[16], columns[16];
    for (int64_t r = 0; r < BLOCK_ROWS; r++)
        lines[r] = r < rows ? _mm512_maskz_loadu_epi16(mask, source + r * stride) : _mm512_setzero_si512();
    transpose_lines(lines, columns);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512((int32_t *)target + 16 * i, columns[i]);
}

// x [rows, in] as blocks of tiles: target [blocks of rows][blocks of in][TILE_ELEMENTS].
static void pack_part(const bf16 *x, int64_t x_stride, int64_t rows, int64_t in, bf16 *target) {
    const int64_t steps = blocks_of(in, STEP), items = blocks_of(rows, BLOCK_ROWS) * steps;
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < items; item++) {
        const int64_t row = item / steps * BLOCK_ROWS, k = item % steps * STEP;
        pack_block(x + row * x_stride + k, x_stride, rows - row, in - k, target + item * TILE_ELEMENTS);
    }
}

// Tile `tile` of sums, [16 rows of w][16 rows of x], to y [rows of x, rows of w].
#define WRITE(tile, first_row, first_out)                                                                             \
    do {                                                                                                              \
        _tile_stored(tile, sums, 64);                                                                                 \
        write_sums(sums, bias ? bias + (first_out) : 0, y + (first_row) * y_stride + (first_out), y_stride,           \
                   rows - (first_row));                                                                               \
    } while (0)

static inline void write_sums(const float *sums, const bf16 *bias, bf16 *y, int64_t y_stride, int64_t rows) {
    __m512i lines[16];
    transpose_16((const int32_t *)sums, lines);
    const __m512 offset = bias ? widen_16(bias) : _mm512_setzero_ps();
    const int64_t count = rows < BLOCK_ROWS ? rows : BLOCK_ROWS;
    for (int64_t r = 0; r < count; r++) narrow_16(y + r * y_stride, _mm512_add_ps((__m512)lines[r], offset));
}

// Two rows of tiles of w, [2 * 16, in], times all of x.
static void panel(const bf16 *restrict w, int64_t in, const bf16 *restrict packed, int64_t rows,
                  const bf16 *restrict bias, bf16 *restrict y, int64_t y_stride, int64_t first_out, int ahead) {
    const int64_t steps = blocks_of(in, STEP), row_blocks = blocks_of(rows, BLOCK_ROWS), whole = in / STEP;
    float sums[256] __attribute__((aligned(64)));
    bf16 rest[2 * TILE_ELEMENTS] __attribute__((aligned(64)));
    if (whole < steps) {  // the last elements of each row of w, filled up with zeros
        memset(rest, 0, sizeof rest);
        for (int r = 0; r < PANEL; r++) memcpy(rest + r * STEP, w + r * in + whole * STEP, (in - whole * STEP) * sizeof *w);
    }
    for (int64_t block = 0; block < row_blocks; block += 2) {
        const bf16 *one = packed + block * steps * TILE_ELEMENTS, *two = one + steps * TILE_ELEMENTS;
        const int both = block + 1 < row_blocks;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < steps; k++) {
            if (k < whole) {
                _tile_loadd(4, w + k * STEP, in * sizeof *w);
                _tile_loadd(5, w + 16 * in + k * STEP, in * sizeof *w);
            } else {
                _tile_loadd(4, rest, 64);
                _tile_loadd(5, rest + TILE_ELEMENTS, 64);
            }
            if (ahead && block == 0)  // the next panel follows in memory; the same share of it is asked for now
                for (int i = 0; i < PANEL; i++) _mm_prefetch(w + PANEL * in + k * PANEL * STEP + i * STEP, _MM_HINT_T1);
            _tile_loadd(6, one + k * TILE_ELEMENTS, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (both) {
                _tile_loadd(7, two + k * TILE_ELEMENTS, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        WRITE(0, 16 * block, first_out);
        WRITE(1, 16 * block, first_out + 16);
        if (both) {
            WRITE(2, 16 * block + 16, first_out);
            WRITE(3, 16 * block + 16, first_out + 16);
        }
    }
}

// w [out, in], `out` a multiple of 32; packed: x as pack_part leaves it.
static void tile_product_part(const bf16 *restrict packed, const bf16 *restrict w, const bf16 *restrict bias,
                              bf16 *restrict y, int64_t y_stride, int64_t rows, int64_t in, int64_t out) {
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < out; n += PANEL)
        panel(w + n * in, in, packed, rows, bias, y, y_stride, n, n + PANEL < out);
}

#else
#define TILES 0
typedef struct { char bytes[64]; } TileState;
static void begin_tiles(TileState *before) {}
static void end_tiles(const TileState *before) {}
static void pack_part(const bf16 *x, int64_t x_stride, int64_t rows, int64_t in, bf16 *target) {}
static void tile_product_part(const bf16 *restrict packed, const bf16 *restrict w, const bf16 *restrict bias,
                              bf16 *restrict y, int64_t y_stride, int64_t rows, int64_t in, int64_t out) {}
#endif

// What products this process can compute: 1 if in tiles, with any number of rows, else 0.
int64_t graftwork_prepare(void) {
#ifdef WITH_TILES
    has_tiles = graftwork_tiles_ready();
#endif
    return has_tiles;
}

static inline int in_tiles(int64_t out) { return has_tiles && out % PANEL == 0; }

// y = x @ w^T + bias: x [rows, in], w [out, in], bias [out] or null, y [rows, out]; `out` a multiple of 4, and rows at most
// VECTOR_ROWS without tiles. packed: room for x in blocks of tiles.
void graftwork_linear_bfloat16(const bf16 *restrict x, const bf16 *restrict w, const bf16 *restrict bias,
                               bf16 *restrict y, bf16 *restrict packed, int64_t rows, int64_t in, int64_t out,
                               int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        if (in_tiles(out)) {
            TileState before;
            begin_tiles(&before);
            pack_part(x, in, rows, in, packed);
#pragma omp barrier
            tile_product_part(packed, w, bias, y, out, rows, in, out);
            end_tiles(&before);
        } else {
            vector_product_part(x, in, w, bias, y, out, rows, in, out);
        }
    }
}
