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
#define EIGHT HAS_MARKS                             // levels by three bits, one of which is the mark of the column
#define LEVEL_WORDS (KIND == LEVEL_TABLE ? NS / 2 : EIGHT ? 5 : 1)
#define WHOLE_ROWS (GROUP >= (1 << 30))  // one group
#define STAGED_SCALARS (KIND == BINARY_RESIDUAL && !WHOLE_ROWS)  // come to shared memory, four groups of a row at a time
#define EPOCH (WHOLE_ROWS ? 1 << 20 : 4 * (GROUP / BLOCK))       // blocks of columns that these groups have
#define RUN (CODE_BITS == 1 ? 4 : 2)                              // blocks of columns whose words of codes are staged together
#define RUN_BYTES (RUN * BLOCK / 8 * CODE_BITS)                  // of a row and plane
#define RUN_PITCH (RUN_BYTES + 16)                               // from row to row: other banks
#define STAGED_BYTES (2 * PLANES * 16 * RUN_PITCH)               // of a warp: one run is read while the next comes
#define SCALAR_PITCH (NS == 7 ? 68 : 40)                         // bytes from row to row there: another bank each
#define GROUP_OF(block) (WHOLE_ROWS ? 0 : (block) / (GROUP / BLOCK))

// ---- Codes of a block of columns of rows r and r + 8, as loads give them: what used one at once would wait for memory -------------------------------
struct Codes {
    u32 word[2][PLANES][KEPT_WORDS];
    u32 scalar[2][LEVEL_WORDS];  // of the group, if it begins here; two marked sets: a lane's share of 16 rows
    u32 zero[2][2];
};

// Where the rows of a lane begin, in bytes of the codes and in cells of the scalars, kept in registers; `shared` is the row
// whose levels a lane makes for its warp.
struct Places { u32 codes[2], cells[2], shared; };  // staged scalars: `cells` in bytes, the word in which those of each row begin
__device__ __forceinline__ Places places_of(const Weight& w, int warp_row, int first_group, int lane) {
    Places at;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = min(warp_row + (lane >> 2) + 8 * h, w.rows - 1);
        at.codes[h] = in_register(row * w.width);
        at.cells[h] = in_register(STAGED_SCALARS ? (row * w.groups + first_group) * (2 * NS) & ~3u : row * w.groups * (2 * NS));
    }
    if (STAGED_SCALARS) {
        at.shared = in_register(lane / 2 * SCALAR_PITCH + ((min(warp_row + lane / 2, w.rows - 1) * w.groups + first_group) * (2 * NS) & 2));
        return at;
    }
    at.shared = in_register(min(warp_row + lane / 2, w.rows - 1) * w.groups * (2 * NS));
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

