// Products of packed codes with the bit planes of x (`planes.cuh`) on the binary tensor cores, nothing unpacked.
//
// mma.m16n8k128 counts the ones of AND: a row of 128 one-bit codes is its operand as stored, each column of the product one
// bit of x, so two products hold all bits and
//     sum_j plane[i, j] x[j] = sum_t +-2^t count_t.
// Two-bit codes are first parted into their two planes; three-bit codes go in as they are.
//
// That sum is a product too. Counts are below 1024, so a count is the bits of a float16, n 2^-24, and two of them in a word
// are the operand of mma.m16n8k16 in the very lanes that counted. The other operand holds 2^t in two columns for the block at
// hand (lower and upper octet) and zeros in the others: after four blocks, lane-in-quad q has the two halves of the sums
// over block q for its two rows, and applies the scalars of that block's group alone. Every step is exact.

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
__device__ __forceinline__ u32 pair_of_counts(int low, int high) { return (u32)(low + (high << 16)); }

// 2^t for the two columns of a product that a lane-in-quad holds, as float16, in the lanes of one column of `weigh`: even
// columns take the lower octet (raw: the lower two), odd ones the last octet, whose highest bits are signs. All but raw
// ones times 2^8: sums come with the factor SUM_UNIT.
struct Powers {
    u32 first, second, last;  // last: of the third octet
};
__device__ __forceinline__ Powers powers_of(int lane) {
    const int q = lane & 3;
    const bool odd = lane & 4;
    const u32 ascending = (RAW ? 0x40003c00u : 0x60005c00u) + 0x08000800u * (u32)q;  // 2^(2 q) and 2^(2 q + 1)
    if (!RAW) return {odd ? 0u : ascending, odd ? ascending ^ (q == 3 ? 0x80000000u : 0u) : 0u, 0u};
    const u32 signs = q == 2 ? 0xc8004c00u : q == 3 ? 0xd000cc00u : ascending;  // 16 and -8; -16 and -32
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
__device__ __forceinline__ void bits_of(u32 (&b)[2 * KINDS][WIDTH], const u32* words, int lane) {
    u32 all[2 * KINDS * WIDTH];
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
// Sums over the planes of one block (or of WIDTH that have one unit), into the columns of `weigh` for number `slot` of four.
template <int ALL>
__device__ __forceinline__ void block_sums(float (&d)[ALL][4], const u8* stage, const u32* words, int block, int slot, const Powers& powers, int lane) {
    const bool mine = lane >> 3 == slot;
    int c[ALL][OCTETS][4];
#pragma unroll
    for (int p = 0; p < ALL; p++)
#pragma unroll
        for (int o = 0; o < OCTETS; o++) c[p][o][0] = c[p][o][1] = c[p][o][2] = c[p][o][3] = 0;
    if (RAW) {
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
        bits_of(b, words, lane);
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
        const u32 a[4] = {pair_of_counts(c[p][0][0], c[p][0][1]), pair_of_counts(c[p][0][2], c[p][0][3]),
                          pair_of_counts(c[p][1][0], c[p][1][1]), pair_of_counts(c[p][1][2], c[p][1][3])};
        weigh(d[p], a[0], a[1], a[2], a[3], mine ? powers.first : 0u, mine ? powers.second : 0u);
        if (RAW) {
            const int(&last)[4] = c[p][OCTETS - 1];
            weigh(d[p], pair_of_counts(last[0], last[1]), pair_of_counts(last[2], last[3]), 0u, 0u, mine ? powers.last : 0u, 0u);
        }
    }
}

template <bool FULL>
__device__ __forceinline__ void item_sums(float (&y)[2], const u8* stage, const u8* scalars, const u32* words, const float2* factors, const Weight& w, int row0, int column0, int lane) {
    const int r = lane >> 2, q = lane & 3, group0 = GROUP >= (1 << 30) ? 0 : column0 / GROUP;
    const int parity[2] = {odd_start(w, row0 + r, group0), odd_start(w, row0 + r + 8, group0)};
    constexpr int ALL = KIND == BINARY_RESIDUAL ? 5 : KIND == GROUPED_INTEGER && BITS == 2 ? 2 : SUMS;
    constexpr bool ONCE = GROUP % ICOLS == 0;  // an item lies in one group: scalars multiply the sums of the whole item
    constexpr float HIGH = RAW ? 65536.0f : 256.0f;
    const Powers powers = powers_of(lane);
    float item_sum[2][ALL] = {}, item_total = 0.0f, item_marked = 0.0f;
    const auto scaled = [&](const float (&all)[ALL], float total, float marked_total, int h, int group) {
        float s[SUMS];
#pragma unroll
        for (int p = 0; p < SUMS; p++) s[p] = all[p];
        if (KIND == GROUPED_INTEGER && BITS == 2) s[0] += 2.0f * all[1 % ALL];
        float value = group_value(s, total, scalars, w, r + 8 * h, row0, column0, parity[h], group, false);
        if (KIND == BINARY_RESIDUAL) {
            s[0] = all[3 % ALL], s[1 % SUMS] = all[4 % ALL], s[2 % SUMS] = 0.0f;
            value = group_value(s, marked_total, scalars, w, r + 8 * h, row0, column0, parity[h], group, true, value);
        }
        return value;
    };
    y[0] = y[1] = 0.0f;
#pragma unroll UNROLL
    for (int set = 0; set < BLOCKS; set += 4 * WIDTH) {
        if (!FULL && column0 + set * 128 >= SPAN(w)) break;
        float d[ALL][4] = {};
        constexpr int SLOTS = BLOCKS / WIDTH < 4 ? BLOCKS / WIDTH : 4;
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            const int block = set + slot * WIDTH;
            if (FULL || column0 + block * 128 < SPAN(w)) block_sums<ALL>(d, stage, words + block * X_WORDS, block, slot, powers, lane);
        }
        const bool there = (SLOTS == 4 || q < SLOTS) && (FULL || column0 + (set + q * WIDTH) * 128 < SPAN(w));
        const int block = there ? set + q * WIDTH : 0;
        float4 factor = *(const float4*)(factors + block * X_FACTORS);
        if (WIDTH == 2) {
            const float4 second = *(const float4*)(factors + (block + 1) * X_FACTORS);
            factor.y += second.y, factor.z += second.z;
        }
        const float unit = there ? factor.x : 0.0f;
        if (KIND == SIGNED_LEVELS) {
            const bool again = column0 + block * 128 >= ORDINARY(w);
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
            for (int p = 0; p < ALL; p++) s[p] = d[p][2 * h] + d[p][2 * h + 1] * HIGH;
            if (ONCE) {
#pragma unroll
                for (int p = 0; p < ALL; p++) item_sum[h][p] += unit * s[p];
            } else {
                y[h] += unit * scaled(s, factor.y, factor.z, h, group_of(column0, block * 128));
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
