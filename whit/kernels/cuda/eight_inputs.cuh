// Inputs of `eight.cu`: brought into shared memory in units of 128 columns of a vector, marked, and rounded there.

struct Unit {
    int v, strip;
    __device__ __forceinline__ void go(const Unit& by, int strips) {
        v += by.v, strip += by.strip;
        if (strip >= strips) strip -= strips, v++;
    }
};

// The largest magnitude of a unit, to where it is wanted.
__device__ __forceinline__ void keep_largest(const Block& b, uint2 x, int v) {
    u32 largest = larger_integers(x.x & 0x7fff7fffu, x.y & 0x7fff7fffu);
    largest = __reduce_max_sync(0xffffffffu, max(largest & 0xffffu, largest >> 16));
    if (SPLITS > 1 && ROUNDED) {
        if (b.lane < SPLITS) largest_at_peer(b.most + v, b.lane, largest);
    } else if (b.lane == 0) {
        atomicMax(b.most + v, largest);
    }
}

// Four units are a lane's at a time: what a thread has brought it alone reads again.
__device__ __forceinline__ void bring_inputs(const Block& b, const Work& w, const u16* given, Ring& ring, const TensorMap& codes) {
    const int strips = b.span / 128, units = strips * b.vectors;
    const Unit step_on = {WARPS / strips, WARPS % strips};
    Unit at = {b.warp / strips, b.warp % strips};
    bool asked = !PATIENT;
#pragma unroll 1
    for (int unit = b.warp; unit < units; unit += 4 * WARPS) {
        uint2 x[4];
        Unit of[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int column = at.strip * 128 + b.lane * 4;
            of[j] = at;
#if INPUT > 0
            const uint2* const from = (const uint2*)(b.wide_x + 2 * column);
#else
            const uint2* const from = (const uint2*)(given + (size_t)at.v * w.columns + b.begin + column);
#endif
            x[j] = unit + j * WARPS < units && column < b.here ? *from : make_uint2(0, 0);
            at.go(step_on, strips);
        }
        if (!asked) ring.load_others(b, codes), asked = true;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (unit + j * WARPS < units) {
                const int column = of[j].strip * 128 + b.lane * 4;
                *(uint2*)(b.wide_x + of[j].v * b.wide_pitch + 2 * column) = x[j];
#if OUTLIERS == 1
                const u32 low = x[j].x & 0x7fff7fffu, high = x[j].y & 0x7fff7fffu;
                u32 bits = (float_of_x((u16)low) >= w.threshold) | (float_of_x((u16)(low >> 16)) >= w.threshold) << 1;
                bits |= (float_of_x((u16)high) >= w.threshold) << 2 | (float_of_x((u16)(high >> 16)) >= w.threshold) << 3;
                if (bits) atomicOr(b.flags + column / 32, bits << column % 32);
#elif OUTLIERS == 0 && (ROUNDED || CONVERTS)
                if (CONVERTS || !w.input_scale) keep_largest(b, x[j], of[j].v);
#endif
            }
    }
    if (!asked) ring.load_others(b, codes);
}

#if PLACED
// Inputs of stored columns, zero where these are no outliers; `x`: a vector of all columns, every `w.columns`.
__device__ __forceinline__ void place_inputs(const Block& b, const Work& w, const u16* x) {
    for (int i = threadIdx.x; i < b.stored; i += THREADS) {
        const u16* const from = x + (i < w.stored ? w.index[i] : 0);
        bool outlier = OUTLIERS == 2 && i < w.stored;
        if (OUTLIERS == 1 && i < w.stored)
            for (int v = 0; v < b.vectors; v++) outlier |= fabsf(float_of_x(from[(size_t)v * w.columns])) >= w.threshold;
        for (int v = 0; v < b.vectors; v++) ((u16*)(b.placed_x + v * b.placed_pitch))[i] = outlier ? from[(size_t)v * w.columns] : (u16)0;
    }
}
#endif

#if OUTLIERS
// Of what is no outlier.
__device__ __forceinline__ void keep_largest_kept(const Block& b) {
    const int strips = b.span / 128, units = strips * b.vectors;
    const Unit step_on = {WARPS / strips, WARPS % strips};
    Unit at = {b.warp / strips, b.warp % strips};
#pragma unroll 4
    for (int unit = b.warp; unit < units; unit += WARPS) {
        const int column = at.strip * 128 + b.lane * 4;
        const uint2 x = *(const uint2*)(b.wide_x + at.v * b.wide_pitch + 2 * column), kept = pairs_of_bits(~(b.flags[column / 32] >> column % 32));
        keep_largest(b, make_uint2(x.x & kept.x, x.y & kept.y), at.v);
        at.go(step_on, strips);
    }
}
#endif

