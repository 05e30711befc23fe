// Words, and conversions between float and the 16-bit type of x. Compiled by NVRTC without any header.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float float_of_half(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ float float_of_x(u16 h) {  // x, bias: float16 or bfloat16
    return BF16 ? __uint_as_float((u32)h << 16) : float_of_half(h);
}
__device__ __forceinline__ u32 pair_of_floats(float low, float high) {
    u32 pair;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}
// The larger magnitudes of two pairs, the second with signs; NaN counts for nothing.
__device__ __forceinline__ u32 larger_pair(u32 most, u32 pair) {
#if BF16
    asm("max.bf16x2 %0, %0, %1;" : "+r"(most) : "r"(pair & 0x7fff7fffu));
#else
    asm("max.f16x2 %0, %0, %1;" : "+r"(most) : "r"(pair & 0x7fff7fffu));
#endif
    return most;
}
// The larger of two pairs of 16-bit integers.
__device__ __forceinline__ u32 larger_integers(u32 a, u32 b) { return __vmaxu2(a, b); }
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Until this returns, a kernel that started while the one before it runs may read what no kernel writes, and nothing else.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if EARLY
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the kernel behind start as soon as there is room for it.
__device__ __forceinline__ void start_next_kernel() {
#if EARLY
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#if BF16
#define HALVES "f32.bf16.bf16"
#else
#define HALVES "f32.f16.f16"
#endif
// Descriptor of a tile in shared memory, swizzled by 128 bytes, without its upper word.
__device__ __forceinline__ u32 descriptor_of(const u8* tile) { return shared_address(tile) >> 4 | 1u << 16; }
