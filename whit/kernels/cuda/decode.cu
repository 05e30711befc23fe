// Dense 16-bit weight (rows, columns) from packed codes: exactly the plain meaning rounded once.
// For products with many vectors, where a library's matrix product over the decoded weight is the fast way.
//
// A thread block takes a few rows of a stripe of columns at a time, a thread eight columns of each of these rows, so that
// stores are whole lines and marks of columns are read once. Codes of up to two bits choose bytes of a table of levels, as
// in `codes.cuh`; wider ones become floats by their exponent bits.

#define TABLE (KIND != GROUPED_INTEGER || BITS <= 2)  // and level tables of more bits, which are read for each weight
#define WIDE_TABLE (KIND == LEVEL_TABLE && BITS > 2)
constexpr int ROWS_AT_ONCE = 8, BATCH = 4, STRIPE = 8 * THREADS;
constexpr int CELLS = GROUP >= STRIPE ? 2 : STRIPE / GROUP + 2;  // groups that a stripe can touch

__device__ __forceinline__ float scalar_at(const u8* scalars, u32 index) { return float_of_half(__ldg((const u16*)scalars + index)); }
// Codes of eight columns of a row, those of a second plane in the upper half: kept as loaded, so that nothing waits here.
__device__ __forceinline__ u64 fetch_octet(const Weight& w, int row, int octet) {
    const u8* from = w.codes[0] + (u32)(row * w.width + octet * CODE_BITS);
    if (KIND == BINARY_RESIDUAL) return __ldg(from) | (u64)__ldg(w.codes[1] + (u32)(row * w.width + octet)) << 32;
    if (CODE_BITS == 2) return __ldg((const u16*)from);  // rows of two-bit codes are whole 16-bit words
    if (CODE_BITS == 4) return __ldg((const u32*)from);
    if (CODE_BITS == 8) return (u64)__ldg((const u32*)from) | (u64)__ldg((const u32*)from + 1) << 32;
    u32 low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < CODE_BITS; i++) (i < 4 ? low : high) |= (u32)__ldg(from + i) << (8 * (i & 3));
    return low | (u64)high << 32;
}
__device__ __forceinline__ u32 code_of(u64 codes, int i) {
    const u32 low = (u32)codes, high = (u32)(codes >> 32);
    const int bit = i * BITS;
    return (bit + BITS <= 32 ? low >> bit : bit >= 32 ? high >> (bit - 32) : funnel_right(low, high, bit)) & ((1u << BITS) - 1);
}

// What scales a group: four levels; for wider integers the scale, and 2^23 plus the zero.
struct Levels { u32 table[2]; float scale, zero; };
__device__ __forceinline__ Levels levels_at(const Weight& w, u32 cell) {
    Levels levels = {};
    if (KIND == LEVEL_TABLE && BITS <= 2) {
        const u32* from = (const u32*)(w.scalars + cell * (2 * NS));
#pragma unroll
        for (int i = 0; i < BITS; i++) {
            const u32 pair = __ldg(from + i);
            levels.table[i] = BF16 ? pair_of_floats(float_of_half((u16)pair), float_of_half((u16)(pair >> 16))) : pair;
        }
    } else if (KIND == GROUPED_INTEGER) {
        float zero = BITS > 1 ? (float)(1 << (BITS - 1)) : 0.5f;
        levels.scale = scalar_at(w.scalars, cell) * (!ASYM && BITS == 1 ? 2.0f : 1.0f);
        if (ASYM) {
            const u32 bit = cell * BITS;
            u32 window = __ldg(w.zeros + (bit >> 3));
            if (8 % BITS && (bit & 7) + BITS > 8) window |= (u32)__ldg(w.zeros + (bit >> 3) + 1) << 8;
            zero = __uint_as_float(0x4b000000u | (window >> (bit & 7) & ((1 << BITS) - 1))) - 8388608.0f;
        }
        levels.zero = 8388608.0f + zero;
        if (HALVES) levels.table[0] = pair_of_floats(levels.scale, levels.scale), levels.table[1] = bias_of_pair(zero);
        if (TABLE) {
            levels.table[0] = pair_of_floats(levels.scale * (0.0f - zero), levels.scale * (1.0f - zero));
            levels.table[1] = pair_of_floats(levels.scale * (2.0f - zero), levels.scale * (3.0f - zero));
        }
    }
    return levels;
}

// Nibbles that choose the bytes of the levels of two pairs of columns, one pair in each half of a word: columns 0 to 3, and
// with `part` 1 columns 4 to 7. For two planes, codes s and t choose byte s + 4 t and the second after it.
__device__ __forceinline__ u32 selectors(u64 octet, int part) {
    const u32 codes = (u32)octet;
    if (KIND == BINARY_RESIDUAL) {
        const u32 first = codes * 0x4001u, second = (u32)(octet >> 32) * 0x10004u;
        const u32 nibbles = ((first & 0x00330033u) | (second & 0x00cc00ccu)) >> (4 * part);
        return (nibbles & 0x00050005u) * 0x11u + ((nibbles & 0x000a000au) * 0x880u + 0x20202020u);
    }
    if (CODE_BITS == 1) {
        const u32 bits = codes * 0x4001u >> (4 * part);
        return (bits & 0x00010001u) * 0x22u + ((bits & 0x00020002u) * 0x1100u + 0x10101010u);
    }
    const u32 twos = (codes | codes << 12) >> (8 * part);
    return (twos & 0x00030003u) * 0x22u + ((twos & 0x000c000cu) * 0x880u + 0x10101010u);
}

