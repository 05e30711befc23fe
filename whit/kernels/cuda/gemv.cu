// y = W x for one vector, from packed codes.
//
// A level is an affine form of bit planes, so with p ranging over the planes of a layout
//     y[i] = sum_groups base[i, g] * sum_j x[j]  +  sum_p delta_p[i, g] * sum_j plane_p[i, j] * x[j]
// and the inner sums need no multiplication per weight. They come from tensor cores that take bits (`bits.cuh`) or bytes
// (`limbs.cuh`), one of which is put before this file with `group.cuh`, the algebra of a group.
//
// One thread block per multiprocessor; each keeps x in its operand form in shared memory and walks over row tiles. Each
// warp takes items of 16 rows x ICOLS columns through a private ring in shared memory, filled by cp.async DEPTH - 1
// ahead or, with BULK, by the tensor copy engine DEPTH ahead. Blocks of a cluster (STAGING_BLOCKS) share the work of
// bringing x into that form. Partial sums of items are added in a fixed order: same input, same bytes.
//
// A block asks for its first items before the kernel ahead has ended; with PATIENT for one per warp, and for the others
// when x has come, which they would delay; with AHEAD after marks and the norm's weight, which are small and no kernel's
// result. The kernel behind may start (EAGER): 0 when this one may read x, 1 at once,
// 2 when x has come.
//
// With SEVERAL > 1 as many weights of one layout meet the same x, each with thread blocks of its own. With GATED there are
// two, W and V, and y = silu(W x) V x: the blocks of a cluster have the same rows, one of W and one of V, which sends the
// first what it found.

#ifndef GATED
#define GATED 0
#endif

// Blocks of 128 columns of x, which share a unit by twos: of signed levels none beyond, whose columns have no number.
#define STAGED_BLOCKS (KIND == SIGNED_LEVELS ? min(across * BLOCKS, (SPAN(w) / 128 - begin * BLOCKS + 1) & ~1) : across * BLOCKS)
#define AT_FIRST (PATIENT ? 1 : BULK ? DEPTH : DEPTH - 1)  // items of a warp that are asked for before x has come

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

// A weight with what brings it.
struct Operand {
    Weight w;
#if BULK
    Maps maps;
#endif
};

