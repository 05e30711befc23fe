// Inputs of `eight.cu`, several vectors of them: in registers from their load to their codes, HELD times 64 columns of all
// vectors a warp's own, so that nobody else is asked which of them are outliers. A lane has eight columns of every fourth
// vector.

#if HELD
struct HeldInputs {
    uint4 x[HELD][2 * TILES];
    u32 outliers[HELD];  // among the eight columns

    __device__ __forceinline__ static int column_of(const Block& b, int u) { return (b.warp + u * WARPS) * 64 + b.lane % 8 * 8; }

    __device__ __forceinline__ void load(const Block& b, const Work& w, const u16* given) {
#pragma unroll
        for (int u = 0; u < HELD; u++)
#pragma unroll
            for (int j = 0; j < 2 * TILES; j++) {
                const int column = column_of(b, u), v = 4 * j + b.lane / 8;
                const u16* const from = given + (size_t)v * w.columns + b.begin + column;
                x[u][j] = v < b.vectors && column < b.here ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
            }
    }
    __device__ __forceinline__ void mark(const Work& w) {
#pragma unroll
        for (int u = 0; u < HELD; u++) {
            outliers[u] = 0;
            if (OUTLIERS == 0) continue;
            u32 most[4] = {0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < 2 * TILES; j++) {
                const u32 word[4] = {x[u][j].x, x[u][j].y, x[u][j].z, x[u][j].w};
#pragma unroll
                for (int i = 0; i < 4; i++) most[i] = larger_pair(most[i], word[i]);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) outliers[u] |= (float_of_x((u16)(most[i / 2] >> (16 * (i % 2)))) >= w.threshold) << i;
            outliers[u] |= __shfl_xor_sync(0xffffffffu, outliers[u], 8);
            outliers[u] |= __shfl_xor_sync(0xffffffffu, outliers[u], 16);
        }
    }
    // What is no outlier, and what is.
    __device__ __forceinline__ uint4 inner(int u, int j) const {
        const uint2 low = pairs_of_bits(~outliers[u]), high = pairs_of_bits(~outliers[u] >> 4);
        return make_uint4(x[u][j].x & low.x, x[u][j].y & low.y, x[u][j].z & high.x, x[u][j].w & high.y);
    }
    __device__ __forceinline__ uint4 outer(int u, int j) const {
        const uint2 low = pairs_of_bits(outliers[u]), high = pairs_of_bits(outliers[u] >> 4);
        return make_uint4(x[u][j].x & low.x, x[u][j].y & low.y, x[u][j].z & high.x, x[u][j].w & high.y);
    }
    // Largest magnitudes of the block's inputs without outliers. Ends with a barrier of the block.
    __device__ __forceinline__ void keep_largest(const Block& b) const {
        u32 largest[TILES];  // of two vectors each
#pragma unroll
        for (int i = 0; i < TILES; i++) largest[i] = 0;
#pragma unroll
        for (int u = 0; u < HELD; u++)
#pragma unroll
            for (int j = 0; j < 2 * TILES; j++) {
                const uint4 kept = inner(u, j);
                const u32 one = larger_integers(larger_integers(kept.x & 0x7fff7fffu, kept.y & 0x7fff7fffu),
                                                larger_integers(kept.z & 0x7fff7fffu, kept.w & 0x7fff7fffu));
                const u32 number = max(one & 0xffffu, one >> 16);
                largest[j / 2] = larger_integers(largest[j / 2], j % 2 ? number << 16 : number);
            }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int across = 1; across < 8; across *= 2) largest[i] = larger_integers(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], across));
            const int v = 8 * i + b.lane / 8 + 4 * (b.lane % 8);
            if (b.lane % 8 < 2 && v < b.vectors) atomicMax(b.most + v, b.lane % 8 ? largest[i] >> 16 : largest[i] & 0xffffu);
        }
        __syncthreads();
    }
    __device__ __forceinline__ void round(const Block& b, const Work& w) const {
        const float factor = factor_of(b, w);
#pragma unroll
        for (int u = 0; u < HELD; u++) {
            const int column = column_of(b, u);
            if (column >= b.span) break;  // the same for all lanes
            const bool met = OUTLIERS && __any_sync(0xffffffffu, outliers[u]);
            if (OUTLIERS && b.lane == 0) *(uint2*)(b.loose + column / 32) = make_uint2(met, 0);
#pragma unroll
            for (int j = 0; j < 2 * TILES; j++) {
                const int v = 4 * j + b.lane / 8;
                const float by = __uint_as_float(__shfl_sync(0xffffffffu, __float_as_uint(factor), v));
                const uint4 kept = inner(u, j);
                const u32 pairs[4] = {kept.x, kept.y, kept.z, kept.w};
                float value[8];
#pragma unroll
                for (int e = 0; e < 8; e++) value[e] = scaled(float_of_x((u16)(pairs[e / 2] >> (16 * (e % 2)))), by, w);
                if (v >= b.vectors) continue;
                uint4* const place = (uint4*)(b.wide_x + v * b.wide_pitch + 2 * column);
#if ROUNDED == 1
                *(uint2*)(b.rounded + v * b.pitch + column) = make_uint2(whole_bytes(value), whole_bytes(value + 4));
                if (met) *place = outer(u, j);
#else
                *place = make_uint4(nearest_pair(value[0], value[1]), nearest_pair(value[2], value[3]),
                                    nearest_pair(value[4], value[5]), nearest_pair(value[6], value[7]));
#endif
            }
        }
    }
};
#endif
