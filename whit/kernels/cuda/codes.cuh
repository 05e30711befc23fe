// Codes of a block of columns, and their expansion to the register operand of a warpgroup product (`wide.cu`). The weights
// are those of the plain meaning rounded once to the type of x, exactly as `decode.cu` gives them.

#define BOXES (BLOCK / 64)  // of 64 columns: what one copy of x brings
#define VECTOR_CODEBOOK 3
#ifndef WIDTH
#define WIDTH 1
#endif
#define BYTE_PER_CHUNK (KIND == VECTOR_CODEBOOK && BITS == 8 && WIDTH == 8)  // a code for each eight columns
#define BYTE_CODES (KIND == VECTOR_CODEBOOK && BITS == 8 && WIDTH != 8)      // codes that are bytes, begun anywhere in a word
#define BYTE_WORDS (((BLOCK - 2) / WIDTH + 2 + 3 + 3) / 4)                   // words that hold those of a block
#define STAGED_CODES (KIND == GROUPED_INTEGER && BITS == 8 && BLOCK == 128)  // come with x: 128 bytes of a row, swizzled alike
#define TABLE (KIND != VECTOR_CODEBOOK && (KIND != GROUPED_INTEGER || BITS <= 2))
#define CODE_WORDS (KIND == VECTOR_CODEBOOK ? 2 * BOXES : BLOCK * CODE_BITS / 32)  // 32-bit words of the codes of a row and plane
#define KEPT_WORDS (STAGED_CODES ? 1 : CODE_BITS == 8 && KIND != VECTOR_CODEBOOK || KIND == VECTOR_CODEBOOK && BITS != 8 ? BLOCK / 8 : BYTE_CODES ? BYTE_WORDS : CODE_WORDS)  // the lane's own: a pair, or a code
#define LEVEL_WORDS (KIND == LEVEL_TABLE ? NS / 2 : KIND == BINARY_RESIDUAL ? 4 : 1)
#define GROUP_OF(block) (GROUP >= (1 << 30) ? 0 : (block) / (GROUP / BLOCK))

// ---- Codes of a block of columns of rows r and r + 8, as loads give them: what used one at once would wait for memory -------------------------------
struct Codes {
    u32 word[2][PLANES][KEPT_WORDS];
    u32 marks;  // lane i: of the columns of product i
    u32 scalar[2][LEVEL_WORDS];  // of the group, if it begins here; two marked sets: a lane's share of 16 rows
    u32 zero[2][2];
};

// Where the rows of a lane begin, in bytes of the codes and in cells of the scalars, kept in registers; `shared` is the row
// whose levels a lane makes for its warp.
struct Places { u32 codes[2], cells[2], shared; };
__device__ __forceinline__ Places places_of(const Weight& w, int warp_row, int lane) {
    Places at;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = min(warp_row + (lane >> 2) + 8 * h, w.rows - 1);
        at.codes[h] = in_register(row * w.width);
        at.cells[h] = in_register(row * w.groups * (2 * NS));
    }
    at.shared = in_register(min(warp_row + lane / 2, w.rows - 1) * w.groups * (2 * NS) + lane % 2 * (NS == 7 ? 8 : 4));
    return at;
}

// Number of the codeword that column `column` of a row belongs to.
__device__ __forceinline__ u32 code_at(const u8* codes, u32 group) {
    if (BITS == 8) return __ldg(codes + group);
    const u32 bit = group * BITS;
    u32 window = __ldg(codes + (bit >> 3));
    if (8 % BITS && (bit & 7) + BITS > 8) window |= (u32)__ldg(codes + (bit >> 3) + 1) << 8;
    return window >> (bit & 7) & ((1 << BITS) - 1);
}

// Of `BYTE_CODES`: those of a block, from the first on, four to a word.
__device__ __forceinline__ void align_codes(u32 (&bytes)[2][KEPT_WORDS], const Codes& codes, const Weight& w, const Places& at, int block) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int shift = ((u32)(u64)w.codes[0] + at.codes[h] + block * BLOCK / WIDTH) % 4 * 8;
#pragma unroll
        for (int i = 0; i < KEPT_WORDS; i++) bytes[h][i] = funnel_right(codes.word[h][0][i], i + 1 < KEPT_WORDS ? codes.word[h][0][i + 1] : 0, shift);
    }
}

