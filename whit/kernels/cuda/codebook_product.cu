// y = W x for one vector from the numbers of codewords of neighbouring columns, 128 codewords and their negatives.
//
// For a group of columns and a codeword the sum of products with x is the same in all rows, so a table of them makes a
// weight a look-up and an addition per WIDTH columns. A tile of the table, 128 groups in float32, comes from tensor-core
// products of x with the codewords and takes 64 KiB of shared memory; SPLITS blocks of a cluster hold a tile each, for the
// same rows, and look up their part of each. In the table the four groups of a word of codes lie so that lane i of a warp
// finds all of its entries in bank i: no look-up waits for another one. Sums are added in a fixed order.
//
// With SEVERAL > 1 as many weights of one layout meet the same x, each with clusters and a codebook of its own.

#define CODEWORDS 128
#define TILE 128                   // groups
#define GROUP_BYTES (CODEWORDS * 128)  // of the table, to the next group of the same word
#define WARP_COUNT (THREADS / 32)
#define STEPS ((WIDTH + 15) / 16)  // products of 16 columns
#define SHARE (64 / WARP_COUNT)    // of the 4 x 16 parts of the table, for each warp
constexpr int AT_ONCE = 8;         // rows of a warp

__device__ __forceinline__ void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Entries k and k + 1 of a group's columns; zero beyond the group and beyond the last column.
__device__ __forceinline__ u32 x_pair(const u16* x, int columns, int group, int k) {
    const int at = group * WIDTH + k;
    if (WIDTH % 2 == 0) {
        if (k >= WIDTH || at >= columns) return 0;
        return at + 1 < columns ? *(const u32*)(x + at) : x[at];
    }
    return (k < WIDTH && at < columns ? x[at] : 0) | (u32)(k + 1 < WIDTH && at + 1 < columns ? x[at + 1] : 0) << 16;
}
__device__ __forceinline__ float codeword_entry(const u8* codebook, int word, int k) {
    if (k >= WIDTH) return 0.0f;
    if (!TERNARY) return (float)(signed char)codebook[word * WIDTH + k] * (1.0f / 128.0f);
    u32 trits = codebook[word * ((WIDTH + 4) / 5) + k / 5];
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < k % 5) trits /= 3;
    return (float)((int)(trits % 3) - 1);
}

// No block of a cluster goes while another one reads its memory; nothing is made visible.
__device__ __forceinline__ void cluster_leave() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// The codewords that a warp multiplies, as the second operand of the product.
struct Codewords {
    u32 b[STEPS][SHARE][2];
    __device__ __forceinline__ void load(const u8* codebook, int warp, int lane) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int n = 0; n < SHARE; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int word = 8 * (warp / 4 * SHARE + n) + lane / 4, k = 16 * step + 8 * half + lane % 4 * 2;
                    b[step][n][half] = pair_of_floats(codeword_entry(codebook, word, k), codeword_entry(codebook, word, k + 1));
                }
    }
};

// The table of one tile: entry (group of the word j, codeword k, word i) at j * GROUP_BYTES + k * 128 + i * 4.
__device__ __forceinline__ void make_table(float* table, const u16* x, const Codewords& codewords, int columns, int tile, int warp, int lane) {
    const int q = lane % 4, r = lane / 4, j = warp % 4, first = warp / 4 * SHARE;
    float sums[2][SHARE][4];
#pragma unroll
    for (int i = 0; i < 8 * SHARE; i++) sums[i / (4 * SHARE)][i / 4 % SHARE][i % 4] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 a[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) a[i / 4][i % 4] = x_pair(x, columns, tile * TILE + 4 * (16 * (i / 4) + r + 8 * (i % 2)) + j, 16 * step + 2 * q + 8 * (i % 4 / 2));
#pragma unroll
        for (int n = 0; n < SHARE; n++) {
            product(sums[0][n], a[0], codewords.b[step][n][0], codewords.b[step][n][1]);
            product(sums[1][n], a[1], codewords.b[step][n][0], codewords.b[step][n][1]);
        }
    }
    // Lane q of a quad begins with words 8 q on and goes round: at every store 32 lanes write to 32 banks.
    float* const out = table + j * (GROUP_BYTES / 4) + (8 * first + 2 * q) * 32 + r;
#pragma unroll
    for (int n = 0; n < SHARE; n++)
#pragma unroll
        for (int p = 0; p < 2; p++) {
            float v[4], t[4];
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = sums[i / 2][n][2 * (i % 2) + p];
#pragma unroll
            for (int i = 0; i < 4; i++) t[i] = q & 1 ? v[(i + 1) % 4] : v[i];
#pragma unroll
            for (int i = 0; i < 4; i++) out[(8 * n + p) * 32 + ((q + i) & 3) * 8] = q & 2 ? t[(i + 2) % 4] : t[i];
        }
}

// The sum of the look-ups of four codes.
__device__ __forceinline__ float looked_up(const u8* table, u32 codes, u32 lane_bytes) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const u32 at = (j == 0 ? codes << 7 : codes >> (8 * j - 7)) & 0x3f80u | lane_bytes;
        const u32 sign = j == 3 ? codes : codes << (24 - 8 * j);
        sum += __uint_as_float(*(const u32*)(table + j * GROUP_BYTES + at) ^ (sign & 0x80000000u));
    }
    return sum;
}

