// The engine's CPU kernels: what a decode step does between its large GEMMs, and bfloat16 GEMMs of few rows.
// Compiled on the machine that runs them (build.py), for its own instructions, against torch's own OpenMP threads.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifndef BLOCK
#error "BLOCK, the tokens in a block of the KV cache, is given by build.py"
#endif
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

#ifdef __AVX512BF16__
static inline __m512 widen_16(const bf16 *source) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)source)), 16);
}

static inline void narrow_16(bf16 *target, __m512 value) {
    _mm256_storeu_si256((__m256i *)target, (__m256i)_mm512_cvtneps_pbh(value));
}

// Rows of 16 become columns: lane j of a[i] goes to lane i of out[j].
static inline void transpose_lines(__m512i a[16], __m512i out[16]) {
    __m512i b[16];
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

// target [columns, 16 rows] = source [16 rows, columns]^T * scale, at most 16 columns. Whether any of it is NaN or infinite.
static inline int transpose_rows(const bf16 *source, int64_t columns, int64_t stride, bf16 *target, int64_t target_stride,
                                 float scale) {
    const __mmask16 mask = columns >= 16 ? 0xffff : (1u << columns) - 1;
    const __m256i exponent = _mm256_set1_epi16(0x7f80);
    __m512i lines[16], turned[16];
    for (int r = 0; r < 16; r++) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, source + r * stride));
        lines[r] = (__m512i)_mm512_mul_ps((__m512)_mm512_slli_epi32(wide, 16), _mm512_set1_ps(scale));
    }
    transpose_lines(lines, turned);
    __mmask16 bad = 0;
    for (int64_t c = 0; c < columns && c < 16; c++) {
        const __m256i line = (__m256i)_mm512_cvtneps_pbh((__m512)turned[c]);
        bad |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(line, exponent), exponent);
        _mm256_storeu_si256((__m256i *)(target + c * target_stride), line);
    }
    return bad != 0;
}

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define WITH_TILES
#include "tiles.h"
#include "nf4.h"
#endif
#endif

#define T float
#define LOAD(value) (value)
#define STORE(value) (value)
#define FINITE(value) (fabsf(value) <= FLT_MAX)
#define NAME(kernel) graftwork_##kernel##_float32
#include "typed.h"
#ifdef WITH_TILES
#include "int8.h"
#endif
#undef T
#undef LOAD
#undef STORE
#undef FINITE
#undef NAME

#define T bf16
#define LOAD(value) widen(value)
#define STORE(value) narrow(value)
#define FINITE(value) (((value) & 0x7f80) != 0x7f80)
#ifdef __AVX512BF16__
#define TRANSPOSE_ROWS transpose_rows
#endif
#define NAME(kernel) graftwork_##kernel##_bfloat16
#include "typed.h"
#ifdef WITH_TILES
#include "int8.h"
#endif

#ifdef __AVX512BF16__
#include "product.h"
#include "layer.h"
#endif
