// y = x W^T for two vectors and more, from packed codes, on the warpgroup tensor cores of compute capability 9.0.
//
// The weight is the operand in registers: 64 rows x 16 columns of codes are expanded by the lanes that hold them, while
// the product before them runs. x is the operand in shared memory, TOKENS vectors x BLOCK columns a stage, brought by the
// tensor copy engine (swizzled by 128 bytes). So a weight is expanded once per TOKENS vectors and no 16-bit weight is ever
// written. Weights are those of the plain meaning rounded once to the type of x, exactly as `decode.cu` gives them.
//
// A thread block has ROW_GROUPS warpgroups of 64 rows each, which only meet at the barriers of the stages. SPLITS blocks of
// a cluster share the columns of a tile; their float32 sums are added in the order of their ranks.

#define BOXES (BLOCK / 64)                       // of 64 columns: what one copy brings
#define ROWS (64 * ROW_GROUPS)
#define BOX_BYTES (TOKENS * 128)
#define X_BYTES (BOXES * BOX_BYTES)              // of one stage
#define SUM_STRIDE (ROWS + 4)                    // floats per vector: keeps the lanes of a store in different banks
#define OUT_STRIDE (ROWS + 8)                    // 16-bit results per vector, likewise
#define VECTOR_CODEBOOK 3
#ifndef WIDTH
#define WIDTH 1
#endif
#define BYTE_PER_CHUNK (KIND == VECTOR_CODEBOOK && BITS == 8 && WIDTH == 8)  // a code for each eight columns
#define TABLE (KIND != VECTOR_CODEBOOK && (KIND != GROUPED_INTEGER || BITS <= 2))
#define HALVES (!BF16 && KIND == GROUPED_INTEGER && BITS > 2)  // wider integers become float16 without float32
#define SECOND_CODE (BITS == 4 ? 0x2c00u : 0x3c00u)            // 1/16 or 1: what the second code of a pair is multiplied by
#define CODE_WORDS (KIND == VECTOR_CODEBOOK ? 2 * BOXES : BLOCK * CODE_BITS / 32)  // 32-bit words of the codes of a row and plane
#define KEPT_WORDS (CODE_BITS == 8 && KIND != VECTOR_CODEBOOK ? CODE_WORDS / 4 : CODE_WORDS)  // 8 bits: the lane's own pairs

// What the tensor copy engine must know of x: an opaque value made by the driver.
struct __align__(64) TensorMap { u64 words[16]; };

