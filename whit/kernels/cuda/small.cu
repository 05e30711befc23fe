// y = x W^T for 2 to 32 vectors, from packed codes, on the 16-bit tensor cores.
//
// Codes are expanded in registers to the operands of mma.m16n8k16: codes of up to two bits choose one of four 16-bit
// levels with a byte permutation (one multiply-add makes the selectors of four weights), wider integers become
// 16-bit floats by their exponent bits. The weights are those of the plain meaning rounded to the type of x; grouped
// integers stay exact integers and their scale multiplies the float32 sums of the group.
//
// One thread block per multiprocessor keeps x (one chunk of columns) in shared memory, in the order in which codes are
// extracted, and walks over row tiles; its warps share the columns of a tile and their sums are added in a fixed order.

// x (tokens, columns) of one chunk into the order of the products; for marked columns also masks and flags.
__device__ __forceinline__ void stage_x(u32* xs, u32* masks, u32* flags, const u16* x, const u8* salient, int column0, int blocks, int tokens, int columns) {
    const bool vector = columns % 8 == 0 && ((size_t)x & 15) == 0;
#pragma unroll 4
    for (int task = threadIdx.x; task < blocks * PARTS * TILES * 32; task += THREADS) {
        const int lane = task % 32, n = task / 32 % TILES, part = task / (32 * TILES) % PARTS, block = task / (32 * TILES * PARTS);
        const int token = n * 8 + (lane >> 2), q = lane & 3, column = column0 + block * 128 + RUN * (4 * part + q);
        union { u16 h[RUN < 8 ? 8 : RUN]; uint4 v[RUN < 8 ? 1 : RUN / 8]; uint2 w; } run;
        const u16* from = x + (size_t)token * columns + column;
        if (token < tokens && vector && RUN >= 8) {
#pragma unroll
            for (int i = 0; i < RUN / 8; i++) run.v[i] = column + 8 * i < columns ? *((const uint4*)from + i) : make_uint4(0, 0, 0, 0);
        } else if (token < tokens && vector) {
            run.w = column < columns ? *(const uint2*)from : make_uint2(0, 0);
        } else {
#pragma unroll
            for (int i = 0; i < RUN; i++) run.h[i] = token < tokens && column + i < columns ? from[i] : 0;
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int t = part * STEPS + i;
            u32 word[2];
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const int first = column_of(i >> 1, 0, i & 1, j), second = column_of(i >> 1, 0, i & 1, j + 1);
                word[j / 2] = run.h[first % RUN] | (u32)run.h[second % RUN] << 16;
            }
            ((uint2*)xs)[((block * 8 + t) * TILES + n) * 32 + lane] = make_uint2(word[0], word[1]);
        }
    }
    if (KIND == BINARY_RESIDUAL)
        for (int task = threadIdx.x; task < blocks * 32; task += THREADS) {
            const int t = task / 4 % 8, q = task % 4, block = task / 32;
            u32 mask[2] = {0, 0};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = column0 + block * 128 + column_of(t >> 1, q, t & 1, j);
                if (column < columns && (salient[column >> 3] >> (column & 7) & 1)) mask[j / 2] |= 0xffffu << (16 * (j & 1));
            }
            ((uint2*)masks)[task] = make_uint2(mask[0], mask[1]);
            u32 any = __ballot_sync(0xffffffffu, mask[0] | mask[1]);  // one warp is one block
            if (threadIdx.x % 32 == 0) {
                u32 flag = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) flag |= (any >> (4 * i) & 15 ? 1u : 0u) << i;
                flags[block] = flag;
            }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
