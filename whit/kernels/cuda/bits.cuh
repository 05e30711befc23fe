// Products of packed codes with the bit planes of x (`planes.cuh`) on the binary tensor cores, nothing unpacked.
//
// mma.m16n8k128 counts the ones of AND: a row of 128 one-bit codes is its operand as stored, each column of the product one
// bit of x, so two products hold all bits and
//     sum_j plane[i, j] x[j] = sum_t +-2^t count_t.
// Two-bit codes are first parted into their two planes; those of three and four bits, and integers of two in groups of 64
// columns, go in as they are. Of planes in groups of 64, a product sees one half, by zeros in x.
//
// That sum is a product too. Counts are below 1024, so a count is the bits of a float16, n 2^-24, and two of them in a word
// are the operand of mma.m16n8k16 in the very lanes that counted. The other operand holds 2^t in two columns for the block at
// hand (lower and upper octet) and zeros in the others: after four blocks, lane-in-quad q has the two halves of the sums
// over block q for its two rows, and applies the scalars of that block's group alone. Every step is exact.
//
// Where counts are at most 128 and x is two digits of eight bits (DIGITS), bytes do it: four counts to a word, and mma.m16n8k32
// weighs two blocks at once with 1 to 64 and -128. Its pipe is that of the counts; a float16 product among them costs two
// cycles more.

