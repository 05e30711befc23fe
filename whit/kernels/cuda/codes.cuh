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
// STAGED_CODES: they come with x, 128 bytes of a row for a stage, swizzled alike: bytes, or words of narrower codes
#define STAGED_BYTE_CODES (STAGED_CODES && BITS == 8)
#define TABLE (KIND != VECTOR_CODEBOOK && (KIND != GROUPED_INTEGER || BITS <= 2))
#define CODE_WORDS (KIND == VECTOR_CODEBOOK ? 2 * BOXES : BLOCK * CODE_BITS / 32)  // 32-bit words of the codes of a row and plane
#define KEPT_WORDS (STAGED_BYTE_CODES ? 1 : CODE_BITS == 8 && KIND != VECTOR_CODEBOOK || KIND == VECTOR_CODEBOOK && BITS != 8 ? BLOCK / 8 : BYTE_CODES ? BYTE_WORDS : CODE_WORDS)  // the lane's own: a pair, or a code
#define EIGHT HAS_MARKS                             // levels by three bits, one of which is the mark of the column
#define LEVEL_WORDS (KIND == LEVEL_TABLE ? NS / 2 : EIGHT ? 5 : 1)
#define WHOLE_ROWS (GROUP >= (1 << 30))  // one group
#define GROUPS_IN_BLOCK (GROUP < BLOCK ? BLOCK / GROUP : 1)
#define BLOCKS_IN_GROUP (GROUP < BLOCK ? 1 : GROUP / BLOCK)
#define TWO_GROUPS (KIND == GROUPED_INTEGER && GROUPS_IN_BLOCK == 2)  // one load for both: rows have an even number then
#define TWO_ZEROS (8 % BITS || BITS == 8 && GROUPS_IN_BLOCK == 2)  // those of a block of columns may end in the next byte
#define STAGED_SCALARS (KIND == BINARY_RESIDUAL && !WHOLE_ROWS)  // come to shared memory, four groups of a row at a time
#define EPOCH (WHOLE_ROWS ? 1 << 20 : 4 * BLOCKS_IN_GROUP)       // blocks of columns that these groups have
#define RUN (CODE_BITS == 1 ? 4 : 2)                              // blocks of columns whose words of codes are staged together
#define RUN_BYTES (RUN * BLOCK / 8 * CODE_BITS)                  // of a row and plane
#define RUN_PITCH (RUN_BYTES + 16)                               // from row to row: other banks
#define STAGED_BYTES (2 * PLANES * 16 * RUN_PITCH)               // of a warp: one run is read while the next comes
#define SCALAR_PITCH (NS == 7 ? 68 : 40)                         // bytes from row to row there: another bank each
#define GROUP_OF(block) (WHOLE_ROWS ? 0 : (block) / BLOCKS_IN_GROUP * GROUPS_IN_BLOCK)  // the first

#if COPIES
// Codewords spread over the banks: a copy for each row that a warp reads at once, in 16 bytes of every line of
// 16 * COPIES, so that no two lanes want the same bank. Words 4 and 5 of width 12 lie twice in the second line of theirs:
// behind them a lane finds the next codeword's first words in the other banks, before them its own.
#define LINE (16 * COPIES)
#define ENTRY_BYTES (WIDTH == 8 ? LINE : 2 * LINE)
#define FIRST_CODE(block) (WIDTH == 12 ? (block) * 16 / 3 * 2 : (block) * BLOCK / WIDTH)  // whole threes of chunks of eight columns
#else
#define FIRST_CODE(block) ((block) * BLOCK / WIDTH)
#endif

// For chunks of eight columns in turn: where a lane finds its columns in the entry of their code, and which of the codes from
// the first of the three chunks on that is, fourfold in nibbles (width 12: two codes have three chunks).
struct CodePlaces { u32 entry[3], code[3]; };
__device__ __forceinline__ void find_places(CodePlaces& places, const u16* codebook, int block, int q, int lane) {
#if COPIES
    const u32 copy = shared_address(codebook) + lane / 4 % COPIES * 16;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        const int chunk = (block + i) % 3, word = (4 * chunk + q) % (WIDTH / 2);
        places.entry[i] = copy + (WIDTH == 8 ? q * 4 : word < 4 ? word * 4 : LINE + (word - 4 + (chunk == 1 ? 2 : 0)) * 4);
        places.code[i] = (block % 3 + i) / 3 * 0x2222u + (4 * chunk + q) / 6 * 0x1111u;
    }
#endif
}
__device__ __forceinline__ void next_places(CodePlaces& places, int block) {  // those of the block behind it: one chunk on
    const u32 first = places.entry[0], code = places.code[0] + 0x2222u, passed = block % 3 == 2 ? 0x2222u : 0u;
    places.entry[0] = places.entry[1], places.entry[1] = places.entry[2], places.entry[2] = first;
    places.code[0] = places.code[1] - passed, places.code[1] = places.code[2] - passed, places.code[2] = code - passed;
}

