// Words of 4:8 sparse binary weights of three regions whose scalars are those of the whole row.
//
// A lane decodes words of the index, nine groups of 8 columns: their digits, 36 signs and 36 trits. The trits of a word begin
// anywhere in a byte of five; eight bytes are two numbers of 20 trits, which as fractions of 3^20 give up their digits to the
// base 81, four trits each, one multiplication at a time, the highest first, and so do the digits of the index.
//
// Per group: the number of the pattern is a digit; a table gives for each column the place of its weight among the four that
// are kept. Sign and region of a kept weight are a number below 8, a nibble; permutations of bytes take it to the bytes of
// its level, and these to their columns.
//
// Items are 16 rows x 4 words, a word for each lane of a quad. Rows are staged in shared memory as they lie in memory.
// Before this file stand the constants and tables of `structured_plan.tables_of`.

#define WORD 9                 // groups in a word of the index
#define WORD_COLUMNS (8 * WORD)
#define SLICE 4                // words of an item
#define SLICE_GROUPS (SLICE * WORD)
#define TRIT_ENTRIES 81
#define SIGN_ENTRIES (PAIRED ? 256 : 16)  // by the signs of two groups, or of one
#define SIGN_COPIES (PAIRED ? 16 : 32)
#define SIGN_TABLE (PATTERNS * 256 + TRIT_ENTRIES * 128)
#define TABLE_BYTES (SIGN_TABLE + SIGN_ENTRIES * SIGN_COPIES * 4)
#define MEANS (NS == 2 * REGIONS + 3)
#define WARP_COUNT (THREADS / 32)

// ---- Tables, each entry 32 times: lane i reads the i-th copy, from a bank of its own ---------------------------------
#define PATTERNS_OF_WARP ((PATTERNS + WARP_COUNT - 1) / WARP_COUNT)
struct Patterns {  // asked of memory early
    uint2 entry[PATTERNS_OF_WARP];
    __device__ __forceinline__ void load(int warp) {
#pragma unroll
        for (int k = 0; k < PATTERNS_OF_WARP; k++) entry[k] = __ldg((const uint2*)places_of_pattern + min(warp + k * WARP_COUNT, (int)PATTERNS - 1));
    }
};
__device__ __forceinline__ void make_tables(u8* tables, const Patterns& patterns, int warp, int lane) {
    for (int entry = warp; entry < TRIT_ENTRIES; entry += WARP_COUNT) {
        const u32 d = entry;
        *(u32*)(tables + PATTERNS * 256 + entry * 128 + lane * 4) = d % 3 << 1 | d / 3 % 3 << 5 | d / 9 % 3 << 9 | d / 27 << 13;
    }
    for (int at = threadIdx.x; at < SIGN_ENTRIES * SIGN_COPIES; at += THREADS) {
        u32 signs = at / SIGN_COPIES;  // a bit to every nibble
        signs = (signs | signs << 12) & 0x000f000fu;
        signs = (signs | signs << 6) & 0x03030303u;
        *(u32*)(tables + SIGN_TABLE + at * 4) = (signs | signs << 3) & 0x11111111u;
    }
#pragma unroll
    for (int k = 0; k < PATTERNS_OF_WARP; k++)
        if (warp + k * WARP_COUNT < (int)PATTERNS) ((uint2*)tables)[(warp + k * WARP_COUNT) * 32 + lane] = patterns.entry[k];
}

