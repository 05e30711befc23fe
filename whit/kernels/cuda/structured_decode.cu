// The dense 16-bit weight (after `structured.cu`), exactly the plain meaning rounded once: 8 columns a store.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode(Weight w, u16* out) {
    extern __shared__ __align__(16) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4, r = lane / 4;
    constexpr int WARP_COUNT = THREADS / 32;
    u32* const tables = (u32*)memory;
    u8* const stage = (u8*)(tables + TABLE_WORDS) + warp * ITEM_BYTES;
    int sign_width, region_width;
    byte_widths(w, sign_width, region_width);
    const int groups = w.columns / 8, parts = (groups + 4 * UNIT - 1) / (4 * UNIT), items = (w.rows + 15) / 16 * parts;
    make_tables(tables, warp, lane, WARP_COUNT);
    __syncthreads();
#pragma unroll 1
    for (int item = blockIdx.x * WARP_COUNT + warp; item < items; item += gridDim.x * WARP_COUNT) {
        const int row0 = item / parts * 16, part = item % parts, group0 = (part * 4 + q) * UNIT;
        stage_unit(stage, w, row0, part, sign_width, region_width, lane);
        copies_wait<0>();
        __syncwarp();
#pragma unroll 1
        for (int h = 0; h < 2; h++) {
            const int row = row0 + r + 8 * h;
            Unit unit;
            begin_unit(unit, stage, w, row0, r + 8 * h, part, q, sign_width, region_width);
            u16* const to = out + (size_t)row * w.columns + group0 * 8;
#pragma unroll
            for (int i = 0; i < UNIT; i++) {
                const u32 marked = REGIONS > 1 && group0 + i < groups ? __ldg(w.salient + group0 + i) : 0;
                u32 codes, pair[4];
                uint2 places;
                unit.group(codes, places, tables, lane, i);
                if (REGIONS > 1 && __any_sync(0xffffffffu, marked))
                    expand<true>(pair, unit.levels, codes, places, mask_of(marked));
                else
                    expand<false>(pair, unit.levels, codes, places, make_uint2(0, 0));
                if (row < w.rows && group0 + i < groups) *(uint4*)(to + i * 8) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
            }
        }
        __syncwarp();
    }
}
