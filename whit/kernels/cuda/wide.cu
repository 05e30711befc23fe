// y = x W^T for two vectors and more, from packed codes, on the warpgroup tensor cores of compute capability 9.0.
//
// The weight is the operand in registers: 64 rows x 16 columns of codes are expanded by the lanes that hold them, while
// the product before them runs. x is the operand in shared memory, TOKENS vectors x BLOCK columns a stage, brought by the
// tensor copy engine (swizzled by 128 bytes). So a weight is expanded once per TOKENS vectors and no 16-bit weight is ever
// written. Weights are those of the plain meaning rounded once to the type of x, exactly as `decode.cu` gives them.
//
// A thread block has ROW_GROUPS warpgroups of 64 rows each, which only meet at the barriers of the stages. SPLITS blocks of
// a cluster share the columns of a tile; their float32 sums are added in the order of their ranks.

#define ROWS (64 * ROW_GROUPS)
#define BOX_BYTES (TOKENS * 128)
#define X_BYTES (STAGE_BLOCKS * BOXES * BOX_BYTES)  // of one stage: one or two blocks of columns
#define STAGE_BYTES (X_BYTES + (STAGED_CODES ? ROWS * 128 : 0))
#define SUM_STRIDE (ROWS + 4)                    // floats per vector: keeps the lanes of a store in different banks
#define PUSHES (INBOX_BYTES > 0)                 // sums go to the block that adds them, beside the ring of x
#define OUT_STRIDE (ROWS + 8)                    // 16-bit results per vector, likewise
#define TOGETHER ((AHEAD + 1) / 2)               // products begun at once
#define MIDDLE (BLOCK == 64 ? 1 : 4)              // the step in which levels are made (ptxas keeps products apart with 2 of 4)
#define TURN(block) ((block) / STAGE_BLOCKS % 4 * 32)  // the thread that fills stages: warps of a scheduler each

