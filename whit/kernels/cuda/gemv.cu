// y = W x for one vector, from packed codes.
//
// A level is an affine form of bit planes, so with p ranging over the planes of a layout
//     y[i] = sum_groups base[i, g] * sum_j x[j]  +  sum_p delta_p[i, g] * sum_j plane_p[i, j] * x[j]
// and the inner sums need no multiplication per weight. They come from tensor cores that take bits (`bits.cuh`) or bytes
// (`limbs.cuh`), one of which is put before this file with `group.cuh`, the algebra of a group.
//
// One thread block per multiprocessor; each keeps x in its operand form in shared memory and walks over row tiles. Each
// warp takes items of 16 rows x ICOLS columns through a private ring in shared memory, filled by cp.async DEPTH - 1
// ahead. Blocks of a cluster (STAGING_BLOCKS) share the work of bringing x into that form. Partial sums of items are
// added in a fixed order: same input, same bytes.
//
// With SEVERAL > 1 as many weights of one layout meet the same x, each with thread blocks of its own.

// Asks L2 for one vector; allowed before `wait_for_previous_kernel`, since L2 sees every later write.
__device__ __forceinline__ void prefetch_x(const u16* x, int columns) {
#if EARLY
    for (int at = threadIdx.x * 64; at < columns; at += THREADS * 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(x + at));
#endif
}

// The items of a warp: numbers warp, warp + WARPS, ... of the row tiles of a round, each `across` items wide.
struct Place {
    int tile, column;
    __device__ __forceinline__ void go(int tiles, int columns, int across) {
        tile += tiles, column += columns;
        if (column >= across) column -= across, tile++;
    }
};

#if SEVERAL > 1
struct Task {
    Weight w;
    u16* y;
    int first, blocks;  // its thread blocks
};
struct Tasks {
    Task of[SEVERAL];
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
gemv(INPUT_TYPE given, const __grid_constant__ Tasks tasks, int chunk_columns, int tiles_per_round) {
    int which = 0;
    while (which + 1 < SEVERAL && (int)blockIdx.x >= tasks.of[which + 1].first) which++;
    const Weight w = tasks.of[which].w;
    const u16* bias = nullptr;
    u16* y = tasks.of[which].y;
    const int block = (int)blockIdx.x - tasks.of[which].first, blocks = tasks.of[which].blocks;
#else
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
gemv(INPUT_TYPE given, Weight w, const u16* bias, u16* y, int chunk_columns, int tiles_per_round) {
    const int block = blockIdx.x, blocks = gridDim.x;
#endif
    extern __shared__ __align__(16) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunk_blocks = chunk_columns / 128;
    u32* x_words = (u32*)memory;
    float2* factors = (float2*)(x_words + chunk_blocks * X_WORDS);
    u8* ring = (u8*)(factors + chunk_blocks * (X_FACTORS)) + warp * (DEPTH * STAGE_BYTES);
    float* partial = (float*)((u8*)(factors + chunk_blocks * (X_FACTORS)) + WARPS * (DEPTH * STAGE_BYTES));
    const int tiles = (w.rows + 15) / 16, items_across = (w.columns + ICOLS - 1) / ICOLS, chunk_items = chunk_columns / ICOLS;
    bool waited = false;
#if INPUT == 0
    const u16* const x = given;
#else
    const u16* const x = (const u16*)x_words;
#endif
    if (EAGER) start_next_kernel();

    for (int first = block; first < tiles; first += blocks * tiles_per_round) {
        const int mine = min(tiles_per_round, (tiles - first + blocks - 1) / blocks);
        for (int begin = 0; begin < items_across; begin += chunk_items) {
            const int across = min(chunk_items, items_across - begin);
            const int down = WARPS / across, right = WARPS % across;
            Place ahead = {warp / across, warp % across}, place = ahead;
            auto load = [&](int slot) {
                if (ahead.tile < mine) {
                    stage_item(ring + slot * STAGE_BYTES, w, (first + ahead.tile * blocks) * 16, (begin + ahead.column) * ICOLS, lane);
                    ahead.go(down, right, across);
                } else {
                    copies_commit();
                }
            };
#if INPUT == 0
            if (!waited) prefetch_x(x, w.columns);
#endif
#pragma unroll 1
            for (int slot = 0; slot < DEPTH - 1; slot++) load(slot);
            if (!waited) {  // weights are no kernel's result: only x has to be waited for
#if INPUT == 0
                wait_for_previous_kernel();
#else
                make_input<X_WORDS>(x_words, given, w.columns, []() { wait_for_previous_kernel(); });
#endif
                waited = true;
            }
            if (items_across > chunk_items || first == block) {
                if (items_across > chunk_items) __syncthreads();
                stage_x(x_words, factors, x, w.salient, begin * ICOLS, across * BLOCKS, w.columns, warp, lane);
#if STAGING_BLOCKS > 1
                cluster_arrive();
                cluster_wait();
                fetch_staged(x_words, factors, across * BLOCKS);
                cluster_arrive();  // waited for at the end: no block goes while another one reads its memory
#endif
                __syncthreads();
            }
            int slot = 0;
            for (; place.tile < mine; place.go(down, right, across)) {
                load(slot == 0 ? DEPTH - 1 : slot - 1);
                copies_wait<DEPTH - 1>();
                __syncwarp();
                const int row0 = (first + place.tile * blocks) * 16, column0 = (begin + place.column) * ICOLS;
                const u8* stage = ring + slot * STAGE_BYTES;
                const u32* item_x_words = x_words + place.column * (BLOCKS * X_WORDS);
                const float2* item_factors = factors + place.column * (BLOCKS * X_FACTORS);
                float sums[2];
                if (column0 + ICOLS <= w.columns)
                    item_sums<true>(sums, stage, item_x_words, item_factors, w, row0, column0, lane);
                else
                    item_sums<false>(sums, stage, item_x_words, item_factors, w, row0, column0, lane);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    sums[h] += __shfl_xor_sync(0xffffffffu, sums[h], 1);
                    if (KIND == BINARY_RESIDUAL || BITWISE) sums[h] += __shfl_xor_sync(0xffffffffu, sums[h], 2);
                }
                if (lane % 4 == 0) {
                    float* out = partial + (place.tile * items_across + begin + place.column) * 16 + lane / 4;
                    out[0] = sums[0];
                    out[8] = sums[1];
                }
                slot = slot == DEPTH - 1 ? 0 : slot + 1;
                __syncwarp();
            }
        }
        __syncthreads();
        for (int index = threadIdx.x; index < mine * 16; index += THREADS) {
            const int tile = index / 16, row = (first + tile * blocks) * 16 + index % 16;
            if (row < w.rows) {
                float total = bias ? float_of_x(bias[row]) : 0.0f;
#pragma unroll 8
                for (int i = 0; i < items_across; i++) total += partial[(tile * items_across + i) * 16 + index % 16];
                y[row] = x_of_float(total);
            }
        }
        if (first + blocks * tiles_per_round < tiles) __syncthreads();
    }
#if STAGING_BLOCKS > 1
    cluster_wait();
#endif
}