// ---- Levels of a row: lower and upper bytes of 16 bits, numbered 2 * region + first bit; marked: 2 * second bit + first --
struct __align__(16) Levels {
    u32 low[2], high[2], marked_low, marked_high;
    float unit;
    u32 unused;
};
struct Scalars {  // of a row, asked of memory early
    u16 half[NS];
    __device__ __forceinline__ void load(const Weight& w, int row) {
#pragma unroll
        for (int j = 0; j < NS; j++) half[j] = __ldg((const u16*)w.scalars + (u32)min(row, w.rows - 1) * NS + j);
    }
};
__device__ __forceinline__ void make_levels(Levels& out, const Scalars& scalars) {
    float scalar[NS], level[10];
#pragma unroll
    for (int j = 0; j < NS; j++) scalar[j] = float_of_half(scalars.half[j]);
#pragma unroll
    for (int i = 0; i < 6; i++) {
        const float sign = i % 2 ? 1.0f : -1.0f;
        level[i] = MEANS ? scalar[2 * (i / 2) % NS] + sign * scalar[(2 * (i / 2) + 1) % NS] : sign * scalar[i / 2];
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        level[6 + i] = ((MEANS ? scalar[NS - 3] : 0.0f) + (i % 2 ? scalar[NS - 2] : -scalar[NS - 2])) + (i / 2 ? scalar[NS - 1] : -scalar[NS - 1]);
    u32 low[10], high[10];
#if FIXED
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 10; i++) most = max(most, level[i] < 0.0f ? -level[i] : level[i]);
    const float up = most > 0.0f ? 32512.0f / most : 0.0f;
    out.unit = most * (1.0f / 32512.0f);
#pragma unroll
    for (int i = 0; i < 10; i++) {  // the lower byte is signed
        const int fixed = __float2int_rn(level[i] * up);
        low[i] = (u32)fixed & 255, high[i] = (u32)(fixed + 128 >> 8) & 255;
    }
#else
    out.unit = 1.0f;
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const u32 rounded = x_of_float(level[i]);
        low[i] = rounded & 255, high[i] = rounded >> 8;
    }
#endif
    out.low[0] = low[0] | low[1] << 8 | low[2] << 16 | low[3] << 24, out.low[1] = low[4] | low[5] << 8;
    out.high[0] = high[0] | high[1] << 8 | high[2] << 16 | high[3] << 24, out.high[1] = high[4] | high[5] << 8;
    out.marked_low = low[6] | low[7] << 8 | low[8] << 16 | low[9] << 24;
    out.marked_high = high[6] | high[7] << 8 | high[8] << 16 | high[9] << 24;
}

// ---- Staging: by one warp, through the copy engine -------------------------------------------------------------------------
// Bytes from row to row of a staged stream: rows of an even number of pieces get one more, for the banks.
__device__ __forceinline__ int pitch_of(int width) { return width + (width % 32 == 0 ? 16 : 0); }
__device__ __forceinline__ int staged_bytes(int width, int rows) { return (pitch_of(width) * rows + 31) / 16 * 16; }
// Rows from `row0`, a multiple of 16, on. What is left of the last piece of a weight is copied at once, and must be before
// the barrier is told how many bytes to expect: the number that this returns.
__device__ __forceinline__ int stage_rest(u8* to, const u8* from, int width, int row0, int rows, int lane) {
    const int bytes = rows * width, rest = width % 32 == 0 ? 0 : bytes % 16;
    if (lane < rest) to[bytes - rest + lane] = __ldg(from + (u64)(u32)row0 * (u32)width + bytes - rest + lane);
    return bytes - rest;
}
__device__ __forceinline__ void stage_rows(u8* to, const u8* from, int width, int row0, int rows, u64* barrier, int lane) {
    from += (u64)(u32)row0 * (u32)width;
    if (width % 32 == 0) {
        for (int row = lane; row < rows; row += 32) copy_bulk(to + row * (width + 16), from + row * width, width, barrier);
    } else if (lane == 0 && rows * width >= 16) {
        copy_bulk(to, from, rows * width / 16 * 16, barrier);
    }
}
// The three streams, and how far apart they lie.
struct Streams {
    const u8 *index, *signs, *regions;
    int index_width, sign_width, region_width, index_bytes, sign_bytes, stage_bytes;
    __device__ __forceinline__ Streams(const Weight& w, int rows) : index(w.codes[0]), signs(w.codes[1]), regions(w.zeros), index_width(w.width) {
        const int groups = w.columns / 8;
        sign_width = (groups * 4 + 7) / 8, region_width = (groups * 4 + 4) / 5;
        index_bytes = staged_bytes(index_width, rows), sign_bytes = staged_bytes(sign_width, rows);
        stage_bytes = index_bytes + sign_bytes + staged_bytes(region_width, rows);
    }
    __device__ __forceinline__ void stage(u8* to, int row0, int rows, u64* barrier, int lane) const {
        int bytes = stage_rest(to, index, index_width, row0, rows, lane) + stage_rest(to + index_bytes, signs, sign_width, row0, rows, lane);
        bytes += stage_rest(to + index_bytes + sign_bytes, regions, region_width, row0, rows, lane);
        __syncwarp();
        if (lane == 0) barrier_expect(barrier, bytes);
        __syncwarp();
        stage_rows(to, index, index_width, row0, rows, barrier, lane);
        stage_rows(to + index_bytes, signs, sign_width, row0, rows, barrier, lane);
        stage_rows(to + index_bytes + sign_bytes, regions, region_width, row0, rows, barrier, lane);
    }
};
// Bytes of eight columns: ones where the column is marked.
__device__ __forceinline__ uint2 mask_of(u32 marks) {
    auto four = [&](int i) { return (marks >> i & 1) * 0xffu | (marks >> i & 2) * 0x7f80u | (marks >> i & 4) * 0x3fc000u | (marks >> i & 8) * 0x1fe00000u; };
    return make_uint2(four(0), four(4));
}
// The groups of a slice with a marked column, for all lanes of a quad at once: bit i for the i-th groups of its words.
__device__ __forceinline__ u32 marked_steps(const Weight& w, int group0, int lane) {
    u32 marks = 0;
#pragma unroll
    for (int q = 0; q < SLICE; q++)
        if (lane < WORD && group0 + q * WORD + lane < w.columns / 8) marks |= __ldg(w.salient + group0 + q * WORD + lane);
    return __ballot_sync(0xffffffffu, marks != 0);
}

