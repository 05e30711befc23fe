// N:M sparse binary weights of groups of 8 columns whose scalars are those of the whole row: a product with few vectors
// (`structured_product`), and the dense 16-bit weight (`decode`). Packed bytes are read once, and are not repacked.
//
// Positions of codes differ between index (a few digits per word), signs (bits) and regions (five to a byte), and agree
// again after UNIT groups. A lane decodes whole units, so that every position in them is known to the compiler: lane q of
// a quad the units 4 i + q of rows r and r + 8, which the tensor-core product takes as its operand once the columns of x
// are counted in the same order. An item of a warp is 16 rows x 4 units, staged in shared memory as 16-byte pieces.
//
// Per group of 8 columns: the number of the pattern is a digit; a table gives for each column the place of its weight
// among those kept. Sign and region of a kept weight are a number below 8, a nibble; permutations of bytes take it to the
// bytes of its level, and these to their columns.
//
// Before this file stand: PATTERNS, PATTERN_TABLE (digits that any word can have), LOW_DIGITS and LOW_POWER (the lower
// digits of a long word and PATTERNS to that power, below 2^31), HIGH_FACTOR and HIGH_SHIFT (see `parted`), and the table
// `places_of_pattern`.

#define WORD_BYTES BITS
#define MEANS (NS == 2 * REGIONS + 3)
#define WORDS (UNIT / WORD_GROUPS)                 // of the index, per unit
#define FIVES (UNIT * KEPT / 5)                    // kept weights of a unit, by fives
#define INDEX_BITS (WORDS * WORD_BYTES * 8)        // per unit
#define PLANE_BITS (UNIT * KEPT)
#define REGION_BITS (REGIONS == 3 ? FIVES * 8 : REGIONS == 2 ? PLANE_BITS : 0)
#define PIECES(bits) ((((bits) * 4 + 14) / 8 + 15 + 15) / 16 | 1)  // an odd number of 16-byte pieces: rows in different banks
#define INDEX_PIECES PIECES(INDEX_BITS)
#define SIGN_PIECES PIECES(PLANE_BITS)
#define REGION_PIECES (REGIONS > 1 ? PIECES(REGION_BITS) : 0)
#define ITEM_BYTES (16 * 16 * (INDEX_PIECES + SIGN_PIECES + REGION_PIECES))
#define UNIT_COLUMNS (UNIT * 8)
#define UNIT_PITCH (UNIT_COLUMNS + 8 * (1 - UNIT % 2))  // halves of x: an odd number of 16-byte pieces
#define MASK_PITCH (UNIT | 1)                      // of 8 bytes
#define NT (TOKENS > 8 ? TOKENS / 8 : 1)
#define TRIT_ENTRIES (REGIONS == 3 ? 256 : 0)
#define PATTERN_WORDS (PATTERN_TABLE * 64)         // two words each
#define TABLE_WORDS (PATTERN_WORDS + (TRIT_ENTRIES + 32) * 32)

__device__ __forceinline__ void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sixteen bytes from global to shared memory, the first `valid` of them; the rest become zero.
__device__ __forceinline__ void copy_piece(u8* shared, const u8* source, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source), "r"(valid) : "memory");
}

// ---- Tables, each entry 32 times: lane i reads the i-th copy, from a bank of its own -------------------------------------
__device__ __forceinline__ void make_tables(u32* tables, int warp, int lane, int warps) {
    for (int entry = warp; entry < (int)PATTERN_TABLE; entry += warps)
        ((uint2*)tables)[entry * 32 + lane] = __ldg((const uint2*)places_of_pattern + min(entry, (int)PATTERNS - 1));
    for (int entry = warp; entry < TRIT_ENTRIES + 32; entry += warps)
        tables[PATTERN_WORDS + entry * 32 + lane] = __ldg(codes_of_five + entry + (TRIT_ENTRIES ? 0 : 256));
}

// ---- Staging -------------------------------------------------------------------------------------------------------------
// `bits` per row from bit `start` of rows of `width` bytes; the copy of a row begins at the multiple of 16 bytes before.
template <int PIECE_COUNT> __device__ __forceinline__ void stage_stream(u8* to, const u8* from, int width, int row0, int rows, u32 start, int lane) {
    const u32 end = (u32)rows * width, row = min(row0 + lane / 2, rows - 1);
    const u32 at = ((row * width + (start >> 3)) & ~15u) + lane % 2 * 16;
    to += lane / 2 * (PIECE_COUNT * 16) + lane % 2 * 16;
    from += at;
    const bool whole = at + 16 * PIECE_COUNT <= end;
#pragma unroll
    for (int piece = 0; piece < PIECE_COUNT; piece += 2) {
        if (piece + lane % 2 >= PIECE_COUNT) continue;
        if (whole) {
            copy_whole<16>(to + piece * 16, from + piece * 16);
        } else {
            const int valid = (int)end - (int)(at + piece * 16);
            copy_piece(to + piece * 16, from + (valid > 0 ? piece * 16 : -(int)at), valid > 16 ? 16 : valid > 0 ? valid : 0);
        }
    }
}

