// The engine's CPU kernels: what a decode step does between its large GEMMs, and bfloat16 GEMMs of few rows.
// Compiled on the machine that runs them (build.py), for its own instructions, against torch's own OpenMP threads.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
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

#ifdef __AVX512BF16__
static inline __m512 widen_16(const bf16 *source) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)source)), 16);
}

static inline void narrow_16(bf16 *target, __m512 value) {
    _mm256_storeu_si256((__m256i *)target, (__m256i)_mm512_cvtneps_pbh(value));
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
#define NAME(kernel) graftwork_##kernel##_bfloat16
#include "typed.h"
#ifdef WITH_TILES
#include "int8.h"
#endif

#ifdef __AVX512BF16__
#include "product.h"
#include "layer.h"
#endif
