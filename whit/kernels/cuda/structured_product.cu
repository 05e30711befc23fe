// y = W x for 1 to 16 vectors of x (after `structured.cu`). Thread blocks take row tiles, each warp an item at a time. A block
// takes all columns of its tiles or, if SPLITS is not 1, those of one part, and a cluster of as many blocks as there are
// parts adds their sums. Sums of items are added in a fixed order.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
structured_product(const u16* x, Weight w, const u16* bias, u16* y, int tokens, int parts, int tiles_per_round) {
    extern __shared__ __align__(16) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4, r = lane / 4;
    constexpr int WARP_COUNT = THREADS / 32;
    const int block = blockIdx.x / SPLITS, blocks = gridDim.x / SPLITS, rank = blockIdx.x % SPLITS;
    const int here = SPLITS > 1 ? 1 : parts, part0 = SPLITS > 1 ? rank : 0;  // parts of this block, and the first of them
    u32* const tables = (u32*)memory;
    u16* const xs = (u16*)(tables + TABLE_WORDS);
    const int pitch = here * (4 * UNIT_PITCH) + (TOKENS > 1 ? 96 - here * (4 * UNIT_PITCH) % 64 : 0);  // halves: 4 pieces more than a multiple of 8
    uint2* const masks = (uint2*)(xs + TOKENS * pitch);
    u32* const any = (u32*)(masks + (REGIONS > 1 ? here * (4 * MASK_PITCH) : 0));
    u8* const stage = (u8*)(any + (REGIONS > 1 ? here * 4 : 0)) + warp * ITEM_BYTES;
    float* const partial = (float*)(stage + (WARP_COUNT - warp) * ITEM_BYTES + 16);
    int sign_width, region_width;
    byte_widths(w, sign_width, region_width);
    const int tiles = (w.rows + 15) / 16;

    make_tables(tables, warp, lane, WARP_COUNT);
    wait_for_previous_kernel();
    bool staged = false;
    for (int first = block; first < tiles; first += blocks * tiles_per_round) {
        const int mine = min(tiles_per_round, (tiles - first + blocks - 1) / blocks);
        auto row_of = [&](int item) { return (first + item / here * blocks) * 16; };
        if (warp < mine * here) stage_unit(stage, w, row_of(warp), part0 + warp % here, sign_width, region_width, lane);
        if (!staged) {
            staged = true;
            const int group0 = part0 * (4 * UNIT);
#pragma unroll 1
            for (int token = 0; token < TOKENS; token++)
                for (int at = threadIdx.x; at < here * (4 * UNIT); at += THREADS) {
                    uint4 value = make_uint4(0, 0, 0, 0);
                    if ((group0 + at) * 8 < w.columns && token < tokens) value = *(const uint4*)(x + (size_t)token * w.columns + (group0 + at) * 8);
                    *(uint4*)(xs + token * pitch + at / UNIT * UNIT_PITCH + at % UNIT * 8) = value;
                }
            if (REGIONS > 1) {
                for (int at = threadIdx.x; at < here * (4 * UNIT); at += THREADS)
                    masks[at / UNIT * MASK_PITCH + at % UNIT] = mask_of((group0 + at) * 8 < w.columns ? w.salient[group0 + at] : 0);
                for (int at = warp; at < here * ANY_WORDS; at += WARP_COUNT) any[at / ANY_WORDS * 4 + at % ANY_WORDS] = any_marked(w, part0 + at / ANY_WORDS, at % ANY_WORDS, lane);
            }
            __syncthreads();
        }
#pragma unroll 1
        for (int item = warp; item < mine * here; item += WARP_COUNT) {
            const int row0 = row_of(item), local = item % here, part = part0 + local;
            if (item != warp) stage_unit(stage, w, row0, part, sign_width, region_width, lane);
            copies_wait<0>();
            __syncwarp();
            Unit unit[2];
            begin_unit(unit[0], stage, w, row0, r, part, q, sign_width, region_width);
            begin_unit(unit[1], stage, w, row0, r + 8, part, q, sign_width, region_width);
            const u16* const mine_x = xs + (TOKENS > 1 ? r * pitch : 0) + (local * 4 + q) * UNIT_PITCH;
            const uint2* const mine_masks = masks + (local * 4 + q) * MASK_PITCH;
            u32 any_here[ANY_WORDS];
#pragma unroll
            for (int i = 0; i < ANY_WORDS; i++) any_here[i] = REGIONS > 1 ? any[local * 4 + i] : 0;
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
                    const u32 first_half[4] = {pair[0][0], pair[1][0], pair[0][1], pair[1][1]};
                    const u32 second_half[4] = {pair[0][2], pair[1][2], pair[0][3], pair[1][3]};
                    product(sums[t][0], first_half, v.x, v.y);
                    product(sums[t][1], second_half, v.z, v.w);
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
#if SPLITS > 1
        cluster_arrive();
        cluster_wait();
#else
        __syncthreads();
#endif
        for (int four = threadIdx.x * SPLITS + rank; four < mine * 4 * TOKENS; four += THREADS * SPLITS) {
            const int tile = four / (4 * TOKENS), token = four / 4 % TOKENS, row0 = (first + tile * blocks) * 16 + four % 4 * 4;
            float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            for (int i = 0; i < parts; i++) {
                const float* from = partial + (SPLITS > 1 ? four : (tile * parts + i) * (4 * TOKENS) + four % (4 * TOKENS)) * 4;
                const uint4 part = SPLITS > 1 ? peer_words(from, i) : *(const uint4*)from;
                total[0] += __uint_as_float(part.x), total[1] += __uint_as_float(part.y);
                total[2] += __uint_as_float(part.z), total[3] += __uint_as_float(part.w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (row0 + i < w.rows && token < tokens) y[(size_t)token * w.rows + row0 + i] = x_of_float(total[i] + (bias ? float_of_x(bias[row0 + i]) : 0.0f));
        }
#if SPLITS > 1
        cluster_arrive();  // no block goes on, or ends, while another one reads its sums
        cluster_wait();
#else
        __syncthreads();
#endif
    }
}
