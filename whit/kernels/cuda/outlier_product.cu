// LLM.int8() for many tokens on the warpgroup tensor cores of compute capability 9.0: y of tiles of M tokens x N rows.
//
// All operands come in slices of 128 bytes of a row, swizzled by 128 bytes: 128 columns of 8-bit codes, or 64 outlier
// columns in 16 bit, gathered beforehand with zeros up to a multiple of 64. A tile is first the product of codes, int32;
// scaled to float32 in place, it goes on with the outlier columns whose weights are codes, is scaled by rows, and goes on
// with those that have a 16-bit weight. How many there are is read from memory: any number is right, and each 64 of them
// cost as much as 128 others.
//
// One warp asks the tensor copy engine for slices; two warpgroups of M / 2 tokens each multiply. A block takes tile after
// tile, and slices of the next one arrive while a tile ends. The blocks of a cluster take neighbouring rows of the same
// tokens, and each brings its share of these for all.

#define BLOCKS (M / 128)  // of 64 tokens, per warpgroup
#define SHARE (M / CLUSTER)  // tokens that a block of a cluster brings
#define STAGE_BYTES ((M + N) * 128)
#define OUT_STRIDE (CHUNK % 32 == 0 ? CHUNK + 8 : CHUNK)  // 16-bit results per token: lanes of a store in different banks

struct Work {
    const float* input_absmax;  // (tokens,)
    const float* absmax;        // (rows,), or one if absmax_step is 0
    const int* counts;          // outlier columns without and with a 16-bit weight
    const u16* bias;
    u16* out;
    int tokens, rows, columns, absmax_step, group;
};