__device__ __forceinline__ void barrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Returns when the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(u64* barrier, int parity) {
    asm volatile(
        "{.reg .pred p; waiting: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; bra waiting; done:}"
        ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
// TOKENS vectors x 64 columns to shared memory; vectors that are not there become zero.
__device__ __forceinline__ void copy_box(u8* shared, const TensorMap& map, u64* barrier, int column, int token) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(shared_address(shared)), "l"(&map), "r"(column), "r"(token), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// Four 8 x 8 matrices of 16-bit values, as the results of a product lie in a warp, to shared memory, transposed: lane i
// names the place of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(u16* place, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(place)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void registers_ready() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// ---- Codes of a block of columns of rows r and r + 8, as a lane of the product needs them -------------------------------
struct Codes {
    u32 word[2][PLANES][KEPT_WORDS];
    u32 marks[2 * BOXES];
    u16 scalar[2][NS];  // of the group, if it begins here
    u16 zero[2];
};

// Number of the codeword that column `column` of a row belongs to.
__device__ __forceinline__ u32 code_at(const u8* codes, u32 group) {
    if (BITS == 8) return __ldg(codes + group);
    const u32 bit = group * BITS;
    u32 window = __ldg(codes + (bit >> 3));
    if (8 % BITS && (bit & 7) + BITS > 8) window |= (u32)__ldg(codes + (bit >> 3) + 1) << 8;
    return window >> (bit & 7) & ((1 << BITS) - 1);
}

__device__ __forceinline__ void fetch(Codes& codes, const Weight& w, const int (&row)[2], int block, int q, bool first) {
#if KIND == VECTOR_CODEBOOK && !BYTE_PER_CHUNK
#pragma unroll
    for (int chunk = 0; chunk < BLOCK / 8; chunk++) {
        const u32 group = (u32)(block * BLOCK + chunk * 8 + 2 * q) / WIDTH;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32 code = code_at(w.codes[0] + (u32)(row[h] * w.width), group) << (8 * (chunk % 4));
            codes.word[h][0][chunk / 4] = chunk % 4 ? codes.word[h][0][chunk / 4] | code : code;
        }
    }
    return;
#endif
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            const u8* from = w.codes[p] + (u32)(row[h] * w.width + block * (BYTE_PER_CHUNK ? BLOCK / 8 : BLOCK / 8 * CODE_BITS));
            u32* to = codes.word[h][p];
            if (CODE_BITS == 8 && !BYTE_PER_CHUNK) {
#pragma unroll
                for (int i = 0; i < KEPT_WORDS; i++)
                    to[i] = (u32)__ldg((const u16*)(from + 16 * i + 2 * q)) | (u32)__ldg((const u16*)(from + 16 * i + 8 + 2 * q)) << 16;
            } else if (CODE_WORDS % 4) {
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
    if (KIND == VECTOR_CODEBOOK) return;
    if (KIND == BINARY_RESIDUAL) {
#pragma unroll
        for (int i = 0; i < BOXES; i++) {
            const uint2 marks = __ldg((const uint2*)w.salient + block * BOXES + i);
            codes.marks[2 * i] = marks.x, codes.marks[2 * i + 1] = marks.y;
        }
    }
    if (!first && block % (GROUP / BLOCK) != 0) return;
    const int group = GROUP >= (1 << 30) ? 0 : block / (GROUP / BLOCK);
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
    float scale, zero;        // wider integers: w = scale (code - zero), in float16 by the pairs of the table
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
            if (HALVES) {
                levels.table[0] = pair_of_floats(scale, scale);
                levels.table[1] = pair_of_floats(-1024.0f - zero, (BITS == 4 ? -64.0f : -1024.0f) - zero);
            }
        }
    }
}
// scale (code - zero) for a pair of codes, rounded once. In float16 every step before the last is exact: a code in the low
// bits of 1024 is 1024 + code; the second of two four-bit codes stays where it is, sixteen times as much.
__device__ __forceinline__ u32 fma_pairs(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 pair_of_halves(u32 biased, const Levels& levels) {
    return multiply_pairs(fma_pairs(biased, SECOND_CODE << 16 | 0x3c00u, levels.table[1]), levels.table[0]);
}
__device__ __forceinline__ u32 pair_of_codes(u32 first, u32 second, const Levels& levels) {
    const float a = __uint_as_float(0x4b000000u | first) - levels.zero, b = __uint_as_float(0x4b000000u | second) - levels.zero;
    return pair_of_floats(levels.scale * a, levels.scale * b);
}

// Nibbles that choose the bytes of two 16-bit levels, 2 c and 2 c + 1 for each code c, in both halves of a word.
struct Multipliers { u32 once, base; };
__device__ __forceinline__ u32 selector_of_bits(u32 v, const Multipliers& m) { return (v & 0x00010001u) * m.once + ((v & 0x00020002u) * 0x1100u + m.base); }
__device__ __forceinline__ u32 selector_of_high_bits(u32 v, u32 selector) {
    selector = (v & 0x00010001u) * 0x44u + selector;
    return (v & 0x00020002u) * 0x2200u + selector;
}
__device__ __forceinline__ u32 selector_of_twos(u32 v, const Multipliers& m) { return (v & 0x00030003u) * m.once + ((v & 0x000c000cu) * 0x880u + m.base); }

// Selectors of products `step` (even) and `step + 1`. One-bit planes have eight columns to a byte: a word is four chunks of
// eight columns, of which 0 and 2 share a selector, and 1 and 3. A word of two-bit codes is the two chunks of one product.
__device__ __forceinline__ void make_selectors(u32 (&selector)[2][2], const Codes& codes, const Multipliers& m, int step, int q) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (CODE_BITS == 1) {
                selector[h][i] = selector_of_bits(codes.word[h][0][step / 2] >> (2 * q + 8 * i), m);
                if (KIND == BINARY_RESIDUAL) selector[h][i] = selector_of_high_bits(codes.word[h][PLANES - 1][step / 2] >> (2 * q + 8 * i), selector[h][i]);
            } else {
                selector[h][i] = selector_of_twos(codes.word[h][0][(step + i) % KEPT_WORDS] >> (4 * q), m);
            }
        }
}