__device__ __forceinline__ void count(int (&c)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ void count(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void weigh(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Even bits of one word, odd bits of another (the compiler makes two operations of it).
__device__ __forceinline__ u32 even_and_odd(u32 even, u32 odd) {
    u32 both;
    asm("lop3.b32 %0, %1, 0x55555555, %2, 0xe2;" : "=r"(both) : "r"(even), "r"(odd));
    return both;
}
__device__ __forceinline__ void weigh_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Two counts as the lower bytes of a word, before the lower half of `rest`.
__device__ __forceinline__ u32 counts_before(int low, int high, u32 rest) {
    u32 word;
    asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(high), "r"(low), "r"(rest));
    return word;
}
__device__ __forceinline__ u32 pair_of_counts(int low, int high) { return (u32)(low + (high << 16)); }

// 2^t for the two columns of a product that a lane-in-quad holds, as float16, in the lanes of one column of `weigh`: even
// columns take the lower octet (raw: the lower two), odd ones the last octet, whose highest bits are signs. All but raw
// ones times 2^8: sums come with the factor SUM_UNIT.
struct Powers {
    u32 first, second, last;  // last: of the third octet; DIGITS: first alone, bytes for four columns
};
__device__ __forceinline__ Powers powers_of(int lane) {
    const int q = lane & 3;
    const bool odd = lane & 4;
    if (DIGITS) return {(0x0201u << 2 * q & 0xffffu) << (odd ? 16 : 0), 0u, 0u};
    const u32 ascending = (RAW ? 0x40003c00u : 0x60005c00u) + 0x08000800u * (u32)q;  // 2^(2 q) and 2^(2 q + 1)
    if (!RAW) return {odd ? 0u : ascending, odd ? ascending ^ (q == 3 ? 0x80000000u : 0u) : 0u, 0u};
    // two bits: -1/2 and -1. Three: 1 and -1/2, -1 and -2. Four: 1 and 2, -1/2 and -1, -2 and -4.
    const u32 first = CODE_BITS == 2 ? 0xbc00b800u : CODE_BITS == 3 ? 0xb8003c00u : 0x40003c00u;
    const u32 second = CODE_BITS == 2 ? 0u : CODE_BITS == 3 ? 0xc000bc00u : 0xbc00b800u;
    const u32 signs = q == 0 ? first : q == 1 ? second : q == 2 && CODE_BITS == 4 ? 0xc400c000u : 0u;
    return {odd ? 0u : ascending, odd ? 0u : ascending + 0x20002000u, odd ? signs : 0u};
}

// The planes of the two rows of a lane in one block.
__device__ __forceinline__ void planes_of(u32 (&plane)[2][4], const u8* stage, int block, int lane) {
    const int r = lane >> 2, q = lane & 3;
    // row r + 8 is swizzled as row r is
    const u8* const from = stage + (CODE_BITS == 1 ? chunk_place(r, block) + q * 4 : chunk_place(r, block * 2 + (q >> 1)) + (q & 1) * 8);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (CODE_BITS == 1) {
            plane[h][0] = *(const u32*)(from + h * 8 * ROW_PITCH);
            if (PLANES > 1) plane[h][1] = *(const u32*)(from + PLANE_BYTES + h * 8 * ROW_PITCH);
            if (PLANES > 2) plane[h][2] = *(const u32*)(from + 2 * PLANE_BYTES + h * 8 * ROW_PITCH), plane[h][3] = plane[h][0] ^ plane[h][1] ^ plane[h][2];
        } else {  // bits 2 j of a plane are those of column j of the 32, bits 2 j + 1 those of column 16 + j
            const uint2 pair = *(const uint2*)(from + h * 8 * ROW_PITCH);
            const u32 low = pair.y << 1, high = pair.x >> 1;
            plane[h][0] = even_and_odd(pair.x, low);
            plane[h][1] = even_and_odd(high, pair.y);
        }
        if (SUMS == 3) plane[h][2] = plane[h][0] & plane[h][1];
    }
}
// The bits of x of one block, or of two: those of lower and upper octet, then those of marked columns.
__device__ __forceinline__ void bits_of(u32 (&b)[2 * KINDS][WIDTH], const u32* words, int lane, int block) {
    u32 all[2 * KINDS * WIDTH];
    lane = cell_of(lane, block);
    if (KINDS * WIDTH == 1) {
        const uint2 two = ((const uint2*)words)[lane];
        all[0] = two.x, all[1] = two.y;
    } else {
#pragma unroll
        for (int i = 0; i < 2 * KINDS * WIDTH; i += 4) {
            const uint4 four = ((const uint4*)words)[lane * (KINDS * WIDTH / 2) + i / 4];
            all[i] = four.x, all[i + 1] = four.y, all[(i + 2) % (2 * KINDS * WIDTH)] = four.z, all[(i + 3) % (2 * KINDS * WIDTH)] = four.w;
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * KINDS * WIDTH; i++) b[i / WIDTH][i % WIDTH] = all[i];
}
// Adds the counts of one half of a block of raw codes.
__device__ __forceinline__ void count_half(int (&c)[OCTETS][4], const u8* stage, const u32* words, int half, int lane, int block) {
    const int r = lane >> 2, q = lane & 3;
    if (CODE_BITS == 2) {
        const u8* const from = stage + chunk_place(r, block * 2 + half) + q * 4;
        const uint4 four = ((const uint4*)words)[lane];
        const uint2 two = ((const uint2*)(words + 128))[lane];
        const u32 b[6] = {four.x, four.y, four.z, four.w, two.x, two.y};
#pragma unroll
        for (int o = 0; o < OCTETS; o++) count(c[o], *(const u32*)from, *(const u32*)(from + 8 * ROW_PITCH), b[half * 3 + o]);
        return;
    }
    const uint4 four = ((const uint4*)(words + half * HALF_WORDS))[lane];
    const uint2 two = ((const uint2*)(words + half * HALF_WORDS + 128))[lane];
    const u32 b[3][2] = {{four.x, four.y}, {four.z, four.w}, {two.x, two.y}};
    u32 a[2][2];  // word by word: the operand has those of both rows side by side
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32* from;
        if (CODE_BITS == 4)
            from = (const u32*)(stage + chunk_place(r, block * 4 + half * 2) + h * 8 * ROW_PITCH) + q, a[h][1] = *((const u32*)(stage + chunk_place(r, block * 4 + half * 2 + 1) + h * 8 * ROW_PITCH) + q);
        else  // what lanes 2 and 3 have beyond the six words meets zeros
            from = (const u32*)(stage + (r + 8 * h) * ROW_STRIDE) + block * 12 + half * 6 + q, a[h][1] = from[4];
        a[h][0] = from[0];
    }
#pragma unroll
    for (int o = 0; o < OCTETS; o++) count(c[o], a[0][0], a[1][0], a[0][1], a[1][1], b[o][0], b[o][1]);
}
// Sums over the planes of one block (or of WIDTH that have one unit, or of one `part`), into the columns of `weigh` for
// number `slot` of four; `third`: the counts of the third octet, and DIGITS: `bytes` all counts, to be weighed with those of
// other slots.
template <int ALL>
__device__ __forceinline__ void block_sums(float (&d)[ALL][4], u32 (&third)[2], u32 (&bytes)[ALL][2], const u8* stage, const u32* words, int block, int part, int slot, const Powers& powers, int lane) {
    const bool mine = lane >> 3 == slot;
    int c[ALL][OCTETS][4];
#pragma unroll
    for (int p = 0; p < ALL; p++)
#pragma unroll
        for (int o = 0; o < OCTETS; o++) c[p][o][0] = c[p][o][1] = c[p][o][2] = c[p][o][3] = 0;
    if (RAW && !THIRDS) {
        if (PARTS == 1 || part == 0) count_half(c[0], stage, words, 0, lane, block);
        if (PARTS == 1 || part == 1) count_half(c[0], stage, words, 1, lane, block);
    } else if (RAW) {
        u32 a[2][3];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const u32* from = (const u32*)(stage + ((lane >> 2) + 8 * h) * ROW_STRIDE) + block * 12 + (lane & 3) * 3;
            a[h][0] = from[0], a[h][1] = from[1], a[h][2] = from[2];
        }
        const uint4 b0 = ((const uint4*)words)[lane], b1 = ((const uint4*)words)[32 + lane];
        const u32 b[9] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w, words[256 + lane]};
#pragma unroll
        for (int i = 0; i < 3; i++)
#pragma unroll
            for (int o = 0; o < OCTETS; o++) count(c[0][o], a[0][i], a[1][i], b[i * 3 + o]);
    } else {
        u32 plane[WIDTH][2][4], b[2 * KINDS][WIDTH];
        bits_of(b, words, lane, block);
        if (PARTS == 2)
#pragma unroll
            for (int i = 0; i < 2 * KINDS; i++) b[i][0] = (lane >> 1 & 1) == part ? b[i][0] : 0u;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) planes_of(plane[i], stage, block + i, lane);
