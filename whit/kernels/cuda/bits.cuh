// x as bit planes: products of packed codes with x on the binary tensor cores, nothing unpacked.
//
// mma.m16n8k128 counts the ones of AND: a row of 128 one-bit codes is its operand as stored. x enters as 16-bit fixed
// point relative to the largest magnitude of its 128 columns (two's complement), one bit per column of the product, so two
// products hold all bits and
//     sum_j plane[i, j] x[j] = sum_t +-2^t count_t,
// exact in int32. Two-bit codes are first parted into their two planes. Three-bit codes go in as they are: position p of
// the packed row is bit p % 3 of code p / 3, which the bits of x are shifted to meet (20 bits then, 24 columns).

#define RAW (CODE_BITS == 3)
#define OCTETS (RAW ? 3 : 2)                        // products (of eight columns) per plane
#define KINDS (KIND == BINARY_RESIDUAL ? 2 : 1)     // marked columns have planes of x of their own
#define X_WORDS (RAW ? 3 * 3 * 32 : KINDS * 2 * 32)
#define X_FACTORS (4 * KINDS)

__device__ __forceinline__ void count(int (&c)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}
// Bit i of lane j becomes bit j of lane i.
__device__ __forceinline__ u32 transpose(u32 x, int lane) {
    u32 mask = 0x0000ffffu;
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) {
        const u32 y = __shfl_xor_sync(0xffffffffu, x, s);
        x = lane & s ? (x & ~mask) | (y >> s & mask) : (x & mask) | (y << s & ~mask);
        mask ^= mask << (s >> 1);
    }
    return x;
}
__device__ __forceinline__ u32 magnitude_of(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// One block of 128 columns by one warp: words [lane of the product][kind][octet] (raw: [word][octet][lane]), and per
// lane-in-quad (value of a unit, its share of the sum of x in units), for `binary-residual` once more with the sum over marked columns.
__device__ __forceinline__ void stage_block(u32* words, float2* factors, const float (&value)[RAW ? 12 : 4], u32 marks, int lane) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < (RAW ? 12 : 4); i++) largest = max(largest, magnitude_of(value[i]));
    largest = __reduce_max_sync(0xffffffffu, largest);
    const float magnitude = __uint_as_float(largest), most = RAW ? 524287.0f : 32767.0f;
    const bool tiny = magnitude < 1e-30f;  // (false for NaN, which must reach the result)
    const float up = tiny ? 0.0f : __fdividef(most, magnitude), down = tiny ? 0.0f : magnitude / most;
    int sum = 0, marked_sum = 0;
    if (RAW) {
#pragma unroll
        for (int i = 0; i < 12; i++) {
            const int position = 32 * (i % 3) + lane, bit = position % 3;  // word i % 3 of lane-in-quad i / 3
            const int fixed = __float2int_rn(value[i] * up);
            if (bit == 0) sum += fixed;
            const u32 word = transpose((fixed & 0x7ffffu) << bit | (fixed < 0 ? 1u : 0u) << (21 + bit), lane);
            if (lane < 24) words[((i % 3) * 3 + lane / 8) * 32 + lane % 8 * 4 + i / 3] = word;
        }
    } else {
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            const int low = __float2int_rn(value[2 * pair] * up), high = __float2int_rn(value[2 * pair + 1] * up);
            sum += low + high;
            if (KIND == BINARY_RESIDUAL) marked_sum += (marks >> (2 * pair) & 1 ? low : 0) + (marks >> (2 * pair + 1) & 1 ? high : 0);
            const u32 word = transpose((low & 0xffffu) | (u32)high << 16, lane);
            const int t = lane & 15, segment = 2 * pair + (lane >> 4);
            u32* out = words + ((t & 7) * 4 + segment) * (2 * KINDS) + (t >> 3);
            if (KIND == BINARY_RESIDUAL) {
                const u32 first = __ballot_sync(0xffffffffu, marks >> (2 * pair) & 1), second = __ballot_sync(0xffffffffu, marks >> (2 * pair + 1) & 1);
                const u32 mask = lane < 16 ? first : second;
                out[0] = word & ~mask;
                out[2] = word & mask;
            } else {
                out[0] = word;
            }
        }
    }
    const float total = (float)__reduce_add_sync(0xffffffffu, sum - marked_sum);
    const float marked_total = KIND == BINARY_RESIDUAL ? (float)__reduce_add_sync(0xffffffffu, marked_sum) : 0.0f;
    if (lane < 4 * KINDS) {  // lane-in-quad q holds columns 2 q and 2 q + 1 of a product: 4^q times those of the first
        const float factor = RAW ? down : down * (float)(1 << (2 * (lane & 3)));
        factors[KINDS == 2 ? (lane & 3) * 2 + (lane >> 2) : lane] = make_float2(factor, (lane & 3) == 0 ? (lane < 4 ? total : marked_total) : 0.0f);
    }
}
// The warps of the STAGING_BLOCKS thread blocks of a cluster take turns at blocks of columns.
#define STAGERS (WARPS * STAGING_BLOCKS)
__device__ __forceinline__ void stage_x(u32* words, float2* factors, const u16* x, const u8* salient, int column0, int blocks, int columns, int warp, int lane) {
    constexpr int BATCH = RAW ? 1 : 4, VALUES = RAW ? 12 : 4;
    for (int first = blockIdx.x % STAGING_BLOCKS * WARPS + warp; first < blocks; first += STAGERS * BATCH) {
        float value[BATCH][VALUES];
        u32 marks[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            marks[i] = 0;
#pragma unroll
            for (int j = 0; j < VALUES; j++) {
                const int offset = RAW ? 32 * (j / 3) + (32 * (j % 3) + lane) / 3 : 32 * j + (CODE_BITS == 2 ? (lane >> 1) + 16 * (lane & 1) : lane);
                const int block = first + i * STAGERS, column = column0 + block * 128 + offset;
                const bool there = block < blocks && column < columns;
                value[i][j] = there ? float_of_x(__ldg(x + column)) : 0.0f;
                if (KIND == BINARY_RESIDUAL && there) marks[i] |= (u32)(__ldg(salient + (column >> 3)) >> (column & 7) & 1) << j;
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int block = first + i * STAGERS;
            if (block < blocks) stage_block(words + block * X_WORDS, factors + block * X_FACTORS, value[i], marks[i], lane);
        }
    }
}

// The signed sum that counts of the columns of one lane stand for, in units of the lane's factor.
__device__ __forceinline__ float counted(const int (&c)[OCTETS][4], int h, int q) {
    if (RAW) {  // columns 0 to 20 weigh 2^t, 21 to 23 hold the signs: -2^19, -2^20, -2^21
        int sum = (c[0][2 * h] + 2 * c[0][2 * h + 1] + 256 * (c[1][2 * h] + 2 * c[1][2 * h + 1])) << (2 * q);
        const int first = q == 3 ? -(1 << 20) : 1 << (16 + 2 * q), second = q == 3 ? -(1 << 21) : q == 2 ? -(1 << 19) : 1 << (17 + 2 * q);
        return (float)(sum + first * c[OCTETS - 1][2 * h] + second * c[OCTETS - 1][2 * h + 1]);
    }
    return (float)(c[0][2 * h] + 2 * c[0][2 * h + 1] + 256 * c[1][2 * h] + (q == 3 ? -512 : 512) * c[1][2 * h + 1]);
}

template <bool FULL>
__device__ __forceinline__ void item_sums(float (&y)[2], const u8* stage, const u32* words, const float2* factors, const Weight& w, int row0, int column0, int lane) {
    const int r = lane >> 2, q = lane & 3, group0 = GROUP >= (1 << 30) ? 0 : column0 / GROUP;
    const int parity[2] = {odd_start(w, row0 + r, group0), odd_start(w, row0 + r + 8, group0)};
    constexpr int ALL = KIND == BINARY_RESIDUAL ? 5 : KIND == GROUPED_INTEGER && BITS == 2 ? 2 : SUMS;
    constexpr bool ONCE = GROUP % ICOLS == 0;  // an item lies in one group: scalars multiply the sums of the whole item
    float item_sum[2][ALL] = {}, item_total = 0.0f, item_marked = 0.0f;
    y[0] = y[1] = 0.0f;
#pragma unroll BLOCKS_AT_ONCE
    for (int block = 0; block < BLOCKS; block++) {
        if (!FULL && column0 + block * 128 >= w.columns) break;
        int c[ALL][OCTETS][4];
#pragma unroll
        for (int p = 0; p < ALL; p++)
#pragma unroll
            for (int o = 0; o < OCTETS; o++) c[p][o][0] = c[p][o][1] = c[p][o][2] = c[p][o][3] = 0;
        if (RAW) {
            u32 a[2][3];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32* from = (const u32*)(stage + (r + 8 * h) * ROW_STRIDE) + block * 12 + q * 3;
                a[h][0] = from[0], a[h][1] = from[1], a[h][2] = from[2];
            }
#pragma unroll
            for (int i = 0; i < 3; i++)
#pragma unroll
                for (int o = 0; o < OCTETS; o++) count(c[0][o], a[0][i], a[1][i], words[block * X_WORDS + (i * 3 + o) * 32 + lane]);
        } else {
            u32 plane[2][3];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = r + 8 * h;
                if (CODE_BITS == 1) {
                    plane[h][0] = staged_word(stage, row, block * 4 + q);
                    if (KIND == BINARY_RESIDUAL) plane[h][1] = staged_word(stage + PLANE_BYTES, row, block * 4 + q);
                } else {  // bits 2 j of a plane are those of column j of the 32, bits 2 j + 1 those of column 16 + j
                    const int at = block * 8 + q * 2;
                    const uint2 pair = *(const uint2*)(stage + chunk_place(row, at >> 2) + (at & 3) * 4);
                    plane[h][0] = (pair.x & 0x55555555u) | (pair.y << 1 & 0xaaaaaaaau);
                    plane[h][1] = (pair.x >> 1 & 0x55555555u) | (pair.y & 0xaaaaaaaau);
                }
                if (SUMS == 3) plane[h][2] = plane[h][0] & plane[h][1];
            }
            if (KIND == BINARY_RESIDUAL) {
                const uint4 b = ((const uint4*)(words + block * X_WORDS))[lane];
#pragma unroll
                for (int p = 0; p < 3; p++) {
                    count(c[p][0], plane[0][p], plane[1][p], b.x);
                    count(c[p][1], plane[0][p], plane[1][p], b.y);
                }
#pragma unroll
                for (int p = 0; p < 2; p++) {
                    count(c[(3 + p) % ALL][0], plane[0][p], plane[1][p], b.z);
                    count(c[(3 + p) % ALL][1], plane[0][p], plane[1][p], b.w);
                }
            } else {
                const uint2 b = ((const uint2*)(words + block * X_WORDS))[lane];
#pragma unroll
                for (int p = 0; p < ALL; p++) {
                    count(c[p][0], plane[0][p], plane[1][p], b.x);
                    count(c[p][1], plane[0][p], plane[1][p], b.y);
                }
            }
        }
        const int group = group_of(column0, block * 128);
        const float2 factor = factors[block * X_FACTORS + q * KINDS];
        if (ONCE) {
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int p = 0; p < ALL; p++) item_sum[h][p] += factor.x * counted(c[p], h, q);
            item_total += factor.x * factor.y;
            if (KIND == BINARY_RESIDUAL) item_marked += factor.x * factors[block * X_FACTORS + q * KINDS + 1].y;
            continue;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float s[SUMS];
#pragma unroll
            for (int p = 0; p < SUMS; p++) s[p] = counted(c[p], h, q);
            if (KIND == GROUPED_INTEGER && BITS == 2) s[0] += 2.0f * counted(c[1 % ALL], h, q);
            float value = group_value(s, factor.y, stage, w, r + 8 * h, row0, column0, parity[h], group, false);
            if (KIND == BINARY_RESIDUAL) {
                const float marked_total = factors[block * X_FACTORS + q * KINDS + 1].y;
                float marked[SUMS];
                marked[0] = counted(c[3 % ALL], h, q);
                marked[1 % SUMS] = counted(c[4 % ALL], h, q);
                marked[2 % SUMS] = 0.0f;
                value += group_value(marked, marked_total, stage, w, r + 8 * h, row0, column0, parity[h], group, true);
            }
            y[h] += factor.x * value;
        }
    }
    if (ONCE)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float s[SUMS];
