// Levels of a group: what the codes of a row are expanded to. The weights are those of the plain meaning rounded once to the
// type of x, exactly as `decode.cu` gives them.

// Three-bit codes of a lane, bits 6 q to 6 q + 5 of the three bytes of a chunk of eight columns, as float16: `pick` names
// the two bytes in which each begins, `mask` its bits there; in the low bits of 1024 it is 1024 + 2^i code, and times
// `factor`, 2^-i, `base` + code. Exact, for i below 8.
#define TRIPLES (HALVES && BITS == 3)
// As float32, where the weights are bfloat16: bytes of the codes in the middle of a word, the mask of one and 2^23 are
// 2^23 + 2^i code, and one multiply-add with its unit, 2^-i, is scale (code - zero): exact for i from 11 on.
#define MIDDLES (BF16 && KIND == GROUPED_INTEGER && (BITS == 3 || BITS == 4))

// The value, in a register for good: what the compiler sees through it computes anew at every use, and it does not see
// through a lane's exchange with itself.
__device__ __forceinline__ u32 kept_in_register(u32 value) { return __shfl_sync(0xffffffffu, value, threadIdx.x % 32); }

// What a lane takes a pair of wider integers out of words with. Every way has some of these; the others are never read.
struct Extraction {
    u32 pick;           // bytes of the word in which they are
    u32 mask;           // bits of both there, each in its half
    u32 factor;         // 2^-i of both, as float16
    u32 base, ones;     // `TRIPLES`: 1024 times `factor`, and 2^i of both
    u32 high_byte;      // of 2^23, under which a code of eight bits becomes a float32
    u32 masks[2];       // `MIDDLES`: bits of each in the word
    u32 units[2];       // `MIDDLES`: 2^-i of each, as the bits of a float32
    __device__ __forceinline__ float unit(int code) const { return __uint_as_float(units[code]); }
};
__device__ __forceinline__ Extraction extraction_of(int q, u32 zero) {  // `zero`: 0 that the compiler does not know, or a constant would take an instruction at every use
    Extraction made = {};
    const auto keep = [zero](u32 value) { return kept_in_register(value + zero); };
    if (KIND != GROUPED_INTEGER || BITS < 3) return made;
    if (MIDDLES) {
        const u32 one = (1 << BITS) - 1, first = BITS == 4 ? 16 : 0x120c0e10 >> (8 * q) & 31, second = BITS == 4 ? 12 : 19 - 2 * q;
        made.pick = keep(BITS == 4 ? q * 0x110u : q == 0 ? 0u : q == 1 ? 0x100u : q == 2 ? 0x210u : 0x220u);
        made.masks[0] = keep(one << first), made.masks[1] = keep(one << second);
        made.units[0] = keep(127 - first << 23), made.units[1] = keep(127 - second << 23);
    } else if (BITS == 8) {
        made.pick = keep(0x4140u), made.high_byte = keep(0x4bu);
    } else if (BITS == 4) {  // both codes of a byte, each in its half
        made.pick = keep(0x4040u | q | q << 8), made.mask = keep(0x00f0000fu), made.factor = keep(0x2c003c00u);
    } else {
        const int first = 0x2460 >> (4 * q) & 15, second = 0x5713 >> (4 * q) & 15;  // the bits that they begin at
        const u32 exponents = first << 10 | second << 26;
        made.pick = keep(q == 0 ? 0x1010u : q == 1 ? 0x2110u : q == 2 ? 0x2121u : 0x3232u);
        made.mask = keep(7u << first | 7u << (16 + second)), made.factor = keep(0x3c003c00u - exponents);
        made.base = keep(0x64006400u - exponents), made.ones = keep(1u << first | 1u << (16 + second));
    }
    return made;
}

// ---- Levels of a group ---------------------------------------------------------------------------------------------------
struct Levels {
    u32 table[2];             // four 16-bit levels of a row; of eight, their lower bytes
    u32 high[2];              // their higher bytes
    float factor[2], offset[2];  // of `MIDDLES`, for both codes of a pair
    float scale, zero;        // wider integers: w = scale (code - zero), in float16 by the pairs of the table
};
__device__ __forceinline__ void levels_of(Levels& levels, const Codes& codes, const Places& at, const Extraction& extraction, int h, int block, int g) {
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
                const float first = extraction.unit(0), second = extraction.unit(1);
                levels.factor[0] = scale * first, levels.factor[1] = scale * second;
                levels.offset[0] = -scale * (8388608.0f * first + zero), levels.offset[1] = -scale * (8388608.0f * second + zero);
            }
            if (HALVES) {
                const u32 whole = ASYM ? zero_code : 1u << (BITS - 1);
                levels.table[0] = TWO_GROUPS ? choose_bytes(codes.scalar[h][0][0], 0, g ? 0x3232u : 0x1010u) : s[0] * 0x10001u;
                levels.table[1] = TRIPLES ? (extraction.base ^ 0x80008000u) + whole * extraction.ones : bias_of_pair(whole);
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

__device__ __forceinline__ u32 pair_of_middles(u32 v, const Extraction& extraction, const Levels& levels) {
    const float first = __uint_as_float((v & extraction.masks[0]) | 0x4b000000u), second = __uint_as_float((v & extraction.masks[1]) | 0x4b000000u);
    return pair_of_floats(fmaf(first, levels.factor[0], levels.offset[0]), fmaf(second, levels.factor[1], levels.offset[1]));
}