#pragma unroll
        for (int p = 0; p < ALL; p++)  // sums 3 and 4 are those of planes 0 and 1 over marked columns
#pragma unroll
            for (int o = 0; o < 2; o++) {
                const int from = KIND == SIGNED_LEVELS ? p : p % 3, of = (p < 3 || KINDS == 1 ? o : 2 + o) % (2 * KINDS);
                if (WIDTH == 2)
                    count(c[p][o], plane[0][0][from], plane[0][1][from], plane[WIDTH - 1][0][from], plane[WIDTH - 1][1][from], b[of][0], b[of][WIDTH - 1]);
                else
                    count(c[p][o], plane[0][0][from], plane[0][1][from], b[of][0]);
            }
    }
#pragma unroll
    for (int p = 0; p < ALL; p++) {
        if (DIGITS) {
#pragma unroll
            for (int h = 0; h < 2; h++) bytes[p][h] = counts_before(c[p][0][2 * h], c[p][0][2 * h + 1], counts_before(c[p][1][2 * h], c[p][1][2 * h + 1], 0u));
            continue;
        }
        const u32 a[4] = {pair_of_counts(c[p][0][0], c[p][0][1]), pair_of_counts(c[p][0][2], c[p][0][3]),
                          pair_of_counts(c[p][1][0], c[p][1][1]), pair_of_counts(c[p][1][2], c[p][1][3])};
        weigh(d[p], a[0], a[1], a[2], a[3], mine ? powers.first : 0u, mine ? powers.second : 0u);
        if (RAW) {
            const int(&last)[4] = c[p][OCTETS - 1];
            third[0] = pair_of_counts(last[0], last[1]), third[1] = pair_of_counts(last[2], last[3]);
        }
    }
}