#if SEVERAL > 1
struct Task {
    Operand operand;
    u16* y;
    int first, blocks;  // its thread blocks
};
struct Tasks {
    Task of[SEVERAL];
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
gemv(INPUT_TYPE given, const __grid_constant__ Tasks tasks, int chunk_columns, int tiles_per_round) {
#if GATED
    const int which = (int)blockIdx.x % 2;
#else
    int which = 0;
    while (which + 1 < SEVERAL && (int)blockIdx.x >= tasks.of[which + 1].first) which++;
#endif
    const Operand& operand = tasks.of[which].operand;
    const u16* bias = nullptr;
    u16* y = tasks.of[which].y;
#if GATED
    const int block = (int)blockIdx.x / 2, blocks = (int)gridDim.x / 2;
    cluster_begun();
#else
    const int block = (int)blockIdx.x - tasks.of[which].first, blocks = tasks.of[which].blocks;
#endif
#else
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
gemv(INPUT_TYPE given, const __grid_constant__ Operand operand, const u16* bias, u16* y, int chunk_columns, int tiles_per_round) {
    const int block = blockIdx.x, blocks = gridDim.x;
#endif
    const Weight w = operand.w;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunk_blocks = chunk_columns / 128;
    MARK(0, 0u);
#if BULK
    extern __shared__ __align__(1024) u8 memory[];
    u8* const codes_ring = memory + warp * (DEPTH * CODE_STAGE);
    u8* const scalars_ring = memory + WARPS * DEPTH * CODE_STAGE + warp * (DEPTH * SCALAR_STAGE);
    u64* const arrived = (u64*)(memory + WARPS * DEPTH * (CODE_STAGE + SCALAR_STAGE)) + warp * DEPTH;
    u32* x_words = (u32*)(memory + WARPS * DEPTH * (CODE_STAGE + SCALAR_STAGE + 8));
    float2* factors = (float2*)(x_words + chunk_blocks * X_WORDS);
    float* partial = (float*)(factors + chunk_blocks * (X_FACTORS));
    if (lane == 0) {
        for (int slot = 0; slot < DEPTH; slot++) barrier_init(arrived + slot, 1);
        barriers_ready();
    }
    __syncwarp();
    int slot = 0, phase = 0;
#else
    extern __shared__ __align__(16) u8 memory[];
    u32* x_words = (u32*)memory;
    float2* factors = (float2*)(x_words + chunk_blocks * X_WORDS);
    u8* ring = (u8*)(factors + chunk_blocks * (X_FACTORS)) + warp * (DEPTH * STAGE_BYTES);
    float* partial = (float*)((u8*)(factors + chunk_blocks * (X_FACTORS)) + WARPS * (DEPTH * STAGE_BYTES));
#endif
    const int tiles = (w.rows + 15) / 16, items_across = (SPAN(w) + ICOLS - 1) / ICOLS, chunk_items = chunk_columns / ICOLS;
    bool waited = false;
#if INPUT == 0
    const u16* const x = given;
#else
    const u16* const x = (const u16*)x_words;
#endif
    if (EAGER == 1) start_next_kernel();

    for (int first = block; first < tiles; first += blocks * tiles_per_round) {
        const int mine = min(tiles_per_round, (tiles - first + blocks - 1) / blocks);
        for (int begin = 0; begin < items_across; begin += chunk_items) {
            const int across = min(chunk_items, items_across - begin);
            const int down = WARPS / across, right = WARPS % across;
            Place ahead = {warp / across, warp % across}, place = ahead;
            auto load = [&](int slot) {
                if (ahead.tile < mine) {
                    const int row0 = (first + ahead.tile * blocks) * 16, column0 = (begin + ahead.column) * ICOLS;
#if BULK
                    if (lane == 0) bulk_item(codes_ring + slot * CODE_STAGE, scalars_ring + slot * SCALAR_STAGE, arrived + slot, w, operand.maps, row0, column0);
#else
                    stage_item(ring + slot * STAGE_BYTES, w, row0, column0, lane);
#endif
                    ahead.go(down, right, across);
                } else if (!BULK) {
                    copies_commit();
                }
            };
            const bool staged = items_across > chunk_items || first == block;
            Turns turns;
            const auto ask_for_marks = [&]() { load_marks(turns, w.salient, first_column(begin * ICOLS, warp, lane), w.columns, staged ? begin * ICOLS + STAGED_BLOCKS * 128 : 0); };
            if (AHEAD) ask_for_marks();
#if INPUT == 0
            if (!waited) prefetch_x(x, w.columns);
#else
            uint4 scale[EIGHTS];
            if (AHEAD && !waited) load_scale(scale, given, w.columns);
#if KIND == SIGNED_LEVELS
            const u32 numbers = waited ? 0u : first_numbers(w);
#endif
#endif
#if BULK
#pragma unroll 1
            for (int i = 0; i < AT_FIRST; i++) load(slot + i < DEPTH ? slot + i : slot + i - DEPTH);
#else
#pragma unroll 1
            for (int slot = 0; slot < AT_FIRST; slot++) load(slot);
#endif
            MARK(1, 0u);
            const auto x_has_come = [&](u32 largest) {
                if (EAGER == 2) start_next_kernel_after(largest);
#if BULK
#pragma unroll 1
                for (int i = AT_FIRST; i < DEPTH; i++) load(slot + i < DEPTH ? slot + i : slot + i - DEPTH);
#else
#pragma unroll 1
                for (int slot = AT_FIRST; slot < DEPTH - 1; slot++) load(slot);
#endif
            };
#if INPUT > 0
            if (!waited) {
                if (!AHEAD) load_scale(scale, given, w.columns);
                make_input<X_WORDS>(x_words, given, scale, w.columns, []() { wait_for_previous_kernel(); });
#if KIND == SIGNED_LEVELS
                gather_marked(x_words, w, numbers);
#endif
            }
            waited = true;
#endif
            if (staged) {  // weights are no kernel's result: only x has to be waited for
                if (items_across > chunk_items) __syncthreads();
                if (!AHEAD) ask_for_marks();
                stage_x(turns, x_words, factors, x, w.salient, begin * ICOLS, STAGED_BLOCKS, w.columns, warp, lane, !waited, x_has_come);
                waited = true;
                MARK(4, 0u);
#if STAGING_BLOCKS > 1
                cluster_arrive();
                cluster_wait();
                fetch_staged(x_words, factors, across * BLOCKS);
                cluster_arrive();  // waited for at the end: no block goes while another one reads its memory
#endif
                __syncthreads();
            } else {
                x_has_come(0);
            }
            MARK(5, 0u);
#if !BULK
            int slot = 0;
#endif
            for (; place.tile < mine; place.go(down, right, across)) {
                const int row0 = (first + place.tile * blocks) * 16, column0 = (begin + place.column) * ICOLS;
#if BULK
                barrier_wait(arrived + slot, phase);
                const u8* stage = codes_ring + slot * CODE_STAGE;
                const u8* scalars = scalars_ring + slot * SCALAR_STAGE;
#else
                load(slot == 0 ? DEPTH - 1 : slot - 1);
                copies_wait<DEPTH - 1>();
                __syncwarp();
                const u8* stage = ring + slot * STAGE_BYTES;
                const u8* scalars = stage + PLANES * PLANE_BYTES;
#endif
                MARK(6, 0u);
                const u32* item_x_words = x_words + place.column * (BLOCKS * X_WORDS);
                const float2* item_factors = factors + place.column * (BLOCKS * X_FACTORS);
                float sums[2];
                if (column0 + ICOLS <= SPAN(w))
                    item_sums<true>(sums, stage, scalars, item_x_words, item_factors, w, row0, column0, lane);
                else
                    item_sums<false>(sums, stage, scalars, item_x_words, item_factors, w, row0, column0, lane);
#if BULK
                __syncwarp();  // all lanes have read what is overwritten
                load(slot);
                if (++slot == DEPTH) slot = 0, phase ^= 1;
#endif
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
#if !BULK
                slot = slot == DEPTH - 1 ? 0 : slot + 1;
                __syncwarp();
#endif
            }
        }
        MARK(7, 0u);
        __syncthreads();
        MARK(8, 0u);
#if GATED
        float* const gates = partial + tiles_per_round * items_across * 16;
        float* const ups = gates + tiles_per_round * 16;
        cluster_wait();  // both have begun: their memory may be written
#endif
        for (int index = threadIdx.x; index < mine * 16; index += THREADS) {
            const int tile = index / 16, row = (first + tile * blocks) * 16 + index % 16;
            if (row < w.rows) {
                float total = bias ? float_of_x(bias[row]) : 0.0f;
                for (int i = 0; i < items_across; i += 4) {  // four at a time: each alone is mostly latency
                    float part[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) part[j] = i + j < items_across ? partial[(tile * items_across + i + j) * 16 + index % 16] : 0.0f;
                    total += part[0] + part[1] + (part[2] + part[3]);
                }
#if GATED
                const float value = float_of_x(x_of_float(total));
                if (which)
                    store_to_peer(ups + index, 0, value);
                else
                    gates[index] = value;
#else
                y[row] = x_of_float(total);
#endif
            }
        }
#if GATED
        cluster_arrive();
        cluster_wait();
        if (which) return;
        for (int index = threadIdx.x; index < mine * 16; index += THREADS) {
            const int row = (first + index / 16 * blocks) * 16 + index % 16;
            if (row < w.rows) {
                const float gate = gates[index];
                y[row] = x_of_float(float_of_x(x_of_float(__fdividef(gate, 1.0f + __expf(-gate)))) * ups[index]);
            }
        }
#endif
        if (first + blocks * tiles_per_round < tiles) __syncthreads();
    }
#if STAGING_BLOCKS > 1
    cluster_wait();
#endif
    MARKS_END(bias);
}
