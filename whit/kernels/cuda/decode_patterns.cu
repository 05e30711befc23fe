// Dense 16-bit weight (rows, columns) from N:M sparse binary weights of groups of 8 columns: exactly the plain meaning
// rounded once. Items and their order are those of `decode.cu`: a thread has the same group of several rows, so where its
// signs and regions begin in a byte is the same in all rows. The number of a pattern is a digit of a word, and cannot be
// found without the digits below it: words are parted by one thread each, and their digits lie in shared memory.
//
// Before this file stand the tables `entries_of_pattern` (a nibble for each column: the kept weight in it, or 7 for none;
// then a nibble for each kept weight, the column it is in, in the upper half below which columns 4 to 7 come again if four
// weights or fewer are kept) and `codes_of_byte` (five regions, twice each, in nibbles).

#define MEANS (NS == 2 * REGIONS + 3)
#define WORD_BYTES BITS
constexpr int STRIPE = 8 * THREADS;
constexpr int CELLS = STRIPE % GROUP == 0 ? STRIPE / GROUP : GROUP % STRIPE == 0 ? 1 : STRIPE / GROUP + 2;
constexpr int WORDS = (THREADS + WORD_GROUPS - 2) / WORD_GROUPS + 1;  // that a stripe touches
constexpr int DIGITS = (WORDS * WORD_GROUPS + 3) / 4 * 4;
constexpr int REGION_BYTES = REGIONS == 3 ? (KEPT + 8) / 5 : REGIONS == 2 ? (KEPT + 14) / 8 : 0;  // of a group, at most
constexpr int SIGN_BYTES = 8 % KEPT == 0 ? 1 : 2;
constexpr int TRIT_ENTRIES = REGIONS == 3 ? 256 : 0;

// ---- Staging: the bytes of a stripe of each row, in pieces of 16 as they lie in memory -----------------------------------
__device__ __forceinline__ void copy_piece(u8* shared, const u8* source, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source), "r"(valid) : "memory");
}
#define PIECES_OF(bytes) ((bytes) ? ((bytes) + 30) / 16 : 0)
constexpr int INDEX_PIECES = PIECES_OF(WORDS * WORD_BYTES), SIGN_PIECES = PIECES_OF(THREADS * KEPT / 8 + 2);
constexpr int REGION_PIECES = PIECES_OF(REGION_BYTES ? THREADS * KEPT / (REGIONS == 3 ? 5 : 8) + 3 : 0), SCALAR_PIECES = PIECES_OF(CELLS * NS * 2);
constexpr int SIGNS = 16 * INDEX_PIECES, REGION_BITS = SIGNS + 16 * SIGN_PIECES, SCALARS = REGION_BITS + 16 * REGION_PIECES;  // where in a row
constexpr int ROW_PIECES = INDEX_PIECES + SIGN_PIECES + REGION_PIECES + SCALAR_PIECES, ROW_BYTES_STAGED = 16 * ROW_PIECES;

// Where the bytes of a stripe begin in each tensor: of the first row, and from row to row.
struct Origin { u32 start, width; };
struct Origins {
    Origin index, signs, regions, scalars;
    __device__ __forceinline__ Origins(const Weight& w, int octet0, int sign_width, int region_width)
        : index{(u32)(octet0 / WORD_GROUPS * WORD_BYTES), (u32)w.width}, signs{(u32)(octet0 * KEPT / 8), (u32)sign_width},
          regions{(u32)(octet0 * KEPT / (REGIONS == 3 ? 5 : 8)), (u32)region_width},
          scalars{GROUP >= (1 << 30) ? 0 : (u32)(octet0 * 8 / GROUP * (NS * 2)), (u32)(w.groups * (NS * 2))} {}
};
__device__ __forceinline__ u32 begin_of(const Origin& origin, int row) { return row * origin.width + origin.start; }
__device__ __forceinline__ void stage(u8* to, const Weight& w, const Origins& origins, int row0) {
#pragma unroll 1
    for (int task = threadIdx.x; task < ROWS * ROW_PIECES; task += THREADS) {
        const int row = min(row0 + task / ROW_PIECES, w.rows - 1), piece = task % ROW_PIECES;
        const bool in_index = piece < INDEX_PIECES, in_signs = piece < REGION_BITS / 16, in_regions = piece < SCALARS / 16;
        const Origin origin = in_index ? origins.index : in_signs ? origins.signs : in_regions ? origins.regions : origins.scalars;
        const u8* from = in_index ? w.codes[0] : in_signs ? w.codes[1] : in_regions ? w.zeros : w.scalars;
        const int within = piece - (in_index ? 0 : in_signs ? SIGNS / 16 : in_regions ? REGION_BITS / 16 : SCALARS / 16);
        const u32 at = (begin_of(origin, row) & ~15u) + within * 16, end = w.rows * origin.width;
        copy_piece(to + task * 16, from + (at < end ? at : 0), at < end ? min(end - at, 16u) : 0);
    }
    copies_commit();
}