// Marks of the columns of a lane: a byte whose highest bit is the mark for each, in the places of the selectors, becomes
// two bytes of a mask by copying that bit.
// Operand words of product `step` (16 columns): rows r and r + 8 of the first eight columns, then of the others.
__device__ __forceinline__ void expand(u32 (&a)[4], const Codes& codes, const u32 (&selector)[2][2], const u32 (&mask_bits)[2], const Levels (&levels)[2], int step, int q, int column0, const u16* codebook) {
    const u32 marks = KIND == BINARY_RESIDUAL ? codes.marks[step >> 1] >> (16 * (step & 1)) : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32* word = codes.word[h][0];
        if (TABLE) {
            const u32 low = CODE_BITS == 1 ? selector[h][0] >> (16 * (step & 1)) : selector[h][step & 1];
            const u32 high = CODE_BITS == 1 ? selector[h][1] >> (16 * (step & 1)) : selector[h][step & 1] >> 16;
            a[h] = choose_bytes(levels[h].table[0], levels[h].table[1], low);
            a[2 + h] = choose_bytes(levels[h].table[0], levels[h].table[1], high);
            if (KIND == BINARY_RESIDUAL && (marks & 0xffffu)) {
                const u32 sign = step & 1 ? 0xbbaau : 0x9988u;  // bytes of copies of the highest bit of a byte
                const u32 first = choose_bytes(mask_bits[0], 0, sign), second = choose_bytes(mask_bits[1], 0, sign);
                a[h] = (a[h] & ~first) | (choose_bytes(levels[h].marked[0], levels[h].marked[1], low) & first);
                a[2 + h] = (a[2 + h] & ~second) | (choose_bytes(levels[h].marked[0], levels[h].marked[1], high) & second);
            }
#if KIND == VECTOR_CODEBOOK
        } else if (true) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int chunk = 2 * step + half;
                const u32 column = column0 + chunk * 8 + 2 * q, code = word[chunk / 4] >> (8 * (chunk % 4)) & 255;
                a[2 * half + h] = *(const u32*)(codebook + code * WIDTH + column % WIDTH);
            }
#endif
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int chunk = 2 * step + half;
                if (CODE_BITS == 3) {
                    const int at = 3 * chunk / 4, shift = 8 * (3 * chunk % 4);
                    const u32 v = (shift <= 8 ? word[at % KEPT_WORDS] >> shift : funnel_right(word[at % KEPT_WORDS], word[(at + 1) % KEPT_WORDS], shift)) >> (6 * q);
                    a[2 * half + h] = HALVES ? pair_of_halves(((v & 63) * 0x2001u & 0x00070007u) | 0x64006400u, levels[h]) : pair_of_codes(v & 7, v >> 3 & 7, levels[h]);
                } else if (CODE_BITS == 4) {
                    const u32 v = HALVES ? choose_bytes(word[chunk % KEPT_WORDS], 0, 0x4040u | q | q << 8) : word[chunk % KEPT_WORDS] >> (8 * q);
                    a[2 * half + h] = HALVES ? pair_of_halves((v & 0x00f0000fu) | 0x64006400u, levels[h]) : pair_of_codes(v & 15, v >> 4 & 15, levels[h]);
                } else {
                    const u32 v = word[step % KEPT_WORDS] >> (16 * half);
                    a[2 * half + h] = HALVES ? pair_of_halves(choose_bytes(v, 0x64u, 0x4140u), levels[h]) : pair_of_codes(v & 255, v >> 8 & 255, levels[h]);
                }
            }
        }
    }
}