// Bits of one row from a unit's first on: `at(position)`, all positions known to the compiler.
struct Stream {
    const u32* words;
    u32 shift;
    template <int PIECE_COUNT> __device__ __forceinline__ void begin(const u8* stage, int row, int width, int from_row, u32 item_start, u32 unit_start) {
        const u32 row_start = (u32)from_row * (u32)width;  // bytes; only the lowest bits matter
        const u32 bit = ((row_start + (item_start >> 3)) & 15) * 8 + (unit_start - (item_start & ~7u));
        words = (const u32*)(stage + row * (PIECE_COUNT * 16)) + (bit >> 5);
        shift = bit & 31;
    }
    __device__ __forceinline__ const u8* bytes() const { return (const u8*)words + (shift >> 3); }  // where units are whole bytes
    __device__ __forceinline__ u32 word(int k) const { return funnel_right(words[k], words[k + 1], shift); }
    __device__ __forceinline__ u32 at(int position) const {
        return position % 32 ? funnel_right(word(position / 32), word(position / 32 + 1), position % 32) : word(position / 32);
    }
};

// ---- Digits ----------------------------------------------------------------------------------------------------------------
// The lowest digit of a number of at most `most`, which is divided by PATTERNS: by a factor rounded up where that is exact.
__device__ __forceinline__ u32 take_digit(u32& rest, u64 most) {
    constexpr u64 FACTOR = ((1ull << 32) + PATTERNS - 1) / PATTERNS, ABOVE = FACTOR * PATTERNS - (1ull << 32);
    const u32 quotient = most * ABOVE < (1ull << 32) ? __umulhi(rest, (u32)FACTOR) : rest / PATTERNS;
    const u32 digit = rest - quotient * PATTERNS;
    rest = quotient;
    return digit;
}
// A long word V = high * LOW_POWER + low. The quotient comes from the highest 32 bits of V, one too small at most.
__device__ __forceinline__ void digits_of(u32 (&digits)[WORD_GROUPS], u32 lower, u32 upper) {
#if WORD_BYTES > 4
    constexpr int SHIFT = 8 * WORD_BYTES - 32;
    upper &= (1u << SHIFT) - 1;
    u32 high = __umulhi(funnel_right(lower, upper, SHIFT), HIGH_FACTOR) >> HIGH_SHIFT;
    u32 low = lower - high * LOW_POWER;
    if (low >= LOW_POWER) low -= LOW_POWER, high++;
    u64 most_low = LOW_POWER - 1, most_high = ((1ull << 8 * WORD_BYTES) - 1) / LOW_POWER;
#pragma unroll
    for (int i = 0; i < WORD_GROUPS; i++) {
        u32& rest = i < LOW_DIGITS ? low : high;
        u64& most = i < LOW_DIGITS ? most_low : most_high;
        digits[i] = i == LOW_DIGITS - 1 || i == WORD_GROUPS - 1 ? rest : take_digit(rest, most);
        most /= PATTERNS;
    }
#else
    u32 rest = WORD_BYTES == 4 ? lower : lower & ((1u << 8 * WORD_BYTES % 32) - 1);
    u64 most = (1ull << 8 * WORD_BYTES) - 1;
#pragma unroll
    for (int i = 0; i < WORD_GROUPS; i++) {
        digits[i] = i == WORD_GROUPS - 1 ? rest : take_digit(rest, most);
        most /= PATTERNS;
    }
#endif
}