// ---- Digits of words -----------------------------------------------------------------------------------------------------
__device__ __forceinline__ void part_word(u8* digits, const u8* from) {  // `from`: in shared memory, not aligned
    constexpr u64 MASK = WORD_BYTES == 8 ? ~0ull : (1ull << 8 * WORD_BYTES % 64) - 1;
    const u32 shift = (u32)(u64)from % 4;
    const u32* const words = (const u32*)(from - shift);
    const u32 middle = words[1], last = words[shift + WORD_BYTES > 8 ? 2 : 1];
    u64 value = (funnel_right(words[0], middle, 8 * shift) | (u64)funnel_right(middle, last, 8 * shift) << 32) & MASK;
#if WORD_BYTES > 4
    // The quotient comes from the highest 32 bits, one too small at most.
    u32 high = __umulhi((u32)(value >> (8 * WORD_BYTES - 32)), HIGH_FACTOR) >> HIGH_SHIFT, low = (u32)value - high * LOW_POWER;
    if (low >= LOW_POWER) low -= LOW_POWER, high++;
#else
    constexpr int LOW_DIGITS = WORD_GROUPS;
    u32 low = (u32)value, high = 0;
#endif
#pragma unroll
    for (int i = 0; i < WORD_GROUPS; i++) {
        u32& rest = i < LOW_DIGITS ? low : high;
        const u32 quotient = rest / PATTERNS;
        digits[i] = (u8)(rest - quotient * PATTERNS), rest = quotient;
    }
}