// ---- Words ---------------------------------------------------------------------------------------------------------------
// The highest digit of a fraction, which keeps the others. (Left to itself the compiler makes three products of two.)
__device__ __forceinline__ u32 next_digit(u32& fraction, u32 base) {
    u32 digit, rest;
    asm("{\n\t.reg .u64 t;\n\tmul.wide.u32 t, %2, %3;\n\tmov.b64 {%1, %0}, t;\n\t}" : "=r"(digit), "=r"(rest) : "r"(fraction), "r"(base));
    fraction = rest;
    return digit;
}
// number * size + start on the multipliers, not the logic units.
__device__ __forceinline__ u32 place_of(u32 number, u32 size, u32 start) {
    u32 place;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(place) : "r"(number), "r"(size), "r"(start));
    return place;
}
// Twenty trits of four bytes, as a fraction of 3^20 = 2^32 / 1.2317...
__device__ __forceinline__ u32 fraction_of_trits(u32 bytes) {
    const u32 number = __dp4a(bytes, 0x0000f301u, 0u) + __dp4a(bytes, 0xf3010000u, 0u) * 59049u;
    return number + (__umulhi(number, 3982028946u) >> 2) + 1u;
}
// The digits of a word of the index as fractions: five lower ones, four upper ones.
__device__ __forceinline__ void fractions_of_index(u32& low_fraction, u32& high_fraction, u32 lower, u32 upper) {
    u32 high = __umulhi(funnel_right(lower, upper, 24), HIGH_FACTOR) >> HIGH_SHIFT;
    u32 low = lower - high * LOW_POWER;
    if (low >= LOW_POWER) low -= LOW_POWER, high++;
    low_fraction = low * 2u + __umulhi(low, 2385697034u) + 1u;        // 2^32 / 70^5 = 2.5554...
    high_fraction = high * 178u + __umulhi(high, 3790035128u) + 1u;   // 2^32 / 70^4 = 178.8...
}

// Powers of three that a word's first trit, number `word` % 5 of its byte, asks for.
struct Phase {
    u32 before, after;  // 3^phase, 3^(4 - phase)
};
__device__ __forceinline__ Phase phase_of(int word) {
    const u32 phase = word % 5;  // a byte of 1, 3, 9, 27, 81
    return {choose_bytes(0x1b090301u, 0x51u, 0x7770u + phase), choose_bytes(0x1b090301u, 0x51u, 0x7774u - phase)};
}

