// y = W x for one or two vectors and 4:8 sparse binary weights (after `structured_words.cuh`, with FIXED).
//
// Weights of a row have ten levels at most: a level is a 16-bit fixed-point number relative to the largest of its row, two
// planes of bytes, and x one of 31 bits relative to its largest magnitude, four limbs of 8 bits in as many columns of an
// integer product. All sums are integers, so exact.
//
// A block takes row tiles that follow one another. Its last warp asks the copy engine for their codes, STAGE_TILES at a time;
// the others decode, each for itself, so that nobody waits for all but at the beginning and at the end.

#define LIMBS 4
#define CONSUMERS (WARP_COUNT - 1)
#define BARRIER_BYTES 128
#define PLANES_OF_X (LIMBS * TOKENS)

__device__ __forceinline__ void product_of_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void word_sums(int (&low_sums)[4], int (&high_sums)[4], Word (&word)[2], const Levels (&levels)[2], const u8* tables, u32 lane, const u8* x, const uint2* masks, u32 marked, const Phase& phase) {
    u32 spread[2] = {0, 0};
#pragma unroll
    for (int i = WORD - 1; i >= 0; i--) {
        const uint2 v = *(const uint2*)(x + 8 * i);
        u32 codes[2], low[2], high[2];
        uint2 places[2];
#pragma unroll
        for (int h = 0; h < 2; h++) word[h].group(codes[h], places[h], spread[h], tables, lane, i, phase), level_bytes(low[h], high[h], levels[h], codes[h]);
        if (marked >> i & 1) {
            const uint2 marks = masks[i];
#pragma unroll
            for (int h = 0; h < 2; h++) mark_levels(low[h], high[h], levels[h], codes[h], places[h], marks);
        }
        const u32 lower[4] = {choose_bytes(low[0], 0, places[0].x), choose_bytes(low[1], 0, places[1].x), choose_bytes(low[0], 0, places[0].y), choose_bytes(low[1], 0, places[1].y)};
        const u32 upper[4] = {choose_bytes(high[0], 0, places[0].x), choose_bytes(high[1], 0, places[1].x), choose_bytes(high[0], 0, places[0].y), choose_bytes(high[1], 0, places[1].y)};
        product_of_bytes(low_sums, lower, v.x, v.y);
        product_of_bytes(high_sums, upper, v.x, v.y);
    }
}

