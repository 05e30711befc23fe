// x as limbs: products of bit planes with x on the integer tensor cores.
//
// One AND leaves four weights of a plane as bytes (0 or a power of two) in the very place where mma.m16n8k32 wants them.
// x enters as 20-bit fixed point relative to the largest magnitude of its 128 columns, cut into four signed 5-bit limbs:
// four of the eight columns of the product. 5 bits leave room to scale a limb by up to 8, which undoes the power of two;
// sums are exact in int32. The other four columns hold the limbs of the marked columns of `binary-residual`, which have
// their own scalars, so a mark costs nothing per weight.

#define X_WORDS 256         // 32-bit words of x in shared memory per block of 128 columns
#define X_FACTORS (FLUSHES * 4)  // pairs of floats beside them
#define FLUSHES (FINE ? 2 : 1)
#define UNIT (CODE_BITS == 1 ? (FINE ? 32.0f : 128.0f) : CODE_BITS == 2 ? 64.0f : CODE_BITS == 4 ? 16.0f : 1.0f)  // what one code step counts as

__device__ __forceinline__ int limb_shift(int step) {
    if (CODE_BITS == 1) return FINE ? 1 - (step & 1) : 3 - step;
    return CODE_BITS == 2 ? 2 * (1 - (step & 1)) : 0;
}

__device__ __forceinline__ void product(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Limbs of one block of 128 columns of x, by one warp: words [2][lane of the product][4], and per flush and lane-in-quad
// the pair (value of a unit, sum of x in units). value[j] is column `column_of(lane / 8, lane / 2 % 4, lane % 2, j)`.
__device__ __forceinline__ void stage_block(u32* limbs, float2* factors, const float (&value)[4], u32 marked, int lane) {
    const int step = lane >> 3, q = lane >> 1 & 3, half = lane & 1;
    u32 largest = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) largest = max(largest, __float_as_uint(value[j]) & 0x7fffffffu);
    largest = __reduce_max_sync(0xffffffffu, largest);
    const float magnitude = __uint_as_float(largest);
    const bool tiny = magnitude < 1e-30f;  // (false for NaN, which must reach the result)
    const float up = tiny ? 0.0f : __fdividef(491520.0f, magnitude), down = tiny ? 0.0f : magnitude * (1.0f / 491520.0f);
    u32 word[4] = {0, 0, 0, 0};
    int sum = 0, marked_sum = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int fixed = __float2int_rn(value[j] * up);
        sum += fixed;
        if (marked >> (8 * j) & 1) marked_sum += fixed;
        int t = fixed + 16912;  // 16 * (1 + 32 + 1024): makes the three lower limbs signed
        int limb[4] = {t >> 15, (t >> 10 & 31) - 16, (t >> 5 & 31) - 16, (t & 31) - 16};
#pragma unroll
        for (int n = 0; n < 4; n++) word[n] |= ((u32)(limb[n] << limb_shift(step)) & 0xffu) << (8 * j);
    }
    u32* out = limbs + (step >> 1) * 128 + q * 4 + (step & 1) * 2 + half;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        out[n * 16] = word[n] & ~marked;
        out[(n + 4) * 16] = word[n] & marked;
    }
#pragma unroll
    for (int flush = 0; flush < FLUSHES; flush++) {
        const bool mine = FLUSHES == 1 || step >> 1 == flush;
        const float ordinary = UNIT * (float)__reduce_add_sync(0xffffffffu, mine ? sum - marked_sum : 0);
        const float marks = KIND == BINARY_RESIDUAL ? UNIT * (float)__reduce_add_sync(0xffffffffu, mine ? marked_sum : 0) : 0.0f;
        if (lane < 4)  // lane-in-quad 0 and 2 hold the upper two limbs, 1 and 3 the lower
            factors[flush * 4 + lane] = make_float2(down / UNIT * (lane & 1 ? 1.0f : 1024.0f), lane == 1 ? ordinary : lane == 3 ? marks : 0.0f);
    }
}
struct Turns {};  // marks are asked for where they are needed
__device__ __forceinline__ int first_column(int, int, int) { return 0; }
__device__ __forceinline__ void load_marks(Turns&, const u8*, int, int, int) {}
template <class Here>
__device__ __forceinline__ void stage_x(const Turns&, u32* limbs, float2* factors, const u16* x, const u8* salient, int column0, int blocks, int columns, int warp, int lane, bool wait, const Here& x_has_come) {
    if (wait) wait_for_previous_kernel();
    x_has_come(0);
    constexpr int BATCH = 4;  // blocks whose loads are in flight together
    for (int first = warp; first < blocks; first += WARPS * BATCH) {
        float value[BATCH][4];
        u32 marked[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            marked[i] = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int block = first + i * WARPS, column = column0 + block * 128 + column_of(lane >> 3, lane >> 1 & 3, lane & 1, j);
                const bool there = block < blocks && column < columns;
                value[i][j] = there ? float_of_x(load_x<u16>(X_AT(x, column))) : 0.0f;
                if (KIND == BINARY_RESIDUAL && there && (__ldg(salient + (column >> 3)) >> (column & 7) & 1)) marked[i] |= 0xffu << (8 * j);
            }
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int block = first + i * WARPS;
            if (block < blocks) stage_block(limbs + block * 256, factors + block * FLUSHES * 4, value[i], marked[i], lane);
        }
    }
}