// ---- Codes of a block of columns of rows r and r + 8, as loads give them: what used one at once would wait for memory -------------------------------
struct Codes {
    u32 word[2][PLANES][KEPT_WORDS];
    u32 scalar[2][GROUPS_IN_BLOCK][LEVEL_WORDS];  // of the groups, if they begin here; two marked sets: a lane's share of 16 rows
    u32 zero[2][2];                               // the bytes that hold the zeros of the groups
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
        const int shift = (at.codes[h] + FIRST_CODE(block)) % 4 * 8;
#pragma unroll
        for (int i = 0; i < KEPT_WORDS; i++) bytes[h][i] = funnel_right(codes.word[h][0][i], i + 1 < KEPT_WORDS ? codes.word[h][0][i + 1] : 0, shift);
    }
}

__device__ __forceinline__ void fetch_codes(Codes& codes, const Weight& w, const Places& at, int block, int q) {
#if BYTE_CODES
    const u32 end = w.rows * w.width;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 first = at.codes[h] + FIRST_CODE(block) & ~3u;
        const u32* const from = (const u32*)(w.codes[0] + first);
#pragma unroll
        for (int i = 0; i < KEPT_WORDS; i++) codes.word[h][0][i] = first + 4 * i < end ? __ldg(from + i) : 0;
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
        for (int p = 0; p < PLANES && !STAGED_BYTE_CODES; p++) {
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
// Words that have come with x: of block `part` of a stage, rows from `row` on, a multiple of eight and `r` down the tile.
__device__ __forceinline__ void read_staged(Codes& codes, const u8* tile, int part, int row, int r) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < CODE_WORDS / 4; i++) {
            const uint4 four = *(const uint4*)(tile + 1024 * h + ((row * 128 + (r << 4)) ^ (part * (CODE_WORDS / 4) + i) << 4));
            u32* to = codes.word[h][0] + 4 * i;
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
    if (KIND == VECTOR_CODEBOOK || STAGED_SCALARS || !first && (WHOLE_ROWS || block % BLOCKS_IN_GROUP != 0)) return;
    const int first_group = GROUP_OF(block);
    if (EIGHT) {
        own_scalars(codes.scalar[0][0], w.scalars + (at.shared + first_group * (2 * NS)), lane);
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int g = 0; g < GROUPS_IN_BLOCK; g++) {
            const int group = first_group + g;
            const u8* from = w.scalars + (at.cells[h] + group * (2 * NS));
            u32* const to = codes.scalar[h][g];
            if (TWO_GROUPS) {
                if (g == 0) to[0] = __ldg((const u32*)from);
            } else if (KIND != LEVEL_TABLE) {
                to[0] = __ldg((const u16*)from);
            } else if (NS == 4) {
                const uint2 four = __ldg((const uint2*)from);
                to[0] = four.x, to[1 % LEVEL_WORDS] = four.y;
            } else {
                to[0] = __ldg((const u32*)from);
            }
            if (ASYM && g == 0) {
                const u32 bit = (at.cells[h] / (2 * NS) + group) * BITS;
                codes.zero[h][0] = __ldg(w.zeros + (bit >> 3));
                if (TWO_ZEROS) codes.zero[h][1] = (bit & 7) + GROUPS_IN_BLOCK * BITS > 8 ? __ldg(w.zeros + (bit >> 3) + 1) : 0;
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
// As float32, where the weights are bfloat16: bytes of the codes in the middle of a word, its mask and 2^23 are
// 2^23 + 2^i code, and one multiply-add, exact for i from 11 on, is scale (code - zero).
#define MIDDLES (BF16 && KIND == GROUPED_INTEGER && (BITS == 3 || BITS == 4))
__device__ __forceinline__ u32 kept(u32 value) { return __shfl_sync(0xffffffffu, value, threadIdx.x % 32); }  // in a register: what the compiler sees through it computes at every use
struct Triples { u32 pick, mask, factor, base, ones; };  // of `MIDDLES`: the masks of both codes, and 2^-i of each
__device__ __forceinline__ Triples triples_of(int q, u32 zero) {  // `zero`: 0 that the compiler does not know, or a constant would take an instruction at every use
    if (KIND != GROUPED_INTEGER || BITS < 3) return {};
    if (MIDDLES) {
        const u32 one = (1 << BITS) - 1, first = BITS == 4 ? 16 : 0x120c0e10 >> (8 * q) & 31, second = BITS == 4 ? 12 : 19 - 2 * q;
        return {kept((BITS == 4 ? q * 0x110u : q == 0 ? 0u : q == 1 ? 0x100u : q == 2 ? 0x210u : 0x220u) + zero), kept((one << first) + zero), kept((one << second) + zero), kept((127 - first << 23) + zero), kept((127 - second << 23) + zero)};
    }
    if (BITS == 8) return {kept(0x4140u + zero), kept(0x4bu + zero)};
    if (BITS == 4) return {kept((0x4040u | q | q << 8) + zero), kept(0x00f0000fu + zero), kept(0x2c003c00u + zero)};  // both codes of a byte, each in its half
    const int first = 0x2460 >> (4 * q) & 15, second = 0x5713 >> (4 * q) & 15;  // the bits that they begin at
    const u32 exponents = first << 10 | second << 26;
    return {kept((q == 0 ? 0x1010u : q == 1 ? 0x2110u : q == 2 ? 0x2121u : 0x3232u) + zero), kept((7u << first | 7u << (16 + second)) + zero), kept((0x3c003c00u - exponents) + zero), kept((0x64006400u - exponents) + zero), kept((1u << first | 1u << (16 + second)) + zero)};
}

// ---- Levels of a group ---------------------------------------------------------------------------------------------------
struct Levels {
    u32 table[2];             // four 16-bit levels of a row; of eight, their lower bytes
    u32 high[2];              // their higher bytes
    float factor[2], offset[2];  // of `MIDDLES`, for both codes of a pair
    float scale, zero;        // wider integers: w = scale (code - zero), in float16 by the pairs of the table
};
__device__ __forceinline__ void levels_of(Levels& levels, const Codes& codes, const Places& at, const Triples& triples, int h, int block, int g) {
    const u32 (&s)[LEVEL_WORDS] = codes.scalar[h][g];
    if (KIND == LEVEL_TABLE) {
#pragma unroll
        for (int i = 0; i < LEVEL_WORDS; i++) levels.table[i % 2] = BF16 ? pair_of_floats(float_of_half((u16)s[i]), float_of_half((u16)(s[i] >> 16))) : s[i];
        if (BITS == 1) levels.table[1] = 0;
    } else {
        const u32 bit = ASYM ? (at.cells[h] / (2 * NS) + GROUP_OF(block)) * BITS : 0;
        const u32 zero_code = ASYM ? (codes.zero[h][0] | (TWO_ZEROS ? codes.zero[h][1] << 8 : 0)) >> ((bit & 7) + g * BITS) & ((1 << BITS) - 1) : 0;
        const u32 scale16 = TWO_GROUPS ? codes.scalar[h][0][0] >> (16 * g) & 0xffffu : s[0];
        const float value = float_of_half((u16)scale16);
        const float zero = ASYM ? (float)zero_code : BITS > 1 ? (float)(1 << (BITS - 1)) : 0.5f;
        const float scale = !ASYM && BITS == 1 ? 2.0f * value : value;
        if (TABLE) {
            levels.table[0] = pair_of_floats(scale * (0.0f - zero), scale * (1.0f - zero));
            levels.table[1] = BITS == 2 ? pair_of_floats(scale * (2.0f - zero), scale * (3.0f - zero)) : 0;
        } else {
            levels.scale = scale, levels.zero = 8388608.0f + zero;
            if (MIDDLES) {
                const float first = __uint_as_float(triples.base), second = __uint_as_float(triples.ones);
                levels.factor[0] = scale * first, levels.factor[1] = scale * second;
                levels.offset[0] = -scale * (8388608.0f * first + zero), levels.offset[1] = -scale * (8388608.0f * second + zero);
            }
            if (HALVES) {
                const u32 whole = ASYM ? zero_code : 1u << (BITS - 1);
                levels.table[0] = TWO_GROUPS ? choose_bytes(codes.scalar[h][0][0], 0, g ? 0x3232u : 0x1010u) : s[0] * 0x10001u;
                levels.table[1] = TRIPLES ? (triples.base ^ 0x80008000u) + whole * triples.ones : bias_of_pair(whole);
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
// Weights of a pair of codes, each in the low bits of 2^23.
__device__ __forceinline__ u32 pair_of_lows(u32 first, u32 second, const Levels& levels) {
    return pair_of_floats(levels.scale * (__uint_as_float(first) - levels.zero), levels.scale * (__uint_as_float(second) - levels.zero));
}

__device__ __forceinline__ u32 pair_of_middles(u32 v, const Triples& triples, const Levels& levels) {
    const float first = __uint_as_float((v & triples.mask) | 0x4b000000u), second = __uint_as_float((v & triples.factor) | 0x4b000000u);
    return pair_of_floats(fmaf(first, levels.factor[0], levels.offset[0]), fmaf(second, levels.factor[1], levels.offset[1]));
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
__device__ __forceinline__ void expand(u32 (&a)[4], const Codes& codes, const u32 (&selector)[2][2], const Levels (&levels)[2], const u32 (&bytes)[2][KEPT_WORDS], const u8* staged, const Triples& triples, int step, int q, int column0, const u16* codebook, const CodePlaces& places) {
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
#if COPIES
            // A byte four times in a word, times what 0x01010101 has for an inverse modulo 2^32, is the byte.
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int chunk = 2 * step + half, word_at = chunk / 6;
                const u32 fourfold = choose_bytes(bytes[h][word_at], bytes[h][(word_at + 1) % KEPT_WORDS], places.code[chunk % 3] + chunk / 3 % 2 * 0x2222u);
                a[2 * half + h] = shared_word(fourfold * (ENTRY_BYTES * 0xffffff01u) + places.entry[chunk % 3]);
            }
            continue;
#endif
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
#if COPIES
                a[2 * half + h] = shared_word(choose_bytes(word[chunk / 4], 0, 0x4440 + chunk % 4) * ENTRY_BYTES + places.entry[0]);
                continue;
#endif
                const u32 column = column0 + chunk * 8 + 2 * q, code = BYTE_PER_CHUNK ? word[chunk / 4] >> (8 * (chunk % 4)) & 255 : word[chunk % KEPT_WORDS];
                a[2 * half + h] = *(const u32*)(codebook + code * WIDTH + column % WIDTH);
            }
#endif
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int chunk = 2 * step + half;
                if (MIDDLES) {
                    const int at = BITS * chunk / 4;
                    const u32 v = choose_bytes(word[at % KEPT_WORDS], BITS == 4 ? 0 : word[(at + 1) % KEPT_WORDS], triples.pick + BITS * chunk % 4 * 0x1111u);
                    a[2 * half + h] = pair_of_middles(v, triples, levels[h]);
                } else if (TRIPLES) {
                    const int at = 3 * chunk / 4;
                    const u32 v = choose_bytes(word[at % KEPT_WORDS], word[(at + 1) % KEPT_WORDS], triples.pick + 3 * chunk % 4 * 0x1111u);
                    a[2 * half + h] = multiply_pairs(fma_pairs((v & triples.mask) | 0x64006400u, triples.factor, levels[h].table[1]), levels[h].table[0]);
                } else if (CODE_BITS == 4) {
                    const u32 v = choose_bytes(word[chunk % KEPT_WORDS], 0, triples.pick);
                    a[2 * half + h] = pair_of_halves((v & triples.mask) | 0x64006400u, levels[h].table[0], levels[h].table[1], ASYM ? SECOND_CODE << 16 | 0x3c00u : triples.factor);
                } else {
                    const u32 v = STAGED_BYTE_CODES ? *(const u16*)(staged + 1024 * h + 8 * half) : word[chunk % KEPT_WORDS];
                    a[2 * half + h] = HALVES ? pair_of_halves(choose_bytes(v, 0x64u, triples.pick), levels[h].table[0], levels[h].table[1]) : pair_of_lows(choose_bytes(v, triples.mask, 0x4550u), choose_bytes(v, triples.mask, 0x4551u), levels[h]);
                }
            }
        }
    }
}

// All codewords in the type of x, their entries exact: the second half negated.
__device__ __forceinline__ void decode_codebook(u16* codebook, const u8* stored) {
#if KIND == VECTOR_CODEBOOK
    auto value_of = [&](int code, int at) {
        float value;
        if (TERNARY) {
            int trits = __ldg(stored + code % (CODES / 2) * ((WIDTH + 4) / 5) + at / 5);
            for (int i = 0; i < at % 5; i++) trits /= 3;
            value = (float)(trits % 3 - 1);
        } else {
            value = (float)(signed char)__ldg(stored + code % (CODES / 2) * WIDTH + at) * (1.0f / 128.0f);
        }
        return x_of_float(code < CODES / 2 ? value : -value);
    };
#if COPIES
    constexpr int LINES = ENTRY_BYTES / LINE;
    for (int line = threadIdx.x; line < CODES * LINES; line += THREADS) {
        const int code = line / LINES, first = line % LINES * 4;
        u32 word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = 2 * (first ? 4 + i % 2 : i);
            word[i] = value_of(code, at) | (u32)value_of(code, at + 1) << 16;
        }
#pragma unroll
        for (int copy = 0; copy < COPIES; copy++)  // lanes begin at different ones: other banks
            *(uint4*)((u8*)codebook + line * LINE + (copy + threadIdx.x) % COPIES * 16) = make_uint4(word[0], word[1], word[2], word[3]);
    }
#else
    for (int entry = threadIdx.x; entry < CODES * WIDTH; entry += THREADS) codebook[entry] = value_of(entry / WIDTH, entry % WIDTH);
#endif
#endif
}