#if ROUNDED || CONVERTS
__device__ __forceinline__ u32 largest_of(const Block& b, int v) {
#if HELD && SPLITS > 1
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < SPLITS; i++) largest = max(largest, b.sent_most[i * 32 + v]);
    return largest;
#else
    return b.most[v];
#endif
}
// What the inputs of vector `lane` are multiplied with or, but for LLM.int8(), divided by; its step to shared memory.
__device__ __forceinline__ float factor_of(const Block& b, const Work& w) {
    float step = 0.0f, factor = 0.0f;
    if (b.lane < b.vectors) {
#if CONVERTS  // largest magnitudes come to lie between 2^14 and 2^15
        const u32 exponent = max(b.most[b.lane] >> 7, 15u);
        factor = __uint_as_float((268 - exponent) << 23), step = __uint_as_float((exponent - 14) << 23);
#elif LLM
        step = float_of_x((u16)largest_of(b, b.lane));
        factor = __fmul_rn(__fdiv_rn(1.0f, fmaxf(step, SMALLEST)), 127.0f);
        step = __fdiv_rn(step, 127.0f);
#else
        step = float_of_x((u16)largest_of(b, b.lane));
        if (w.input_scale) step = *w.input_scale;
        else step = __fmul_rn(step, __fdiv_rn(1.0f, w.maximum)), step = step == 0.0f ? 1.0f : step;
        factor = step;
#endif
        if (b.warp == 0) b.steps[b.lane] = step;
    }
    return factor;
}
// A number on the scale of the codes.
__device__ __forceinline__ float scaled(float value, float by, const Work& w) {
#if CONVERTS
    return value * by;
#elif LLM
    return fminf(fmaxf(__fmul_rn(value, by), -127.0f), 127.0f);
#else
    const float ratio = __fdiv_rn(value, by), below = ratio < -w.maximum ? -w.maximum : ratio;
    return ratio > w.maximum ? w.maximum : below;
#endif
}
// Bytes of four whole numbers.
__device__ __forceinline__ u32 whole_bytes(const float* value) {
    u32 code[4];
#pragma unroll
    for (int e = 0; e < 4; e++) code[e] = __float_as_uint(__fadd_rn(value[e], ROUNDER));
    return bytes_of(bytes_of(code[0], code[1], 0x0040), bytes_of(code[2], code[3], 0x0040), 0x5410);
}

__device__ __forceinline__ void round_inputs(const Block& b, const Work& w) {
    const int strips = b.span / 128, units = strips * b.vectors;
    const Unit step_on = {WARPS / strips, WARPS % strips};
    Unit at = {b.warp / strips, b.warp % strips};
    const float factor = factor_of(b, w);
#pragma unroll 2
    for (int unit = b.warp; unit < units; unit += WARPS) {
        const int column = at.strip * 128 + b.lane * 4;
        const float by = __uint_as_float(__shfl_sync(0xffffffffu, __float_as_uint(factor), at.v));
        uint2* const place = (uint2*)(b.wide_x + at.v * b.wide_pitch + 2 * column);
        const uint2 x = *place, kept = pairs_of_bits(OUTLIERS ? ~(b.flags[column / 32] >> column % 32) : 15);
        const u32 pairs[2] = {x.x & kept.x, x.y & kept.y};
        float value[4];
#pragma unroll
        for (int e = 0; e < 4; e++) value[e] = scaled(float_of_x((u16)(pairs[e / 2] >> (16 * (e % 2)))), by, w);
#if ROUNDED == 0
        *place = make_uint2(pair_of_halves(value[0], value[1]), pair_of_halves(value[2], value[3]));
#elif ROUNDED == 1
        *(u32*)(b.rounded + at.v * b.pitch + column) = whole_bytes(value);
        if (LOOSE && (b.loose[column / 64 * 2] | b.loose[column / 64 * 2 + 1])) {  // what is no outlier is zero there
            const uint2 outer = pairs_of_bits(b.loose[column / 32] >> column % 32);
            *place = make_uint2(x.x & outer.x, x.y & outer.y);
        }
#else
        *place = make_uint2(nearest_pair(value[0], value[1]), nearest_pair(value[2], value[3]));
#endif
        at.go(step_on, strips);
    }
}
#endif