__device__ __forceinline__ void fetch_codes(Codes& codes, const Weight& w, const Places& at, int block, int lane) {
    const int q = lane & 3;
#if BYTE_CODES
    const u64 end = (u64)(w.codes[0] + w.rows * w.width);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u64 from = (u64)(w.codes[0] + (at.codes[h] + block * BLOCK / WIDTH)) & ~3ull;
#pragma unroll
        for (int i = 0; i < KEPT_WORDS; i++) codes.word[h][0][i] = from + 4 * i < end ? __ldg((const u32*)from + i) : 0;
    }
    return;
#elif KIND == VECTOR_CODEBOOK && !BYTE_PER_CHUNK
#pragma unroll
    for (int chunk = 0; chunk < BLOCK / 8; chunk++) {
        const u32 group = (u32)(block * BLOCK + chunk * 8 + 2 * q) / WIDTH;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            codes.word[h][0][chunk] = code_at(w.codes[0] + at.codes[h], group);
        }
    }
    return;
#endif
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int p = 0; p < PLANES && !STAGED_CODES; p++) {
            const u8* from = w.codes[p] + (at.codes[h] + block * (BYTE_PER_CHUNK ? BLOCK / 8 : BLOCK / 8 * CODE_BITS));
            u32* to = codes.word[h][p];
            if (CODE_BITS == 8 && !BYTE_PER_CHUNK) {
#pragma unroll
                for (int i = 0; i < KEPT_WORDS; i++) to[i] = __ldg((const u16*)(from + 8 * i + 2 * q));
            } else if (CODE_WORDS % 4) {
#pragma unroll
                for (int i = 0; i < CODE_WORDS / 2; i++) {
                    const uint2 pair = load_eight(from + 8 * i);
                    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
                }
            } else {
#pragma unroll
                for (int i = 0; i < CODE_WORDS / 4; i++) {
                    const uint4 four = load_sixteen(from + 16 * i);
                    to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
                }
            }
        }
    if (KIND == BINARY_RESIDUAL) {
        codes.marks = __ldg((const u16*)w.salient + block * (BLOCK / 16) + lane % (BLOCK / 16));
    }
}
// What scales the group that begins with block `block`, if one does or the block is the `first`.
__device__ __forceinline__ void fetch_scalars(Codes& codes, const Weight& w, const Places& at, int block, int lane, bool first) {
    if (KIND == VECTOR_CODEBOOK || !first && block % (GROUP / BLOCK) != 0) return;
    const int group = GROUP_OF(block);
    if (KIND == BINARY_RESIDUAL) {  // even lanes: of unmarked columns; odd lanes: of marked ones
        const u8* from = w.scalars + (at.shared + group * (2 * NS));
        if (NS == 7) {
#pragma unroll
            for (int i = 0; i < 4; i++) codes.scalar[0][i] = __ldg((const u16*)from + (i == 3 && lane % 2 ? 2 : i));
        } else {
            const u32 two = __ldg((const u32*)from);
            codes.scalar[0][0] = two;
        }
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u8* from = w.scalars + (at.cells[h] + group * (2 * NS));
        if (KIND != LEVEL_TABLE) {
            codes.scalar[h][0] = __ldg((const u16*)from);
        } else if (NS == 4) {
            const uint2 four = __ldg((const uint2*)from);
            codes.scalar[h][0] = four.x, codes.scalar[h][1 % LEVEL_WORDS] = four.y;
        } else {
            codes.scalar[h][0] = __ldg((const u32*)from);
        }
        if (ASYM) {
            const u32 bit = (at.cells[h] / (2 * NS) + group) * BITS;
            codes.zero[h][0] = __ldg(w.zeros + (bit >> 3));
            if (8 % BITS) codes.zero[h][1] = (bit & 7) + BITS > 8 ? __ldg(w.zeros + (bit >> 3) + 1) : 0;
        }
    }
}

