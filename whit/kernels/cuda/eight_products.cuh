// Products of `eight.cu`: of 64 columns of 16 rows, and of outlier columns whose weights are stored in 16 bit.

struct Sums {
    int whole[TILES][4];
    float outer[TILES][4];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) whole[t][i] = 0, outer[t][i] = 0.0f;
    }
};

// Adds the product of one item, whose columns are the block's from `first` on.
__device__ __forceinline__ void multiply_item(Sums& s, const Block& b, const u8* stage, int row, int first, const int (&vector_of)[TILES]) {
    const int q = b.q;
#pragma unroll
    for (int half = 0; half < ITEM / 64; half++) {
        const u8* const from = stage + half / 2 * 2048 + row * 128 + ((half % 2 * 4 + q) ^ row) * 16;
        const uint4 top = *(const uint4*)from, bottom = *(const uint4*)(from + 1024);
        const int column = first + half * 64;
#if ROUNDED == 1
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const uint4 x = *(const uint4*)(b.rounded + vector_of[t] * b.pitch + column + 16 * q);
            whole_product(s.whole[t], top.x, bottom.x, top.y, bottom.y, x.x, x.y);
            whole_product(s.whole[t], top.z, bottom.z, top.w, bottom.w, x.z, x.w);
        }
#endif
#if WIDENS
        const uint2 marks = ROUNDED == 1 ? *(const uint2*)(b.loose + column / 32) : make_uint2(1, 1);
        if (marks.x | marks.y) {
            u32 above[8], below[8];
            const u32 tops[4] = {top.x, top.y, top.z, top.w}, bottoms[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                widen(*(u32(*)[2])(above + 2 * i), tops[i]);
                widen(*(u32(*)[2])(below + 2 * i), bottoms[i]);
            }
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const uint4* const x = (const uint4*)(b.wide_x + vector_of[t] * b.wide_pitch + 2 * column + 32 * q);
                const uint4 first = x[0], second = x[1];
                wide_product(s.outer[t], above[0], below[0], above[1], below[1], first.x, first.y);
                wide_product(s.outer[t], above[2], below[2], above[3], below[3], first.z, first.w);
                wide_product(s.outer[t], above[4], below[4], above[5], below[5], second.x, second.y);
                wide_product(s.outer[t], above[6], below[6], above[7], below[7], second.z, second.w);
            }
        }
#endif
    }
}

// Sums of a warp for a tile, to shared memory.
__device__ __forceinline__ void keep_sums(const Sums& s, const Block& b, int tile, int row) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int v = 8 * t + 2 * b.q + i % 2, at = ((tile + b.warp) * MOST + v) * 16 + row + i / 2 * 8;
            if (v < b.vectors) {
                if (WHOLE_SUMS) ((int*)b.sums)[at] = s.whole[t][i];
                else if (LOOSE) b.sums[at] = __fmul_rn((float)s.whole[t][i], b.steps[v]) + s.outer[t][i];
                else b.sums[at] = CONVERTS ? s.outer[t][i] * b.steps[v] : s.outer[t][i];
            }
        }
}

#if PLACED
// Stored columns of whole rows, to shared memory.
__device__ __forceinline__ void multiply_placed(const Block& b, const Work& w, int tile, int row, const int (&vector_of)[TILES]) {
    const int first = b.first_row(tile) + row;
    float beside[TILES][4];
#pragma unroll
    for (int t = 0; t < TILES; t++) beside[t][0] = beside[t][1] = beside[t][2] = beside[t][3] = 0.0f;
    for (int k = 2 * b.q; k < b.stored; k += 16) {
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int line = first + i % 2 * 8, at = k + i / 2 * 8;
            const u16* const from = w.cached + (size_t)line * w.stored + at;
            a[i] = (line < w.rows && at < w.stored ? (u32)__ldg(from) : 0) | (line < w.rows && at + 1 < w.stored ? (u32)__ldg(from + 1) : 0) << 16;
        }
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const u32* const x = (const u32*)(b.placed_x + vector_of[t] * b.placed_pitch + 2 * k);
            wide_product(beside[t], a[0], a[1], a[2], a[3], x[0], x[4]);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int v = 8 * t + 2 * b.q + i % 2;
            if (v < b.vectors) b.placed_sums[(tile / SPLITS * b.vectors + v) * 16 + row + i / 2 * 8] = beside[t][i];
        }
}
#endif
