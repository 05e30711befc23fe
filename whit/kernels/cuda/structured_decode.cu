// The dense 16-bit weight (after `structured.cu`), exactly the plain meaning rounded once. Columns that a lane decodes are
// collected in shared memory until they fill the 128 bytes of a line of the result, which eight lanes then write: stores of
// 16 bytes into as many lines as there are lanes take six times as long.

#define LINE 8                         // groups of 8 columns
#define LINE_PITCH (16 * (LINE + 1))   // bytes
#define LINES_BYTES (32 * LINE_PITCH)  // of a warp: 8 rows x 4 units

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode(Weight w, u16* out) {
    extern __shared__ __align__(16) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4, r = lane / 4;
    constexpr int WARP_COUNT = THREADS / 32;
    u32* const tables = (u32*)memory;
    u8* const stage = (u8*)(tables + TABLE_WORDS) + warp * (ITEM_BYTES + LINES_BYTES);
    u8* const lines = stage + ITEM_BYTES;
    int sign_width, region_width;
    byte_widths(w, sign_width, region_width);
    const int groups = w.columns / 8, parts = (groups + 4 * UNIT - 1) / (4 * UNIT), items = (w.rows + 15) / 16 * parts;
    make_tables(tables, warp, lane, WARP_COUNT);
    __syncthreads();
#pragma unroll 1
    for (int item = blockIdx.x * WARP_COUNT + warp; item < items; item += gridDim.x * WARP_COUNT) {
        const int row0 = item / parts * 16, part = item % parts, group0 = (part * 4 + q) * UNIT;
        stage_unit(stage, w, row0, part, sign_width, region_width, lane);
        u32 any_here[ANY_WORDS];
#pragma unroll
        for (int i = 0; i < ANY_WORDS; i++) any_here[i] = REGIONS > 1 ? any_marked(w, part, i, lane) : 0;
        copies_wait<0>();
        __syncwarp();
#pragma unroll 1
        for (int h = 0; h < 2; h++) {
            Unit unit;
            begin_unit(unit, stage, w, row0, r + 8 * h, part, q, sign_width, region_width);
            // Lane i writes sixteenths i % 8 of lines, in rows i / 8 and i / 8 + 4.
            const int row = row0 + 8 * h + lane / 8;
#pragma unroll
            for (int i = 0; i < UNIT; i++) {
                u32 codes, pair[4];
                uint2 places;
                unit.group(codes, places, tables, lane, i);
                if (REGIONS > 1 && (any_here[i / 32] >> i % 32 & 1))
                    expand<true>(pair, unit.levels, codes, places, mask_of(group0 + i < groups ? __ldg(w.salient + group0 + i) : 0));
                else
                    expand<false>(pair, unit.levels, codes, places, make_uint2(0, 0));
                *(uint4*)(lines + lane * LINE_PITCH + (group0 + i) % LINE * 16) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
#pragma unroll 1
                for (int from = 0; from < 4; from++) {  // units whose line is full
                    const int last = (part * 4 + from) * UNIT + i;
                    if (last % LINE != LINE - 1 && i < UNIT - 1) continue;
                    __syncwarp();
                    const int group = last / LINE * LINE + lane % 8;
                    const bool there = group <= last && group >= last - i && group < groups;
#pragma unroll
                    for (int k = 0; k < 2; k++)
                        if (there && row + 4 * k < w.rows)
                            *(uint4*)(out + (size_t)(row + 4 * k) * w.columns + group * 8) = *(const uint4*)(lines + ((lane / 8 + 4 * k) * 4 + from) * LINE_PITCH + lane % 8 * 16);
                    __syncwarp();
                }
            }
        }
        __syncwarp();
    }
}
