// y = x W^T for two vectors and more, from packed codes, on the warpgroup tensor cores of compute capability 9.0.
//
// The weight is the operand in registers: 64 rows x 16 columns of codes are expanded by the lanes that hold them, while
// the product before them runs. x is the operand in shared memory, TOKENS vectors x 64 columns a stage, as it lies in
// memory (swizzled by 128 bytes). So a weight is expanded once per TOKENS vectors and no 16-bit weight is ever written.
// Weights are those of the plain meaning rounded once to the type of x, exactly as `decode.cu` gives them.
//
// A thread block has ROW_GROUPS warpgroups of 64 rows each. SPLITS blocks of a cluster share the columns of a tile; their
// float32 sums are added in the order of their ranks through distributed shared memory.

#define STEP_COLUMNS 64                          // of x in one stage; four products
#define ROWS (64 * ROW_GROUPS)
#define X_BYTES (TOKENS * 128)                   // of one stage
#define SUM_STRIDE (ROWS + 4)                    // floats per vector: keeps the lanes of a store in different banks
#define TABLE (KIND != GROUPED_INTEGER || BITS <= 2)
#define CODE_WORDS (2 * CODE_BITS)               // 32-bit words of 64 codes of a row and plane

__device__ __forceinline__ void copy_chunk(u8* shared, const u16* source, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source), "r"(there ? 16 : 0) : "memory");
}
// What threads have written to shared memory is seen by the tensor cores after a barrier.
__device__ __forceinline__ void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void registers_ready() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Four floats at the place of `own` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float4 peer_floats(const float* own, int rank) {
    float4 v;
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}

// ---- Codes of 64 columns of rows r and r + 8, as a lane of the product needs them ---------------------------------------
struct Codes {
    u32 word[2][PLANES][CODE_BITS == 8 ? 4 : CODE_WORDS];  // 8 bits: the lane's own pairs, two to a word
    u32 marks[2];
    u16 scalar[2][NS];  // of the group, if it begins here
    u16 zero[2];
};

// 16-byte chunk (eight columns) of the place `place` in a stage: 1-bit codes take chunks 0 and 2 first, then 1 and 3.
__device__ __forceinline__ int chunk_at(int chunk) { return CODE_BITS == 1 ? (chunk & 4) | (chunk & 1) << 1 | (chunk >> 1 & 1) : chunk; }

__device__ __forceinline__ void fetch(Codes& codes, const Weight& w, const int (&row)[2], int block, int q, bool first) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            const u8* from = w.codes[p] + (u32)(row[h] * w.width + block * (8 * CODE_BITS));
            u32* to = codes.word[h][p];
            if (CODE_BITS == 8) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    to[i] = (u32)__ldg((const u16*)(from + 16 * i + 2 * q)) | (u32)__ldg((const u16*)(from + 16 * i + 8 + 2 * q)) << 16;
            } else if (CODE_BITS % 2) {
#pragma unroll
                for (int i = 0; i < CODE_WORDS / 2; i++) {
                    const uint2 pair = __ldg((const uint2*)from + i);
                    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
                }
            } else {
#pragma unroll
                for (int i = 0; i < CODE_WORDS / 4; i++) {
                    const uint4 four = __ldg((const uint4*)from + i);
                    to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
                }
            }
        }
    if (KIND == BINARY_RESIDUAL) {
        const uint2 marks = __ldg((const uint2*)w.salient + block);
        codes.marks[0] = marks.x, codes.marks[1] = marks.y;
    }
    if (!first && block % (GROUP / STEP_COLUMNS) != 0) return;
    const int group = GROUP >= (1 << 30) ? 0 : block / (GROUP / STEP_COLUMNS);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 cell = (u32)(row[h] * w.groups + group);
        const u8* from = w.scalars + cell * (2 * NS);
        if (NS % 4 == 0) {
#pragma unroll
            for (int i = 0; i < NS / 4; i++) {
                const uint2 four = __ldg((const uint2*)from + i);
                codes.scalar[h][4 * i % NS] = (u16)four.x, codes.scalar[h][(4 * i + 1) % NS] = (u16)(four.x >> 16);
                codes.scalar[h][(4 * i + 2) % NS] = (u16)four.y, codes.scalar[h][(4 * i + 3) % NS] = (u16)(four.y >> 16);
            }
        } else {
#pragma unroll
            for (int i = 0; i < NS; i++) codes.scalar[h][i] = __ldg((const u16*)from + i);
        }
        if (ASYM) {
            const u32 bit = cell * BITS;
            u32 window = __ldg(w.zeros + (bit >> 3));
            if (8 % BITS && (bit & 7) + BITS > 8) window |= (u32)__ldg(w.zeros + (bit >> 3) + 1) << 8;
            codes.zero[h] = (u16)(window >> (bit & 7) & ((1 << BITS) - 1));
        }
    }
}

