// Shared by the kernels of packed codes: conversions, copies, the kernels before and behind, and the weight. Compiled by
// NVRTC without any header, for compute capability 8.0 and above.
//
// A kernel is compiled for one layout: KIND (0 binary-residual, 1 level-table, 2 grouped-integer), BITS, NS (16-bit
// scalars per group), ASYM, GROUP (columns per group; a huge number for "whole row"), BF16 (type of x, bias and y) and
// ALIGN (16, 4 or 1: what the width of a packed row in bytes is a multiple of).
// The tensors are read exactly as they are stored: nothing is repacked.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARPS (THREADS / 32)

#define BINARY_RESIDUAL 0
#define LEVEL_TABLE 1
#define GROUPED_INTEGER 2
#define SIGNED_LEVELS 5
#define PLANES (KIND == SIGNED_LEVELS ? 3 : KIND == BINARY_RESIDUAL ? 2 : 1)  // packed tensors that hold codes
#define HAS_MARKS (KIND == BINARY_RESIDUAL || KIND == SIGNED_LEVELS)             // some columns have other levels
#define CODE_BITS (KIND == BINARY_RESIDUAL ? 1 : BITS)  // bits per weight in each of them

#ifndef MARK  // of the time at which warps pass a place: benchmarks/timeline.py
#define MARK(number, after)
#define MARKS_END(bias)
#endif

__device__ __forceinline__ float float_of_half(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ float low_half(u32 word) { return float_of_half((u16)word); }
__device__ __forceinline__ float high_half(u32 word) { return float_of_half((u16)(word >> 16)); }
__device__ __forceinline__ u16 half_of_float(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
__device__ __forceinline__ float float_of_x(u16 h) {  // x, bias: float16 or bfloat16
    return BF16 ? __uint_as_float((u32)h << 16) : float_of_half(h);
}
__device__ __forceinline__ u16 x_of_float(float f) {
    u16 h;
    if (BF16)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    else
        h = half_of_float(f);
    return h;
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
// Four bytes of eight, as the nibbles of the selector say. Their highest bits must be zero, which __byte_perm would see to
// with one more instruction; the other half of a selector does not matter.
__device__ __forceinline__ u32 choose_bytes(u32 low, u32 high, u32 selector) {
    u32 chosen;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(chosen) : "r"(low), "r"(high), "r"(selector));
    return chosen;
}
// A constant in a register: an instruction has room for one immediate operand.
__device__ __forceinline__ u32 in_register(u32 constant) {
    u32 value;
    asm("mov.u32 %0, %1;" : "=r"(value) : "r"(constant));
    return value;
}
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Sixteen bytes from global to shared memory; only the first `valid` are read, the rest become zero.
__device__ __forceinline__ void copy16(u8* shared, const u8* source, int valid) {
    valid = valid < 0 ? 0 : valid > 16 ? 16 : valid;
#if ALIGN == 16
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source), "r"(valid) : "memory");
#elif ALIGN == 4
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
        int part = valid - i < 0 ? 0 : valid - i > 4 ? 4 : valid - i;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared + i)), "l"(part ? source + i : source), "r"(part) : "memory");
    }
#else
    for (int i = 0; i < 16; i++) shared[i] = i < valid ? source[i] : 0;
#endif
}
// BYTES of them, all there.
template <int BYTES> __device__ __forceinline__ void copy_whole(u8* shared, const u8* source) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(source) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(source), "n"(BYTES < 4 ? 4 : BYTES) : "memory");
}
__device__ __forceinline__ void copy4(void* shared, const u8* source, int valid) {  // source 4-byte aligned
    valid = valid < 0 ? 0 : valid > 4 ? 4 : valid;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(source), "r"(valid) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Programmatic dependent launch: a kernel launched with that attribute may start before the one ahead of it in the stream
// has ended. Until this returns it may read what no kernel writes, weights, and nothing else.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if EARLY
    asm volatile("griddepcontrol.wait;" ::: "memory");
#if !defined(EAGER) || EAGER < 2
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#endif
}

// Bytes that the kernel before may have written: not __ldg, which the compiler may move before the wait.
__device__ __forceinline__ uint4 read_sixteen(const void* from) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ uint2 read_eight(const void* from) {
    uint2 v;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
    return v;
}
// A word that no kernel writes, asked for here and not where it is used.
__device__ __forceinline__ u32 read_constant(const void* from) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}
// Computed here and not where it is used.
__device__ __forceinline__ void known(int& a, int& b, const u16*& c) { asm volatile("" : "+r"(a), "+r"(b), "+l"(c)); }

// Lets the kernel behind start as soon as there is room for it.
__device__ __forceinline__ void start_next_kernel() {
#if EARLY
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same, not before `value` (which must not be all ones) has been loaded.
__device__ __forceinline__ void start_next_kernel_after(u32 value) {
#if EARLY
    asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0xffffffff; @p griddepcontrol.launch_dependents;}" ::"r"(value) : "memory");
#endif
}

__device__ __forceinline__ u32 funnel_right(u32 low, u32 high, int shift) { return __funnelshift_r(low, high, shift); }

struct Weight {
    const u8* codes[2];
    const u8* salient;
    const u8* scalars;
    const u8* zeros;
    int rows, columns, width, groups;  // width: bytes per packed row of one plane
};
__device__ __forceinline__ const u8* plane_codes(const Weight& w, int plane) { return plane == 2 ? w.zeros : w.codes[plane % 2]; }
// Columns that one vector meets: signed levels have marked ones once more, behind all others.
#define SPAN(w) (KIND == SIGNED_LEVELS ? 8 * (w).width : (w).columns)
