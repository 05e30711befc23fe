// Codewords of a codebook in shared memory, and where a lane finds those of its columns.

#define VECTOR_CODEBOOK 3
#ifndef WIDTH
#define WIDTH 1
#endif

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

// Number of the codeword that column `column` of a row belongs to.
__device__ __forceinline__ u32 code_at(const u8* codes, u32 group) {
    if (BITS == 8) return __ldg(codes + group);
    const u32 bit = group * BITS;
    u32 window = __ldg(codes + (bit >> 3));
    if (8 % BITS && (bit & 7) + BITS > 8) window |= (u32)__ldg(codes + (bit >> 3) + 1) << 8;
    return window >> (bit & 7) & ((1 << BITS) - 1);
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
