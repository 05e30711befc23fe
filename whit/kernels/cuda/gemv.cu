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

#if BULK
// ---- The tensor copy engine ------------------------------------------------------------------------------------------
#define CODE_STAGE ((PLANES * PLANE_BYTES + 127) / 128 * 128)
#define SCALAR_STAGE ((16 * 4 * SCALAR_WORDS + 127) / 128 * 128)
#define BOXES_ACROSS (BULK == 2 ? 1 : ROW_BYTES / ROW_PITCH)
struct __align__(64) TensorMap { u64 words[16]; };
struct Maps {
    TensorMap codes[2], scalars;
};
__device__ __forceinline__ void barrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Returns when the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(u64* barrier, int parity) {
    asm volatile(
        "{.reg .pred p; waiting: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra waiting; done:}"
        ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
__device__ __forceinline__ void copy_tile(u8* shared, const TensorMap& map, u64* barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void copy_run(u8* shared, const u8* source, int bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(shared_address(shared)), "l"(source), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// The same by rows: every lane copies one.
__device__ __forceinline__ void bulk_rows(u8* codes, u8* scalars, u64* barrier, const Weight& w, int row0, int column0, int lane) {
    const int row = lane & 15, byte0 = column0 / 8 * CODE_BITS, group0 = GROUP >= (1 << 30) ? 0 : column0 / GROUP;
    const int row_bytes = min(ROW_BYTES, w.width - byte0), scalar_bytes = min(GROUPS_IN_ITEM, w.groups - group0) * (NS * 2);
    if (lane == 0) barrier_expect(barrier, 16 * (PLANES * row_bytes + scalar_bytes));
    __syncwarp();
    const u32 from = (u32)((row0 + row) * w.width + byte0);
    if (lane < 16 * PLANES) copy_run(codes + (lane >> 4) * PLANE_BYTES + row * ROW_PITCH, w.codes[PLANES == 2 ? lane >> 4 : 0] + from, row_bytes, barrier);
    if (GROUP >= (1 << 30)) {
        if (lane == 31) copy_run(scalars, w.scalars + row0 * (NS * 2), 16 * scalar_bytes, barrier);
    } else if (PLANES == 2 ? lane < 16 : lane >= 16) {
        copy_run(scalars + row * (SCALAR_WORDS * 4), w.scalars + (u32)(((row0 + row) * w.groups + group0) * (NS * 2)), scalar_bytes, barrier);
    }
}
__device__ __forceinline__ void bulk_item(u8* codes, u8* scalars, u64* barrier, const Weight& w, const Maps& maps, int row0, int column0) {
    constexpr int SCALAR_BYTES = GROUP >= (1 << 30) ? 16 * NS * 2 : 16 * 4 * SCALAR_WORDS;
    barrier_expect(barrier, PLANES * 16 * ROW_BYTES + SCALAR_BYTES);
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++)
#pragma unroll
        for (int box = 0; box < BOXES_ACROSS; box++)
            copy_tile(codes + plane * PLANE_BYTES + box * (16 * ROW_PITCH), maps.codes[plane], barrier, column0 / 16 * CODE_BITS + box * (ROW_PITCH / 2), row0);
    if (GROUP >= (1 << 30))
        copy_run(scalars, w.scalars + row0 * (NS * 2), SCALAR_BYTES, barrier);
    else
        copy_tile(scalars, maps.scalars, barrier, column0 / GROUP * NS, row0);
}
#endif

#if SPLIT > 1
__device__ __forceinline__ void store_to_peer(float* own, int rank, float value) {
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
#endif

#ifndef AHEAD
#define AHEAD DEPTH  // stages asked for before x has come
#endif
// The items of a warp: numbers warp, warp + WARPS, ... of the row tiles of a round, each `across` items wide.
struct Place {
    int tile, column;
    __device__ __forceinline__ void go(int tiles, int columns, int across) {
        tile += tiles, column += columns;
        if (column >= across) column -= across, tile++;
    }
};

#if BULK
#define MAPS_PARAMETER const __grid_constant__ Maps maps,
#else
#define MAPS_PARAMETER
#endif
#if SEVERAL > 1
struct Task {
    Weight w;
    u16* y;
    int first, blocks;  // its thread blocks
#if BULK
    Maps maps;
#endif
};
struct Tasks {
    Task of[SEVERAL];
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
gemv(const u16* x, const __grid_constant__ Tasks tasks, int chunk_columns, int tiles_per_round) {
    int which = 0;
    while (which + 1 < SEVERAL && (int)blockIdx.x >= tasks.of[which + 1].first) which++;
    const Weight w = tasks.of[which].w;
    const u16* bias = nullptr;
    u16* y = tasks.of[which].y;
    const int block = (int)blockIdx.x - tasks.of[which].first, blocks = tasks.of[which].blocks;
#if BULK
    const Maps& maps = tasks.of[which].maps;
#endif
#else
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
gemv(const u16* x, Weight w, MAPS_PARAMETER const u16* bias, u16* y, int chunk_columns, int tiles_per_round) {
    const int block = blockIdx.x / SPLIT, blocks = gridDim.x / SPLIT;
#endif
    MARK(0);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunk_blocks = chunk_columns / 128;
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
#if SPLIT > 1  // blocks of a cluster share the columns of their tiles
    const int rank = blockIdx.x % SPLIT, all_items = (w.columns + ICOLS - 1) / ICOLS;
    const int item0 = rank * all_items / SPLIT, items_across = (rank + 1) * all_items / SPLIT - item0;
#else
    const int item0 = 0, items_across = (w.columns + ICOLS - 1) / ICOLS;
#endif
    const int tiles = (w.rows + 15) / 16, chunk_items = chunk_columns / ICOLS;
    bool waited = false;
    if (EAGER == 1) start_next_kernel();

    for (int first = block; first < tiles; first += blocks * tiles_per_round) {
        const int mine = min(tiles_per_round, (tiles - first + blocks - 1) / blocks);
        for (int begin = 0; begin < items_across; begin += chunk_items) {
            const int across = min(chunk_items, items_across - begin);
            const int down = WARPS / across, right = WARPS % across;
            Place ahead = {warp / across, warp % across}, place = ahead;
            auto load = [&](int slot) {
#if BULK
                if (ahead.tile < mine) {
                    if (BULK == 2)
                        bulk_rows(codes_ring + slot * CODE_STAGE, scalars_ring + slot * SCALAR_STAGE, arrived + slot, w, (first + ahead.tile * blocks) * 16, (item0 + begin + ahead.column) * ICOLS, lane);
                    else if (lane == 0)
                        bulk_item(codes_ring + slot * CODE_STAGE, scalars_ring + slot * SCALAR_STAGE, arrived + slot, w, maps, (first + ahead.tile * blocks) * 16, (item0 + begin + ahead.column) * ICOLS);
                    ahead.go(down, right, across);
                }
#else
                if (ahead.tile < mine) {
                    stage_item(ring + slot * STAGE_BYTES, w, (first + ahead.tile * blocks) * 16, (item0 + begin + ahead.column) * ICOLS, lane);
                    ahead.go(down, right, across);
                } else {
                    copies_commit();
                }
#endif
            };
            if (!waited) prefetch_x(x, w.columns);
#if BULK
#pragma unroll 1
            for (int i = 0; i < AHEAD; i++) load(slot + i < DEPTH ? slot + i : slot + i - DEPTH);
#else
#pragma unroll 1
            for (int slot = 0; slot < (AHEAD < DEPTH - 1 ? AHEAD : DEPTH - 1); slot++) load(slot);
#endif
            MARK(1);
            const auto here = [&](u32 largest) {  // x has come: now what may delay it
                if (EAGER == 2) start_next_kernel_after(largest);
#if BULK
#pragma unroll 1
                for (int i = AHEAD; i < DEPTH; i++) load(slot + i < DEPTH ? slot + i : slot + i - DEPTH);
#else
#pragma unroll 1
                for (int slot = AHEAD; slot < DEPTH - 1; slot++) load(slot);
#endif
            };
#if SPLIT > 1
            if (first == block) cluster_begun();
#endif
            if (items_across > chunk_items || first == block) {  // weights are no kernel's result: only x has to be waited for
                if (items_across > chunk_items) __syncthreads();
#if GIVEN_PLANES
                {
                    if (!waited) wait_for_previous_kernel();
                    here(0);
                    MARK(2);
                    const int words = across * BLOCKS * X_WORDS;
                    for (int i = threadIdx.x; i < words / 4; i += THREADS) ((uint4*)x_words)[i] = read_sixteen((const uint4*)x + i);
                    for (int i = threadIdx.x; i < across * BLOCKS * X_FACTORS / 2; i += THREADS) ((uint4*)factors)[i] = read_sixteen((const uint4*)x + words / 4 + i);
                }
#else
                stage_x(x_words, factors, x, w.salient, (item0 + begin) * ICOLS, across * BLOCKS, w.columns, warp, lane, !waited, here);
#endif
                waited = true;
                MARK(4);
#if STAGING_BLOCKS > 1
                cluster_arrive();
                cluster_wait();
                fetch_staged(x_words, factors, across * BLOCKS);
                cluster_arrive();  // waited for at the end: no block goes while another one reads its memory
#endif
                __syncthreads();
                if (EAGER == 3) start_next_kernel();
            } else {
                here(0);
            }
            MARK(5);
#if !BULK
            int slot = 0;
#endif
            for (; place.tile < mine; place.go(down, right, across)) {
                const int row0 = (first + place.tile * blocks) * 16, column0 = (item0 + begin + place.column) * ICOLS;
#if BULK
                barrier_wait(arrived + slot, phase);
                const u8* stage = codes_ring + slot * CODE_STAGE;
                const u8* scalars = scalars_ring + slot * SCALAR_STAGE - PLANES * PLANE_BYTES;
#else
                load(slot == 0 ? DEPTH - 1 : slot - 1);
                copies_wait<DEPTH - 1>();
                __syncwarp();
                const u8* stage = ring + slot * STAGE_BYTES;
                const u8* scalars = stage;
#endif
                MARK_ONCE(6);
                const u32* item_x_words = x_words + place.column * (BLOCKS * X_WORDS);
                const float2* item_factors = factors + place.column * (BLOCKS * X_FACTORS);
                float sums[2];
                if (column0 + ICOLS <= w.columns)
                    item_sums<true>(sums, stage, scalars, item_x_words, item_factors, w, row0, column0, lane);
                else
                    item_sums<false>(sums, stage, scalars, item_x_words, item_factors, w, row0, column0, lane);
#if BULK
                __syncwarp();
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
        MARK(7);
        __syncthreads();
        MARK(8);
#if SPLIT > 1
        if (first == block) cluster_wait();  // all have begun
        float* const inbox = partial + tiles_per_round * ((chunk_columns / ICOLS) * 16);  // [SPLIT][rows of this rank's tiles]
        for (int index = threadIdx.x; index < mine * 16; index += THREADS) {
            const int tile = index / 16;
            float total = 0.0f;
#pragma unroll 8
            for (int i = 0; i < items_across; i++) total += partial[(tile * items_across + i) * 16 + index % 16];
            float* const place = inbox + (rank * ((tiles_per_round + SPLIT - 1) / SPLIT) + tile / SPLIT) * 16 + index % 16;
            store_to_peer(place, tile % SPLIT, total);
        }
        cluster_arrive();
        cluster_wait();
        for (int index = threadIdx.x; index < (mine + SPLIT - 1 - rank) / SPLIT * 16; index += THREADS) {
            const int tile = index / 16 * SPLIT + rank, row = (first + tile * blocks) * 16 + index % 16;
            if (row < w.rows) {
                float total = HAS_BIAS(bias) ? float_of_x(bias[row]) : 0.0f;
#pragma unroll
                for (int i = 0; i < SPLIT; i++) total += inbox[i * ((tiles_per_round + SPLIT - 1) / SPLIT) * 16 + index];
                y[row] = x_of_float(total);
            }
        }
        if (first + blocks * tiles_per_round < tiles) cluster_arrive(), cluster_wait();
#else
        for (int index = threadIdx.x; index < mine * 16; index += THREADS) {
            const int tile = index / 16, row = (first + tile * blocks) * 16 + index % 16;
            if (row < w.rows) {
                float total = HAS_BIAS(bias) ? float_of_x(bias[row]) : 0.0f;
#pragma unroll 8
                for (int i = 0; i < items_across; i++) total += partial[(tile * items_across + i) * 16 + index % 16];
                y[row] = x_of_float(total);
            }
        }
        if (first + blocks * tiles_per_round < tiles) __syncthreads();
#endif
    }
#if STAGING_BLOCKS > 1
    cluster_wait();
#endif
    MARKS_OUT();
}

#if GIVEN_PLANES
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) prepare(const u16* x, const u8* salient, u32* out, int columns, int blocks) {
    stage_x(out, (float2*)(out + blocks * X_WORDS), x, salient, 0, blocks, columns, threadIdx.x / 32, threadIdx.x % 32, false, [](u32) {});
}
#endif
