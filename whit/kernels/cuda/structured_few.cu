// y = W x for up to 16 vectors and 4:8 sparse binary weights (after `structured_words.cuh`).
//
// Levels are expanded in registers as the first operand of 16-bit tensor-core products; x lies in shared memory. A cluster of
// SPLITS blocks shares the columns of the same rows; then the sums of each part pass through memory.

#define NT (TOKENS / 8)
#define BARRIER_BYTES 64

__device__ __forceinline__ void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Bytes of rows from `start` on, whose copies begin at the multiple of 16 bytes before; as `Streams` for parts of rows.
__device__ __forceinline__ int pieces_of(int bytes) { return (bytes + 15 + 8 + 15) / 16 | 1; }  // odd: rows in different banks
__device__ __forceinline__ int part_bytes(u32 source, u32 end, int pieces) { return source >= end ? 0 : min(pieces * 16, (int)(end - source)); }
__device__ __forceinline__ int stage_part_rest(u8* to, const u8* from, int width, int row0, int rows, int all_rows, int start, int pieces, int lane) {
    int whole = 0;
    for (int row = lane; row < rows; row += 32) {
        const u32 source = ((u32)(row0 + row) * (u32)width + start) & ~15u;
        const int bytes = part_bytes(source, (u32)all_rows * (u32)width, pieces);
        for (int i = bytes / 16 * 16; i < bytes; i++) to[row * pieces * 16 + i] = __ldg(from + source + i);
        whole += bytes / 16 * 16;
    }
    return whole;
}
__device__ __forceinline__ void stage_part(u8* to, const u8* from, int width, int row0, int rows, int all_rows, int start, int pieces, u64* barrier, int lane) {
    for (int row = lane; row < rows; row += 32) {
        const u32 source = ((u32)(row0 + row) * (u32)width + start) & ~15u;
        const int bytes = part_bytes(source, (u32)all_rows * (u32)width, pieces) / 16 * 16;
        if (bytes > 0) copy_bulk(to + row * pieces * 16, from + source, bytes, barrier);
    }
}