__device__ __forceinline__ void fetch_codes(Codes& codes, const Weight& w, const Places& at, int block, int q) {
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
            const u8* from = plane_codes(w, p) + (at.codes[h] + block * (BYTE_PER_CHUNK ? BLOCK / 8 : BLOCK / 8 * CODE_BITS));
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
}
// The words of a run of blocks, from byte `byte` of the warp's rows on, to shared memory.
__device__ __forceinline__ void copy_words(u8* shared, const Weight& w, const Places& at, int byte, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            u8* const to = shared + (p * 16 + (lane >> 2) + 8 * h) * RUN_PITCH + 16 * (lane & 3);
            const u8* const from = plane_codes(w, p) + (at.codes[h] + byte + 16 * (lane & 3));
#pragma unroll
            for (int i = 0; i < RUN_BYTES; i += 64)
                if (16 * (lane & 3) + i < min(RUN_BYTES, w.width - byte)) copy_whole<16>(to + i, from + i);
        }
}
__device__ __forceinline__ void read_words(Codes& codes, const u8* shared, int block, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int p = 0; p < PLANES; p++)
#pragma unroll
            for (int i = 0; i < CODE_WORDS / 4; i++) {
                const uint4 four = *(const uint4*)(shared + (p * 16 + (lane >> 2) + 8 * h) * RUN_PITCH + block % RUN * (RUN_BYTES / RUN) + 16 * i);
                u32* to = codes.word[h][p] + 4 * i;
                to[0] = four.x, to[1 % KEPT_WORDS] = four.y, to[2 % KEPT_WORDS] = four.z, to[3 % KEPT_WORDS] = four.w;
            }
}
// Scalars of `binary-residual` that make the levels of a bit t (that of the lane): [mean,] scale of ordinary columns, [mean,]
// two scales of marked ones.
__device__ __forceinline__ void own_scalars(u32 (&s)[LEVEL_WORDS], const u8* from, int lane) {
    const u16* const cell = (const u16*)from;
    if (KIND == SIGNED_LEVELS) {
        s[0] = cell[lane % 2 ? 1 : 3], s[1] = cell[lane % 2 ? 2 : 0], s[2 % LEVEL_WORDS] = cell[4], s[3 % LEVEL_WORDS] = cell[5];
    } else if (NS == 7) {
#pragma unroll
        for (int i = 0; i < 5; i++) s[i] = cell[i < 2 ? lane % 2 * 2 + i : i + 2];
    } else {
        s[0] = cell[lane % 2], s[1] = cell[2], s[2 % LEVEL_WORDS] = cell[3];
    }
}
// What scales the group that begins with block `block`, if one does or the block is the `first`.
__device__ __forceinline__ void fetch_scalars(Codes& codes, const Weight& w, const Places& at, int block, int lane, bool first) {
    if (KIND == VECTOR_CODEBOOK || STAGED_SCALARS || !first && (WHOLE_ROWS || block % (GROUP / BLOCK) != 0)) return;
    const int group = GROUP_OF(block);
    if (EIGHT) {
        own_scalars(codes.scalar[0], w.scalars + (at.shared + group * (2 * NS)), lane);
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

// Scalars of four groups of the warp's rows to shared memory, where loads by lane would ask 16 lines for two bytes each.
__device__ __forceinline__ void copy_scalars(u8* shared, const Weight& w, const Places& at, int row0, int first_group, int epoch, int lane) {
    const u32 begin = epoch * (8 * NS), total = w.rows * w.groups * (2 * NS), last = ((min(row0 + 64 * ROW_GROUPS, w.rows) - 1) * w.groups + first_group) * (2 * NS);
    constexpr int PART = NS == 7 ? 4 : 8;  // a row may begin in the middle of a word
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u8* const to = shared + ((lane >> 2) + 8 * h) * SCALAR_PITCH + PART * (lane & 3);
        const u32 from = at.cells[h] + begin + PART * (lane & 3);
        if (last + begin + 64 <= total) {
#pragma unroll
            for (int i = 0; i < (NS == 7 ? 4 : 1); i++) copy_whole<PART>(to + 16 * i, w.scalars + from + 16 * i);
        } else {
#pragma unroll 1
            for (u32 i = 0; i < (NS == 7 ? 64 : 8); i += NS == 7 ? 16 : 4) copy4(to + i, w.scalars + (from + i < total ? from + i : 0), from + i < total ? min(total - from - i, 4u) : 0);
        }
    }
}
__device__ __forceinline__ void staged_scalars(u32 (&s)[LEVEL_WORDS], const u8* shared, const Places& at, int group, int lane) {  // the how manieth
    own_scalars(s, shared + at.shared + group % 4 * (2 * NS), lane);
}

// Three-bit codes of a lane, bits 6 q to 6 q + 5 of the three bytes of a chunk of eight columns, as float16: `pick` names
// the two bytes in which each begins, `mask` its bits there; in the low bits of 1024 it is 1024 + 2^i code, and times
// `factor`, 2^-i, `base` + code. Exact, for i below 8.
#define TRIPLES (HALVES && BITS == 3)
struct Triples { u32 pick, mask, factor, base; };
__device__ __forceinline__ Triples triples_of(int q) {
    const int first = 0x2460 >> (4 * q) & 15, second = 0x5713 >> (4 * q) & 15;  // the bits that they begin at
    const u32 exponents = first << 10 | second << 26;
    return {q == 0 ? 0x1010u : q == 1 ? 0x2110u : q == 2 ? 0x2121u : 0x3232u, 7u << first | 7u << (16 + second), 0x3c003c00u - exponents, 0x64006400u - exponents};
}

// ---- Levels of a group ---------------------------------------------------------------------------------------------------
struct Levels {
    u32 table[2];             // four 16-bit levels of a row; of eight, their lower bytes
    u32 high[2];              // their higher bytes
    float scale, zero;        // wider integers: w = scale (code - zero), in float16 by the pairs of the table
};
__device__ __forceinline__ void levels_of(Levels& levels, const Codes& codes, const Places& at, const Triples& triples, int h, int block) {
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
                levels.table[1] = TRIPLES ? fma_pairs(pair_of_floats(zero, zero), 0xbc00bc00u, triples.base ^ 0x80008000u) : bias_of_pair(zero);
            }
        }
    }
}
// The eight levels of `binary-residual`, level s + 2 m + 4 t for bits s, t and mark m: each lane makes the four of one t and
// row of the warp's 16; their bytes meet in shared memory, 16 a row, the lower ones first. (No barrier here: one that only
// some blocks of columns come to would cost the uniform registers of the whole loop.)
__device__ __forceinline__ void make_levels(u8* shared, const u32 (&s)[LEVEL_WORDS], int lane) {
    u32* const place = (u32*)(shared + lane / 2 * 16) + lane % 2;
    if (KIND == SIGNED_LEVELS) {  // number u + 2 m + 4 v; the sign is put before what was chosen
        const float a = float_of_half((u16)s[2]), b = float_of_half((u16)s[3]);
        const u32 others = pair_of_floats(float_of_half((u16)s[0]), float_of_half((u16)s[1]));
        const u32 marked = lane % 2 ? pair_of_floats(a + b, 0.0f) : pair_of_floats(0.0f, a - b);
        place[0] = choose_bytes(others, marked, 0x6420u), place[2] = choose_bytes(others, marked, 0x7531u);
        return;
    }
    const u32 scale = s[NS == 7 ? 1 : 0], first = s[NS == 7 ? 3 : 1], second = s[NS == 7 ? 4 : 2] ^ (lane % 2 ? 0u : 0x8000u);
    const float mean = NS == 7 ? float_of_half((u16)s[2]) : 0.0f, size = float_of_half((u16)first), more = float_of_half((u16)second);
    const u32 marked = pair_of_floats((mean - size) + more, (mean + size) + more);
#if BF16
    const float middle = NS == 7 ? float_of_half((u16)s[0]) : 0.0f, width = float_of_half((u16)scale);
    const u32 others = pair_of_floats(middle - width, middle + width);
#else
    const u32 others = fma_pairs(scale * 0x10001u, 0x3c00bc00u, NS == 7 ? s[0] * 0x10001u : 0u);  // exact sums, rounded once
#endif
    place[0] = choose_bytes(others, marked, 0x6420u), place[2] = choose_bytes(others, marked, 0x7531u);
}
__device__ __forceinline__ void take_levels(Levels (&levels)[2], const u8* shared, int lane) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 four = *(const uint4*)(shared + ((lane >> 2) + 8 * h) * 16);
        levels[h].table[0] = four.x, levels[h].table[1] = four.y, levels[h].high[0] = four.z, levels[h].high[1] = four.w;
    }
}
// Marks of the columns of a lane, as `make_selectors` takes them, for blocks of columns `begin` to `end`: a word for 32
// columns, the words of a block and lane of four together. The first warp has other things to do.
__device__ __forceinline__ void spread_marks(u32* shared, const u8* salient, int begin, int end) {
    constexpr int WORDS = BLOCK / 32;
    for (int cell = threadIdx.x - 32; cell < (end - begin) * 4 * WORDS; cell += THREADS - 32) {
        const int word = cell / (4 * WORDS) * WORDS + cell % WORDS, q = cell / WORDS % 4;
        const u32 marks = __ldg((const u32*)salient + begin * WORDS + word), moved = funnel_right(marks, marks, 2 * q + 31);
        shared[cell] = (moved & 0x02020202u) | (moved << 3 & 0x20202020u);
    }
}
__device__ __forceinline__ u32 pair_of_codes(u32 first, u32 second, const Levels& levels) {
    const float a = __uint_as_float(0x4b000000u | first) - levels.zero, b = __uint_as_float(0x4b000000u | second) - levels.zero;
    return pair_of_floats(levels.scale * a, levels.scale * b);
}