extern "C" __global__ void __launch_bounds__(384, 1)
outlier_product(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right, const __grid_constant__ TensorMap loose_inputs, const __grid_constant__ TensorMap loose_weight, const __grid_constant__ TensorMap placed_inputs, const __grid_constant__ TensorMap placed_weight, Work w) {
    extern __shared__ __align__(1024) u8 memory[];
    u64* const full = (u64*)(memory + DEPTH * STAGE_BYTES);  // a slice has come
    u64* const empty = full + DEPTH;                         // every warp is done with it
    u16* const results = (u16*)(empty + DEPTH);              // [warp][16][OUT_STRIDE]
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // the same in all lanes, as the compiler sees
    const int down = (w.tokens + M - 1) / M, across = (w.rows + CLUSTER * N - 1) / (CLUSTER * N), tiles = down * across;
    const int rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0, first_tile = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int whole = (w.columns + 127) / 128;
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < DEPTH; slot++) {
            barrier_init(full + slot, 1);
            barrier_init(empty + slot, 8 * CLUSTER);
        }
        barriers_ready();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();
    start_next_kernel();
    auto copy_tokens = [&](int slot, const TensorMap& map, int column, int token0) {
        if (CLUSTER > 1)
            copy_box_to_pair(memory + slot * STAGE_BYTES + rank * SHARE * 128, map, full + slot, column, token0 + rank * SHARE);
        else
            copy_box(memory + slot * STAGE_BYTES, map, full + slot, column, token0);
    };
    auto place_of = [&](int tile, int& token0, int& row0) {  // `group` tiles of tokens before the next rows
        const int band = tile / (w.group * across), height = min(down - band * w.group, w.group), inner = tile % (w.group * across);
        token0 = (band * w.group + inner % height) * M;
        row0 = (inner / height * CLUSTER + rank) * N;
    };

    if (warp >= 8) {
        fewer_registers<40>();
        if (warp == 8 && lane == 0) {
            int token0, row0;
            place_of(first_tile, token0, row0);
            const int early = min(DEPTH, whole);
            if (!AHEAD) wait_for_previous_kernel();
            for (int slot = 0; slot < early; slot++) {  // with AHEAD no kernel writes codes of the weight
                barrier_expect(full + slot, STAGE_BYTES);
                copy_box(memory + slot * STAGE_BYTES + M * 128, right, full + slot, slot * 64, row0);
            }
            if (AHEAD) wait_for_previous_kernel();
            for (int slot = 0; slot < early; slot++) copy_tokens(slot, left, slot * 64, token0);
            const int loose = LOOSE ? (w.counts[0] + 63) / 64 : 0;
            const int placed = PLACED ? (w.counts[1] + 63) / 64 : 0;
            int slot = early % DEPTH, parity = early == DEPTH ? 0 : 1, slice = early;
            for (int tile = first_tile; tile < tiles; tile += clusters, slice = 0) {
                place_of(tile, token0, row0);
                for (; slice < whole + loose + placed; slice++) {
                    barrier_wait(empty + slot, parity);
                    barrier_expect(full + slot, STAGE_BYTES);
                    u8* const to = memory + slot * STAGE_BYTES;
                    if (slice < whole) {
                        copy_tokens(slot, left, slice * 64, token0);
                        copy_box(to + M * 128, right, full + slot, slice * 64, row0);
                    } else if (slice < whole + loose) {
                        copy_tokens(slot, loose_inputs, (slice - whole) * 64, token0);
                        copy_box(to + M * 128, loose_weight, full + slot, (slice - whole) * 64, row0);
                    } else {
                        copy_tokens(slot, placed_inputs, (slice - whole - loose) * 64, token0);
                        copy_box(to + M * 128, placed_weight, full + slot, (slice - whole - loose) * 64, row0);
                    }
                    slot = slot == DEPTH - 1 ? 0 : slot + 1;
                    parity ^= slot == 0;
                }
            }
        }
    } else {
        more_registers<232>();
        wait_for_previous_kernel();
        const int loose = LOOSE ? (w.counts[0] + 63) / 64 : 0;
        const int placed = PLACED ? (w.counts[1] + 63) / 64 : 0;
        const int group = warp / 4, r = lane / 4, q = lane % 4;
        const u32 first_left = descriptor_of(memory) + group * BLOCKS * (64 * 128 / 16), first_right = descriptor_of(memory + M * 128);
        u16* const staged = results + warp * 16 * OUT_STRIDE;
        int slot = 0, parity = 0;
        auto next = [&]() {
            slot = slot == DEPTH - 1 ? 0 : slot + 1;
            parity ^= slot == 0;
        };
        auto leave = [&](int done) {
            if (lane == 0) {
                barrier_arrive(empty + done);
                if (CLUSTER > 1) barrier_arrive_at(empty + done, rank ^ 1);
            }
        };
        for (int tile = first_tile; tile < tiles; tile += clusters) {
            int token0, row0;
            place_of(tile, token0, row0);
            int before = 0;
            u32 total[BLOCKS][N / 2];  // integers, then float32, in the same registers
            {
                for (int slice = 0; slice < whole; slice++) {
                    barrier_wait(full + slot, parity);
                    const u32 offset = slot * (STAGE_BYTES / 16);
                    registers_ready();
#pragma unroll
                    for (int step = 0; step < 4; step++)
#pragma unroll
                        for (int block = 0; block < BLOCKS; block++)
                            codes_product(total[block], first_left + offset + block * (64 * 128 / 16) + step * 2, first_right + offset + step * 2, slice + step);
                    products_commit();
                    products_wait<1>();
                    if (slice) leave(before);
                    before = slot;
                    next();
                }
                products_wait<0>();
                leave(before);
#pragma unroll
                for (int block = 0; block < BLOCKS; block++) {
                    const int token = token0 + (group * BLOCKS + block) * 64 + warp % 4 * 16 + r;
                    const float scale[2] = {w.input_absmax[min(token, w.tokens - 1)] / LEVELS, w.input_absmax[min(token + 8, w.tokens - 1)] / LEVELS};
#pragma unroll
                    for (int i = 0; i < N / 2; i++) total[block][i] = __float_as_uint((float)(int)total[block][i] * scale[i / 2 % 2]);
                }
            }
            auto add_columns = [&](int slices) {
                for (int slice = 0; slice < slices; slice++) {
                    barrier_wait(full + slot, parity);
                    const u32 offset = slot * (STAGE_BYTES / 16);
                    registers_ready();
#pragma unroll
                    for (int step = 0; step < 4; step++)
#pragma unroll
                        for (int block = 0; block < BLOCKS; block++)
                            columns_product(total[block], first_left + offset + block * (64 * 128 / 16) + step * 2, first_right + offset + step * 2, 1);
                    products_commit();
                    products_wait<1>();
                    if (slice) leave(before);
                    before = slot;
                    next();
                }
                products_wait<0>();
                if (slices) leave(before);
            };
            if (LOOSE) add_columns(loose);
#pragma unroll
            for (int j = 0; j < N / 8; j++) {
                const int row = min(row0 + 8 * j + 2 * q, w.rows - 2) * w.absmax_step;
                const float scale[2] = {w.absmax[row] / LEVELS, w.absmax[row + w.absmax_step] / LEVELS};
#pragma unroll
                for (int block = 0; block < BLOCKS; block++)
#pragma unroll
                    for (int e = 0; e < 4; e++) total[block][4 * j + e] = __float_as_uint(__uint_as_float(total[block][4 * j + e]) * scale[e % 2]);
            }
            if (PLACED) add_columns(placed);
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                const int token = token0 + (group * BLOCKS + block) * 64 + warp % 4 * 16;
#pragma unroll
                for (int part = 0; part < N / CHUNK; part++) {
#pragma unroll
                    for (int j = 0; j < CHUNK / 8; j++) {
                        const int n = part * CHUNK + 8 * j;
                        float four[4];
#pragma unroll
                        for (int e = 0; e < 4; e++) four[e] = __uint_as_float(total[block][n / 2 + e]);
                        float offset[2] = {0.0f, 0.0f};
                        if (BIAS) {
                            const int row = min(row0 + n + 2 * q, w.rows - 2);
                            offset[0] = float_of_x(w.bias[row]), offset[1] = float_of_x(w.bias[row + 1]);
                        }
                        *(u32*)(staged + r * OUT_STRIDE + 8 * j + 2 * q) = pair_of_floats(four[0] + offset[0], four[1] + offset[1]);
                        *(u32*)(staged + (r + 8) * OUT_STRIDE + 8 * j + 2 * q) = pair_of_floats(four[2] + offset[0], four[3] + offset[1]);
                    }
                    __syncwarp();
                    for (int cell = lane; cell < 16 * (CHUNK / 8); cell += 32) {
                        const int line = cell / (CHUNK / 8), row = row0 + part * CHUNK + cell % (CHUNK / 8) * 8;
                        if (token + line < w.tokens && row < w.rows)
                            *(uint4*)(w.out + (size_t)(token + line) * w.rows + row) = *(const uint4*)(staged + line * OUT_STRIDE + cell % (CHUNK / 8) * 8);
                    }
                    __syncwarp();
                }
            }
        }
    }
    if (CLUSTER > 1) {  // no block ends while another one may write into its memory
        __syncwarp();
        cluster_arrive();
        cluster_wait();
    }
}