__device__ __forceinline__ void word_sums(float (&sums)[NT][2][4], Word (&word)[2], const Levels (&levels)[2], const u8* tables, u32 lane, const u16* x, int pitch, const uint2* masks, u32 marked, const Phase& phase) {
    u32 spread[2] = {0, 0};
#pragma unroll
    for (int i = WORD - 1; i >= 0; i--) {
        u32 codes[2], low[2], high[2], pair[2][4];
        uint2 places[2];
#pragma unroll
        for (int h = 0; h < 2; h++) word[h].group(codes[h], places[h], spread[h], tables, lane, i, phase), level_bytes(low[h], high[h], levels[h], codes[h]);
        if (marked >> i & 1) {
            const uint2 marks = masks[i];
#pragma unroll
            for (int h = 0; h < 2; h++) mark_levels(low[h], high[h], levels[h], codes[h], places[h], marks);
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 selector = half ? places[h].y : places[h].x, a = choose_bytes(low[h], 0, selector), b = choose_bytes(high[h], 0, selector);
                pair[h][2 * half] = choose_bytes(a, b, 0x5140), pair[h][2 * half + 1] = choose_bytes(a, b, 0x7362);
            }
        const u32 first[4] = {pair[0][0], pair[1][0], pair[0][1], pair[1][1]}, second[4] = {pair[0][2], pair[1][2], pair[0][3], pair[1][3]};
#pragma unroll
        for (int t = 0; t < NT; t++) {
            const uint4 v = *(const uint4*)(x + t * 8 * pitch + i * 8);
            product(sums[t][0], first, v.x, v.y);
            product(sums[t][1], second, v.z, v.w);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
structured_few(const u16* x, Weight w, const u16* bias, u16* y, float* split_sums, int tokens, int slices, int most_rows) {
    extern __shared__ __align__(16) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4, r = lane / 4;
    const int cluster = blockIdx.x / SPLITS, clusters = gridDim.x / SPLITS, rank = blockIdx.x % SPLITS;
    const int groups = w.columns / 8, words = (groups + WORD - 1) / WORD, word0 = rank * slices * SLICE, group0 = word0 * WORD;
    const int sign_width = (groups * 4 + 7) / 8, region_width = (groups * 4 + 4) / 5;
    const int pitch = slices * (SLICE * WORD_COLUMNS) + (slices % 2 ? 0 : 32);  // half a row of banks more than a multiple
    u8* const tables = memory + BARRIER_BYTES;
    Levels* const levels = (Levels*)(tables + TABLE_BYTES);
    u16* const xs = (u16*)(levels + most_rows);
    float* const partial = (float*)(xs + TOKENS * pitch);
    uint2* const masks = (uint2*)(partial + STAGE_TILES * slices * 16 * TOKENS);
    const int ring_start = (int)((u8*)(masks + slices * SLICE_GROUPS) - memory);
    const int index_start = word0 * 7, sign_start = word0 / 2 * 9, region_start = word0 * 7 + word0 / 5;
    const int index_pieces = pieces_of(slices * (SLICE * 7)), sign_pieces = pieces_of(slices * (SLICE * 9 / 2)), region_pieces = pieces_of(slices * (SLICE * 36) / 5 + 1);
    const int row_bytes = 16 * (index_pieces + sign_pieces + region_pieces), stage_bytes = STAGE_TILES * 16 * row_bytes;
    u32* const any = (u32*)(memory + ring_start + DEPTH * stage_bytes);
    const int tiles = (w.rows + 15) / 16, first_tile = (int)((u64)cluster * tiles / clusters), last_tile = (int)((u64)(cluster + 1) * tiles / clusters);
    const int row0 = first_tile * 16, row_end = min(last_tile * 16, w.rows), stages = (last_tile - first_tile + STAGE_TILES - 1) / STAGE_TILES;

    u64* const full = (u64*)memory;
    const auto stage = [&](int number) {
        const int from = row0 + number * (STAGE_TILES * 16), rows = min(STAGE_TILES * 16, row_end - from);
        u8 *const to_index = memory + ring_start + number % DEPTH * stage_bytes, *const to_signs = to_index + STAGE_TILES * 256 * index_pieces, *const to_regions = to_signs + STAGE_TILES * 256 * sign_pieces;
        u64* const barrier = full + number % DEPTH;
        int bytes = stage_part_rest(to_index, w.codes[0], w.width, from, rows, w.rows, index_start, index_pieces, lane);
        bytes += stage_part_rest(to_signs, w.codes[1], sign_width, from, rows, w.rows, sign_start, sign_pieces, lane);
        bytes += stage_part_rest(to_regions, w.zeros, region_width, from, rows, w.rows, region_start, region_pieces, lane);
        bytes = __reduce_add_sync(0xffffffffu, bytes);
        if (lane == 0) barrier_expect(barrier, bytes);
        __syncwarp();
        stage_part(to_index, w.codes[0], w.width, from, rows, w.rows, index_start, index_pieces, barrier, lane);
        stage_part(to_signs, w.codes[1], sign_width, from, rows, w.rows, sign_start, sign_pieces, barrier, lane);
        stage_part(to_regions, w.zeros, region_width, from, rows, w.rows, region_start, region_pieces, barrier, lane);
    };
    start_next_kernel();
    if (warp == 0) {
        if (lane <= DEPTH) barrier_init(full + lane, 1);
        barriers_ready();
        __syncwarp();
#pragma unroll 1
        for (int number = 0; number < min(DEPTH, stages); number++) stage(number);
    }
    Patterns patterns;
    patterns.load(warp);
    Scalars scalars;
    scalars.load(w, row0 + threadIdx.x);
    const u32 steps = warp < slices ? marked_steps(w, group0 + warp * SLICE_GROUPS, lane) : 0;
    for (int i = threadIdx.x; i < slices * SLICE_GROUPS; i += THREADS) masks[i] = mask_of(group0 + i < groups ? __ldg(w.salient + group0 + i) : 0);
    make_tables(tables, patterns, warp, lane);
    if (row0 + (int)threadIdx.x < row_end) make_levels(levels[threadIdx.x], scalars);
    for (int row = row0 + threadIdx.x + THREADS; row < row_end; row += THREADS) scalars.load(w, row), make_levels(levels[row - row0], scalars);
    if (lane == 0 && warp < slices) any[warp] = steps;
    for (int slice = warp + WARP_COUNT; slice < slices; slice += WARP_COUNT) {
        const u32 more = marked_steps(w, group0 + slice * SLICE_GROUPS, lane);
        if (lane == 0) any[slice] = more;
    }
    wait_for_previous_kernel();
    // Vectors that are not there may be anything: their sums are not kept.
    const int here = min(slices * SLICE_GROUPS, groups - group0), beyond = slices * SLICE_GROUPS - here;
    if (warp == 0) {
        if (lane == 0) barrier_expect(full + DEPTH, tokens * here * 16);
        __syncwarp();
        if (lane < tokens) copy_bulk((u8*)(xs + lane * pitch), (const u8*)(x + (size_t)lane * w.columns + group0 * 8), here * 16, full + DEPTH);
    }
    for (int at = threadIdx.x; at < tokens * beyond; at += THREADS) *(uint4*)(xs + at / beyond * pitch + (here + at % beyond) * 8) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    barrier_wait(full + DEPTH, 0);
    // Warps take slices, or with more warps than slices a share of the tiles as well.
    const int teams = WARP_COUNT > slices ? WARP_COUNT / slices : 1, team = warp / slices, slice0 = warp % slices;
#pragma unroll 1
    for (int number = 0; number < stages; number++) {
        barrier_wait(full + number % DEPTH, number / DEPTH & 1);
        if (number > 0) __syncthreads();  // sums of the stage before have been read
        const int stage_row = number * (STAGE_TILES * 16), here_tiles = min(STAGE_TILES, last_tile - first_tile - number * STAGE_TILES);
#pragma unroll 1
        for (int slice = team < teams ? slice0 : slices; slice < slices; slice += WARP_COUNT) {
            const int word_number = max(min(word0 + slice * SLICE + q, words - 1), word0);
            const Phase phase = phase_of(word_number);
            // Copies of rows begin at multiples of 16 bytes, and so do tiles: their rows lie alike.
            Start start;
            const int index_at = r * index_pieces * 16 + (int)(((u32)r * (u32)w.width + index_start) & 15) - index_start + word_number * 7;
            const int sign_at = (r * sign_pieces * 16 + (int)(((u32)r * (u32)sign_width + sign_start) & 15) - sign_start) * 8 + word_number * 36;
            const int region_at = r * region_pieces * 16 + (int)(((u32)r * (u32)region_width + region_start) & 15) - region_start + word_number * 7 + word_number / 5;
            start.index = index_at >> 2, start.signs = sign_at >> 5, start.regions = region_at >> 2;
            start.index_shift = (index_at & 3) * 8, start.sign_shift = sign_at & 31, start.region_shift = (region_at & 3) * 8;
            // Row r + 8 may begin half a piece further on.
            const int index_half = 8 * index_pieces * 16 + (int)(((u32)(r + 8) * (u32)w.width + index_start) & 15) - (int)(((u32)r * (u32)w.width + index_start) & 15);
            const int sign_half = 8 * sign_pieces * 16 + (int)(((u32)(r + 8) * (u32)sign_width + sign_start) & 15) - (int)(((u32)r * (u32)sign_width + sign_start) & 15);
            const int region_half = 8 * region_pieces * 16 + (int)(((u32)(r + 8) * (u32)region_width + region_start) & 15) - (int)(((u32)r * (u32)region_width + region_start) & 15);
            const u16* const mine = xs + r * pitch + (slice * SLICE + q) * WORD_COLUMNS;
            const uint2* const mine_masks = masks + (slice * SLICE + q) * WORD;
            const u32 marked = any[slice];
#pragma unroll 1
            for (int tile = team; tile < here_tiles; tile += teams) {
                const u8* const here = memory + ring_start + number % DEPTH * stage_bytes;
                const u8* const index_words = here + tile * 256 * index_pieces;
                const u8* const sign_words = here + STAGE_TILES * 256 * index_pieces + tile * 256 * sign_pieces;
                const u8* const region_words = here + STAGE_TILES * 256 * (index_pieces + sign_pieces) + tile * 256 * region_pieces;
                Word word[2];
                Levels mine_levels[2];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    mine_levels[h] = levels[stage_row + tile * 16 + r + 8 * h];
                    word[h].begin((const u32*)(index_words + h * index_half), (const u32*)(sign_words + h * sign_half), (const u32*)(region_words + h * region_half), start, phase);
                }
                float sums[NT][2][4];
#pragma unroll
                for (int i = 0; i < NT * 8; i++) sums[i / 8][i / 4 % 2][i % 4] = 0.0f;
                word_sums(sums, word, mine_levels, tables, lane, mine, pitch, mine_masks, marked, phase);
                float* const out = partial + (tile * slices + slice) * (16 * TOKENS);
#pragma unroll
                for (int t = 0; t < NT; t++)
#pragma unroll
                    for (int e = 0; e < 4; e++) out[(t * 8 + 2 * q + e % 2) * 16 + r + 8 * (e / 2)] = sums[t][0][e] + sums[t][1][e];
            }
        }
        __syncthreads();
        if (warp == 0 && number + DEPTH < stages) stage(number + DEPTH);
        for (int four = threadIdx.x; four < here_tiles * 4 * TOKENS; four += THREADS) {
            const int tile = four / (4 * TOKENS), token = four / 4 % TOKENS, row = row0 + stage_row + tile * 16 + four % 4 * 4;
            float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            for (int i = 0; i < slices; i++) {
                const float4 part = *(const float4*)(partial + (tile * slices + i) * (16 * TOKENS) + token * 16 + four % 4 * 4);
                total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
            }
            if (token >= tokens) continue;
            if (SPLITS > 1) {
                *(float4*)(split_sums + ((size_t)(rank * tokens + token) * tiles * 16 + row)) = float4{total[0], total[1], total[2], total[3]};
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (row + i < w.rows) y[(size_t)token * w.rows + row + i] = x_of_float(total[i] + (bias ? float_of_x(bias[row + i]) : 0.0f));
            }
        }
    }
#if SPLITS > 1
    cluster_arrive();
    cluster_wait();
    const int fours = (last_tile - first_tile) * 4;
    for (int at = threadIdx.x * SPLITS + rank; at < fours * tokens; at += THREADS * SPLITS) {
        const int token = at / fours, row = row0 + at % fours * 4;
        float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < SPLITS; i++) {
            const float4 part = *(const float4*)(split_sums + ((size_t)(i * tokens + token) * tiles * 16 + row));
            total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (row + i < w.rows) y[(size_t)token * w.rows + row + i] = x_of_float(total[i] + (bias ? float_of_x(bias[row + i]) : 0.0f));
    }
#endif
}