// Nibbles that choose the bytes of two 16-bit levels, 2 c and 2 c + 1 for each code c, in both halves of a word.
struct Multipliers { u32 once, base, low; };
__device__ __forceinline__ u32 selector_of_bits(u32 v, const Multipliers& m) { return (v & 0x00010001u) * m.once + ((v & 0x00020002u) * 0x1100u + m.base); }
__device__ __forceinline__ u32 selector_of_twos(u32 v, const Multipliers& m) { return (v & 0x00030003u) * m.once + ((v & 0x000c000cu) * 0x880u + m.base); }
__device__ __forceinline__ Multipliers multipliers() {
    return {in_register(0x22), in_register(0x10101010), in_register(0x03030303)};
}

// Selectors of products `step` (even) and `step + 1`. One-bit planes have eight columns to a byte: a word is four chunks of
// eight columns, of which 0 and 2 share a selector, and 1 and 3. A word of two-bit codes is the two chunks of one product.
// Where two planes and the mark choose one of eight levels: nibbles s + 2 m + 4 t, two for each chunk, all in one word.
__device__ __forceinline__ void make_selectors(u32 (&selector)[2][2], const Codes& codes, const Multipliers& m, const u32 (&marks)[BLOCK / 32], int step, int q) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (EIGHT) {
            const u32 sign = KIND == SIGNED_LEVELS ? codes.word[h][0][step / 2] : 0u;
            const u32 first = codes.word[h][PLANES > 1 ? PLANES - 2 : 0][step / 2] ^ sign, second = codes.word[h][PLANES - 1][step / 2] ^ sign;
            const u32 moved = funnel_right(second, second, 2 * q + 30), nibbles = ((first >> (2 * q) ^ moved) & m.low) ^ moved;  // s0 + 2 s1 + 4 t0 + 8 t1
            selector[h][0] = (nibbles & 0x05050505u) | (nibbles << 3 & 0x50505050u) | marks[step / 2];
            if (KIND == SIGNED_LEVELS) selector[h][1] = funnel_right(sign, sign, 2 * q + 26);  // signs of odd columns at the top of bytes
            continue;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            selector[h][i] = CODE_BITS == 1 ? selector_of_bits(codes.word[h][0][step / 2] >> (2 * q + 8 * i), m)
                                            : selector_of_twos(codes.word[h][0][(step + i) % KEPT_WORDS] >> (4 * q), m);
    }
}