// All codewords in the type of x, their entries exact: the second half negated.
__device__ __forceinline__ void decode_codebook(u16* codebook, const u8* stored) {
#if KIND == VECTOR_CODEBOOK
    for (int entry = threadIdx.x; entry < CODES * WIDTH; entry += THREADS) {
        const int code = entry / WIDTH % (CODES / 2), at = entry % WIDTH;
        float value;
        if (TERNARY) {
            int trits = stored[code * ((WIDTH + 4) / 5) + at / 5];
            for (int i = 0; i < at % 5; i++) trits /= 3;
            value = (float)(trits % 3 - 1);
        } else {
            value = (float)(signed char)stored[code * WIDTH + at] * (1.0f / 128.0f);
        }
        codebook[entry] = x_of_float(entry < CODES / 2 * WIDTH ? value : -value);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
wide(const __grid_constant__ TensorMap x, Weight w, const u16* bias, u16* y, int tokens) {
    extern __shared__ __align__(1024) u8 memory[];
    const int rank = blockIdx.x % SPLITS, tile = blockIdx.x / SPLITS, row_tiles = (w.rows + ROWS - 1) / ROWS;
    const int row0 = tile % row_tiles * ROWS, token0 = tile / row_tiles * TOKENS, blocks = w.columns / BLOCK;
    const int begin = rank * blocks / SPLITS, end = (rank + 1) * blocks / SPLITS;
    const int lane = threadIdx.x % 32, r = lane >> 2, q = lane & 3, own_row = threadIdx.x / 32 * 16 + r;
    const int row[2] = {min(row0 + own_row, w.rows - 1), min(row0 + own_row + 8, w.rows - 1)};
    u16* const codebook = (u16*)(memory + TILE_BYTES);
    u64* const full = (u64*)(memory + TILE_BYTES + CODEBOOK_BYTES);  // a stage has come
    u64* const empty = full + DEPTH;                                 // every warp is done with it
    if (threadIdx.x == 0) {
        prefetch_map(x);
        for (int slot = 0; slot < DEPTH; slot++) {
            barrier_init(full + slot, 1);
            barrier_init(empty + slot, WARPS);
        }
        barriers_ready();
    }
    __syncthreads();
    auto load = [&](int block, int slot) {
        barrier_expect(full + slot, X_BYTES);
#pragma unroll
        for (int box = 0; box < BOXES; box++) copy_box(memory + slot * X_BYTES + box * BOX_BYTES, x, full + slot, block * BLOCK + box * 64, token0);
    };
    wait_for_previous_kernel();
    if (threadIdx.x == 0)
        for (int ahead = 0; ahead < DEPTH && begin + ahead < end; ahead++) load(begin + ahead, ahead);
    if (KIND == VECTOR_CODEBOOK) {
        decode_codebook(codebook, w.zeros);
        __syncthreads();
    }

    float sums[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) sums[i] = 0.0f;
    Codes codes, next;
    Levels levels[2];
    if (begin < end) fetch(next, w, row, begin, q, true);
    int slot = 0, before = 0, phase = 0, phase_before = 0;
    u32 a[AHEAD + 1][4], selector[2][2], mask_bits[2];
    const Multipliers multipliers = {in_register(0x22), in_register(0x10101010)};
    const u32 first_tile = descriptor_of(memory);
    for (int block = begin; block < end; block++) {
        codes = next;
        if (KIND != VECTOR_CODEBOOK && (block == begin || block % (GROUP / BLOCK) == 0))
#pragma unroll
            for (int h = 0; h < 2; h++) levels_of(levels[h], codes.scalar[h], codes.zero[h]);
        if (block + 1 < end) fetch(next, w, row, block + 1, q, false);
        barrier_wait(full + slot, phase);
        const u32 tile_of_x = first_tile + slot * (X_BYTES / 16);
#pragma unroll
        for (int step = 0; step < BLOCK / 16; step++) {
            products_wait<AHEAD>();  // the registers of the product AHEAD + 1 before this one are free
            if (step == AHEAD && block > begin && lane == 0) barrier_arrive(empty + before);  // all of the block before are done
            if (TABLE && step % 2 == 0) make_selectors(selector, codes, multipliers, step, q);
            if (KIND == BINARY_RESIDUAL && step % 2 == 0)
#pragma unroll
                for (int i = 0; i < 2; i++) mask_bits[i] = (codes.marks[step / 2] >> (2 * q + 8 * i) & 0x00030003u) * 0x4080u;
            expand(a[step % (AHEAD + 1)], codes, selector, mask_bits, levels, step, q, block * BLOCK, codebook);
            registers_ready();
            warpgroup_product(sums, a[step % (AHEAD + 1)], tile_of_x + step / 4 * (BOX_BYTES / 16) + step % 4 * 2);
            products_commit();
        }
        if (threadIdx.x == 0 && block > begin && block - 1 + DEPTH < end) {
            barrier_wait(empty + before, phase_before);
            load(block - 1 + DEPTH, before);
        }
        __syncwarp();
        before = slot, phase_before = phase;
        slot = slot == DEPTH - 1 ? 0 : slot + 1;
        phase ^= slot == 0;
    }
    products_wait<0>();
    __syncthreads();
    if (KIND == VECTOR_CODEBOOK) {
        const float scale[2] = {float_of_half(__ldg((const u16*)w.scalars + row[0])), float_of_half(__ldg((const u16*)w.scalars + row[1]))};
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) sums[i] *= scale[i / 2 % 2];
    }

#if SPLITS == 1
    u16* const staged = (u16*)memory;  // [TOKENS][OUT_STRIDE]
    const float offset[2] = {bias ? float_of_x(bias[row[0]]) : 0.0f, bias ? float_of_x(bias[row[1]]) : 0.0f};
    u16* const place = staged + (lane / 16 * 8 + lane % 8) * OUT_STRIDE + threadIdx.x / 32 * 16 + lane / 8 % 2 * 8;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j += 2) {
        u32 pair[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* from = sums + (4 * j + 2 * i) % (TOKENS / 2);
            pair[i] = pair_of_floats(from[0] + offset[i % 2], from[1] + offset[i % 2]);
        }
        store_transposed(place + (TOKENS == 8 && lane >= 16 ? -8 : 8 * j) * OUT_STRIDE, pair[0], pair[1], pair[2], pair[3]);
    }
    __syncthreads();
    for (int cell = threadIdx.x; cell < TOKENS * (ROWS / 8); cell += THREADS) {
        const int token = cell / (ROWS / 8), part = cell % (ROWS / 8) * 8, first_row = row0 + part;
        if (token0 + token >= tokens || first_row >= w.rows) continue;
        const uint4 eight = *(const uint4*)(staged + token * OUT_STRIDE + part);
        u16* const to = y + (size_t)(token0 + token) * w.rows + first_row;
        if (w.rows % 8 == 0) {
            *(uint4*)to = eight;
        } else {
            const u32 two[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (first_row + i < w.rows) to[i] = (u16)(two[i / 2] >> (16 * (i % 2)));
        }
    }
#else
    float* const total = (float*)memory;  // [TOKENS][SUM_STRIDE]
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) total[(8 * j + 2 * q + (e & 1)) * SUM_STRIDE + own_row + 8 * (e >> 1)] = sums[4 * j + e];
    cluster_arrive();
    cluster_wait();
    for (int cell = rank * THREADS + threadIdx.x; cell < TOKENS * (ROWS / 4); cell += SPLITS * THREADS) {
        const int token = cell / (ROWS / 4), part = cell % (ROWS / 4) * 4, first_row = row0 + part;
        if (token0 + token >= tokens || first_row >= w.rows) continue;
        const float* own = total + token * SUM_STRIDE + part;
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int other = 0; other < SPLITS; other++) {
            const uint4 four = peer_words(own, other);
            v[0] += __uint_as_float(four.x), v[1] += __uint_as_float(four.y), v[2] += __uint_as_float(four.z), v[3] += __uint_as_float(four.w);
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
#endif
    if (SPLITS > 1) cluster_arrive(), cluster_wait();  // no block ends while another one reads its sums
}