// ---- Levels of a group ---------------------------------------------------------------------------------------------------
struct Levels {
    u32 table[2], marked[2];  // four 16-bit levels of a row, for ordinary and for marked columns
    float scale, zero;        // wider integers: w = scale (code - zero)
};
__device__ __forceinline__ void levels_of(Levels& levels, const u16 (&s)[NS], u32 zero_code) {
    float v[NS];
#pragma unroll
    for (int i = 0; i < NS; i++) v[i] = float_of_half(s[i]);
    if (KIND == BINARY_RESIDUAL) {
        const bool means = NS == 7;
        const float mean_c = means ? v[0] : 0.0f, mean_s = means ? v[2 % NS] : 0.0f, mean = means ? v[4 % NS] : 0.0f;
        const float scale_c = v[means ? 1 : 0], scale_s = v[means ? 3 : 1], one = v[NS - 2], two = v[NS - 1];
        levels.table[0] = pair_of_floats(mean_c - scale_c, mean_c + scale_c);
        levels.table[1] = pair_of_floats(mean_s - scale_s, mean_s + scale_s);
        levels.marked[0] = pair_of_floats(mean - one - two, mean + one - two);
        levels.marked[1] = pair_of_floats(mean - one + two, mean + one + two);
    } else if (KIND == LEVEL_TABLE) {
        levels.table[0] = pair_of_floats(v[0], v[1 % NS]);
        levels.table[1] = BITS == 2 ? pair_of_floats(v[2 % NS], v[3 % NS]) : 0;
    } else {
        const float zero = ASYM ? (float)zero_code : BITS > 1 ? (float)(1 << (BITS - 1)) : 0.5f;
        const float scale = !ASYM && BITS == 1 ? 2.0f * v[0] : v[0];
        if (TABLE) {
            levels.table[0] = pair_of_floats(scale * (0.0f - zero), scale * (1.0f - zero));
            levels.table[1] = BITS == 2 ? pair_of_floats(scale * (2.0f - zero), scale * (3.0f - zero)) : 0;
        } else {
            levels.scale = scale, levels.zero = 8388608.0f + zero;
        }
    }
}
__device__ __forceinline__ u32 pair_of_codes(u32 first, u32 second, const Levels& levels) {
    const float a = __uint_as_float(0x4b000000u | first) - levels.zero, b = __uint_as_float(0x4b000000u | second) - levels.zero;
    return pair_of_floats(levels.scale * a, levels.scale * b);
}