// Operand words of product `step` (16 columns): rows r and r + 8 of the first eight columns, then of the others.
__device__ __forceinline__ void expand(u32 (&a)[4], const Codes& codes, const u32 (&selector)[2][2], const Levels (&levels)[2], const u32 (&bytes)[2][KEPT_WORDS], const u8* staged, const Triples& triples, int step, int q, int column0, const u16* codebook) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32* word = codes.word[h][0];
        if (EIGHT) {
            const u32 chosen = selector[h][0] >> (16 * (step & 1));
            const u32 low = choose_bytes(levels[h].table[0], levels[h].table[1], chosen);
            u32 high = choose_bytes(levels[h].high[0], levels[h].high[1], chosen);
            if (KIND == SIGNED_LEVELS) high ^= choose_bytes(selector[h][1] << 1, selector[h][1], step & 1 ? 0x7362u : 0x5140u) & 0x80808080u;
            a[h] = choose_bytes(low, high, 0x5140u);
            a[2 + h] = choose_bytes(low, high, 0x7362u);
        } else if (TABLE) {
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
                if (TRIPLES) {
                    const int at = 3 * chunk / 4;
                    const u32 v = choose_bytes(word[at % KEPT_WORDS], word[(at + 1) % KEPT_WORDS], triples.pick + 3 * chunk % 4 * 0x1111u);
                    a[2 * half + h] = multiply_pairs(fma_pairs((v & triples.mask) | 0x64006400u, triples.factor, levels[h].table[1]), levels[h].table[0]);
                } else if (CODE_BITS == 3) {
                    const int at = 3 * chunk / 4, shift = 8 * (3 * chunk % 4);
                    const u32 v = (shift <= 8 ? word[at % KEPT_WORDS] >> shift : funnel_right(word[at % KEPT_WORDS], word[(at + 1) % KEPT_WORDS], shift)) >> (6 * q);
                    a[2 * half + h] = pair_of_codes(v & 7, v >> 3 & 7, levels[h]);
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

