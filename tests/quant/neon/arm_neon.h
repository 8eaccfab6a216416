// What kernels.cpp takes from Arm's header, in plain C++, so that any processor can test it.
#include <cstdint>
typedef int8_t int8x16_t __attribute__((vector_size(16)));
typedef int32_t int32x4_t __attribute__((vector_size(16)));

static inline int32x4_t vdupq_n_s32(int32_t x) { return int32x4_t{x, x, x, x}; }
static inline int8x16_t vreinterpretq_s8_s32(int32x4_t x) { return (int8x16_t)x; }
static inline int32x4_t vdotq_s32(int32x4_t sum, int8x16_t a, int8x16_t b) {
    for (int i = 0; i < 16; i++) sum[i / 4] += (int)a[i] * b[i];
    return sum;
}