// ---- Levels ----------------------------------------------------------------------------------------------------------------
// Low and high bytes of the levels of a row, numbered 2 * region + first bit, those that do not exist zero.
struct Levels {
    u32 low[2], high[2], marked_low, marked_high;
    __device__ __forceinline__ void make(const Weight& w, int row) {
        float scalar[NS];
#pragma unroll
        for (int j = 0; j < NS; j++) scalar[j] = float_of_half(__ldg((const u16*)w.scalars + (u32)row * NS + j));
        u32 level[8], marked[4];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float sign = i % 2 ? 1.0f : -1.0f;
            const int region = i / 2 % REGIONS;
            level[i] = i / 2 >= REGIONS ? 0 : x_of_float(MEANS ? scalar[2 * region % NS] + sign * scalar[(2 * region + 1) % NS] : sign * scalar[region % NS]);
            const float base = MEANS ? scalar[NS > 2 ? NS - 3 : 0] : 0.0f;
            if (i < 4) marked[i] = REGIONS == 1 ? 0 : x_of_float((base + sign * scalar[NS > 1 ? NS - 2 : 0]) + (i / 2 ? scalar[NS - 1] : -scalar[NS - 1]));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            low[i] = (level[4 * i] & 255) | (level[4 * i + 1] & 255) << 8 | (level[4 * i + 2] & 255) << 16 | level[4 * i + 3] << 24;
            high[i] = level[4 * i] >> 8 | level[4 * i + 1] >> 8 << 8 | level[4 * i + 2] >> 8 << 16 | level[4 * i + 3] >> 8 << 24;
        }
        marked_low = (marked[0] & 255) | (marked[1] & 255) << 8 | (marked[2] & 255) << 16 | marked[3] << 24;
        marked_high = marked[0] >> 8 | marked[1] >> 8 << 8 | marked[2] >> 8 << 16 | marked[3] >> 8 << 24;
    }
};

// Bytes of eight columns: ones where the column is marked.
__device__ __forceinline__ uint2 mask_of(u32 marks) {
    auto four = [&](int i) { return (marks >> i & 1) * 0xffu | (marks >> i & 2) * 0x7f80u | (marks >> i & 4) * 0x3fc000u | (marks >> i & 8) * 0x1fe00000u; };
    return make_uint2(four(0), four(4));
}

// Low and high bytes of the levels of four kept weights; `mask`: which of them are in marked columns.
template <bool MARKED> __device__ __forceinline__ void level_bytes(u32& low, u32& high, const Levels& levels, u32 codes, u32 mask) {
    low = choose_bytes(levels.low[0], levels.low[1], codes), high = choose_bytes(levels.high[0], levels.high[1], codes);
    if (MARKED) {
        low = (low & ~mask) | (choose_bytes(levels.marked_low, 0, codes) & mask);
        high = (high & ~mask) | (choose_bytes(levels.marked_high, 0, codes) & mask);
    }
}

// Eight columns from the levels of the kept weights. `places`: a nibble for each column, the kept weight in it or 7 for
// none; then (for up to four kept weights in the upper half, below which the columns 4 to 7 come again) a nibble for each
// kept weight, the column it is in.
template <bool MARKED> __device__ __forceinline__ void expand(u32 (&pair)[4], const Levels& levels, u32 codes, const uint2& places, const uint2& marks) {
    u32 low, high, low_rest = 0, high_rest = 0;
    level_bytes<MARKED>(low, high, levels, codes, MARKED ? choose_bytes(marks.x, marks.y, KEPT > 4 ? places.y : places.y >> 16) : 0);
    if (KEPT > 4) {
        const u32 rest = (codes >> 16 & (0xfffu >> 4 * (7 - (KEPT > 4 ? KEPT : 4)))) | 0x7000u;
        level_bytes<MARKED>(low_rest, high_rest, levels, rest, MARKED ? choose_bytes(marks.x, marks.y, places.y >> 16) : 0);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 selector = half == 0 ? places.x : KEPT > 4 ? places.x >> 16 : places.y;
        const u32 a = choose_bytes(low, low_rest, selector), b = choose_bytes(high, high_rest, selector);
        pair[2 * half] = choose_bytes(a, b, 0x5140);
        pair[2 * half + 1] = choose_bytes(a, b, 0x7362);
    }
}

