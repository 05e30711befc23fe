// y = x W^T for 2 to 32 vectors, from packed codes, on the 16-bit tensor cores.
//
// Codes are expanded in registers to the operands of mma.m16n8k16: codes of up to two bits choose one of four 16-bit
// levels with a byte permutation (one multiply-add makes the selectors of four weights), wider integers become
// 16-bit floats by their exponent bits. The weights are those of the plain meaning rounded to the type of x; grouped
// integers stay exact integers and their scale multiplies the float32 sums of the group.
//
// One thread block per multiprocessor keeps x (one chunk of columns) in shared memory, in the order in which codes are
// extracted, and walks over row tiles; its warps share the columns of a tile and their sums are added in a fixed order.

constexpr int BLOCKS_AT_ONCE = UNROLL;
#define TABLE (KIND != GROUPED_INTEGER || BITS <= 2)
#define TOKENS (8 * TILES)
#define CELLS (16 * (TOKENS + 1))  // results of a row tile; one more per row keeps its columns in different banks
#define RUN (FINE && CODE_BITS == 1 ? 16 : CODE_BITS <= 1 ? 32 : CODE_BITS <= 3 ? 16 : CODE_BITS == 4 ? 8 : 4)
#define PARTS (32 / RUN)   // runs of consecutive columns that one lane contributes to a block of 128
#define STEPS (8 / PARTS)  // products per run

__device__ __forceinline__ void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
    u32 sum;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
#else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
#endif
    return sum;
}

// Four levels of a row and group: words {0, 1}, {2, 3}; with `marks`, those of marked columns.
__device__ __forceinline__ void level_words(u32 (&t)[2], const u8* scalars, const Weight& w, int row, int row0, int group0, int parity, int group, bool marks) {
    if (KIND == BINARY_RESIDUAL) {
        const int shift = NS == 7 ? 1 : 0;
        if (!marks) {
            const float mean_c = NS == 7 ? staged_scalar(scalars, row, parity, group, 0) : 0.0f;
            const float mean_s = NS == 7 ? staged_scalar(scalars, row, parity, group, 2) : 0.0f;
            const float scale_c = staged_scalar(scalars, row, parity, group, shift), scale_s = staged_scalar(scalars, row, parity, group, NS == 7 ? 3 : 1);
            t[0] = pair_of_floats(mean_c - scale_c, mean_c + scale_c);
            t[1] = pair_of_floats(mean_s - scale_s, mean_s + scale_s);
        } else {
            const float mean = NS == 7 ? staged_scalar(scalars, row, parity, group, 4) : 0.0f;
            const float one = staged_scalar(scalars, row, parity, group, NS - 2), two = staged_scalar(scalars, row, parity, group, NS - 1);
            t[0] = pair_of_floats(mean - one - two, mean + one - two);
            t[1] = pair_of_floats(mean - one + two, mean + one + two);
        }
    } else if (KIND == LEVEL_TABLE) {
        t[0] = pair_of_floats(staged_scalar(scalars, row, parity, group, 0), staged_scalar(scalars, row, parity, group, 1));
        t[1] = BITS == 2 ? pair_of_floats(staged_scalar(scalars, row, parity, group, 2), staged_scalar(scalars, row, parity, group, 3)) : 0;
    } else {
        const float zero = staged_zero(scalars, w, row, row0, group0, group), step = !ASYM && BITS == 1 ? 2.0f : 1.0f;
        t[0] = pair_of_floats(-zero * step, (1.0f - zero) * step);
        t[1] = pair_of_floats(2.0f - zero, 3.0f - zero);
    }
}
__device__ __forceinline__ void levels_of(u32& low, u32& high, u32 codes, const u32 (&t)[2]) {
    const u32 selector = codes * 0x22u + 0x10101010u;  // code c chooses bytes 2 c and 2 c + 1
    low = choose_bytes(t[0], t[1], selector);
    high = choose_bytes(t[0], t[1], selector >> 16);
}
// Bytes of codes to exact 16-bit floats code - zero; `minus` is the pair that takes the bias of the trick and zero away.
__device__ __forceinline__ void integers_of(u32& low, u32& high, u32 codes, u32 minus, float zero) {
#if BF16 && BITS == 8
    float f[4];
#pragma unroll
    for (int j = 0; j < 4; j++) f[j] = __uint_as_float(choose_bytes(codes, 0x4b000000u, 0x7650 + j)) - (8388608.0f + zero);
    low = pair_of_floats(f[0], f[1]);
    high = pair_of_floats(f[2], f[3]);
#else
    const u32 exponent = BF16 ? 0x43434343u : 0x64646464u;  // 128 + code, 1024 + code
    low = add_pairs(choose_bytes(codes, exponent, 0x4140), minus);
    high = add_pairs(choose_bytes(codes, exponent, 0x4342), minus);
#endif
}