small(const u16* x, Weight w, const u16* bias, u16* y, int tokens, int chunk_columns, int tiles_per_round) {
    extern __shared__ __align__(16) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunk_blocks = chunk_columns / 128;
    u32* xs = (u32*)memory;
    u32* masks = xs + chunk_blocks * 64 * TOKENS;
    u32* flags = masks + (KIND == BINARY_RESIDUAL ? chunk_blocks * 64 : 0);
    float* partial = (float*)(flags + (KIND == BINARY_RESIDUAL ? (chunk_blocks + 3) / 4 * 4 : 0));  // [WARPS][CELLS]
    float* total = partial + WARPS * CELLS;  // [tiles_per_round][CELLS], if x comes in several chunks
    const int tiles = (w.rows + 15) / 16, items_across = (w.columns + ICOLS - 1) / ICOLS, chunk_items = chunk_columns / ICOLS;
    u8* ring = (u8*)(total + (items_across > chunk_items ? tiles_per_round * CELLS : 0)) + warp * (DEPTH * STAGE_BYTES);
    wait_for_previous_kernel();

    for (int first = blockIdx.x; first < tiles; first += gridDim.x * tiles_per_round) {
        const int mine = min(tiles_per_round, (tiles - first + (int)gridDim.x - 1) / (int)gridDim.x);
        for (int begin = 0; begin < items_across; begin += chunk_items) {
            const int across = min(chunk_items, items_across - begin), last_chunk = begin + across == items_across;
            const int per_tile = warp < across ? (across - warp + WARPS - 1) / WARPS : 0, items = mine * per_tile;
            auto load = [&](int index, int slot) {
                if (index < items)
                    stage_item(ring + slot * STAGE_BYTES, w, (first + index / per_tile * gridDim.x) * 16, (begin + warp + index % per_tile * WARPS) * ICOLS, lane);
                else
                    copies_commit();
            };
            for (int ahead = 0; ahead < DEPTH - 1; ahead++) load(ahead, ahead);
            if (items_across > chunk_items || first == blockIdx.x) {
                if (items_across > chunk_items) __syncthreads();
                stage_x(xs, masks, flags, x, w.salient, begin * ICOLS, across * BLOCKS, tokens, w.columns);
                __syncthreads();
            }
            int slot = 0, index = 0;
            for (int tile = 0; tile < mine; tile++) {
                const int row0 = (first + tile * gridDim.x) * 16;
                float sums[2][TILES][4];
#pragma unroll
                for (int n = 0; n < 2 * TILES; n++) sums[n % 2][n / 2][0] = sums[n % 2][n / 2][1] = sums[n % 2][n / 2][2] = sums[n % 2][n / 2][3] = 0.0f;
                for (int i = 0; i < per_tile; i++, index++) {
                    load(index + DEPTH - 1, slot == 0 ? DEPTH - 1 : slot - 1);
                    copies_wait<DEPTH - 1>();
                    __syncwarp();
                    const int column = warp + i * WARPS;
                    const int column0 = (begin + column) * ICOLS;
                    if (column0 + ICOLS <= w.columns)
                        item_products<true>(sums, ring + slot * STAGE_BYTES, xs + column * BLOCKS * 64 * TOKENS, masks + column * BLOCKS * 64, flags + column * BLOCKS, w, row0, column0, lane);
                    else
                        item_products<false>(sums, ring + slot * STAGE_BYTES, xs + column * BLOCKS * 64 * TOKENS, masks + column * BLOCKS * 64, flags + column * BLOCKS, w, row0, column0, lane);
                    slot = slot == DEPTH - 1 ? 0 : slot + 1;
                    __syncwarp();
                }
                float* out = partial + warp * CELLS;
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        out[((lane >> 2) + 8 * (i >> 1)) * (TOKENS + 1) + n * 8 + (lane & 3) * 2 + (i & 1)] = sums[0][n][i] + sums[1][n][i];
                __syncthreads();
                for (int cell = threadIdx.x; cell < 16 * TOKENS; cell += THREADS) {
                    const int row = row0 + cell % 16, token = cell / 16, at = cell % 16 * (TOKENS + 1) + token;
                    float sum = begin ? total[tile * CELLS + at] : 0.0f;
                    #pragma unroll
                    for (int i = 0; i < WARPS; i++) sum += partial[i * CELLS + at];
                    if (!last_chunk)
                        total[tile * CELLS + at] = sum;
                    else if (row < w.rows && token < tokens)
                        y[(size_t)token * w.rows + row] = x_of_float(sum + (bias ? float_of_x(bias[row]) : 0.0f));
                }
                __syncthreads();
            }
        }
    }
}
