// An item: 16 rows x ITEM columns of codes with their scalars, staged in shared memory by one warp; and which column a code
// read from there stands for. Behind `common.cuh`. PIECE: 16, 8 or 4 bytes, in which the scalars of an item's row can be
// copied; 2 if they may start at any half.

#define ICOLS ITEM
#define BLOCKS (ICOLS / 128)
#define ROW_BYTES (ICOLS * CODE_BITS / 8)                      // per row, plane and item
#define ROW_STRIDE (CODE_BITS == 3 ? ROW_BYTES + 16 : ROW_BYTES)
#ifndef BULK
#define BULK 0
#endif
// Bytes from a staged row to the next: boxes of the tensor copy engine are at most 128 bytes wide and follow one another.
#define ROW_PITCH (BULK && ROW_BYTES > 128 ? 128 : ROW_BYTES)
#define ROW_CHUNKS (ROW_BYTES / 16)
#define GROUPS_IN_ITEM (GROUP % ICOLS == 0 ? 1 : ICOLS % GROUP == 0 ? ICOLS / GROUP : ICOLS / GROUP + 2)
#define REGULAR (GROUP % ICOLS == 0 || ICOLS % GROUP == 0)       // an item starts with a group
#define SCALAR_WORDS (PIECE > 2 ? GROUPS_IN_ITEM * NS / 2 : (GROUPS_IN_ITEM * NS + (NS % 2 ? 2 : 1)) / 2)  // an odd start costs one more half
#define ZERO_WORDS (ASYM ? (GROUPS_IN_ITEM * BITS + 62) / 32 + 1 : 0)
#define PLANE_BYTES (16 * ROW_STRIDE)
#define STAGE_BYTES ((PLANES * PLANE_BYTES + 16 * 4 * (SCALAR_WORDS + ZERO_WORDS) + 15) / 16 * 16)

#if defined(BITWISE) && BITWISE && BITS == 2 && !(KIND == 2 && GROUP % 128)  // a quad reads two chunks at once
#define SWIZZLE (BULK ? 1 : 2)
#else
#define SWIZZLE 1
#endif
// Where 16-byte chunk `chunk` of row `row` lies in a staged plane: swizzled so that a quad column of 8 rows has as many
// banks as it can.
__device__ __forceinline__ int chunk_place(int row, int chunk) {
    if (CODE_BITS == 3) return row * ROW_STRIDE + chunk * 16;
    if (BULK) {  // as the engine swizzles: by the row for 128 bytes, by half of its number for 64
        constexpr int CHUNKS = ROW_PITCH / 16;
        return chunk / CHUNKS * (16 * ROW_PITCH) + row * ROW_PITCH + ((chunk ^ row / (8 / CHUNKS)) & (CHUNKS - 1)) * 16;
    }
    constexpr int SHARE = 8 / ROW_CHUNKS > 0 ? 8 / ROW_CHUNKS : 1;  // rows that fill the 32 banks
    return row * ROW_BYTES + ((chunk ^ (SWIZZLE * (row / SHARE) & 7)) & (ROW_CHUNKS - 1)) * 16;
}