#pragma unroll
            for (int p = 0; p < SUMS; p++) s[p] = item_sum[h][p];
            if (KIND == GROUPED_INTEGER && BITS == 2) s[0] += 2.0f * item_sum[h][1 % ALL];
            y[h] = group_value(s, item_total, stage, w, r + 8 * h, row0, column0, parity[h], 0, false);
            if (KIND == BINARY_RESIDUAL) {
                float marked[SUMS];
                marked[0] = item_sum[h][3 % ALL], marked[1 % SUMS] = item_sum[h][4 % ALL], marked[2 % SUMS] = 0.0f;
                y[h] += group_value(marked, item_marked, stage, w, r + 8 * h, row0, column0, parity[h], 0, true);
            }
        }
}

// What the other blocks of the cluster have staged.
__device__ __forceinline__ void fetch_staged(u32* words, float2* factors, int blocks) {
    constexpr int WORD_PIECES = X_WORDS / 4, PIECES = WORD_PIECES + X_FACTORS / 2;
    for (int piece = threadIdx.x; piece < blocks * PIECES; piece += THREADS) {
        const int block = piece / PIECES, at = piece % PIECES, owner = block % STAGERS / WARPS;
        uint4* own = at < WORD_PIECES ? (uint4*)(words + block * X_WORDS) + at : (uint4*)(factors + block * X_FACTORS) + (at - WORD_PIECES);
        if (owner != (int)(blockIdx.x % STAGING_BLOCKS)) *own = peer_words(own, owner);
    }
}