// ---- Levels of a group ---------------------------------------------------------------------------------------------------
struct Levels {
    u32 table[2], marked[2];  // four 16-bit levels of a row, for ordinary and for marked columns
    float scale, zero;        // wider integers: w = scale (code - zero), in float16 by the pairs of the table
};
__device__ __forceinline__ void levels_of(Levels& levels, const Codes& codes, const Places& at, int h, int block) {
    const u32 (&s)[LEVEL_WORDS] = codes.scalar[h];
    if (KIND == LEVEL_TABLE) {
#pragma unroll
        for (int i = 0; i < LEVEL_WORDS; i++) levels.table[i % 2] = BF16 ? pair_of_floats(float_of_half((u16)s[i]), float_of_half((u16)(s[i] >> 16))) : s[i];
        if (BITS == 1) levels.table[1] = 0;
    } else {
        const u32 bit = ASYM ? (at.cells[h] / (2 * NS) + GROUP_OF(block)) * BITS : 0;
        const u32 zero_code = ASYM ? (codes.zero[h][0] | (8 % BITS ? codes.zero[h][1] << 8 : 0)) >> (bit & 7) & ((1 << BITS) - 1) : 0;
        const float value = float_of_half((u16)s[0]);
        const float zero = ASYM ? (float)zero_code : BITS > 1 ? (float)(1 << (BITS - 1)) : 0.5f;
        const float scale = !ASYM && BITS == 1 ? 2.0f * value : value;
        if (TABLE) {
            levels.table[0] = pair_of_floats(scale * (0.0f - zero), scale * (1.0f - zero));
            levels.table[1] = BITS == 2 ? pair_of_floats(scale * (2.0f - zero), scale * (3.0f - zero)) : 0;
        } else {
            levels.scale = scale, levels.zero = 8388608.0f + zero;
            if (HALVES) {
                levels.table[0] = pair_of_floats(scale, scale);
                levels.table[1] = bias_of_pair(zero);
            }
        }
    }
}
// Levels of `binary-residual`: each lane makes those of one row of the warp's 16, ordinary or marked; they meet in shared
// memory, 16 bytes a row.
__device__ __forceinline__ void marked_levels(Levels (&levels)[2], const u32 (&s)[LEVEL_WORDS], uint2* shared, int lane) {
    const bool marked = lane % 2;
    const float mean = NS == 7 ? float_of_half((u16)s[0]) : 0.0f, scale = float_of_half((u16)s[NS == 7 ? 1 : 0]);
    const float third = float_of_half((u16)(NS == 7 ? s[2] : s[0] >> 16)), fourth = NS == 7 ? float_of_half((u16)s[3]) : third;
    const float other_mean = NS == 7 && !marked ? third : mean, other_scale = marked ? scale : fourth;
    const float two = marked ? third : 0.0f;
    __syncwarp();  // everyone has read what lies there
    shared[lane] = make_uint2(parted_pair((mean - scale) - two, (mean + scale) - two), parted_pair((other_mean - other_scale) + two, (other_mean + other_scale) + two));
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 four = ((const uint4*)shared)[(lane >> 2) + 8 * h];
        levels[h].table[0] = four.x, levels[h].table[1] = four.y, levels[h].marked[0] = four.z, levels[h].marked[1] = four.w;
    }
}
__device__ __forceinline__ u32 pair_of_codes(u32 first, u32 second, const Levels& levels) {
    const float a = __uint_as_float(0x4b000000u | first) - levels.zero, b = __uint_as_float(0x4b000000u | second) - levels.zero;
    return pair_of_floats(levels.scale * a, levels.scale * b);
}

// Nibbles that choose the bytes of two 16-bit levels, 2 c and 2 c + 1 for each code c, in both halves of a word. Where a code
// is a bit of each of two planes, s and t: s + 4 t and s + 4 t + 2, of nibbles s0 + 2 s1 + 4 t0 + 8 t1.
struct Multipliers { u32 once, base, low; };
__device__ __forceinline__ u32 selector_of_bits(u32 v, const Multipliers& m) { return (v & 0x00010001u) * m.once + ((v & 0x00020002u) * 0x1100u + m.base); }
__device__ __forceinline__ u32 selector_of_planes(u32 v, const Multipliers& m) { return (v & 0x00050005u) * m.once + ((v & 0x000a000au) * 0x880u + m.base); }
__device__ __forceinline__ u32 selector_of_twos(u32 v, const Multipliers& m) { return (v & 0x00030003u) * m.once + ((v & 0x000c000cu) * 0x880u + m.base); }
__device__ __forceinline__ Multipliers multipliers() {
    return {in_register(KIND == BINARY_RESIDUAL ? 0x11 : 0x22), in_register(KIND == BINARY_RESIDUAL ? 0x20202020 : 0x10101010), in_register(0x03030303)};
}

// Selectors of products `step` (even) and `step + 1`. One-bit planes have eight columns to a byte: a word is four chunks of
// eight columns, of which 0 and 2 share a selector, and 1 and 3. A word of two-bit codes is the two chunks of one product.
__device__ __forceinline__ void make_selectors(u32 (&selector)[2][2], const Codes& codes, const Multipliers& m, int step, int q) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (KIND == BINARY_RESIDUAL) {
            const u32 first = codes.word[h][0][step / 2], second = codes.word[h][PLANES - 1][step / 2];
            const u32 moved = funnel_right(second, second, 2 * q + 30), nibbles = ((first >> (2 * q) ^ moved) & m.low) ^ moved;
            selector[h][0] = selector_of_planes(nibbles, m);
            selector[h][1] = selector_of_planes(nibbles >> 8, m);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            selector[h][i] = CODE_BITS == 1 ? selector_of_bits(codes.word[h][0][step / 2] >> (2 * q + 8 * i), m)
                                            : selector_of_twos(codes.word[h][0][(step + i) % KEPT_WORDS] >> (4 * q), m);
    }
}