__device__ __forceinline__ void stage_item(u8* stage, const Weight& w, int row0, int column0, int lane) {
    const int byte0 = column0 / 8 * CODE_BITS;
    const bool full = row0 + 16 <= w.rows && column0 + ICOLS <= SPAN(w);
    const int group0 = GROUP >= (1 << 30) ? 0 : column0 / GROUP;
    u32* scalars = (u32*)(stage + PLANES * PLANE_BYTES);
    const auto whole_codes = [&]() {
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++) {
            const u8* from = plane_codes(w, plane) + (u32)((row0 + lane / ROW_CHUNKS) * w.width + byte0 + lane % ROW_CHUNKS * 16);
#pragma unroll
            for (int i = 0; i < (16 * ROW_CHUNKS) / 32; i++) {
                if (32 % ROW_CHUNKS == 0) {  // whole rows at a time
                    copy_whole<16>(stage + plane * PLANE_BYTES + chunk_place(lane / ROW_CHUNKS + 32 / ROW_CHUNKS * i, lane % ROW_CHUNKS), from);
                    from += (u32)(32 / ROW_CHUNKS * w.width);
                } else {
                    int index = lane + 32 * i, row = index / ROW_CHUNKS, chunk = index % ROW_CHUNKS;
                    copy_whole<16>(stage + plane * PLANE_BYTES + chunk_place(row, chunk), plane_codes(w, plane) + (u32)((row0 + row) * w.width + byte0 + chunk * 16));
                }
            }
        }
    };
    const auto whole_scalars = [&]() {
        const u32 start = (u32)(row0 * w.groups + group0) * (NS * 2);
        constexpr int ACROSS = GROUPS_IN_ITEM * NS * 2 / PIECE > 0 ? GROUPS_IN_ITEM * NS * 2 / PIECE : 1;
#pragma unroll
        for (int i = 0; i < (16 * ACROSS + 31) / 32; i++) {
            int index = lane + 32 * i, row = index / ACROSS, piece = index % ACROSS;
            if (16 * ACROSS % 32 == 0 || row < 16)
                copy_whole<PIECE>((u8*)scalars + index * PIECE, w.scalars + (start + (u32)(row * w.groups * (NS * 2) + piece * PIECE)));
        }
    };
    if (ALIGN == 16 && PIECE > 2 && full) {  // one branch, so that the compiler interleaves what follows
        whole_codes();
        whole_scalars();
    } else {
        if (ALIGN == 16 && full) {
            whole_codes();
        } else {
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++)
#pragma unroll 1
                for (int i = 0; i < (16 * ROW_CHUNKS) / 32; i++) {
                    int index = lane + 32 * i, row = index / ROW_CHUNKS, chunk = index % ROW_CHUNKS;
                    int from = min(row0 + row, w.rows - 1), offset = byte0 + chunk * 16;
                    int valid = w.width - offset;
                    copy16(stage + plane * PLANE_BYTES + chunk_place(row, chunk), plane_codes(w, plane) + (size_t)from * w.width + (valid > 0 ? offset : 0), valid);
                }
        }
        if (PIECE > 2 && full) {
            whole_scalars();
        } else {
            const long long scalar_end = (long long)w.rows * w.groups * (NS * 2);
#pragma unroll 1
            for (int index = lane; index < 16 * SCALAR_WORDS; index += 32) {
                const int row = index / SCALAR_WORDS, word = index % SCALAR_WORDS;
                long long offset = (((long long)min(row0 + row, w.rows - 1) * w.groups + group0) * (NS * 2) & ~3ll) + 4 * word;
                long long valid = scalar_end - offset;
                copy4(scalars + index, w.scalars + (valid > 0 ? offset : 0), valid > 4 ? 4 : (int)valid);
            }
        }
    }
#if ASYM
    u32* zeros = scalars + 16 * SCALAR_WORDS;
    const long long zero_end = ((long long)w.rows * w.groups + 7) / 8 * BITS;
    const long long zero_start = ((long long)row0 * w.groups + group0) * BITS;
#pragma unroll
    for (int i = 0; i < (16 * ZERO_WORDS + 31) / 32; i++) {
        int index = lane + 32 * i, row = index / ZERO_WORDS, word = index % ZERO_WORDS;
        if (row < 16) {
            long long offset = ((zero_start + min(row, w.rows - 1 - row0) * w.groups * BITS >> 5) + word) * 4;
            long long valid = zero_end - offset;
            copy4(zeros + index, w.zeros + (valid > 0 ? offset : 0), valid > 4 ? 4 : (int)valid);
        }
    }
#endif
    copies_commit();
}

