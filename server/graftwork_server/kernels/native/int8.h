// Products with int8 weights on tiles (tiles.h): y = (rounded x) @ w^T, one scale for each output and one for each row
// of x (quantization.py). Included twice, with T and NAME as typed.h has them.

#ifndef GRAFTWORK_INT8
#define GRAFTWORK_INT8

#include <float.h>

// Sums [weight tile][input tile] of 16 outputs by 16 rows, over `steps` times 64 inputs. 4 x 1 or 2 x 2 tiles at most.
static inline __attribute__((always_inline)) void int8_sums(const int8_t *w, int64_t in, const int8_t *x, int64_t steps,
                                                            int w_tiles, int x_tiles, int32_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(6, x + step * TILE_BYTES, 64);
        _tile_loadd(4, w + step * 64, in);
        _tile_dpbssd(0, 4, 6);
        if (x_tiles == 2) {
            _tile_loadd(7, x + (steps + step) * TILE_BYTES, 64);
            _tile_dpbssd(1, 4, 7);
            if (w_tiles == 2) {
                _tile_loadd(5, w + 16 * in + step * 64, in);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        } else if (w_tiles == 4) {
            _tile_loadd(5, w + 16 * in + step * 64, in);
            _tile_dpbssd(1, 5, 6);
            _tile_loadd(4, w + 32 * in + step * 64, in);
            _tile_dpbssd(2, 4, 6);
            _tile_loadd(5, w + 48 * in + step * 64, in);
            _tile_dpbssd(3, 5, 6);
        }
    }
    _tile_stored(0, sums, 64);
    if (w_tiles * x_tiles > 1) _tile_stored(1, sums + 256, 64);
    if (w_tiles * x_tiles > 2) {
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

#endif

#define TYPED_(name, type) name##_16_##type
#define TYPED(name, type) TYPED_(name, type)

// Rounds up to 16 rows of x [rows, in] to codes, packed as the second operand, and scales [16].
static void NAME(int8_pack)(const T *x, int64_t rows, int64_t in, int8_t *packed, float *scales) {
    if (rows < 16) memset(packed, 0, in / 64 * TILE_BYTES);
    for (int64_t row = 0; row < rows; row++) {
        const T *line = x + row * in;
        // As integers, since the largest of floats would not be NaN where one of them is.
        __m512i most = _mm512_setzero_si512();
        for (int64_t k = 0; k < in; k += 16)
            most = _mm512_max_epi32(most, (__m512i)_mm512_abs_ps(TYPED(load, T)(line + k)));
        union { int bits; float number; } largest = {_mm512_reduce_max_epi32(most)};
        float scale = largest.number / 127.0f;
        if (scale < FLT_MIN) scale = FLT_MIN;
        scales[row] = scale;
        const __m512 factor = _mm512_set1_ps(1.0f / scale);
        for (int64_t k = 0; k < in; k += 16) {
            const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(TYPED(load, T)(line + k), factor));
            int32_t quads[4];
            _mm_storeu_si128((__m128i *)quads, _mm512_cvtsepi32_epi8(codes));
            int8_t *tile = packed + k / 64 * TILE_BYTES + k % 64 / 4 * 64 + row * 4;
            for (int i = 0; i < 4; i++) memcpy(tile + 64 * i, quads + i, 4);
        }
    }
}

// y [rows, out]: 16 outputs from n on, of `rows` rows.
static inline void NAME(int8_finish)(const int32_t *sums, const float *w_scale, const T *bias, const float *x_scale,
                                     T *y, int64_t rows, int64_t out) {
    __m512i by_row[16];
    transpose_16(sums, by_row);
    const __m512 factors = _mm512_loadu_ps(w_scale);
    const __m512 offsets = bias ? TYPED(load, T)(bias) : _mm512_setzero_ps();
    for (int64_t row = 0; row < rows; row++) {
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(by_row[row]), _mm512_set1_ps(x_scale[row]));
        TYPED(store, T)(y + row * out, _mm512_add_ps(_mm512_mul_ps(value, factors), offsets));
    }
}

// x [rows, in], w int8 [out, in], w_scale [out], bias [out] or null, y [rows, out]; `in` a multiple of 64, `out` of 16.
// scratch: 64-byte aligned, for every 16 rows or part of them 16 * in bytes and 16 floats.
void NAME(int8_linear)(const T *restrict x, const int8_t *restrict w, const float *restrict w_scale,
                       const T *restrict bias, T *restrict y, int8_t *restrict scratch, int64_t rows, int64_t in,
                       int64_t out, int64_t threads) {
    const int64_t steps = in / 64, tiles = (rows + 15) / 16;
    float *const scales = (float *)(scratch + tiles * steps * TILE_BYTES);
    const int64_t wide = tiles == 1 ? 64 : 32;
    const int64_t blocks = (out + wide - 1) / wide;
#pragma omp parallel num_threads(threads)
    {
        // torch's own libraries use the tiles too and may remember what they have configured.
        char before[64];
        _tile_storeconfig(before);
        _tile_loadconfig(&tile_layout);
        int32_t sums[4 * 256] __attribute__((aligned(64)));
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t count = rows - 16 * tile < 16 ? rows - 16 * tile : 16;
            NAME(int8_pack)(x + 16 * tile * in, count, in, scratch + tile * steps * TILE_BYTES, scales + 16 * tile);
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = block * wide, last = first + wide < out ? first + wide : out;
            const int whole = last - first == wide;
            for (int64_t tile = 0; tile < tiles;) {
                const int x_tiles = tiles - tile > 1 ? 2 : 1;
                const int8_t *packed = scratch + tile * steps * TILE_BYTES;
                for (int64_t n = first; n < last;) {
                    int w_tiles = 1;
                    if (whole && tiles == 1) {
                        int8_sums(w + n * in, in, packed, steps, w_tiles = 4, 1, sums);
                    } else if (whole && x_tiles == 2) {
                        int8_sums(w + n * in, in, packed, steps, w_tiles = 2, 2, sums);
                    } else if (x_tiles == 2) {
                        int8_sums(w + n * in, in, packed, steps, 1, 2, sums);
                    } else {
                        int8_sums(w + n * in, in, packed, steps, 1, 1, sums);
                    }
                    for (int i = 0; i < w_tiles; i++)
                        for (int j = 0; j < x_tiles; j++) {
                            const int64_t row = 16 * (tile + j), column = n + 16 * i;
                            NAME(int8_finish)(sums + 256 * (i * x_tiles + j), w_scale + column,
                                              bias ? bias + column : 0, scales + row, y + row * out + column,
                                              rows - row < 16 ? rows - row : 16, out);
                        }
                    n += 16 * w_tiles;
                }
                tile += x_tiles;
            }
        }
        _tile_loadconfig(before);
    }
}

#undef TYPED
#undef TYPED_