// Operand words of product `step` (16 columns): rows r and r + 8 of the first eight columns, then of the others.
__device__ __forceinline__ void expand(u32 (&a)[4], const Codes& codes, const u32 (&selector)[2][2], u32 marked, const Levels (&levels)[2], const u32 (&bytes)[2][KEPT_WORDS], const u8* staged, int step, int q, int column0, const u16* codebook) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32* word = codes.word[h][0];
        if (TABLE) {
            const u32 low = CODE_BITS == 1 ? selector[h][0] >> (16 * (step & 1)) : selector[h][step & 1];
            const u32 high = CODE_BITS == 1 ? selector[h][1] >> (16 * (step & 1)) : selector[h][step & 1] >> 16;
            a[h] = choose_bytes(levels[h].table[0], levels[h].table[1], low);
            a[2 + h] = choose_bytes(levels[h].table[0], levels[h].table[1], high);
#if BYTE_CODES
        } else if (true) {
            // Column p + 8 c + 2 q of the first code's, p where the block begins in it: of code k = that over the width.
            const int column = column0 % WIDTH + 2 * q;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int chunk = 2 * step + half, word_at = chunk * 8 / WIDTH / 4;
                const int code = ((column + chunk * 8) * (65536 / WIDTH + 1) >> 16) - 4 * word_at;
                const int byte = choose_bytes(bytes[h][word_at], bytes[h][(word_at + 1) % KEPT_WORDS], code) & 255;
                const u8* entry = (const u8*)codebook + (column * 2 - code * (2 * WIDTH)) + byte * (2 * WIDTH);
                a[2 * half + h] = *(const u32*)(entry + (chunk * 16 - word_at * 8 * WIDTH));
            }
#elif KIND == VECTOR_CODEBOOK
        } else if (true) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int chunk = 2 * step + half;
                const u32 column = column0 + chunk * 8 + 2 * q, code = BYTE_PER_CHUNK ? word[chunk / 4] >> (8 * (chunk % 4)) & 255 : word[chunk % KEPT_WORDS];
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
                    a[2 * half + h] = HALVES ? pair_of_halves(((v & 63) * 0x2001u & 0x00070007u) | 0x64006400u, levels[h].table[0], levels[h].table[1]) : pair_of_codes(v & 7, v >> 3 & 7, levels[h]);
                } else if (CODE_BITS == 4) {
                    const u32 v = HALVES ? choose_bytes(word[chunk % KEPT_WORDS], 0, 0x4040u | q | q << 8) : word[chunk % KEPT_WORDS] >> (8 * q);
                    a[2 * half + h] = HALVES ? pair_of_halves((v & 0x00f0000fu) | 0x64006400u, levels[h].table[0], levels[h].table[1]) : pair_of_codes(v & 15, v >> 4 & 15, levels[h]);
                } else {
                    const u32 v = STAGED_CODES ? *(const u16*)(staged + 1024 * h + 8 * half) : word[chunk % KEPT_WORDS];
                    a[2 * half + h] = HALVES ? pair_of_halves(choose_bytes(v, 0x64u, 0x4140u), levels[h].table[0], levels[h].table[1]) : pair_of_codes(v & 255, v >> 8 & 255, levels[h]);
                }
            }
        }
    }
    if (KIND == BINARY_RESIDUAL && (marked >> step & 1)) {
        // The marks of a lane's columns to the highest bits of two bytes, and copies of those bits to the others.
        const u32 own = __shfl_sync(0xffffffffu, codes.marks, step) >> (2 * q), first = choose_bytes((own & 3) * 0x4080u, 0, 0x9988u), second = choose_bytes((own & 0x300) * 0x4080u, 0, 0xaa99u);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            a[h] = (a[h] & ~first) | (choose_bytes(levels[h].marked[0], levels[h].marked[1], selector[h][0] >> (16 * (step & 1))) & first);
            a[2 + h] = (a[2 + h] & ~second) | (choose_bytes(levels[h].marked[0], levels[h].marked[1], selector[h][1] >> (16 * (step & 1))) & second);
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