// Scalar j of local group `group` for staged row `row`; `parity` as odd_start gives it.
__device__ __forceinline__ int odd_start(const Weight& w, int row, int group0) {
    return PIECE == 2 && NS % 2 ? ((min(row, w.rows - 1) * w.groups + group0) & 1) : 0;
}
__device__ __forceinline__ float staged_scalar(const u8* scalars, int row, int parity, int group, int j) {
    const u16* halves = (const u16*)scalars + row * SCALAR_WORDS * 2;
    return float_of_half(halves[parity + group * NS + j]);
}
// Which of the item's groups holds column `offset` of the item: known to the compiler when loops are unrolled.
__device__ __forceinline__ int group_of(int column0, int offset) {
    if (REGULAR) return GROUP % ICOLS == 0 ? 0 : offset / GROUP;
    return (column0 + offset) / GROUP - column0 / GROUP;
}
__device__ __forceinline__ float staged_zero(const u8* scalars, const Weight& w, int row, int row0, int group0, int group) {
#if ASYM
    const u32* zeros = (const u32*)scalars + 16 * SCALAR_WORDS + row * ZERO_WORDS;
    u32 start = (u32)(min(row0 + row, w.rows - 1) * w.groups + group0) * BITS & 31;
    if (GROUPS_IN_ITEM * BITS <= 32)  // those of a row, found once
        return (float)(funnel_right(zeros[0], zeros[1], start) >> (group * BITS) & ((1u << BITS) - 1));
    start += group * BITS;
    u32 word = start >> 5;
    return (float)(funnel_right(zeros[word], zeros[word + 1], start & 31) & ((1u << BITS) - 1));
#else
    return BITS > 1 ? (float)(1 << (BITS - 1)) : 0.5f;
#endif
}
__device__ __forceinline__ u32 staged_word(const u8* plane, int row, int word) {  // 32-bit word `word` of the row
    return *(const u32*)(plane + chunk_place(row, word >> 2) + (word & 3) * 4);
}

// Which column a code extracted from a staged word stands for.
#define FINE (GROUP % 128 != 0)                   // groups of 64: results are taken every two products, not four
#define FLUSHES (FINE ? 2 : 1)
// Column (in its block of 128) of byte j of operand word `half`, in product `step`, for lane-in-quad q.
__device__ __forceinline__ int column_of(int step, int q, int half, int j) {
    if (CODE_BITS == 1 && !FINE) return 32 * q + 8 * j + step + 4 * half;
    if (CODE_BITS == 1) return 64 * (step >> 1) + 16 * q + 8 * (j & 1) + (step & 1) + 2 * (j >> 1) + 4 * half;
    if (CODE_BITS == 2) return 64 * (step >> 1) + 16 * q + 4 * j + (step & 1) + 2 * half;
    if (CODE_BITS == 3) return 64 * (step >> 1) + 16 * q + 8 * (step & 1) + 4 * half + j;
    if (CODE_BITS == 4) return 32 * step + 8 * q + 2 * j + half;
    return 32 * step + 16 * half + 4 * q + j;
}

// Sixteen one-bit codes of a half block: bytes 0 and 1 as stored, bytes 2 and 3 the same shifted right by two.
__device__ __forceinline__ u32 half_word(const u8* plane, int row, int word, int q) {
    u32 bits = staged_word(plane, row, word + (q >> 1));
    bits = q & 1 ? bits >> 16 : bits & 0xffffu;
    return bits | (bits << 14 & 0xffff0000u);
}
// Sixteen three-bit codes from byte 6 q of the 24 bytes of a half block: one per byte of out[0..3].
__device__ __forceinline__ void three_bit_bytes(u32 (&out)[4], const u8* stage, int row, int byte, int q) {
    const u32* from = (const u32*)(stage + row * ROW_STRIDE + byte) + (6 * q >> 2);
    const u32 low = from[0], high = from[1];
    const u32 first = funnel_right(low, high, 16 * (q & 1)), second = high >> (16 * (q & 1));
    const u32 part[4] = {first, first >> 12, funnel_right(first, second, 24), second >> 4};
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[i] = (part[i] & 0x7u) | (part[i] << 5 & 0x700u) | (part[i] << 10 & 0x70000u) | (part[i] << 15 & 0x7000000u);
}
