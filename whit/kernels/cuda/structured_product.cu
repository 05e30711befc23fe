// y = W x for 1 to 16 vectors of x (after `structured.cu`). Thread block: all columns of row tiles, an item a warp at a
// time; sums of items are added in a fixed order.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
structured_product(const u16* x, Weight w, const u16* bias, u16* y, int tokens, int parts, int tiles_per_round) {
    extern __shared__ __align__(16) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4, r = lane / 4;
    constexpr int WARP_COUNT = THREADS / 32;
    u32* const tables = (u32*)memory;
    u16* const xs = (u16*)(tables + TABLE_WORDS);
    const int pitch = parts * (4 * UNIT_PITCH) + 32 * (TOKENS > 1) + (TOKENS > 1 ? 64 - parts * (4 * UNIT_PITCH) % 64 : 0);  // halves: 4 pieces more than a multiple of 8
    uint2* const masks = (uint2*)(xs + TOKENS * pitch);
    u32* const any = (u32*)(masks + (REGIONS > 1 ? parts * (4 * MASK_PITCH) : 0));
    u8* const stage = (u8*)(any + (REGIONS > 1 ? parts * 4 : 0)) + warp * ITEM_BYTES;
    float* const partial = (float*)(stage + (WARP_COUNT - warp) * ITEM_BYTES + 16);
    int sign_width, region_width;
    byte_widths(w, sign_width, region_width);
    const int tiles = (w.rows + 15) / 16;

    make_tables(tables, warp, lane, WARP_COUNT);
    wait_for_previous_kernel();
    bool staged = false;
    for (int first = blockIdx.x; first < tiles; first += gridDim.x * tiles_per_round) {
        const int mine = min(tiles_per_round, (tiles - first + (int)gridDim.x - 1) / (int)gridDim.x);
        auto row_of = [&](int item) { return (first + item / parts * (int)gridDim.x) * 16; };
        if (warp < mine * parts) stage_unit(stage, w, row_of(warp), warp % parts, sign_width, region_width, lane);
        if (!staged) {
            staged = true;
#pragma unroll 1
            for (int token = 0; token < TOKENS; token++)
                for (int group = threadIdx.x; group < parts * (4 * UNIT); group += THREADS) {
                    uint4 value = make_uint4(0, 0, 0, 0);
                    if (group * 8 < w.columns && token < tokens) value = *(const uint4*)(x + (size_t)token * w.columns + group * 8);
                    *(uint4*)(xs + token * pitch + group / UNIT * UNIT_PITCH + group % UNIT * 8) = value;
                }
            if (REGIONS > 1)
                for (int at = threadIdx.x; at < parts * (4 * UNIT); at += THREADS)
                    masks[at / UNIT * MASK_PITCH + at % UNIT] = mask_of(at < w.columns / 8 ? w.salient[at] : 0);
            if (REGIONS > 1)
                for (int at = warp; at < parts * ANY_WORDS; at += WARP_COUNT) any[at / ANY_WORDS * 4 + at % ANY_WORDS] = any_marked(w, at / ANY_WORDS, at % ANY_WORDS, lane);
            __syncthreads();
        }
#pragma unroll 1
        for (int item = warp; item < mine * parts; item += WARP_COUNT) {
            const int row0 = row_of(item), part = item % parts;
            if (item != warp) stage_unit(stage, w, row0, part, sign_width, region_width, lane);
            copies_wait<0>();
            __syncwarp();
            Unit unit[2];
            begin_unit(unit[0], stage, w, row0, r, part, q, sign_width, region_width);
            begin_unit(unit[1], stage, w, row0, r + 8, part, q, sign_width, region_width);
            const u16* const mine_x = xs + (TOKENS > 1 ? r * pitch : 0) + (part * 4 + q) * UNIT_PITCH;
            const uint2* const mine_masks = masks + (part * 4 + q) * MASK_PITCH;
            u32 any_here[ANY_WORDS];
#pragma unroll
            for (int i = 0; i < ANY_WORDS; i++) any_here[i] = REGIONS > 1 ? any[part * 4 + i] : 0;
            float sums[NT][2][4];
#pragma unroll
            for (int i = 0; i < NT * 8; i++) sums[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
            for (int i = 0; i < UNIT; i++) {
                u32 pair[2][4];
                u32 codes[2];
                uint2 places[2];
#pragma unroll
                for (int h = 0; h < 2; h++) unit[h].group(codes[h], places[h], tables, lane, i);
                if (REGIONS > 1 && (any_here[i / 32] >> i % 32 & 1)) {
                    const uint2 marks = mine_masks[i];
#pragma unroll
                    for (int h = 0; h < 2; h++) expand<true>(pair[h], unit[h].levels, codes[h], places[h], marks);
                } else {
#pragma unroll
                    for (int h = 0; h < 2; h++) expand<false>(pair[h], unit[h].levels, codes[h], places[h], make_uint2(0, 0));
                }
#pragma unroll
                for (int t = 0; t < NT; t++) {
                    const uint4 v = *(const uint4*)(mine_x + t * 8 * pitch + i * 8);
                    const u32 first[4] = {pair[0][0], pair[1][0], pair[0][1], pair[1][1]};
                    const u32 second[4] = {pair[0][2], pair[1][2], pair[0][3], pair[1][3]};
                    product(sums[t][0], first, v.x, v.y);
                    product(sums[t][1], second, v.z, v.w);
                }
            }
            float* const out = partial + item * (16 * TOKENS);
            if (TOKENS == 1) {
                if (q == 0) out[r] = sums[0][0][0] + sums[0][1][0], out[r + 8] = sums[0][0][2] + sums[0][1][2];
            } else {
#pragma unroll
                for (int t = 0; t < NT; t++)
#pragma unroll
                    for (int e = 0; e < 4; e++) out[(t * 8 + 2 * q + e % 2) * 16 + r + 8 * (e / 2)] = sums[t][0][e] + sums[t][1][e];
            }
            __syncwarp();
        }
        __syncthreads();
        for (int index = threadIdx.x; index < mine * 16 * TOKENS; index += THREADS) {
            const int tile = index / (16 * TOKENS), at = index % (16 * TOKENS), token = at / 16;
            const int row = (first + tile * (int)gridDim.x) * 16 + at % 16;
            if (row < w.rows && token < tokens) {
                float total = bias ? float_of_x(bias[row]) : 0.0f;
                for (int i = 0; i < parts; i++) total += partial[(tile * parts + i) * (16 * TOKENS) + at];
                y[(size_t)token * w.rows + row] = x_of_float(total);
            }
        }
        __syncthreads();
    }
}