// Levels of the weights of one row of a unit, group by group, in order.
struct Unit {
    Stream index, signs, regions;
    Levels levels;
    u32 digits[WORD_GROUPS], five[3];
    __device__ __forceinline__ u32 five_of(const u32* tables, int lane, int j) const {
        const u32 lane_bytes = lane * 4;
        const u8* spread = (const u8*)(tables + PATTERN_WORDS + TRIT_ENTRIES * 32);
        auto entry = [&](const u8* table, u32 number_at_7, u32 mask) { return *(const u32*)(table + ((number_at_7 & mask << 7) | lane_bytes)); };
        u32 codes = entry(spread, 5 * j >= 7 ? signs.at(5 * j - 7) : signs.at(0) << (7 - 5 * j > 0 ? 7 - 5 * j : 0), 31);
        if (REGIONS == 2) codes |= entry(spread, 5 * j >= 7 ? regions.at(5 * j - 7) : regions.at(0) << (7 - 5 * j > 0 ? 7 - 5 * j : 0), 31) << 1;
        if (REGIONS == 3) codes += *(const u32*)((const u8*)(tables + PATTERN_WORDS) + (regions.bytes()[j] * 128 + lane * 4));
        return codes;
    }
    // To be called for i = 0, 1, ...: five[] slides along.
    __device__ __forceinline__ void group(u32& codes, uint2& places, const u32* tables, int lane, int i) {
        if (i % WORD_GROUPS == 0) {
            const int bit = i / WORD_GROUPS * WORD_BYTES * 8;
            digits_of(digits, index.at(bit), WORD_BYTES > 4 ? index.at(bit + 32) : 0);
        }
        places = *(const uint2*)((const u8*)tables + (digits[i % WORD_GROUPS] * 256 + lane * 8));
        const int first = i * KEPT, j = first / 5, p = first % 5;
        const int before = i ? ((i - 1) * KEPT + KEPT - 1) / 5 : -1;  // the last five that is known
        const int start = i ? (i - 1) * KEPT / 5 : 0;                 // of which five[0] is the number
        u32 known[3];
#pragma unroll
        for (int k = 0; k < 3; k++) {
            const int number = j + k;
            known[k] = 0;
            if (number > (first + KEPT - 1) / 5) continue;
            known[k] = number <= before ? five[number - start < 3 && number >= start ? number - start : 0] : five_of(tables, lane, number);
        }
#pragma unroll
        for (int k = 0; k < 3; k++) five[k] = known[k];
        codes = known[0] >> (4 * p);
        if (p + KEPT > 5) codes += known[1] << (20 - 4 * p);
        if (p + KEPT > 10) codes += known[2] << (40 - 4 * p & 31);
    }
};

// Whether one of the four units of a part has a marked column in its group number i: bit i % 32 of word i / 32.
#define ANY_WORDS ((UNIT + 31) / 32)
__device__ __forceinline__ u32 any_marked(const Weight& w, int part, int word, int lane) {
    const int i = word * 32 + lane;
    u32 marks = 0;
#pragma unroll
    for (int q = 0; q < 4; q++)
        if (i < UNIT && (part * 4 + q) * UNIT + i < w.columns / 8) marks |= w.salient[(part * 4 + q) * UNIT + i];
    return __ballot_sync(0xffffffffu, marks != 0);
}

__device__ __forceinline__ void byte_widths(const Weight& w, int& signs, int& regions) {
    const int kept = w.columns / 8 * KEPT;  // columns are a multiple of 8
    signs = (kept + 7) / 8;
    regions = REGIONS == 3 ? (kept + 4) / 5 : signs;
}

__device__ __forceinline__ void stage_unit(u8* stage, const Weight& w, int row0, int part, int sign_width, int region_width, int lane) {
    stage_stream<INDEX_PIECES>(stage, w.codes[0], w.width, row0, w.rows, part * (4 * INDEX_BITS), lane);
    stage_stream<SIGN_PIECES>(stage + 256 * INDEX_PIECES, w.codes[1], sign_width, row0, w.rows, part * (4 * PLANE_BITS), lane);
    if (REGIONS > 1) stage_stream<REGION_PIECES>(stage + 256 * (INDEX_PIECES + SIGN_PIECES), w.zeros, region_width, row0, w.rows, part * (4 * REGION_BITS), lane);
    copies_commit();
}

__device__ __forceinline__ void begin_unit(Unit& unit, const u8* stage, const Weight& w, int row0, int row, int part, int q, int sign_width, int region_width) {
    const int from = min(row0 + row, w.rows - 1);
    unit.index.begin<INDEX_PIECES>(stage, row, w.width, from, part * (4 * INDEX_BITS), (part * 4 + q) * INDEX_BITS);
    unit.signs.begin<SIGN_PIECES>(stage + 256 * INDEX_PIECES, row, sign_width, from, part * (4 * PLANE_BITS), (part * 4 + q) * PLANE_BITS);
    if (REGIONS > 1) unit.regions.begin<REGION_PIECES>(stage + 256 * (INDEX_PIECES + SIGN_PIECES), row, region_width, from, part * (4 * REGION_BITS), (part * 4 + q) * REGION_BITS);
    unit.levels.make(w, from);
}