// Where a lane's word begins in the three staged streams: 4-byte words from the beginning of a tile, and bits from there.
struct Start {
    int index, signs, regions;
    u32 index_shift, sign_shift, region_shift;
};
// Up to 64 bits of shared memory.
__device__ __forceinline__ void read_bits(u32& low, u32& high, const u32* words, u32 shift) {
    const u32 a = words[0], b = words[1], c = words[2];
    low = funnel_right(a, b, shift), high = funnel_right(b, c, shift);
}

struct Word {
    u32 index[2], trits[2], signs, more_signs, middle;
    __device__ __forceinline__ void begin(const u32* index_words, const u32* sign_words, const u32* region_words, const Start& start, const Phase& phase) {
        u32 lower, upper;
        read_bits(lower, upper, index_words + start.index, start.index_shift);
        fractions_of_index(index[0], index[1], lower, upper);
        if (SIGN_WORDS) {  // 36 bits from a multiple of four on are within two words
            const u32 a = sign_words[start.signs], b = sign_words[start.signs + 1];
            signs = funnel_right(a, b, start.sign_shift), more_signs = b >> start.sign_shift;
        } else {
            read_bits(signs, more_signs, sign_words + start.signs, start.sign_shift);
        }
        read_bits(lower, upper, region_words + start.regions, start.region_shift);
        trits[0] = fraction_of_trits(lower), trits[1] = fraction_of_trits(upper);
        middle = next_digit(trits[0], phase.after);  // the first of the trits of group 4
        trits[1] *= phase.after;
    }
    // Codes of the four kept weights of group i, in the order 8, 7, ... 0, and nibbles for choose_bytes that bring them to their
    // columns. `spread`: signs of two groups, kept from the odd one to the even one.
    __device__ __forceinline__ void group(u32& codes, uint2& places, u32& spread, const u8* tables, u32 lane, int i, const Phase& phase) {
        const u32 pattern = next_digit(index[i > 4], 70u);
        const u32 number = i == 4 ? middle + __umulhi(trits[1], phase.before) * phase.after : next_digit(trits[i > 4], 81u);
        places = *(const uint2*)(tables + place_of(pattern, 256, lane * 8));
        const u32 regions = *(const u32*)(tables + PATTERNS * 256 + place_of(number, 128, lane * 4));
        constexpr int SIZE = PAIRED ? 6 : 7;  // of an entry with its copies: 2^SIZE bytes
        const int bit = PAIRED ? i / 2 * 8 : i * 4;
        if (!PAIRED || i % 2 || i == 8) {
            const u32 mask = PAIRED && i < 8 ? 0xffu << SIZE : 0xfu << SIZE;
            const u32 sign_at = (i == 8 ? more_signs << SIZE : bit < SIZE ? signs << (SIZE - bit) : signs >> (bit - SIZE)) & mask;
            spread = *(const u32*)(tables + SIGN_TABLE + (sign_at | lane % SIGN_COPIES * 4));
        }
        codes = regions + (PAIRED && i % 2 ? spread >> 16 : spread);
    }
};
// Bytes of the levels of four kept weights.
__device__ __forceinline__ void level_bytes(u32& low, u32& high, const Levels& levels, u32 codes) {
    low = choose_bytes(levels.low[0], levels.low[1], codes), high = choose_bytes(levels.high[0], levels.high[1], codes);
}
// The same where columns are marked.
__device__ __forceinline__ void mark_levels(u32& low, u32& high, const Levels& levels, u32 codes, const uint2& places, const uint2& marks) {
    const u32 mask = choose_bytes(marks.x, marks.y, places.y >> 16);
    low = (low & ~mask) | (choose_bytes(levels.marked_low, 0, codes) & mask);
    high = (high & ~mask) | (choose_bytes(levels.marked_high, 0, codes) & mask);
}
