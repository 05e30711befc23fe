// Pairs of 16-bit weights from codes, shared by `expand.cuh` and `decode.cu`.

#define HALVES (!BF16 && KIND == GROUPED_INTEGER && BITS > 2)  // wider integers become float16 without float32
#define SECOND_CODE (BITS == 4 ? 0x2c00u : 0x3c00u)            // 1/16 or 1: what the second code of a pair is multiplied by

// A pair of levels whose bytes lie in the order low, low, high, high.
__device__ __forceinline__ u32 parted_pair(float first, float second) { return choose_bytes(pair_of_floats(first, second), 0, 0x3120); }

__device__ __forceinline__ u32 fma_pairs(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// scale (code - zero) for a pair of codes, rounded once. Every step before the last is exact: a code in the low bits of 1024
// is 1024 + code; the second of two four-bit codes stays where it is, sixteen times as much.
__device__ __forceinline__ u32 pair_of_halves(u32 biased, u32 scales, u32 bias, u32 factor = SECOND_CODE << 16 | 0x3c00u) {
    return multiply_pairs(BITS == 8 ? add_pairs(biased, bias) : fma_pairs(biased, factor, bias), scales);
}
// -1024 - zero, and -64 - zero for the second of four bits: the last places of both are counted in codes.
__device__ __forceinline__ u32 bias_of_pair(u32 zero) { return BITS == 4 ? 0xd400e400u + zero * 0x100001u : 0xe400e400u + zero * 0x10001u; }