#if SEVERAL > 1
struct Task {
    Weight w;
    u16* y;
    int first;  // of its clusters
};
struct Tasks {
    Task of[SEVERAL];
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
codebook_product(INPUT_TYPE given, const __grid_constant__ Tasks tasks, int passes, int rows_each) {
    int which = 0;
    while (which + 1 < SEVERAL && (int)blockIdx.x / SPLITS >= tasks.of[which + 1].first) which++;
    const Weight w = tasks.of[which].w;
    const u16* bias = nullptr;
    u16* const y = tasks.of[which].y;
    const int cluster = (int)blockIdx.x / SPLITS - tasks.of[which].first;
#else
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
codebook_product(INPUT_TYPE given, Weight w, const u16* bias, u16* y, int passes, int rows_each) {
    const int cluster = blockIdx.x / SPLITS;
#endif
    extern __shared__ __align__(16) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % SPLITS;
    float* const partial = (float*)(memory + 4 * GROUP_BYTES);
    const int row0 = cluster * rows_each, rows = max(0, min(rows_each, w.rows - row0));
    const int batches = (rows + AT_ONCE - 1) / AT_ONCE;
    auto codes_of = [&](int tile) { return w.codes[0] + (size_t)row0 * w.width + min(tile * TILE + lane * 4, w.width - 4); };
    auto load = [&](u32 (&word)[AT_ONCE], const u8* codes, int row) {
        if (row + AT_ONCE <= rows) {
            const u8* from = codes + (u32)(row * w.width);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++, from += w.width) word[i] = __ldg((const u32*)from);
        } else {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) word[i] = __ldg((const u32*)(codes + (u32)(min(row + i, rows - 1) * w.width)));
        }
    };
    // Codes and codewords are no kernel's result: only x has to be waited for.
    u32 word[AT_ONCE];
    if (warp < batches) load(word, codes_of(rank), warp * AT_ONCE);
    Codewords codewords;
    codewords.load(w.zeros, warp, lane);
#if INPUT == 0
    const u16* const x = given;
    wait_for_previous_kernel();
#else
    u32* const made = (u32*)(partial + rows_each);
    make_input<64>(made, given, w.columns, []() { wait_for_previous_kernel(); });
    const u16* const x = (const u16*)made;
#endif
#pragma unroll 1
    for (int pass = 0; pass < passes; pass++) {
        const int tile = pass * SPLITS + rank;
        // Beyond the last column the table is zero, whatever the code: lanes there read the end of the row again.
        const u8* const codes = codes_of(tile);
        if (pass > 0 && warp < batches) load(word, codes, warp * AT_ONCE);
        if (pass > 0) __syncthreads();
        make_table((float*)memory, x, codewords, w.columns, tile, warp, lane);
        __syncthreads();
#pragma unroll 1
        for (int batch = warp; batch < batches; batch += WARP_COUNT) {
            u32 next[AT_ONCE];
            if (batch + WARP_COUNT < batches) load(next, codes, (batch + WARP_COUNT) * AT_ONCE);
            float v[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) v[i] = looked_up(memory, word[i], lane * 4);
            // Sums over the lanes; rows part among them on the way.
#pragma unroll
            for (int half = AT_ONCE / 2, across = 16; half > 0; half /= 2, across /= 2)
#pragma unroll
                for (int i = 0; i < half; i++) {
                    const float keep = lane & across ? v[i + half] : v[i], give = lane & across ? v[i] : v[i + half];
                    v[i] = keep + __shfl_xor_sync(0xffffffffu, give, across);
                }
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], 2);
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], 1);
            const int mine = batch * AT_ONCE + (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0);
            if (lane % 4 == 0 && mine < rows) partial[mine] = pass > 0 ? partial[mine] + v[0] : v[0];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) word[i] = next[i];
        }
    }
#if SPLITS > 1
    cluster_arrive();
#endif
    int four = threadIdx.x * SPLITS + rank;
    float scale[4], shift[4];
    auto load_scales = [&]() {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (four * 4 + i >= rows) break;
            scale[i] = float_of_half(__ldg((const u16*)w.scalars + row0 + four * 4 + i));
            shift[i] = bias ? float_of_x(bias[row0 + four * 4 + i]) : 0.0f;
        }
    };
    load_scales();
#if SPLITS > 1
    cluster_wait();
#else
    __syncthreads();
#endif
    for (; four * 4 < rows; four += THREADS * SPLITS, load_scales()) {
        float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < SPLITS; i++) {
            const uint4 part = SPLITS > 1 ? peer_words(partial + four * 4, i) : *(const uint4*)(partial + four * 4);
            total[0] += __uint_as_float(part.x), total[1] += __uint_as_float(part.y);
            total[2] += __uint_as_float(part.z), total[3] += __uint_as_float(part.w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (four * 4 + i < rows) y[row0 + four * 4 + i] = x_of_float(total[i] * scale[i] + shift[i]);
    }
#if SPLITS > 1
    cluster_leave();
#endif
}
