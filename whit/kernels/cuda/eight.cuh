// What `eight.cu` is made of: constants, the copy engine and peers of a cluster, products, and codes widened to 16 bits.

#define WARPS (THREADS / 32)
#define BOXES (ITEM / 128)
#define ITEM_BYTES (16 * ITEM)
#define LOOSE (OUTLIERS == 1 || (OUTLIERS == 2 && !PLACED))  // there may be outlier columns whose weights are codes
#define WIDENS (ROUNDED != 1 || LOOSE)
#define CONVERTS (BF16 && ROUNDED == 0)  // inputs to float16, divided by a power of two
#define FLOATS (BF16 && ROUNDED == 1)    // codes are widened to bfloat16
#ifndef MARK  // of the time at which warps pass a place: benchmarks/timeline.py
#define MARK(number, after)
#define MARKS_END(bias)
#endif
#ifndef HELD
#define HELD 0
#endif
#ifndef BIAS_FLOAT
#define BIAS_FLOAT 0
#endif
#define ROUNDER 12582912.0f  // 1.5 2^23: a float has no fraction beyond it
#define SMALLEST 0x1p-100f
#define WHOLE_SUMS (ROUNDED == 1 && !LOOSE)  // else sums are float32
#if FLOATS
#define WIDE_TYPE "f32.bf16.bf16.f32"
#else
#define WIDE_TYPE "f32.f16.f16.f32"
#endif

struct __align__(64) TensorMap { u64 words[16]; };

struct Work {
    const u8* scales;          // of rows, float32 or (SCALES_BF16) bfloat16
    const float* input_scale;  // of all inputs, if stored
    const int* index;          // stored outlier columns
    const u16* cached;         // (rows, stored) their weights, if PLACED
    const u8* bias;            // of the type of x, or (BIAS_FLOAT) float32
    u16* out;
    int vectors, rows, columns, scale_step, stored, span;  // span: columns of a block
    float threshold, maximum;  // of the inputs' numbers
};

__device__ __forceinline__ void copy_rows(u8* shared, const TensorMap& map, u64* barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(shared_address(shared)), "l"(&map), "r"(column / 2), "r"(row), "r"(shared_address(barrier)) : "memory");
}
// As `send_sum`.
__device__ __forceinline__ void send_word(u32* own, int rank, u32 value, u64* barrier) {
    asm volatile("{.reg .b32 place, counter; mapa.shared::cluster.u32 place, %0, %2; mapa.shared::cluster.u32 counter, %1, %2; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [place], %3, [counter];}"
        ::"r"(shared_address(own)), "r"(shared_address(barrier)), "r"(rank), "r"(value) : "memory");
}
__device__ __forceinline__ void send_four(u32* own, int rank, const u32 (&v)[4], u64* barrier) {
    asm volatile("{.reg .b32 place, counter; mapa.shared::cluster.u32 place, %0, %2; mapa.shared::cluster.u32 counter, %1, %2; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [place], {%3, %4, %5, %6}, [counter];}"
        ::"r"(shared_address(own)), "r"(shared_address(barrier)), "r"(rank), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
__device__ __forceinline__ void largest_at_peer(u32* own, int rank, u32 value) {
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
    asm volatile("red.relaxed.cluster.shared::cluster.max.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void whole_product(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void wide_product(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col." WIDE_TYPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 bytes_of(u32 low, u32 high, u32 selector) {
    u32 chosen;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(chosen) : "r"(low), "r"(high), "r"(selector));
    return chosen;
}
__device__ __forceinline__ u32 subtracted(u32 a, u32 b) {
    u32 d;
#if FLOATS
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#else
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
    return d;
}
#if CODES == 1
__device__ __forceinline__ void from_e4m3(u32& low, u32& high, u32 codes) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}" : "=r"(low), "=r"(high) : "r"(codes));
}
#endif
__device__ __forceinline__ u32 pair_of_halves(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#if ROUNDED == 2
// The nearest numbers of E4M3, as float16.
__device__ __forceinline__ u32 nearest_pair(float low, float high) {
    u32 pair;
    asm("{.reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, %2, %1; cvt.rn.f16x2.e4m3x2 %0, t;}" : "=r"(pair) : "f"(low), "f"(high));
    return pair;
}
#endif
// Numbers of four codes as two pairs of 16 bits.
__device__ __forceinline__ void widen(u32 (&pair)[2], u32 codes) {
#if CODES == 0 && FLOATS  // 128 + the lower seven bits, less 128 or 256
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 two = bytes_of(codes, 0, i ? 0x4342 : 0x4140);
        pair[i] = subtracted((two & 0x007f007fu) | 0x43004300u, (two & 0x00800080u) | 0x43004300u);
    }
#elif CODES == 0  // 1024 + 128 + a code
    const u32 raised = codes ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 2; i++) pair[i] = subtracted(bytes_of(raised, 0x64646464u, i ? 0x4342 : 0x4140), 0x64806480u);
#elif CODES == 1
    from_e4m3(pair[0], pair[1], codes);
#else
#pragma unroll
    for (int i = 0; i < 2; i++) pair[i] = bytes_of(codes, 0, i ? 0x3424 : 0x1404);
#endif
}

__device__ __forceinline__ float scale_of_row(const Work& w, int row) {
    const int at = row * w.scale_step;
#if SCALES_BF16
    return __uint_as_float((u32)__ldg((const u16*)w.scales + at) << 16);
#else
    return __ldg((const float*)w.scales + at);
#endif
}

// Masks of two pairs of 16 bits, from four bits.
__device__ __forceinline__ uint2 pairs_of_bits(u32 bits) {
    return make_uint2((bits & 1 ? 0xffffu : 0) | (bits & 2 ? 0xffff0000u : 0), (bits & 4 ? 0xffffu : 0) | (bits & 8 ? 0xffff0000u : 0));
}