template <bool FULL>
__device__ __forceinline__ void item_products(float (&y)[2][TILES][4], const u8* stage, const u32* xs, const u32* masks, const u32* flags, const Weight& w, int row0, int column0, int lane) {
    const u8* const scalars = stage + PLANES * PLANE_BYTES;
    const int r = lane >> 2, q = lane & 3, group0 = GROUP >= (1 << 30) ? 0 : column0 / GROUP;
    const int parity[2] = {odd_start(w, row0 + r, group0), odd_start(w, row0 + r + 8, group0)};
#pragma unroll BLOCKS_AT_ONCE
    for (int block = 0; block < BLOCKS; block++) {
        if (!FULL && column0 + block * 128 >= w.columns) break;
        u32 even[2], odd[2], table[2][2], marked_table[2][2];
        u32 minus[2];
        float zero[2], scale[2], sums[2][TILES][4];
        const u32 flag = KIND == BINARY_RESIDUAL ? flags[block] : 0;
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            if (!FULL && FINE && column0 + block * 128 + pair * 64 >= w.columns) break;
            if (pair == 0 || FINE) {
                const int group = group_of(column0, block * 128 + pair * 64);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = r + 8 * h;
                    if (TABLE) level_words(table[h], scalars, w, row, row0, group0, parity[h], group, false);
                    if (KIND == BINARY_RESIDUAL && flag) level_words(marked_table[h], scalars, w, row, row0, group0, parity[h], group, true);
                    if (KIND == GROUPED_INTEGER) scale[h] = staged_scalar(scalars, row, parity[h], group, 0);
                    if (!TABLE) {
                        zero[h] = staged_zero(scalars, w, row, row0, group0, group);
                        minus[h] = pair_of_floats(-(BF16 ? 128.0f : 1024.0f) - zero[h], -(BF16 ? 128.0f : 1024.0f) - zero[h]);
                    }
                }
                if (KIND == GROUPED_INTEGER)
#pragma unroll
                    for (int n = 0; n < 2 * TILES; n++) sums[n % 2][n / 2][0] = sums[n % 2][n / 2][1] = sums[n % 2][n / 2][2] = sums[n % 2][n / 2][3] = 0.0f;
            }
            u32 three[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = r + 8 * h;
                if (CODE_BITS == 1 && (pair == 0 || FINE)) {
                    u32 first = FINE ? half_word(stage, row, block * 4 + pair * 2, q) : staged_word(stage, row, block * 4 + q);
                    if (KIND == BINARY_RESIDUAL) {  // two planes become words of two-bit codes: even columns, odd columns
                        const u8* plane = stage + PLANE_BYTES;
                        u32 second = FINE ? half_word(plane, row, block * 4 + pair * 2, q) : staged_word(plane, row, block * 4 + q);
                        even[h] = (first & 0x55555555u) | (second << 1 & 0xaaaaaaaau);
                        odd[h] = (first >> 1 & 0x55555555u) | (second & 0xaaaaaaaau);
                    } else {
                        even[h] = first;
                    }
                }
                if (CODE_BITS == 2) even[h] = staged_word(stage, row, block * 8 + pair * 4 + q);
                if (CODE_BITS == 3) three_bit_bytes(three[h], stage, row, block * 48 + pair * 24, q);
            }
#pragma unroll
            for (int t = 4 * pair; t < 4 * pair + 4; t++) {
                const int step = t >> 1, half = t & 1;
                u32 a[4];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = r + 8 * h;
                    u32 codes;
                    if (CODE_BITS == 1) {
                        const int bit = (FINE ? step & 1 : step) + 4 * half;
                        if (KIND == BINARY_RESIDUAL)
                            codes = (bit & 1 ? odd[h] >> (bit - 1) : even[h] >> bit) & 0x03030303u;
                        else
                            codes = even[h] >> bit & 0x01010101u;
                    } else if (CODE_BITS == 2) {
                        codes = even[h] >> (2 * (step & 1) + 4 * half) & 0x03030303u;
                    } else if (CODE_BITS == 3) {
                        codes = three[h][t & 3];
                    } else if (CODE_BITS == 4) {
                        codes = staged_word(stage, row, block * 16 + step * 4 + q) >> (4 * half) & 0x0f0f0f0fu;
                    } else {
                        codes = staged_word(stage, row, block * 32 + t * 4 + q);
                    }
                    if (TABLE)
                        levels_of(a[h], a[2 + h], codes, table[h]);
                    else
                        integers_of(a[h], a[2 + h], codes, minus[h], zero[h]);
                    if (KIND == BINARY_RESIDUAL && (flag >> t & 1)) {
                        u32 low, high;
                        const uint2 mask = ((const uint2*)masks)[(block * 8 + t) * 4 + q];
                        levels_of(low, high, codes, marked_table[h]);
                        a[h] = (low & mask.x) | (a[h] & ~mask.x);
                        a[2 + h] = (high & mask.y) | (a[2 + h] & ~mask.y);
                    }
                }
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    const uint2 b = ((const uint2*)xs)[((block * 8 + t) * TILES + n) * 32 + lane];
                    product(KIND == GROUPED_INTEGER ? sums[t & 1][n] : y[t & 1][n], a, b.x, b.y);
                }
            }
            if (KIND == GROUPED_INTEGER && (pair == 1 || FINE))
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) y[0][n][i] += scale[i >> 1] * (sums[0][n][i] + sums[1][n][i]);
        }
    }
}

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