// ---- Levels of a row -----------------------------------------------------------------------------------------------------
// Low and high bytes of the levels, numbered 2 * region + first bit, those that do not exist zero; then of marked columns.
struct __align__(16) Levels { u32 low[2], high[2], marked_low, marked_high, unused[2] = {}; };
__device__ __forceinline__ Levels levels_of(const u16* scalars) {
    float scalar[NS];
#pragma unroll
    for (int j = 0; j < NS; j++) scalar[j] = float_of_half(scalars[j]);
    u32 level[8], marked[4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float sign = i % 2 ? 1.0f : -1.0f;
        const int region = i / 2 % REGIONS;
        level[i] = i / 2 >= REGIONS ? 0 : x_of_float(MEANS ? scalar[2 * region % NS] + sign * scalar[(2 * region + 1) % NS] : sign * scalar[region % NS]);
        const float base = MEANS ? scalar[NS > 2 ? NS - 3 : 0] : 0.0f;
        if (i < 4) marked[i] = REGIONS == 1 ? 0 : x_of_float((base + sign * scalar[NS > 1 ? NS - 2 : 0]) + (i / 2 ? scalar[NS - 1] : -scalar[NS - 1]));
    }
    Levels levels;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 first = level[4 * i] | level[4 * i + 1] << 16, second = level[4 * i + 2] | level[4 * i + 3] << 16;
        levels.low[i] = choose_bytes(first, second, 0x6420), levels.high[i] = choose_bytes(first, second, 0x7531);
    }
    const u32 first = marked[0] | marked[1] << 16, second = marked[2] | marked[3] << 16;
    levels.marked_low = choose_bytes(first, second, 0x6420), levels.marked_high = choose_bytes(first, second, 0x7531);
    return levels;
}
// ---- Weights -------------------------------------------------------------------------------------------------------------
// Bytes of eight columns: ones where the column is marked.
__device__ __forceinline__ uint2 mask_of(u32 marks) {
    auto four = [&](int i) { return (marks >> i & 1) * 0xffu | (marks >> i & 2) * 0x7f80u | (marks >> i & 4) * 0x3fc000u | (marks >> i & 8) * 0x1fe00000u; };
    return make_uint2(four(0), four(4));
}
// A nibble for each of up to seven bits.
__device__ __forceinline__ u32 nibbles_of(u32 bits) {
    if (KEPT == 1) return bits;
    u32 v = KEPT > 4 ? (bits | bits << 12) & 0x000f000fu : bits;
    v = (v | v << 6) & 0x03030303u;
    return (v | v << 3) & 0x11111111u;
}
__device__ __forceinline__ void level_bytes(u32& low, u32& high, const Levels& levels, u32 codes, u32 mask) {
    low = choose_bytes(levels.low[0], levels.low[1], codes), high = choose_bytes(levels.high[0], levels.high[1], codes);
    if (REGIONS > 1) {
        low = (low & ~mask) | (choose_bytes(levels.marked_low, 0, codes) & mask);
        high = (high & ~mask) | (choose_bytes(levels.marked_high, 0, codes) & mask);
    }
}
__device__ __forceinline__ void expand(u32 (&pair)[4], const Levels& levels, u32 codes, const uint2& entry, const uint2& marks) {
    u32 low, high, low_rest = 0, high_rest = 0;
    level_bytes(low, high, levels, codes, REGIONS > 1 ? choose_bytes(marks.x, marks.y, KEPT > 4 ? entry.y : entry.y >> 16) : 0);
    if (KEPT > 4) {
        const u32 rest = (codes >> 16 & (0xfffu >> 4 * (7 - (KEPT > 4 ? KEPT : 4)))) | 0x7000u;
        level_bytes(low_rest, high_rest, levels, rest, REGIONS > 1 ? choose_bytes(marks.x, marks.y, entry.y >> 16) : 0);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 selector = half == 0 ? entry.x : KEPT > 4 ? entry.x >> 16 : entry.y;
        const u32 a = choose_bytes(low, low_rest, selector), b = choose_bytes(high, high_rest, selector);
        pair[2 * half] = choose_bytes(a, b, 0x5140);
        pair[2 * half + 1] = choose_bytes(a, b, 0x7362);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
decode(Weight w, u16* out) {
    extern __shared__ __align__(16) u8 memory[];
    const int lane = threadIdx.x % 32;
    u8* const staged = memory;                                          // [3][ROWS][ROW_BYTES_STAGED]
    Levels* const levels = (Levels*)(staged + 3 * ROWS * ROW_BYTES_STAGED);  // [2][ROWS][CELLS]
    uint2* const patterns = (uint2*)(levels + 2 * ROWS * CELLS);        // each entry 16 times: half a warp's banks
    u32* const fives = (u32*)(patterns + PATTERNS * 16);                // each entry 32 times
    u8* const digits = (u8*)(fives + TRIT_ENTRIES * 32);            // [2][ROWS][DIGITS]
    // A block keeps to a stripe. Of the rows after the next the bytes are on their way, of the next digits and levels are made.
    const int octets = w.columns / 8, stripes = (octets + THREADS - 1) / THREADS, step = gridDim.x / stripes * ROWS;
    const int kept = octets * KEPT, sign_width = (kept + 7) / 8, region_width = REGIONS == 3 ? (kept + 4) / 5 : sign_width;
    const int octet0 = blockIdx.x % stripes * THREADS, octet = octet0 + threadIdx.x;
    int row0 = blockIdx.x / stripes * ROWS;
    if (row0 >= step) return;  // blocks beyond a multiple of the stripes
    const Origins origins(w, octet0, sign_width, region_width);
    const auto fill = [&](int first_row, const u8* from, int turn) {
        for (int task = threadIdx.x; task < ROWS * WORDS; task += THREADS) {
            const int i = task / WORDS, number = task % WORDS, row = min(first_row + i, w.rows - 1);
            part_word(digits + (turn * ROWS + i) * DIGITS + number * WORD_GROUPS, from + i * ROW_BYTES_STAGED + begin_of(origins.index, row) % 16 + number * WORD_BYTES);
        }
        for (int task = THREADS - 1 - threadIdx.x; task < ROWS * CELLS; task += THREADS) {  // the last threads have fewer words
            const int i = task / CELLS, row = min(first_row + i, w.rows - 1);
            levels[turn * (ROWS * CELLS) + task] = levels_of((const u16*)(from + i * ROW_BYTES_STAGED + SCALARS + begin_of(origins.scalars, row) % 16) + task % CELLS * NS);
        }
    };
    stage(staged, w, origins, row0);
    stage(staged + ROWS * ROW_BYTES_STAGED, w, origins, row0 + step);
    for (int entry = threadIdx.x / 16; entry < PATTERNS; entry += THREADS / 16) patterns[entry * 16 + lane % 16] = __ldg((const uint2*)entries_of_pattern + entry);
    for (int entry = threadIdx.x / 32; entry < TRIT_ENTRIES; entry += THREADS / 32) fives[entry * 32 + lane] = __ldg(codes_of_byte + entry);
    copies_wait<0>();
    __syncthreads();
    fill(row0, staged, 0);
    wait_for_previous_kernel();  // it may still read what this one is to overwrite
    __syncthreads();
    const uint2 marks = mask_of(REGIONS > 1 ? __ldg(w.salient + min(octet, octets - 1)) : 0);
    const u8* const digit = digits + octet - octet0 / WORD_GROUPS * WORD_GROUPS;
    const Levels* const own = levels + (GROUP >= (1 << 30) ? 0 : octet * 8 / GROUP - octet0 * 8 / GROUP);
    const int first = octet * KEPT, shift = first % 8, trit = first % 5;
    const int sign_at = SIGNS + first / 8 - origins.signs.start, region_at = REGION_BITS + first / (REGIONS == 3 ? 5 : 8) - origins.regions.start;
    int slot = 0;
#pragma unroll 1
    for (int turn = 0; row0 < w.rows; turn ^= 1, row0 += step) {
        const u8* const here = staged + slot * (ROWS * ROW_BYTES_STAGED);
        stage(staged + (slot == 0 ? 2 : slot - 1) * (ROWS * ROW_BYTES_STAGED), w, origins, row0 + 2 * step);
        slot = slot == 2 ? 0 : slot + 1;
        if (row0 + step < w.rows) fill(row0 + step, staged + slot * (ROWS * ROW_BYTES_STAGED), turn ^ 1);
        if (octet < octets) {
            constexpr u32 MASK = (1u << KEPT) - 1;
            const auto bit_codes = [&](const u8* bytes) {
                u32 window = bytes[0];
                if (SIGN_BYTES > 1) window |= bytes[1] << 8;
                return nibbles_of(window >> shift & MASK);
            };
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int row = min(row0 + i, w.rows - 1);
                u32 codes = bit_codes(here + (i * ROW_BYTES_STAGED + begin_of(origins.signs, row) % 16 + sign_at)), pair[4];
                const u8* const own_regions = here + (i * ROW_BYTES_STAGED + begin_of(origins.regions, row) % 16 + region_at);
                if (REGIONS == 2) codes |= bit_codes(own_regions) << 1;
                if (REGIONS == 3) {
                    const auto five = [&](int j) { return fives[own_regions[j] * 32 + lane]; };
                    codes += five(0) >> (4 * trit);
                    if (REGION_BYTES > 1) codes += five(1) << (20 - 4 * trit);
                    if (REGION_BYTES > 2) codes += trit == 4 ? five(2) << 24 : 0;
                }
                const uint2 entry = patterns[digit[(turn * ROWS + i) * DIGITS] * 16 + lane % 16];
                expand(pair, own[(turn * ROWS + i) * CELLS], codes, entry, marks);
                *(uint4*)(out + (size_t)row * w.columns + octet * 8) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
            }
        }
        copies_wait<0>();
        __syncthreads();
    }
}
