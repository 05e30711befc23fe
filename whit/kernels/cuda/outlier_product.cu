// LLM.int8() for many tokens on the warpgroup tensor cores of compute capability 9.0: y of tiles of M tokens x N rows.
//
// All operands come in slices of 128 bytes of a row, swizzled by 128 bytes: 128 columns of 8-bit codes, or 64 outlier
// columns in 16 bit, gathered beforehand with zeros up to a multiple of 64. A tile is first the product of codes, int32;
// scaled to float32 in place, it goes on with the outlier columns whose weights are codes, is scaled by rows, and goes on
// with those that have a 16-bit weight. How many there are is read from memory: any number is right, and each 64 of them
// cost as much as 128 others.
//
// One warp asks the tensor copy engine for slices; two warpgroups of M / 2 tokens each multiply. A block takes tile after
// tile, and slices of the next one arrive while a tile ends.

#define BLOCKS (M / 128)  // of 64 tokens, per warpgroup
#define STAGE_BYTES ((M + N) * 128)
#define OUT_STRIDE (CHUNK + 8)  // 16-bit results per token: lanes of a store in different banks
#define LANES (CHUNK / 8)      // that store results of a token

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
    float* const scales = (float*)(empty + DEPTH);           // [2][N], of rows, by turns of tiles
    float* const offsets = scales + 2 * N;                   // [2][N]
    u16* const results = (u16*)(offsets + 2 * N);            // [warp][16][OUT_STRIDE]
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;  // the same in all lanes, as the compiler sees
    const int down = (w.tokens + M - 1) / M, across = (w.rows + N - 1) / N, tiles = down * across;
    const int whole = (w.columns + 127) / 128;
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < DEPTH; slot++) {
            barrier_init(full + slot, 1);
            barrier_init(empty + slot, 8);
        }
        barriers_ready();
    }
    __syncthreads();
    start_next_kernel();
    auto place_of = [&](int tile, int& token0, int& row0) {  // `group` tiles of tokens before the next rows
        const int band = tile / (w.group * across), height = min(down - band * w.group, w.group), inner = tile % (w.group * across);
        token0 = (band * w.group + inner % height) * M;
        row0 = inner / height * N;
    };

    if (warp >= 8) {
        fewer_registers<40>();
        if (warp == 8 && lane == 0) {
            int token0, row0;
            place_of(blockIdx.x, token0, row0);
            const int early = min(DEPTH, whole);
            if (!AHEAD) wait_for_previous_kernel();
            for (int slot = 0; slot < early; slot++) {  // with AHEAD no kernel writes codes of the weight
                barrier_expect(full + slot, STAGE_BYTES);
                copy_box(memory + slot * STAGE_BYTES + M * 128, right, full + slot, slot * 64, row0);
            }
            if (AHEAD) wait_for_previous_kernel();
            for (int slot = 0; slot < early; slot++) copy_box(memory + slot * STAGE_BYTES, left, full + slot, slot * 64, token0);
            const int loose = LOOSE ? (w.counts[0] + 63) / 64 : 0;
            const int placed = PLACED ? (w.counts[1] + 63) / 64 : 0;
            int slot = early % DEPTH, parity = early == DEPTH ? 0 : 1, slice = early;
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, slice = 0) {
                place_of(tile, token0, row0);
                for (; slice < whole + loose + placed; slice++) {
                    barrier_wait(empty + slot, parity);
                    barrier_expect(full + slot, STAGE_BYTES);
                    u8* const to = memory + slot * STAGE_BYTES;
                    if (slice < whole) {
                        copy_box(to, left, full + slot, slice * 64, token0);
                        copy_box(to + M * 128, right, full + slot, slice * 64, row0);
                    } else if (slice < whole + loose) {
                        copy_box(to, loose_inputs, full + slot, (slice - whole) * 64, token0);
                        copy_box(to + M * 128, loose_weight, full + slot, (slice - whole) * 64, row0);
                    } else {
                        copy_box(to, placed_inputs, full + slot, (slice - whole - loose) * 64, token0);
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
        int slot = 0, parity = 0, turn = 0;
        auto next = [&]() {
            slot = slot == DEPTH - 1 ? 0 : slot + 1;
            parity ^= slot == 0;
        };
        auto leave = [&](int done) {
            if (lane == 0) barrier_arrive(empty + done);
        };
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
            int token0, row0;
            place_of(tile, token0, row0);
            int before = 0;
            // What the end of the tile needs is asked for now, and put down when the tensor cores are at work.
            const int own_row = min(row0 + (int)threadIdx.x, w.rows - 1);
            const float own_scale = threadIdx.x < N ? w.absmax[own_row * w.absmax_step] : 0.0f;
            const float own_offset = BIAS && threadIdx.x < N ? float_of_x(w.bias[own_row]) : 0.0f;
            float by_token[BLOCKS][2];
#pragma unroll
            for (int block = 0; block < BLOCKS; block++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    by_token[block][h] = w.input_absmax[min(token0 + (group * BLOCKS + block) * 64 + warp % 4 * 16 + r + 8 * h, w.tokens - 1)];
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
                    if (slice == 0 && threadIdx.x < N) {
                        scales[turn * N + threadIdx.x] = own_scale * (1.0f / LEVELS);
                        if (BIAS) offsets[turn * N + threadIdx.x] = own_offset;
                    }
                    products_wait<1>();
                    if (slice) leave(before);
                    before = slot;
                    next();
                }
                products_wait<0>();
                leave(before);
                consumers_meet();  // scales are there; they are written again two tiles on
#pragma unroll
                for (int block = 0; block < BLOCKS; block++) {
                    const float scale[2] = {by_token[block][0] * (1.0f / LEVELS), by_token[block][1] * (1.0f / LEVELS)};
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
            const float* const by_row = scales + turn * N + 2 * q;
            const float* const shift = offsets + turn * N + 2 * q;
            if (PLACED) {
#pragma unroll
                for (int j = 0; j < N / 8; j++) {
                    const float2 scale = *(const float2*)(by_row + 8 * j);
#pragma unroll
                    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            total[block][4 * j + e] = __float_as_uint(__uint_as_float(total[block][4 * j + e]) * (e % 2 ? scale.y : scale.x));
                }
                add_columns(placed);
            }
            const int line = lane / LANES, part_row = lane % LANES * 8;
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                const int token = token0 + (group * BLOCKS + block) * 64 + warp % 4 * 16 + line;
                u16* const to = w.out + (size_t)token * w.rows + row0 + part_row;
#pragma unroll
                for (int part = 0; part < N / CHUNK; part++) {
#pragma unroll
                    for (int j = 0; j < CHUNK / 8; j++) {
                        const int n = part * CHUNK + 8 * j;
                        float four[4];
#pragma unroll
                        for (int e = 0; e < 4; e++) four[e] = __uint_as_float(total[block][n / 2 + e]);
                        if (!PLACED) {
                            const float2 scale = *(const float2*)(by_row + n);
                            four[0] *= scale.x, four[1] *= scale.y, four[2] *= scale.x, four[3] *= scale.y;
                        }
                        if (BIAS) {
                            const float2 offset = *(const float2*)(shift + n);
                            four[0] += offset.x, four[1] += offset.y, four[2] += offset.x, four[3] += offset.y;
                        }
                        *(u32*)(staged + r * OUT_STRIDE + 8 * j + 2 * q) = pair_of_floats(four[0], four[1]);
                        *(u32*)(staged + (r + 8) * OUT_STRIDE + 8 * j + 2 * q) = pair_of_floats(four[2], four[3]);
                    }
                    __syncwarp();
                    const bool here = row0 + part * CHUNK + part_row < w.rows;
#pragma unroll
                    for (int lines = 0; lines < 16; lines += 32 / LANES)
                        if (here && token + lines < w.tokens)
                            *(uint4*)(to + (size_t)lines * w.rows + part * CHUNK) = *(const uint4*)(staged + (line + lines) * OUT_STRIDE + part_row);
                    __syncwarp();
                }
            }
        }
    }
}