// One vector as 31-bit fixed point, limb by limb; what a unit is worth. `largest_of`: a word for each warp.
__device__ __forceinline__ float stage_x(u8* xs, int x_pitch, const u16* x, int groups, int all_groups, u32* largest_of, int warp, int lane) {
    uint4 eight[X_GROUPS];
    u32 largest = 0;
#pragma unroll
    for (int k = 0; k < X_GROUPS; k++) {
        const int group = threadIdx.x + k * THREADS;
        eight[k] = make_uint4(0, 0, 0, 0);
        if (group < groups) eight[k] = read_sixteen((const uint4*)x + group);
        const u32 words_of[4] = {eight[k].x, eight[k].y, eight[k].z, eight[k].w};
#pragma unroll
        for (int i = 0; i < 4; i++) largest = max(largest, max(words_of[i] & 0x7fffu, words_of[i] >> 16 & 0x7fffu));
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) largest_of[warp] = largest;
    __syncthreads();
    largest = __reduce_max_sync(0xffffffffu, lane < WARP_COUNT ? largest_of[lane] : 0);
    const float magnitude = float_of_x((u16)largest);
    const bool tiny = magnitude < 1e-30f;  // (false for NaN, which must reach the result)
    const float unit = tiny ? 0.0f : magnitude * 9.313225746154785e-10f, up = tiny ? 0.0f : 1.0f / unit;
#pragma unroll
    for (int k = 0; k < X_GROUPS; k++) {
        const int group = threadIdx.x + k * THREADS;
        if (group >= all_groups) break;
        const u32 words_of[4] = {eight[k].x, eight[k].y, eight[k].z, eight[k].w};
        u32 fixed[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            fixed[i] = (u32)__float2int_rn(float_of_x((u16)(words_of[i / 2] >> 16 * (i % 2))) * up) + 0x00808080u ^ 0x00808080u;
        u32 limb[4][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 a = __byte_perm(fixed[4 * i], fixed[4 * i + 1], 0x5140), b = __byte_perm(fixed[4 * i + 2], fixed[4 * i + 3], 0x5140);
            const u32 c = __byte_perm(fixed[4 * i], fixed[4 * i + 1], 0x7362), d = __byte_perm(fixed[4 * i + 2], fixed[4 * i + 3], 0x7362);
            limb[0][i] = __byte_perm(a, b, 0x5410), limb[1][i] = __byte_perm(a, b, 0x7632);
            limb[2][i] = __byte_perm(c, d, 0x5410), limb[3][i] = __byte_perm(c, d, 0x7632);
        }
#pragma unroll
        for (int n = 0; n < LIMBS; n++) *(uint2*)(xs + n * x_pitch + group * 8) = make_uint2(limb[n][0], limb[n][1]);
    }
    return unit;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
structured_vector(const u16* x, Weight w, const u16* bias, u16* y, int slices, int most_rows) {
    const int block = blockIdx.x, blocks = gridDim.x;
    extern __shared__ __align__(16) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane % 4, r = lane / 4;
    const int groups = w.columns / 8, words = (groups + WORD - 1) / WORD;
    const Streams streams(w, STAGE_TILES * 16);
    const int x_pitch = slices * (SLICE * WORD_COLUMNS) + 32;
    u8* const tables = memory + BARRIER_BYTES;
    Levels* const levels = (Levels*)(tables + TABLE_BYTES);
    u8* const xs = (u8*)(levels + most_rows);
    uint2* const zeros = (uint2*)(xs + PLANES_OF_X * x_pitch);
    uint2* const masks = zeros + WORD + 1;
    u32* const any = (u32*)(masks + slices * SLICE_GROUPS);
    u32* const largest_of = any + slices;
    float* const partial = (float*)(largest_of + 32 * TOKENS);
    const int ring_start = (int)((u8*)(partial + most_rows * slices * TOKENS) - memory + 15) & ~15;
    const int tiles = (w.rows + 15) / 16, first_tile = (int)((u64)block * tiles / blocks), last_tile = (int)((u64)(block + 1) * tiles / blocks);
    const int row0 = first_tile * 16, row_end = min(last_tile * 16, w.rows), stages = (last_tile - first_tile + STAGE_TILES - 1) / STAGE_TILES;

    u64* const full = (u64*)memory, * const empty = full + DEPTH;
    const auto stage = [&](int number) {
        const int from = row0 + number * (STAGE_TILES * 16);
        streams.stage(memory + ring_start + number % DEPTH * streams.stage_bytes, from, min(STAGE_TILES * 16, row_end - from), full + number % DEPTH, lane);
    };
    start_next_kernel();
    // All that is asked of memory before anything is waited for. The last warp asks for the codes.
    const bool asks = warp == WARP_COUNT - 1;
    if (asks) {
        if (lane < DEPTH) barrier_init(full + lane, 1), barrier_init(empty + lane, CONSUMERS);
        barriers_ready();
        __syncwarp();
#pragma unroll 1
        for (int number = 0; number < min(DEPTH, stages); number++) stage(number);
    }
    Patterns patterns;
    patterns.load(warp);
    Scalars scalars;
    scalars.load(w, row0 + threadIdx.x);
    u32 marks[X_GROUPS];
#pragma unroll
    for (int k = 0; k < X_GROUPS; k++) marks[k] = (int)threadIdx.x + k * THREADS < groups ? __ldg(w.salient + threadIdx.x + k * THREADS) : 0;
    const u32 steps = warp < slices ? marked_steps(w, warp * SLICE_GROUPS, lane) : 0;

    make_tables(tables, patterns, warp, lane);
    if (row0 + (int)threadIdx.x < row_end) make_levels(levels[threadIdx.x], scalars);
    for (int row = row0 + threadIdx.x + THREADS; row < row_end; row += THREADS) scalars.load(w, row), make_levels(levels[row - row0], scalars);
#pragma unroll
    for (int k = 0; k < X_GROUPS; k++)
        if ((int)threadIdx.x + k * THREADS < slices * SLICE_GROUPS) masks[threadIdx.x + k * THREADS] = mask_of(marks[k]);
    if (lane == 0 && warp < slices) any[warp] = steps;
    for (int slice = warp + WARP_COUNT; slice < slices; slice += WARP_COUNT) {
        const u32 more = marked_steps(w, slice * SLICE_GROUPS, lane);
        if (lane == 0) any[slice] = more;
    }
    if (threadIdx.x < WORD) zeros[threadIdx.x] = make_uint2(0, 0);

    wait_for_previous_kernel();
    float x_unit[TOKENS];
#pragma unroll
    for (int token = 0; token < TOKENS; token++)
        x_unit[token] = stage_x(xs + token * (LIMBS * x_pitch), x_pitch, x + token * w.columns, groups, slices * SLICE_GROUPS, largest_of + 32 * token, warp, lane);

    __syncthreads();
    if (asks) {
#pragma unroll 1
        for (int number = DEPTH; number < stages; number++) {
            barrier_wait(empty + number % DEPTH, (number / DEPTH - 1) & 1);
            stage(number);
        }
    }
    // Warps take slices, or with more warps than slices a share of the tiles as well.
    const int teams = CONSUMERS > slices ? CONSUMERS / slices : 1, team = warp / slices, slice0 = warp % slices;
#pragma unroll 1
    for (int number = 0; number < (asks ? 0 : stages); number++) {
        barrier_wait(full + number % DEPTH, number / DEPTH & 1);
        const int stage_row = number * (STAGE_TILES * 16), here_tiles = min(STAGE_TILES, last_tile - first_tile - number * STAGE_TILES);
#pragma unroll 1
        for (int slice = team < teams ? slice0 : slices; slice < slices; slice += CONSUMERS) {
            const int word_number = min(slice * SLICE + q, words - 1);
            const Phase phase = phase_of(word_number);
            Start start;
            const int index_at = r * pitch_of(w.width) + word_number * 7, sign_at = r * pitch_of(streams.sign_width) * 8 + word_number * 36, region_at = r * pitch_of(streams.region_width) + word_number * 7 + word_number / 5;
            start.index = index_at >> 2, start.signs = sign_at >> 5, start.regions = region_at >> 2;
            start.index_shift = (index_at & 3) * 8, start.sign_shift = sign_at & 31, start.region_shift = (region_at & 3) * 8;
            const u8* const mine = r < PLANES_OF_X ? xs + r * x_pitch + (slice * SLICE + q) * WORD_COLUMNS : (const u8*)zeros;
            const uint2* const mine_masks = masks + (slice * SLICE + q) * WORD;
            const u32 marked = any[slice];
#pragma unroll 1
            for (int tile = team; tile < here_tiles; tile += teams) {
                const u8* const here = memory + ring_start + number % DEPTH * streams.stage_bytes;
                const u32* const index_words = (const u32*)(here + tile * 16 * pitch_of(w.width));
                const u32* const sign_words = (const u32*)(here + streams.index_bytes + tile * 16 * pitch_of(streams.sign_width));
                const u32* const region_words = (const u32*)(here + streams.index_bytes + streams.sign_bytes + tile * 16 * pitch_of(streams.region_width));
                Word word[2];
                Levels mine_levels[2];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    mine_levels[h] = levels[stage_row + tile * 16 + r + 8 * h];
                    word[h].begin(index_words + 2 * h * pitch_of(w.width), sign_words + 2 * h * pitch_of(streams.sign_width), region_words + 2 * h * pitch_of(streams.region_width), start, phase);
                }
                int low_sums[4] = {0, 0, 0, 0}, high_sums[4] = {0, 0, 0, 0};
                word_sums(low_sums, high_sums, word, mine_levels, tables, lane, mine, mine_masks, marked, phase);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float sum = (float)(high_sums[2 * h] * 256 + low_sums[2 * h]) + (float)(high_sums[2 * h + 1] * 256 + low_sums[2 * h + 1]) * 256.0f;
                    if (q % 2) sum *= 65536.0f;
                    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                    if (q % 2 == 0 && q / 2 < TOKENS) partial[((stage_row + tile * 16 + r + 8 * h) * TOKENS + q / 2) * slices + slice] = sum;
                }
            }
        }
        if (number + DEPTH < stages) {
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + number % DEPTH);
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < (row_end - row0) * TOKENS; at += THREADS) {
        const int row = at / TOKENS, token = at % TOKENS;
        float total = 0.0f;
        for (int i = 0; i < slices; i++) total += partial[at * slices + i];
        y[(size_t)token * w.rows + row0 + row] = x_of_float(total * levels[row].unit * (token ? x_unit[TOKENS - 1] : x_unit[0]) + (bias ? float_of_x(bias[row0 + row]) : 0.0f));
    }
}
