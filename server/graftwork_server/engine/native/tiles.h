// What products in tiles share: Intel's tile registers (AMX). A tile product takes its first operand
// as 16 rows of 64 bytes, so weights [out, in] go there as they lie, and its second in groups of four bytes by row, so
// the few rows of the input are packed on the way in. No second copy of the weights is kept.

#include <sys/syscall.h>
#include <unistd.h>

#define TILE_BYTES 1024

// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 inputs; all have 16 rows of 64 bytes.
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_layout = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Whether the system lets this process use the tiles; it has to be asked once.
int64_t graftwork_tiles_ready(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
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

static inline void transpose_16(const int32_t *sums, __m512i out[16]) {
    __m512i lines[16];
    for (int i = 0; i < 16; i++) lines[i] = _mm512_load_si512(sums + 16 * i);
    transpose_lines(lines, out);
}

static inline __m512 load_16_float(const float *x) { return _mm512_loadu_ps(x); }
static inline __m512 load_16_bf16(const bf16 *x) { return widen_16(x); }
static inline void store_16_float(float *y, __m512 value) { _mm512_storeu_ps(y, value); }
static inline void store_16_bf16(bf16 *y, __m512 value) { narrow_16(y, value); }
