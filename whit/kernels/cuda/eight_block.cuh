// What a block of threads of `eight.cu` works on, where it keeps it in shared memory, and the ring of a warp.

struct Block {
    int warp, lane, g, q;            // g: a row of eight; q: of the lanes that share it
    int rank, cluster, clusters;     // rank: of the block in its cluster
    int vectors, span, begin, here;  // columns of the block: room for `span` from `begin` on, `here` of them exist
    int tiles, across, each;         // row tiles of 16; items of a tile, of a warp
    int pitch, wide_pitch;           // bytes between vectors
    int stored, placed_pitch;
    float *row_scales, *row_biases, *steps;
    u32 *most, *sent_most;  // largest magnitudes of vectors: of this block, of all blocks of the cluster
    u64* sent;              // two barriers: largest magnitudes have come, sums have come
    u32 *flags, *loose;     // outlier columns, and those whose weights are codes
    u8 *placed_x, *wide, *wide_x, *rounded;
    float *sums, *inbox, *placed_sums;  // of tiles and warps; of blocks, for results of this one; of every SPLITS-th tile
    int room;                           // fours of results of a block at most

    __device__ __forceinline__ Block(u8* memory, const Work& w) {
        warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
        rank = SPLITS > 1 ? blockIdx.x % SPLITS : 0, cluster = blockIdx.x / SPLITS, clusters = gridDim.x / SPLITS;
        vectors = w.vectors, span = w.span, begin = rank * span, here = min(span, w.columns - begin);
        const int all_tiles = (w.rows + 15) / 16;
        tiles = (all_tiles - cluster + clusters - 1) / clusters, across = span / ITEM;
        each = (tiles * across + WARPS - 1) / WARPS;
        pitch = span + 64, wide_pitch = 2 * span + 16;
        row_scales = (float*)(memory + WARPS * DEPTH * (ITEM_BYTES + 8));
        row_biases = row_scales + tiles * 16;
        most = (u32*)(row_biases + tiles * 16);
        steps = (float*)(most + 32);
        sent_most = most + 64;
        sent = (u64*)(sent_most + SPLITS * 32);
        flags = (u32*)(sent + 2);
        loose = flags + (PLACED ? span / 32 : 0);
        stored = (w.stored + 15) / 16 * 16, placed_pitch = 2 * stored + 16;
        placed_x = (u8*)(loose + (OUTLIERS ? span / 32 : 0));
        wide = placed_x + (PLACED ? (vectors * placed_pitch + 127) / 128 * 128 : 0);
#if INPUT > 0
        const int wide_bytes = (2 * max(w.columns, (SPLITS - 1) * span + span) + 127) / 128 * 128;
        wide_x = wide + 2 * begin;
#else
        const int wide_bytes = vectors * wide_pitch;
        wide_x = wide;
#endif
        rounded = wide + wide_bytes;
        sums = (float*)(rounded + (ROUNDED == 1 ? (vectors * pitch + 15) / 16 * 16 : 0));
        inbox = sums + (tiles + WARPS) * MOST * 16;
        room = (tiles * MOST * 4 + 32 * SPLITS - 1) / (32 * SPLITS) * 32;
        placed_sums = inbox + (SPLITS > 1 ? SPLITS * room * 4 : 0);
    }
    // Results, four rows of a vector at a time, are shared out among the blocks in runs of 32.
    __device__ __forceinline__ int own_results() const {
        const int runs = tiles * MOST * 4 / 32, rest = tiles * MOST * 4 % 32;
        return (runs / SPLITS + (rank < runs % SPLITS)) * 32 + (rank == runs % SPLITS ? rest : 0);
    }
    __device__ __forceinline__ int first_row(int tile) const { return (cluster + tile * clusters) * 16; }
    // Scale and bias of row `i` of the block's.
    __device__ __forceinline__ float scale_of(const Work& w, int i) const {
        const int row = first_row(i / 16) + i % 16;
        return i < tiles * 16 && row < w.rows ? scale_of_row(w, row) : 0.0f;
    }
    __device__ __forceinline__ float bias_of(const Work& w, int i) const {
        const int row = first_row(i / 16) + i % 16;
        if (!(w.bias && i < tiles * 16 && row < w.rows)) return 0.0f;
        return BIAS_FLOAT ? ((const float*)w.bias)[row] : float_of_x(((const u16*)w.bias)[row]);
    }
    __device__ __forceinline__ void keep_rows(const Work& w, float first_scale, float first_bias) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < tiles * 16; i += THREADS) {
            const float scale = i < THREADS ? first_scale : scale_of(w, i);
            row_scales[i] = LLM ? __fdiv_rn(scale, 127.0f) : scale;
            row_biases[i] = i < THREADS ? first_bias : bias_of(w, i);
        }
    }
};

// Items of a warp, one after the other, some of them on their way.
struct Ring {
    u8* stages;
    u64* arrived;
    int next, last, tile, part;  // of the next one to ask for

    __device__ __forceinline__ Ring(u8* memory, const Block& b) {
        stages = memory + b.warp * (DEPTH * ITEM_BYTES);
        arrived = (u64*)(memory + WARPS * DEPTH * ITEM_BYTES) + b.warp * DEPTH;
        const int items = b.tiles * b.across;
        next = min(b.warp * b.each, items), last = min(next + b.each, items);
        tile = next / b.across, part = next % b.across;
    }
    __device__ __forceinline__ void load(int at, const Block& b, const TensorMap& codes) {
        if (next < last) {
            if (b.lane == 0) {
                const int row = b.first_row(tile), column = b.begin + part * ITEM;
                barrier_expect(arrived + at, ITEM_BYTES);
#pragma unroll
                for (int box = 0; box < BOXES; box++) copy_rows(stages + at * ITEM_BYTES + box * 2048, codes, arrived + at, column + box * 128, row);
            }
            next++;
            if (++part == b.across) part = 0, tile++;
        }
    }
    __device__ __forceinline__ void load_others(const Block& b, const TensorMap& codes) {
#pragma unroll 1
        for (int i = 1; i < DEPTH; i++) load(i, b, codes);
    }
};
