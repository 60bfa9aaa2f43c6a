// Products of bfloat16 with nf4 weights on tiles (tiles.h), for the few rows of a decode step: y = x @ w^T, w [out, in]
// in 4-bit codes with one factor for each 64 of a row (quantization.py). Codes are looked up into tiles in the first
// cache, so that no more than they comes from memory. The looked-up values are rounded to bfloat16, as weights of that
// type are; the factor of a block is multiplied in, in float32, after its 64 products are summed.

#define NF4_BLOCK 64

// The 16 values (appendix E of arXiv:2305.14314) as bfloat16; the lookup takes them twice.
#define NF4_VALUES                                                                                                   \
    0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, \
        0x3f39, 0x3f80
static const uint16_t nf4_values[32] __attribute__((aligned(64))) = {NF4_VALUES, NF4_VALUES};

// 16 rows by 64 columns of the weights as two tiles of 32 columns. `stride`: bytes from row to row.
static inline void nf4_look_up(const uint8_t *codes, int64_t stride, uint16_t *tiles) {
    const __m512i values = _mm512_load_si512(nf4_values), low = _mm512_set1_epi32(15);
    for (int row = 0; row < 16; row++)
        for (int half = 0; half < 2; half++) {
            const __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + row * stride + 16 * half));
            const __m512i wide = _mm512_cvtepu8_epi32(bytes);
            // The first of two values is in the upper bits of its byte.
            const __m512i second = _mm512_slli_epi32(_mm512_and_si512(wide, low), 16);
            const __m512i pairs = _mm512_or_si512(_mm512_srli_epi32(wide, 4), second);
            _mm512_store_si512(tiles + 512 * half + 32 * row, _mm512_permutexvar_epi16(pairs, values));
        }
}

// x [rows, in], codes [out, in / 2], factors [out, in / 64], bias [out] or null, y [rows, out]; `in` a multiple of 64,
// `out` of 16, at most 64 rows. scratch: 64-byte aligned, 32 * in bytes for every 16 rows or part of them.
void graftwork_nf4_linear_bfloat16(const bf16 *restrict x, const uint8_t *restrict codes, const float *restrict factors,
                                   const bf16 *restrict bias, bf16 *restrict y, uint32_t *restrict scratch,
                                   int64_t rows, int64_t in, int64_t out, int64_t threads) {
    const int64_t blocks = in / NF4_BLOCK, tiles = (rows + 15) / 16;
    // Pairs of inputs [tile][pair][row], as the second operand of a tile product has them.
    if (rows % 16) memset(scratch + (tiles - 1) * 8 * in, 0, 32 * in);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t pair = 0; pair < in / 2; pair++)
            memcpy(scratch + row / 16 * 8 * in + pair * 16 + row % 16, x + row * in + 2 * pair, 4);
#pragma omp parallel num_threads(threads)
    {
        char before[64];
        _tile_storeconfig(before);
        _tile_loadconfig(&tile_layout);
        uint16_t weights[1024] __attribute__((aligned(64)));
        float products[256] __attribute__((aligned(64))), sums[4][256] __attribute__((aligned(64)));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < out; n += 16) {
            memset(sums, 0, sizeof sums);
            for (int64_t block = 0; block < blocks; block++) {
                nf4_look_up(codes + n * in / 2 + block * NF4_BLOCK / 2, in / 2, weights);
                _tile_loadd(4, weights, 64);
                _tile_loadd(5, weights + 512, 64);
                for (int64_t tile = 0; tile < tiles; tile++) {
                    const uint32_t *input = scratch + tile * 8 * in + block * 512;
                    _tile_zero(0);
                    _tile_loadd(6, input, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, input + 256, 64);
                    _tile_dpbf16ps(0, 5, 7);
                    _tile_stored(0, products, 64);
                    for (int i = 0; i < 16; i++) {
                        const __m512 factor = _mm512_set1_ps(factors[(n + i) * blocks + block]);
                        const __m512 product = _mm512_load_ps(products + 16 * i);
                        float *const sum = sums[tile] + 16 * i;
                        _mm512_store_ps(sum, _mm512_fmadd_ps(factor, product, _mm512_load_ps(sum)));
                    }
                }
            }
            const __m512 offsets = bias ? load_16_bf16(bias + n) : _mm512_setzero_ps();
            for (int64_t tile = 0; tile < tiles; tile++) {
                __m512i by_row[16];
                transpose_16((const int32_t *)sums[tile], by_row);
                for (int64_t row = 16 * tile; row < rows && row < 16 * tile + 16; row++)
                    store_16_bf16(y + row * out + n, _mm512_add_ps((__m512)by_row[row % 16], offsets));
            }
        }
        _tile_loadconfig(before);
    }
}