template <bool FULL>
__device__ __forceinline__ void item_sums(float (&y)[2], const u8* stage, const u8* scalars, const u32* words, const float2* factors, const Weight& w, int row0, int column0, int lane) {
    const int r = lane >> 2, q = lane & 3, group0 = GROUP >= (1 << 30) ? 0 : column0 / GROUP;
    const int parity[2] = {odd_start(w, row0 + r, group0), odd_start(w, row0 + r + 8, group0)};
    constexpr int ALL = KIND == BINARY_RESIDUAL ? 5 : KIND == GROUPED_INTEGER && BITS == 2 && !RAW ? 2 : SUMS;
    constexpr int COLUMNS = 128 / PARTS;
    constexpr bool ONCE = GROUP % ICOLS == 0;  // an item lies in one group: scalars multiply the sums of the whole item
    constexpr float HIGH = RAW ? 65536.0f : 256.0f;
    const Powers powers = powers_of(lane);
    float item_sum[2][ALL] = {}, item_total = 0.0f, item_marked = 0.0f;
    const auto scaled = [&](const float (&all)[ALL], float total, float marked_total, int h, int group) {
        float s[SUMS];
#pragma unroll
        for (int p = 0; p < SUMS; p++) s[p] = all[p];
        if (KIND == GROUPED_INTEGER && PARTED) s[0] += 2.0f * all[1 % ALL];
        float value = group_value(s, total, scalars, w, r + 8 * h, row0, column0, parity[h], group, false);
        if (KIND == BINARY_RESIDUAL) {
            s[0] = all[3 % ALL], s[1 % SUMS] = all[4 % ALL], s[2 % SUMS] = 0.0f;
            value = group_value(s, marked_total, scalars, w, r + 8 * h, row0, column0, parity[h], group, true, value);
        }
        return value;
    };
    y[0] = y[1] = 0.0f;
#pragma unroll UNROLL
    for (int set = 0; set < BLOCKS * PARTS; set += 4 * WIDTH) {
        if (!FULL && column0 + set * COLUMNS >= SPAN(w)) break;
        float d[ALL][4] = {};
        u32 third[4][2] = {}, bytes[4][ALL][2] = {};
        constexpr int SLOTS = BLOCKS * PARTS / WIDTH < 4 ? BLOCKS * PARTS / WIDTH : 4;
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            const int at = set + slot * WIDTH;
            if (FULL || column0 + at * COLUMNS < SPAN(w)) block_sums<ALL>(d, third[slot], bytes[slot], stage, words + at / PARTS * X_WORDS, at / PARTS, at % PARTS, slot, powers, lane);
        }
        if (DIGITS)
#pragma unroll
            for (int p = 0; p < ALL; p++) {
                int e[4] = {0, 0, 0, 0};
#pragma unroll
                for (int slot = 0; slot < SLOTS; slot += 2)
                    weigh_bytes(e, bytes[slot][p][0], bytes[slot][p][1], bytes[slot + 1][p][0], bytes[slot + 1][p][1], lane >> 3 == slot ? powers.first : 0u, lane >> 3 == slot + 1 ? powers.first : 0u);
                d[p][0] = (float)(e[0] + 256 * e[1]), d[p][2] = (float)(e[2] + 256 * e[3]);
            }
        if (RAW)
#pragma unroll
            for (int slot = 0; slot < SLOTS; slot += 2)
                weigh(d[0], third[slot][0], third[slot][1], third[slot + 1][0], third[slot + 1][1], lane >> 3 == slot ? powers.last : 0u, lane >> 3 == slot + 1 ? powers.last : 0u);
        const bool there = (SLOTS == 4 || q < SLOTS) && (FULL || column0 + (set + q * WIDTH) * COLUMNS < SPAN(w));
        const int at = there ? set + q * WIDTH : 0;
        float4 factor = *(const float4*)(factors + at / PARTS * X_FACTORS);
        if (PARTS == 2) factor = {factor.x, at % 2 ? factor.z : factor.y, 0.0f, 0.0f};
        if (WIDTH == 2) {
            const float4 second = *(const float4*)(factors + (at + 1) * X_FACTORS);
            factor.y += second.y, factor.z += second.z;
        }
        const float unit = there ? factor.x : 0.0f;
        if (KIND == SIGNED_LEVELS) {
            const bool again = column0 + at * 128 >= ORDINARY(w);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint4 eight = *((const uint4*)scalars + r + 8 * h);
                const u32 pair = again ? eight.z : eight.x;
                const float a = low_half(pair), b = high_half(pair);
                float sum[3] = {};
#pragma unroll
                for (int half = 0; half < 2; half++) {  // exact sums: what cancels leaves nothing
                    const float e = d[3 % ALL][2 * h + half] - d[0][2 * h + half], f = d[1 % ALL][2 * h + half] - d[2 % ALL][2 * h + half];
                    const float third = d[1 % ALL][2 * h + half] + d[2 % ALL][2 * h + half] - (d[3 % ALL][2 * h + half] + d[0][2 * h + half]);
                    const float weight = half ? HIGH : 1.0f;
                    sum[0] += weight * (e + f), sum[1] += weight * (e - f), sum[2] += weight * third;
                }
                const float value = again ? (a - b) * sum[0] + (a + b) * sum[1] : a * sum[0] + (b * sum[1] + low_half(eight.y) * sum[2]);
                y[h] += 0.5f * unit * value;
            }
            continue;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float s[ALL];
#pragma unroll
            for (int p = 0; p < ALL; p++) s[p] = DIGITS ? d[p][2 * h] : d[p][2 * h] + d[p][2 * h + 1] * HIGH;
            if (ONCE) {
#pragma unroll
                for (int p = 0; p < ALL; p++) item_sum[h][p] += unit * s[p];
            } else {
                y[h] += unit * scaled(s, factor.y, factor.z, h, group_of(column0, at * COLUMNS));
            }
        }
        item_total += unit * factor.y;
        item_marked += unit * factor.z;
    }
    if (ONCE && KIND != SIGNED_LEVELS)
#pragma unroll
        for (int h = 0; h < 2; h++) y[h] = scaled(item_sum[h], item_total, item_marked, h, 0);
    y[0] *= UNIT_LEFT, y[1] *= UNIT_LEFT;
}
