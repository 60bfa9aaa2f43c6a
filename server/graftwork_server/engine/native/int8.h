// Products with int8 weights on AMX: y = (rounded x) @ w^T for w [out, in] as it lies in the shared block, one scale for
// each output and one for each row of x (quantization.py). The weights are the first operand of the tile product, whose
// layout is row-major, and the few rows of x the second, which wants groups of four: so x is packed on the way in, and
// no second copy of the weights is kept. Included twice, with T, LOAD, STORE and NAME as typed.h has them.

#ifndef GRAFTWORK_INT8
#define GRAFTWORK_INT8

#include <float.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_BYTES 1024  // 16 rows of 64 bytes

// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 inputs; all have 16 rows of 64 bytes.
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} int8_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Whether the system lets this process use the tiles; it has to be asked once.
int64_t graftwork_int8_ready(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

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

static inline void int8_transpose(const int32_t *sums, __m512i out[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_load_si512(sums + 16 * i);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // Lane l of a[i + j] holds column 4 l + j of the rows i to i + 3.
    for (int j = 0; j < 4; j++) {
        const __m512i even_top = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        const __m512i odd_top = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_low = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        out[j] = _mm512_shuffle_i32x4(even_top, even_low, 0x88);
        out[4 + j] = _mm512_shuffle_i32x4(odd_top, odd_low, 0x88);
        out[8 + j] = _mm512_shuffle_i32x4(even_top, even_low, 0xdd);
        out[12 + j] = _mm512_shuffle_i32x4(odd_top, odd_low, 0xdd);
    }
}

static inline __m512 int8_load_float(const float *x) { return _mm512_loadu_ps(x); }
static inline __m512 int8_load_bf16(const bf16 *x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}
static inline void int8_store_float(float *y, __m512 value) { _mm512_storeu_ps(y, value); }
static inline void int8_store_bf16(bf16 *y, __m512 value) {
    _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(value));
}

#endif

#define INT8_(name, type) int8_##name##_##type
#define INT8(name, type) INT8_(name, type)

// Rounds up to 16 rows of x [rows, in] to codes, packed as the second operand, and scales [16].
static void NAME(int8_pack)(const T *x, int64_t rows, int64_t in, int8_t *packed, float *scales) {
    if (rows < 16) memset(packed, 0, in / 64 * TILE_BYTES);
    for (int64_t row = 0; row < rows; row++) {
        const T *line = x + row * in;
        // As integers, since the largest of floats would not be NaN where one of them is.
        __m512i most = _mm512_setzero_si512();
        for (int64_t k = 0; k < in; k += 16)
            most = _mm512_max_epi32(most, (__m512i)_mm512_abs_ps(INT8(load, T)(line + k)));
        union { int bits; float number; } largest = {_mm512_reduce_max_epi32(most)};
        float scale = largest.number / 127.0f;
        if (scale < FLT_MIN) scale = FLT_MIN;
        scales[row] = scale;
        const __m512 factor = _mm512_set1_ps(1.0f / scale);
        for (int64_t k = 0; k < in; k += 16) {
            const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(INT8(load, T)(line + k), factor));
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
    int8_transpose(sums, by_row);
    const __m512 factors = _mm512_loadu_ps(w_scale);
    const __m512 offsets = bias ? INT8(load, T)(bias) : _mm512_setzero_ps();
    for (int64_t row = 0; row < rows; row++) {
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(by_row[row]), _mm512_set1_ps(x_scale[row]));
        INT8(store, T)(y + row * out, _mm512_add_ps(_mm512_mul_ps(value, factors), offsets));
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
        _tile_loadconfig(&int8_tiles);
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

#undef INT8
#undef INT8_
