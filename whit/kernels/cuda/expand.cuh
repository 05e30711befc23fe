// Expansion of codes to the register operand of a warpgroup product (`wide.cu`).

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
__device__ __forceinline__ void expand(u32 (&a)[4], const Codes& codes, const u32 (&selector)[2][2], const Levels (&levels)[2], const u32 (&bytes)[2][KEPT_WORDS], const u8* staged, const Extraction& extraction, int step, int q, int column0, const u16* codebook, const CodePlaces& places) {
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
                    const u32 v = choose_bytes(word[at % KEPT_WORDS], BITS == 4 ? 0 : word[(at + 1) % KEPT_WORDS], extraction.pick + BITS * chunk % 4 * 0x1111u);
                    a[2 * half + h] = pair_of_middles(v, extraction, levels[h]);
                } else if (TRIPLES) {
                    const int at = 3 * chunk / 4;
                    const u32 v = choose_bytes(word[at % KEPT_WORDS], word[(at + 1) % KEPT_WORDS], extraction.pick + 3 * chunk % 4 * 0x1111u);
                    a[2 * half + h] = multiply_pairs(fma_pairs((v & extraction.mask) | 0x64006400u, extraction.factor, levels[h].table[1]), levels[h].table[0]);
                } else if (CODE_BITS == 4) {
                    const u32 v = choose_bytes(word[chunk % KEPT_WORDS], 0, extraction.pick);
                    a[2 * half + h] = pair_of_halves((v & extraction.mask) | 0x64006400u, levels[h].table[0], levels[h].table[1], ASYM ? SECOND_CODE << 16 | 0x3c00u : extraction.factor);
                } else {
                    const u32 v = STAGED_BYTE_CODES ? *(const u16*)(staged + 1024 * h + 8 * half) : word[chunk % KEPT_WORDS];
                    a[2 * half + h] = HALVES ? pair_of_halves(choose_bytes(v, 0x64u, extraction.pick), levels[h].table[0], levels[h].table[1]) : pair_of_lows(choose_bytes(v, extraction.high_byte, 0x4550u), choose_bytes(v, extraction.high_byte, 0x4551u), levels[h]);
                }
            }
        }
    }
}
