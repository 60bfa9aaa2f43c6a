// The engine's CPU kernels: what a decode step does between its large GEMMs, and bfloat16 GEMMs of few rows.
// Compiled on the machine that runs them (build.py), for its own instructions, against torch's own OpenMP threads.

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__) || defined(__AMX_INT8__)
#include <immintrin.h>
#endif

#define BLOCK 16          // tokens in a block of the KV cache (kv_cache.py)
#define RANK_CHUNK 8      // ranks of one work item of the shrink
#define COLUMN_CHUNK 512  // columns of one work item of the expand
#define TILE 64           // columns summed in registers
#define SERIAL 16384      // elements below which waking the other threads costs more than they save

typedef uint16_t bf16;

static inline float widen(bf16 value) {
    union { uint32_t bits; float number; } cast = {(uint32_t)value << 16};
    return cast.number;
}

// Rounds to nearest even, as torch does; NaN stays NaN.
static inline bf16 narrow(float value) {
    union { float number; uint32_t bits; } cast = {value};
    const uint32_t rounded = (cast.bits + 0x7fff + (cast.bits >> 16 & 1)) >> 16;
    return value != value ? 0x7fc0 : (bf16)rounded;
}

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include "tiles.h"
#include "nf4.h"
#endif

#define T float
#define LOAD(value) (value)
#define STORE(value) (value)
#define NAME(kernel) graftwork_##kernel##_float32
#include "typed.h"
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include "int8.h"
#endif
#undef T
#undef LOAD
#undef STORE
#undef NAME

#define T bf16
#define LOAD(value) widen(value)
#define STORE(value) narrow(value)
#define NAME(kernel) graftwork_##kernel##_bfloat16
#include "typed.h"
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#include "int8.h"
#endif

#ifdef __AVX512BF16__

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

// y = x @ w^T + bias for few rows: x [rows, in], w [out, in], bias [out] or null, y [rows, out]; `out` a multiple of 4.
// The weights stay in the layout that torch and the tuner read, and are read once: each four rows of w meet all rows of
// x while they are in the first cache.
void graftwork_linear_bfloat16(const bf16 *restrict x, const bf16 *restrict w, const bf16 *restrict bias,
                               bf16 *restrict y, int64_t rows, int64_t in, int64_t out, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < out; n += 4) {
        __m512 offset = _mm512_setzero_ps();
        if (bias) {
            const __m128 four = _mm_set_ps(widen(bias[n + 3]), widen(bias[n + 2]), widen(bias[n + 1]), widen(bias[n]));
            offset = _mm512_broadcast_f32x4(four);
        }
        for (int64_t row = 0; row < rows; row += 4) {
            const int64_t count = rows - row < 4 ? rows - row : 4;
            const bf16 *inputs[4];
            for (int r = 0; r < count; r++) inputs[r] = x + (row + r) * in;
            __m512 sums[16];
            if (count == 4) dots_4(inputs, w + n * in, in, sums);
            else if (count == 3) dots_3(inputs, w + n * in, in, sums);
            else if (count == 2) dots_2(inputs, w + n * in, in, sums);
            else dots_1(inputs, w + n * in, in, sums);
            const __m512 results = _mm512_add_ps(sums_of_16(sums), offset);
            // Lanes 4 r to 4 r + 3 are row r's.
            uint64_t lines[4];
            _mm256_storeu_si256((__m256i *)lines, (__m256i)_mm512_cvtneps_pbh(results));
            for (int r = 0; r < count; r++) memcpy(y + (row + r) * out + n, lines + r, sizeof *lines);
        }
    }
}

#endif