// Results of four rows of a vector, with the bias.
__device__ __forceinline__ void store_four(const Weight& w, const u16* bias, u16* y, int tokens, int token, int row, const float (&v)[4]) {
    if (token >= tokens || row >= w.rows) return;
    u16 out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = x_of_float(v[i] + (bias ? float_of_x(bias[min(row + i, w.rows - 1)]) : 0.0f));
    u16* const place = y + (size_t)token * w.rows + row;
    if (w.rows % 4 == 0) {
        *(uint2*)place = make_uint2(out[0] | (u32)out[1] << 16, out[2] | (u32)out[3] << 16);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (row + i < w.rows) place[i] = out[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
wide(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap codes_map, Weight w, const u16* bias, u16* y, int tokens, int first_tile) {
    extern __shared__ __align__(1024) u8 memory[];
    const int rank = blockIdx.x % SPLITS, tile = first_tile + blockIdx.x / SPLITS, row_tiles = (w.rows + ROWS - 1) / ROWS;
    const int row0 = tile % row_tiles * ROWS, token0 = tile / row_tiles * TOKENS, blocks = w.columns / BLOCK;
    const int begin = rank * blocks / SPLITS, end = (rank + 1) * blocks / SPLITS;
    __builtin_assume(begin < end);  // or products would wait for each other: sums might not come from any
    const int lane = threadIdx.x % 32, r = lane >> 2, q = lane & 3, own_row = threadIdx.x / 32 * 16 + r;
    const int warp_row = row0 + threadIdx.x / 32 * 16;
    const int row[2] = {min(row0 + own_row, w.rows - 1), min(row0 + own_row + 8, w.rows - 1)};
    u16* const codebook = (u16*)(memory + TILE_BYTES);
    u64* const full = (u64*)(memory + TILE_BYTES + CODEBOOK_BYTES);  // a stage has come
    u64* const empty = full + DEPTH;                                 // every warp is done with it
    u64* const sent = empty + DEPTH;                                 // all sums of the cluster have come
    u8* const level_bytes = (u8*)(sent + 2) + threadIdx.x / 32 * 512;  // of two groups
    u8* const scalar_bytes = (u8*)(sent + 2 + 2 * THREADS) + threadIdx.x / 32 * (32 * SCALAR_PITCH);  // of two times four groups
    float* const inbox = (float*)(sent + 2 + (EIGHT ? 2 * THREADS : 0) + (STAGED_SCALARS ? WARPS * 4 * SCALAR_PITCH : 0));  // [SPLITS][TOKENS / SPLITS][SUM_STRIDE]
    u8* const word_bytes = (u8*)(inbox + INBOX_BYTES / 4) + threadIdx.x / 32 * STAGED_BYTES;
    u32* const marks = (u32*)(inbox + (INBOX_BYTES + (STAGED_WORDS ? WARPS * STAGED_BYTES : 0)) / 4);  // of the columns of this block, as the lanes take them
    if (threadIdx.x == 0) {
        prefetch_map(x);
        for (int slot = 0; slot < DEPTH; slot++) {
            barrier_init(full + slot, 1);
            barrier_init(empty + slot, WARPS);
        }
        if (PUSHES) barrier_init(sent, 1);
        barriers_ready();
        if (PUSHES) barrier_expect(sent, TOKENS * ROWS * 4);
    }
    __syncwarp();
    if (PUSHES) cluster_begun();
    const int first_group = GROUP_OF(begin), first_block = WHOLE_ROWS ? 0 : first_group * BLOCKS_IN_GROUP;
    const Places at = places_of(w, warp_row, first_group, lane);
    Codes even, odd;
    auto stage_words = [&](int run) { copy_words(word_bytes + run % 2 * (STAGED_BYTES / 2), w, at, (begin + run * RUN) * (BLOCK / 8 * CODE_BITS), lane); };
    if (STAGED_WORDS) stage_words(0);
    if (!STAGED_WORDS && !STAGED_CODES) fetch_codes(even, w, at, begin, q);
    fetch_scalars(even, w, at, begin, lane, true);
    if (begin + 1 < end) fetch_scalars(odd, w, at, begin + 1, lane, false);
    auto stage_scalars = [&](int epoch) { copy_scalars(scalar_bytes + epoch % 2 * (16 * SCALAR_PITCH), w, at, row0, first_group, epoch, lane); };
    if (STAGED_SCALARS) stage_scalars(0);
    if (STAGED_SCALARS || STAGED_WORDS) copies_commit();
    if (EIGHT && threadIdx.x >= 32) spread_marks(marks, w.salient, begin, end);
    auto load = [&](int block, int slot) {
        barrier_expect(full + slot, STAGE_BYTES);
        if (STAGED_CODES) copy_codes(memory + slot * STAGE_BYTES + X_BYTES, codes_map, full + slot, block * (BLOCK / 16 * BITS), row0);
#pragma unroll
        for (int box = 0; box < STAGE_BLOCKS * BOXES; box++) copy_box(memory + slot * STAGE_BYTES + box * BOX_BYTES, x, full + slot, block * BLOCK + box * 64, token0);
    };
    if (KIND == VECTOR_CODEBOOK) decode_codebook(codebook, w.zeros);
    wait_for_previous_kernel();
    if (threadIdx.x == 0)
        for (int ahead = 0; ahead < DEPTH && begin + ahead * STAGE_BLOCKS < end; ahead++) load(begin + ahead * STAGE_BLOCKS, ahead);
    auto levels_ahead = [&](int block, u32 (&scalars)[LEVEL_WORDS]) {
        if (STAGED_SCALARS) staged_scalars(scalars, scalar_bytes + (block - first_block) / EPOCH % 2 * (16 * SCALAR_PITCH), at, GROUP_OF(block) - first_group, lane);
        make_levels(level_bytes + block % 2 * 256, scalars, lane);
    };
    if (STAGED_SCALARS || STAGED_WORDS) {
        copies_wait<0>();
        __syncwarp();
    }
    if (EIGHT) levels_ahead(begin, even.scalar[0][0]);
    __syncthreads();

    float sums[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0.0f;
    Levels levels[2] = {};  // what is set first where a group begins: NVRTC 13.0 lost one of two constants left unset until then
    int slot = 0, before = 0, phase = 0, phase_before = 0;
    u32 a[AHEAD + 1][4], selector[2][2];
    const Multipliers factors = multipliers();
    const Extraction extraction = extraction_of(q, at.codes[0] >> 31);
    const u64 first_stage = descriptor_of(memory);
    CodePlaces places = {};
    find_places(places, codebook, begin, q, lane);
    auto find_levels = [&](const Codes& codes, int block, int group) {  // of the groups that begin with the block
        if (EIGHT) {
            take_levels(levels, level_bytes + block % 2 * 256, lane);
        } else if (KIND != VECTOR_CODEBOOK) {
#pragma unroll
            for (int h = 0; h < 2; h++) levels_of(levels[h], codes, at, extraction, h, block, group);
        }
    };
    if (WHOLE_ROWS) find_levels(even, begin, 0);
    const u32* const own_marks = marks + q * (BLOCK / 32) - begin * (BLOCK / 8);
    auto multiply_block = [&](int block, Codes& codes, Codes& next, bool is_even) {  // from the first one on
        if (!WHOLE_ROWS && (block == begin || block % BLOCKS_IN_GROUP == 0)) find_levels(codes, block, 0);
        u32 marked[BLOCK / 32] = {};
        if (EIGHT) {
#pragma unroll
            for (int i = 0; i < BLOCK / 32; i += 2) {
                const uint2 two = *(const uint2*)(own_marks + block * (BLOCK / 8) + i);
                marked[i] = two.x, marked[i + 1] = two.y;
            }
        }
        const bool opens_stage = STAGE_BLOCKS == 1 || is_even, closes_stage = STAGE_BLOCKS == 1 || !is_even;
        const int number = block - begin;
        if (STAGED_WORDS) {
            if (is_even && number % RUN == 0 && block + RUN < end) stage_words(number / RUN + 1);
            read_words(codes, word_bytes + number / RUN % 2 * (STAGED_BYTES / 2), number, lane);
        } else if (!STAGED_CODES && block + 1 < end) {
            fetch_codes(next, w, at, block + 1, q);
        }
        if (GROUPS_IN_BLOCK == 1 && block + 2 < end) fetch_scalars(codes, w, at, block + 2, lane, false);
        if (STAGED_SCALARS && (GROUP > BLOCK || is_even) && (block - first_block + 4) % EPOCH == 0 && block + 4 < end) stage_scalars((block - first_block + 4) / EPOCH);
        if (STAGED_SCALARS || STAGED_WORDS) copies_commit();
        const u8* const staged = memory + slot * STAGE_BYTES + X_BYTES + own_row * 128 + 2 * q;
        u32 bytes[2][KEPT_WORDS];
        if (BYTE_CODES) align_codes(bytes, codes, w, at, block);
        if (STAGED_CODES && opens_stage) barrier_wait(full + slot, phase);
        if (STAGED_CODES && BITS < 8) read_staged(codes, memory + slot * STAGE_BYTES + X_BYTES, opens_stage ? 0 : 1, own_row, r);
        const u64 tile_of_x = first_stage + slot * (STAGE_BYTES / 16) + (opens_stage ? 0 : X_BYTES / 32);
#pragma unroll
        for (int step = 0; step < BLOCK / 16; step++) {
            const bool opens = step % TOGETHER == 0, closes = step % TOGETHER == TOGETHER - 1;
            if (opens) products_wait<(AHEAD + 1) / TOGETHER - 1>();  // the registers of the products AHEAD + 1 before these are free
            if (opens_stage && step == AHEAD + 1 - TOGETHER && block > begin && lane == 0) barrier_arrive(empty + before);  // all of the stage before are done
            if (STAGED_SCALARS && step == MIDDLE && block + 1 < end && (block + 1) % BLOCKS_IN_GROUP == 0) levels_ahead(block + 1, next.scalar[0][0]);
            if (GROUPS_IN_BLOCK > 1 && step == 4) {
                find_levels(codes, block, 1);
                if (block + 2 < end) fetch_scalars(codes, w, at, block + 2, lane, false);
            }
            if (TABLE && step % 2 == 0) make_selectors(selector, codes, factors, marked, step, q);
            expand(a[step % (AHEAD + 1)], codes, selector, levels, bytes, staged + ((step ^ r) << 4), extraction, step, q, block * BLOCK, codebook, places);
            if (!closes) continue;
            if (!STAGED_CODES && opens_stage && step == TOGETHER - 1) barrier_wait(full + slot, phase);
            registers_ready();
#pragma unroll
            for (int s = step + 1 - TOGETHER; s <= step; s++) warpgroup_product(sums, a[s % (AHEAD + 1)], tile_of_x + s / 4 * (BOX_BYTES / 16) + s % 4 * 2);
            products_commit();
        }
        if (opens_stage && threadIdx.x == TURN(block) && block > begin && block + (DEPTH - 1) * STAGE_BLOCKS < end) {
            barrier_wait(empty + before, phase_before);
            load(block + (DEPTH - 1) * STAGE_BLOCKS, before);
        }
        if (STAGED_SCALARS || STAGED_WORDS) copies_wait<(STAGED_WORDS ? RUN / 2 : 2)>();  // those of two blocks before
        if (COPIES && WIDTH == 12) next_places(places, block);
        __syncwarp();
        if (!closes_stage) return;
        before = slot, phase_before = phase;
        slot = slot == DEPTH - 1 ? 0 : slot + 1;
        phase ^= slot == 0;
    };
    for (int block = begin; block < end; block += 2) {  // what is loaded ahead is not moved
        multiply_block(block, even, odd, true);
        if (block + 1 < end) multiply_block(block + 1, odd, even, false);
    }
    products_wait<0>();
    __syncthreads();
    if (KIND == VECTOR_CODEBOOK) {
        const float scale[2] = {float_of_half(__ldg((const u16*)w.scalars + row[0])), float_of_half(__ldg((const u16*)w.scalars + row[1]))};
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) sums[i] *= scale[i / 2 % 2];
    }

#if SPLITS == 1
    u16* const staged = (u16*)memory;  // [TOKENS][OUT_STRIDE]
    const float offset[2] = {bias ? float_of_x(bias[row[0]]) : 0.0f, bias ? float_of_x(bias[row[1]]) : 0.0f};
    u16* const place = staged + (lane / 16 * 8 + lane % 8) * OUT_STRIDE + threadIdx.x / 32 * 16 + lane / 8 % 2 * 8;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j += 2) {
        u32 pair[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* from = sums + (4 * j + 2 * i) % (TOKENS / 2);
            pair[i] = pair_of_floats(from[0] + offset[i % 2], from[1] + offset[i % 2]);
        }
        store_transposed(place + (TOKENS == 8 && lane >= 16 ? -8 : 8 * j) * OUT_STRIDE, pair[0], pair[1], pair[2], pair[3]);
    }
    __syncthreads();
    for (int cell = threadIdx.x; cell < TOKENS * (ROWS / 8); cell += THREADS) {
        const int token = cell / (ROWS / 8), part = cell % (ROWS / 8) * 8, first_row = row0 + part;
        if (token0 + token >= tokens || first_row >= w.rows) continue;
        const uint4 eight = *(const uint4*)(staged + token * OUT_STRIDE + part);
        u16* const to = y + (size_t)(token0 + token) * w.rows + first_row;
        if (w.rows % 8 == 0) {
            *(uint4*)to = eight;
        } else {
            const u32 two[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (first_row + i < w.rows) to[i] = (u16)(two[i / 2] >> (16 * (i % 2)));
        }
    }
#elif PUSHES
    constexpr int SHARE = TOKENS / SPLITS;  // vectors that a block adds
    cluster_wait();                         // all blocks have begun
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int token = 8 * j + 2 * q + (e & 1);
            send_sum(inbox + (rank * SHARE + token % SHARE) * SUM_STRIDE + own_row + 8 * (e >> 1), token / SHARE, sums[4 * j + e], sent);
        }
    peers_wait(sent);
    for (int cell = threadIdx.x; cell < SHARE * (ROWS / 4); cell += THREADS) {
        const int own = cell / (ROWS / 4), token = rank * SHARE + own, part = cell % (ROWS / 4) * 4;
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int other = 0; other < SPLITS; other++) {
            const float4 four = *(const float4*)(inbox + (other * SHARE + own) * SUM_STRIDE + part);
            v[0] += four.x, v[1] += four.y, v[2] += four.z, v[3] += four.w;
        }
        store_four(w, bias, y, tokens, token0 + token, row0 + part, v);
    }
#else
    float* const total = (float*)memory;  // [TOKENS][SUM_STRIDE]
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) total[(8 * j + 2 * q + (e & 1)) * SUM_STRIDE + own_row + 8 * (e >> 1)] = sums[4 * j + e];
    cluster_arrive();
    cluster_wait();
    for (int cell = rank * THREADS + threadIdx.x; cell < TOKENS * (ROWS / 4); cell += SPLITS * THREADS) {
        const int token = cell / (ROWS / 4), part = cell % (ROWS / 4) * 4;
        const float* own = total + token * SUM_STRIDE + part;
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int other = 0; other < SPLITS; other++) {
            const uint4 four = peer_words(own, other);
            v[0] += __uint_as_float(four.x), v[1] += __uint_as_float(four.y), v[2] += __uint_as_float(four.z), v[3] += __uint_as_float(four.w);
        }
        store_four(w, bias, y, tokens, token0 + token, row0 + part, v);
    }
    cluster_arrive();
    cluster_wait();  // no block ends while another one reads its sums
#endif
}