template <bool FULL>
__device__ __forceinline__ void item_sums(float (&y)[2], const u8* stage, const u8* scalars, const u32* limbs, const float2* factors, const Weight& w, int row0, int column0, int lane) {
    const int r = lane >> 2, q = lane & 3, group0 = GROUP >= (1 << 30) ? 0 : column0 / GROUP;
    const int parity[2] = {odd_start(w, row0 + r, group0), odd_start(w, row0 + r + 8, group0)};
    y[0] = y[1] = 0.0f;
#pragma unroll BLOCKS_AT_ONCE
    for (int block = 0; block < BLOCKS; block++) {
        if (!FULL && column0 + block * 128 >= w.columns) break;
        const uint4* pairs = (const uint4*)(limbs + block * 256) + lane;
#pragma unroll
        for (int flush = 0; flush < FLUSHES; flush++) {
            if (!FULL && FINE && column0 + block * 128 + flush * 64 >= w.columns) break;
            int c[SUMS][4];
#pragma unroll
            for (int p = 0; p < SUMS; p++) c[p][0] = c[p][1] = c[p][2] = c[p][3] = 0;
#pragma unroll
            for (int pair = FINE ? flush : 0; pair < (FINE ? flush + 1 : 2); pair++) {
                const uint4 b = pairs[pair * 32];
                if (CODE_BITS == 1) {
                    u32 v[2][3];
#pragma unroll
                    for (int h = 0; h < 2; h++) {
#pragma unroll
                        for (int plane = 0; plane < PLANES; plane++) {
                            const u8* from = stage + plane * PLANE_BYTES;
                            v[h][plane] = FINE ? half_word(from, r + 8 * h, block * 4 + flush * 2, q) : staged_word(from, r + 8 * h, block * 4 + q);
                        }
                        if (SUMS == 3) v[h][2] = v[h][0] & v[h][1];
                    }
#pragma unroll
                    for (int s = 0; s < 2; s++) {
                        const u32 mask = 0x10101010u << (FINE ? s : pair * 2 + s);
#pragma unroll
                        for (int p = 0; p < SUMS; p++)
                            product(c[p], v[0][p] << 4 & mask, v[1][p] << 4 & mask, v[0][p] & mask, v[1][p] & mask, s ? b.z : b.x, s ? b.w : b.y);
                    }
                } else if (CODE_BITS == 2) {
                    u32 v[2] = {staged_word(stage, r, block * 8 + pair * 4 + q), staged_word(stage, r + 8, block * 8 + pair * 4 + q)};
#pragma unroll
                    for (int s = 0; s < 2; s++) {
                        if (KIND == LEVEL_TABLE) {
                            u32 both[2] = {v[0] & v[0] << 1, v[1] & v[1] << 1};  // meaningful at odd bits
                            const u32 first = 0x10101010u << (2 * s), second = first << 1;
                            product(c[0], v[0] << 4 & first, v[1] << 4 & first, v[0] & first, v[1] & first, s ? b.z : b.x, s ? b.w : b.y);
                            product(c[1 % SUMS], v[0] << 4 & second, v[1] << 4 & second, v[0] & second, v[1] & second, s ? b.z : b.x, s ? b.w : b.y);
                            product(c[2 % SUMS], both[0] << 4 & second, both[1] << 4 & second, both[0] & second, both[1] & second, s ? b.z : b.x, s ? b.w : b.y);
                        } else {
                            const u32 mask = 0x30303030u << (2 * s);
                            product(c[0], v[0] << 4 & mask, v[1] << 4 & mask, v[0] & mask, v[1] & mask, s ? b.z : b.x, s ? b.w : b.y);
                        }
                    }
                } else if (CODE_BITS == 3) {
                    u32 a[2][4];
#pragma unroll
                    for (int h = 0; h < 2; h++) three_bit_bytes(a[h], stage, r + 8 * h, block * 48 + pair * 24, q);
                    product(c[0], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
                    product(c[0], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
                } else if (CODE_BITS == 4) {
#pragma unroll
                    for (int s = 0; s < 2; s++) {
                        u32 v[2] = {staged_word(stage, r, block * 16 + pair * 8 + s * 4 + q), staged_word(stage, r + 8, block * 16 + pair * 8 + s * 4 + q)};
                        const u32 mask = 0xf0f0f0f0u;
                        product(c[0], v[0] << 4 & mask, v[1] << 4 & mask, v[0] & mask, v[1] & mask, s ? b.z : b.x, s ? b.w : b.y);
                    }
                } else {
#pragma unroll
                    for (int s = 0; s < 2; s++) {
                        const int word = block * 32 + pair * 16 + s * 8 + q;
                        product(c[0], staged_word(stage, r, word), staged_word(stage, r + 8, word), staged_word(stage, r, word + 4), staged_word(stage, r + 8, word + 4), s ? b.z : b.x, s ? b.w : b.y);
                    }
                }
            }
            const float2 factor = factors[(block * FLUSHES + flush) * 4 + q];
            const int group = group_of(column0, block * 128 + flush * 64);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float s[SUMS];
#pragma unroll
                for (int p = 0; p < SUMS; p++) s[p] = (float)(c[p][2 * h] * 32 + c[p][2 * h + 1]);
                y[h] += factor.x * group_value(s, factor.y, scalars, w, r + 8 * h, row0, column0, parity[h], group, KIND == BINARY_RESIDUAL && q >= 2);
            }
        }
    }
}
