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

static inline void transpose_16(const int32_t *sums, __m512i out[16]) {
    __m512i lines[16];
    for (int i = 0; i < 16; i++) lines[i] = _mm512_load_si512(sums + 16 * i);
    transpose_lines(lines, out);
}

static inline __m512 load_16_float(const float *x) { return _mm512_loadu_ps(x); }
static inline __m512 load_16_bf16(const bf16 *x) { return widen_16(x); }
static inline void store_16_float(float *y, __m512 value) { _mm512_storeu_ps(y, value); }
static inline void store_16_bf16(bf16 *y, __m512 value) { narrow_16(y, value); }
