// What scales the groups of a block of columns: loaded by lane, or four groups of a row at a time through shared memory.

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
