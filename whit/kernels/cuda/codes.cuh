// Codes of a block of columns for `wide.cu`: what is brought of them, from where, and which words of it are a lane's.

#define BOXES (BLOCK / 64)  // of 64 columns: what one copy of x brings
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
#define TWO_GROUPS (KIND == GROUPED_INTEGER && GROUPS_IN_BLOCK == 2 && BITS > 2)  // one load for both; slower with two bits
#define TWO_ZEROS (8 % BITS || BITS == 8 && GROUPS_IN_BLOCK == 2)  // those of a block of columns may end in the next byte
#define STAGED_SCALARS (KIND == BINARY_RESIDUAL && !WHOLE_ROWS)  // come to shared memory, four groups of a row at a time
#define EPOCH (WHOLE_ROWS ? 1 << 20 : 4 * BLOCKS_IN_GROUP)       // blocks of columns that these groups have
#define RUN (CODE_BITS == 1 ? 4 : 2)                              // blocks of columns whose words of codes are staged together
#define RUN_BYTES (RUN * BLOCK / 8 * CODE_BITS)                  // of a row and plane
#define RUN_PITCH (RUN_BYTES + 16)                               // from row to row: other banks
#define STAGED_BYTES (2 * PLANES * 16 * RUN_PITCH)               // of a warp: one run is read while the next comes
#define SCALAR_PITCH (NS == 7 ? 68 : 40)                         // bytes from row to row there: another bank each
#define GROUP_OF(block) (WHOLE_ROWS ? 0 : (block) / BLOCKS_IN_GROUP * GROUPS_IN_BLOCK)  // the first

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