// Operand words of product `step` (16 columns): rows r and r + 8 of the first eight columns, then of the others.
__device__ __forceinline__ void expand(u32 (&a)[4], const Codes& codes, const Levels (&levels)[2], int step, int q) {
    const u32 marks = KIND == BINARY_RESIDUAL ? codes.marks[step >> 1] >> (8 * (step & 1)) : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32* word = codes.word[h][0];
        if (TABLE) {
            u32 selector;  // nibbles choose the bytes of a level: 2 c and 2 c + 1 for each of two codes c, in both halves
            if (CODE_BITS == 1) {
                const u32 v = word[step >> 1] >> (2 * q + 8 * (step & 1));
                selector = (v & 0x00010001u) * 0x22u + ((v & 0x00020002u) * 0x1100u + 0x10101010u);
                if (KIND == BINARY_RESIDUAL) {
                    const u32 u = codes.word[h][PLANES - 1][step >> 1] >> (2 * q + 8 * (step & 1));
                    selector += (u & 0x00010001u) * 0x44u;
                    selector += (u & 0x00020002u) * 0x2200u;
                }
            } else {
                const u32 v = word[step] >> (4 * q);
                selector = (v & 0x00030003u) * 0x22u + ((v & 0x000c000cu) * 0x880u + 0x10101010u);
            }
            a[h] = __byte_perm(levels[h].table[0], levels[h].table[1], selector);
            a[2 + h] = __byte_perm(levels[h].table[0], levels[h].table[1], selector >> 16);
            if (KIND == BINARY_RESIDUAL && (marks & 0x00ff00ffu)) {
                const u32 v = marks >> (2 * q);
                const u32 low = (v & 1) * 0xffffu | (v & 2) * 0x7fff8000u, high = (v >> 16 & 1) * 0xffffu | (v >> 16 & 2) * 0x7fff8000u;
                a[h] = (a[h] & ~low) | (__byte_perm(levels[h].marked[0], levels[h].marked[1], selector) & low);
                a[2 + h] = (a[2 + h] & ~high) | (__byte_perm(levels[h].marked[0], levels[h].marked[1], selector >> 16) & high);
            }
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int chunk = 2 * step + half;
                if (CODE_BITS == 3) {
                    const int at = 3 * chunk / 4, shift = 8 * (3 * chunk % 4);
                    const u32 v = (shift <= 8 ? word[at] >> shift : funnel_right(word[at], word[at + 1 < CODE_WORDS ? at + 1 : at], shift)) >> (6 * q);
                    a[2 * half + h] = pair_of_codes(v & 7, v >> 3 & 7, levels[h]);
                } else if (CODE_BITS == 4) {
                    const u32 v = word[chunk % CODE_WORDS] >> (8 * q);
                    a[2 * half + h] = pair_of_codes(v & 15, v >> 4 & 15, levels[h]);
                } else {
                    const u32 v = half ? word[step] >> 16 : word[step];
                    a[2 * half + h] = pair_of_codes(v & 255, v >> 8 & 255, levels[h]);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
wide(const u16* x, Weight w, const u16* bias, u16* y, int tokens) {
    extern __shared__ __align__(1024) u8 memory[];
    const int rank = blockIdx.x % SPLITS, tile = blockIdx.x / SPLITS, row_tiles = (w.rows + ROWS - 1) / ROWS;
    const int row0 = tile % row_tiles * ROWS, token0 = tile / row_tiles * TOKENS, blocks = w.columns / STEP_COLUMNS;
    const int begin = rank * blocks / SPLITS, end = (rank + 1) * blocks / SPLITS;
    const int lane = threadIdx.x % 32, r = lane >> 2, q = lane & 3, own_row = threadIdx.x / 32 * 16 + r;
    const int row[2] = {min(row0 + own_row, w.rows - 1), min(row0 + own_row + 8, w.rows - 1)};

    // This thread's copies of x: one chunk of eight columns of every (THREADS / 8)-th vector.
    const int chunk = threadIdx.x % 8, first_token = threadIdx.x / 8;
    const u16* from = x + (size_t)min(token0 + first_token, tokens - 1) * w.columns + chunk * 8;
    u8* const to = memory + first_token * 128 + ((chunk_at(chunk) ^ (first_token & 7)) << 4);
    auto load = [&](int block, int slot) {
        if (block < end)
#pragma unroll
            for (int i = 0; i < (TOKENS * 8 + THREADS - 1) / THREADS; i++) {
                const int token = first_token + i * (THREADS / 8);
                const bool there = token0 + token < tokens;
                if (TOKENS * 8 >= THREADS || token < TOKENS)
                    copy_chunk(to + slot * X_BYTES + i * (THREADS * 16), there ? from + (size_t)(i * (THREADS / 8)) * w.columns + block * STEP_COLUMNS : x, there);
            }
        copies_commit();
    };
    wait_for_previous_kernel();
    for (int ahead = 0; ahead < DEPTH - 2; ahead++) load(begin + ahead, ahead);

    float sums[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0.0f;
    Codes codes, next;
    Levels levels[2];
    if (begin < end) fetch(next, w, row, begin, q, true);
    int slot = 0;
    u32 a[2][4];
    for (int block = begin; block < end; block++) {
        codes = next;
        if (block == begin || block % (GROUP / STEP_COLUMNS) == 0)
#pragma unroll
            for (int h = 0; h < 2; h++) levels_of(levels[h], codes.scalar[h], codes.zero[h]);
        if (block + 1 < end) fetch(next, w, row, block + 1, q, false);
        copies_wait<DEPTH - 3>();
        show_to_tensor_cores();
        __syncthreads();
        // Every warpgroup has waited for its products of the block before the last one, whose slot is filled again.
        load(block + DEPTH - 2, slot >= 2 ? slot - 2 : slot + DEPTH - 2);
#pragma unroll
        for (int step = 0; step < 4; step++) {
            products_wait<1>();  // the registers of the product before the last one are free
            expand(a[step & 1], codes, levels, step, q);
            registers_ready();
            warpgroup_product(sums, a[step & 1], memory + slot * X_BYTES, step);
            products_commit();
        }
        slot = slot == DEPTH - 1 ? 0 : slot + 1;
    }
    products_wait<0>();
    copies_wait<0>();
    __syncthreads();

    float* const total = (float*)memory;  // [TOKENS][SUM_STRIDE]
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) total[(8 * j + 2 * q + (e & 1)) * SUM_STRIDE + own_row + 8 * (e >> 1)] = sums[4 * j + e];
    if (SPLITS > 1) cluster_barrier();
    else __syncthreads();
    for (int cell = rank * THREADS + threadIdx.x; cell < TOKENS * (ROWS / 4); cell += SPLITS * THREADS) {
        const int token = cell / (ROWS / 4), part = cell % (ROWS / 4) * 4, first_row = row0 + part;
        if (token0 + token >= tokens || first_row >= w.rows) continue;
        const float* own = total + token * SUM_STRIDE + part;
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int other = 0; other < SPLITS; other++) {
            const float4 four = SPLITS > 1 ? peer_floats(own, other) : *(const float4*)own;
            v[0] += four.x, v[1] += four.y, v[2] += four.z, v[3] += four.w;
        }
        u16 out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = x_of_float(v[i] + (bias ? float_of_x(bias[min(first_row + i, w.rows - 1)]) : 0.0f));
        u16* const place = y + (size_t)(token0 + token) * w.rows + first_row;
        if (w.rows % 4 == 0) {
            *(uint2*)place = make_uint2(out[0] | (u32)out[1] << 16, out[2] | (u32)out[3] << 16);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (first_row + i < w.rows) place[i] = out[i];
        }
    }
    if (SPLITS > 1) cluster_barrier();  // no block ends while another one reads its sums
}