__device__ __forceinline__ void expand(u32 (&word)[4], u64 codes, const Levels& levels, const u8* table) {
    if (WIDE_TABLE) {
#pragma unroll
        for (int i = 0; i < 4; i++) word[i] = pair_of_floats(scalar_at(table, code_of(codes, 2 * i)), scalar_at(table, code_of(codes, 2 * i + 1)));
    } else if (TABLE) {
#pragma unroll
        for (int i = 0; i < 4; i++) word[i] = choose_bytes(levels.table[0], levels.table[1], selectors(codes, i / 2) >> (16 * (i % 2)));
    } else if (HALVES && (BITS == 3 || BITS == 4 || BITS == 8)) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 low = (u32)codes, pair = BITS == 8 && i >= 2 ? (u32)(codes >> 32) : low;
            const u32 biased = BITS == 3   ? ((low >> (6 * i) & 63) * 0x2001u & 0x00070007u) | 0x64006400u
                               : BITS == 4 ? (choose_bytes(low, 0, 0x4040u | i | i << 8) & 0x00f0000fu) | 0x64006400u
                                           : choose_bytes(pair, 0x64u, i % 2 ? 0x4342u : 0x4140u);
            word[i] = pair_of_halves(biased, levels.table[0], levels.table[1]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float a = __uint_as_float(0x4b000000u | code_of(codes, 2 * i)) - levels.zero, b = __uint_as_float(0x4b000000u | code_of(codes, 2 * i + 1)) - levels.zero;
            word[i] = pair_of_floats(levels.scale * a, levels.scale * b);
        }
    }
}

__device__ __forceinline__ void store(const Weight& w, u16* out, int row, int octet, const u32 (&word)[4]) {
    u16* const to = out + (size_t)row * w.columns + octet * 8;
    if (w.columns % 8 == 0) {
        *(uint4*)to = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (octet * 8 + i < w.columns) to[i] = (u16)(word[i / 2] >> (16 * (i % 2)));
    }
}

// Levels of `binary-residual` for the rows and groups of a stripe: two words for ordinary columns, two for marked ones.
__device__ __forceinline__ void make_levels(uint2 (*shared)[CELLS][2], const Weight& w, int row0, int cell0, int cells) {
    for (int task = threadIdx.x; task < ROWS_AT_ONCE * 2 * cells; task += THREADS) {
        const int marked = task % 2, cell = task / 2 % cells, row = task / 2 / cells;
        const u32 at = (u32)(min(row0 + row, w.rows - 1) * w.groups + cell0 + cell) * NS + marked * (NS == 7 ? 4 : 2);
        const float mean = NS == 7 ? scalar_at(w.scalars, at) : 0.0f, scale = scalar_at(w.scalars, at + (NS == 7 ? 1 : 0));
        const float third = scalar_at(w.scalars, at + (NS == 7 ? 2 : 1)), two = marked ? third : 0.0f;
        const float other_mean = NS == 7 && !marked ? third : mean;
        const float other_scale = marked ? scale : NS == 7 ? scalar_at(w.scalars, at + 3) : third;
        shared[row][cell][marked] = make_uint2(parted_pair((mean - scale) - two, (mean + scale) - two), parted_pair((other_mean - other_scale) + two, (other_mean + other_scale) + two));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
decode(Weight w, u16* out) {
    extern __shared__ __align__(16) u8 memory[];
    uint2 (*const shared)[CELLS][2] = (uint2 (*)[CELLS][2])memory;  // [ROWS_AT_ONCE]
    const int octets = (w.columns + 7) / 8, stripes = (octets + THREADS - 1) / THREADS, blocks = (w.rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int item = blockIdx.x; item < blocks * stripes; item += gridDim.x) {
        const int row0 = item / stripes * ROWS_AT_ONCE, octet0 = item % stripes * THREADS, octet = octet0 + threadIdx.x;
        const int group = octet * 8 / GROUP, cell0 = octet0 * 8 / GROUP;
        u64 codes[ROWS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < ROWS_AT_ONCE; i++) codes[i] = octet < octets ? fetch_octet(w, min(row0 + i, w.rows - 1), octet) : 0;
#if KIND == BINARY_RESIDUAL
        const int last = (min(octet0 + THREADS, octets) - 1) * 8 / GROUP;
        __syncthreads();  // everyone has read what lies there
        make_levels(shared, w, row0, cell0, last - cell0 + 1);
        __syncthreads();
#endif
        if (octet >= octets) continue;
        const u32 marks = KIND == BINARY_RESIDUAL ? __ldg(w.salient + octet) : 0;
#pragma unroll
        for (int first = 0; first < ROWS_AT_ONCE; first += BATCH) {
            Levels levels[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH && KIND != BINARY_RESIDUAL; i++) levels[i] = levels_at(w, (u32)(min(row0 + first + i, w.rows - 1) * w.groups + group));
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int row = row0 + first + i;
                u32 word[4];
#if KIND == BINARY_RESIDUAL
                const uint4 four = *(const uint4*)shared[first + i][group - cell0];
                levels[i].table[0] = four.x, levels[i].table[1] = four.y;
#endif
                expand(word, codes[first + i], levels[i], w.scalars + (u32)(min(row, w.rows - 1) * w.groups + group) * (2 * NS));
#if KIND == BINARY_RESIDUAL
                if (marks)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const u32 here = (marks >> (2 * j) & 1) * 0xffffu | (marks >> (2 * j) & 2) * 0x7fff8000u;
                        word[j] = (word[j] & ~here) | (choose_bytes(four.z, four.w, selectors(codes[first + i], j / 2) >> (16 * (j % 2))) & here);
                    }
#endif
                if (row < w.rows) store(w, out, row, octet, word);
            }
        }
    }
}
