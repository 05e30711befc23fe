// Codes of an item (`items.cuh`) as operands of the 16-bit tensor cores, and their products with x: see `small.cu`.

constexpr int BLOCKS_AT_ONCE = UNROLL;
#define TABLE (KIND != GROUPED_INTEGER || BITS <= 2)
#define TOKENS (8 * TILES)
#define CELLS (16 * (TOKENS + 1))  // results of a row tile; one more per row keeps its columns in different banks
#define RUN (FINE && CODE_BITS == 1 ? 16 : CODE_BITS <= 1 ? 32 : CODE_BITS <= 3 ? 16 : CODE_BITS == 4 ? 8 : 4)
#define PARTS (32 / RUN)   // runs of consecutive columns that one lane contributes to a block of 128
#define STEPS (8 / PARTS)  // products per run

__device__ __forceinline__ void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
    u32 sum;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
#else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
#endif
    return sum;
}

// Four levels of a row and group: words {0, 1}, {2, 3}; with `marks`, those of marked columns.
__device__ __forceinline__ void level_words(u32 (&t)[2], const u8* scalars, const Weight& w, int row, int row0, int group0, int parity, int group, bool marks) {
    if (KIND == BINARY_RESIDUAL) {
        const int shift = NS == 7 ? 1 : 0;
        if (!marks) {
            const float mean_c = NS == 7 ? staged_scalar(scalars, row, parity, group, 0) : 0.0f;
            const float mean_s = NS == 7 ? staged_scalar(scalars, row, parity, group, 2) : 0.0f;
            const float scale_c = staged_scalar(scalars, row, parity, group, shift), scale_s = staged_scalar(scalars, row, parity, group, NS == 7 ? 3 : 1);
            t[0] = pair_of_floats(mean_c - scale_c, mean_c + scale_c);
            t[1] = pair_of_floats(mean_s - scale_s, mean_s + scale_s);
        } else {
            const float mean = NS == 7 ? staged_scalar(scalars, row, parity, group, 4) : 0.0f;
            const float one = staged_scalar(scalars, row, parity, group, NS - 2), two = staged_scalar(scalars, row, parity, group, NS - 1);
            t[0] = pair_of_floats(mean - one - two, mean + one - two);
            t[1] = pair_of_floats(mean - one + two, mean + one + two);
        }
    } else if (KIND == LEVEL_TABLE) {
        t[0] = pair_of_floats(staged_scalar(scalars, row, parity, group, 0), staged_scalar(scalars, row, parity, group, 1));
        t[1] = BITS == 2 ? pair_of_floats(staged_scalar(scalars, row, parity, group, 2), staged_scalar(scalars, row, parity, group, 3)) : 0;
    } else {
        const float zero = staged_zero(scalars, w, row, row0, group0, group), step = !ASYM && BITS == 1 ? 2.0f : 1.0f;
        t[0] = pair_of_floats(-zero * step, (1.0f - zero) * step);
        t[1] = pair_of_floats(2.0f - zero, 3.0f - zero);
    }
}
__device__ __forceinline__ void levels_of(u32& low, u32& high, u32 codes, const u32 (&t)[2]) {
    const u32 selector = codes * 0x22u + 0x10101010u;  // code c chooses bytes 2 c and 2 c + 1
    low = choose_bytes(t[0], t[1], selector);
    high = choose_bytes(t[0], t[1], selector >> 16);
}
// Bytes of codes to exact 16-bit floats code - zero; `minus` is the pair that takes the bias of the trick and zero away.
__device__ __forceinline__ void integers_of(u32& low, u32& high, u32 codes, u32 minus, float zero) {
#if BF16 && BITS == 8
    float f[4];
#pragma unroll
    for (int j = 0; j < 4; j++) f[j] = __uint_as_float(choose_bytes(codes, 0x4b000000u, 0x7650 + j)) - (8388608.0f + zero);
    low = pair_of_floats(f[0], f[1]);
    high = pair_of_floats(f[2], f[3]);
#else
    const u32 exponent = BF16 ? 0x43434343u : 0x64646464u;  // 128 + code, 1024 + code
    low = add_pairs(choose_bytes(codes, exponent, 0x4140), minus);
    high = add_pairs(choose_bytes(codes, exponent, 0x4342), minus);
#endif
}

template <bool FULL>
__device__ __forceinline__ void item_products(float (&y)[2][TILES][4], const u8* stage, const u32* xs, const u32* masks, const u32* flags, const Weight& w, int row0, int column0, int lane) {
    const u8* const scalars = stage + PLANES * PLANE_BYTES;
    const int r = lane >> 2, q = lane & 3, group0 = GROUP >= (1 << 30) ? 0 : column0 / GROUP;
    const int parity[2] = {odd_start(w, row0 + r, group0), odd_start(w, row0 + r + 8, group0)};
#pragma unroll BLOCKS_AT_ONCE
    for (int block = 0; block < BLOCKS; block++) {
        if (!FULL && column0 + block * 128 >= w.columns) break;
        u32 even[2], odd[2], table[2][2], marked_table[2][2];
        u32 minus[2];
        float zero[2], scale[2], sums[2][TILES][4];
        const u32 flag = KIND == BINARY_RESIDUAL ? flags[block] : 0;
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            if (!FULL && FINE && column0 + block * 128 + pair * 64 >= w.columns) break;
            if (pair == 0 || FINE) {
                const int group = group_of(column0, block * 128 + pair * 64);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = r + 8 * h;
                    if (TABLE) level_words(table[h], scalars, w, row, row0, group0, parity[h], group, false);
                    if (KIND == BINARY_RESIDUAL && flag) level_words(marked_table[h], scalars, w, row, row0, group0, parity[h], group, true);
                    if (KIND == GROUPED_INTEGER) scale[h] = staged_scalar(scalars, row, parity[h], group, 0);
                    if (!TABLE) {
                        zero[h] = staged_zero(scalars, w, row, row0, group0, group);
                        minus[h] = pair_of_floats(-(BF16 ? 128.0f : 1024.0f) - zero[h], -(BF16 ? 128.0f : 1024.0f) - zero[h]);
                    }
                }
                if (KIND == GROUPED_INTEGER)
#pragma unroll
                    for (int n = 0; n < 2 * TILES; n++) sums[n % 2][n / 2][0] = sums[n % 2][n / 2][1] = sums[n % 2][n / 2][2] = sums[n % 2][n / 2][3] = 0.0f;
            }
            u32 three[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = r + 8 * h;
                if (CODE_BITS == 1 && (pair == 0 || FINE)) {
                    u32 first = FINE ? half_word(stage, row, block * 4 + pair * 2, q) : staged_word(stage, row, block * 4 + q);
                    if (KIND == BINARY_RESIDUAL) {  // two planes become words of two-bit codes: even columns, odd columns
                        const u8* plane = stage + PLANE_BYTES;
                        u32 second = FINE ? half_word(plane, row, block * 4 + pair * 2, q) : staged_word(plane, row, block * 4 + q);
                        even[h] = (first & 0x55555555u) | (second << 1 & 0xaaaaaaaau);
                        odd[h] = (first >> 1 & 0x55555555u) | (second & 0xaaaaaaaau);
                    } else {
                        even[h] = first;
                    }
                }
                if (CODE_BITS == 2) even[h] = staged_word(stage, row, block * 8 + pair * 4 + q);
                if (CODE_BITS == 3) three_bit_bytes(three[h], stage, row, block * 48 + pair * 24, q);
            }
#pragma unroll
            for (int t = 4 * pair; t < 4 * pair + 4; t++) {
                const int step = t >> 1, half = t & 1;
                u32 a[4];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = r + 8 * h;
                    u32 codes;
                    if (CODE_BITS == 1) {
                        const int bit = (FINE ? step & 1 : step) + 4 * half;
                        if (KIND == BINARY_RESIDUAL)
                            codes = (bit & 1 ? odd[h] >> (bit - 1) : even[h] >> bit) & 0x03030303u;
                        else
                            codes = even[h] >> bit & 0x01010101u;
                    } else if (CODE_BITS == 2) {
                        codes = even[h] >> (2 * (step & 1) + 4 * half) & 0x03030303u;
                    } else if (CODE_BITS == 3) {
                        codes = three[h][t & 3];
                    } else if (CODE_BITS == 4) {
                        codes = staged_word(stage, row, block * 16 + step * 4 + q) >> (4 * half) & 0x0f0f0f0fu;
                    } else {
                        codes = staged_word(stage, row, block * 32 + t * 4 + q);
                    }
                    if (TABLE)
                        levels_of(a[h], a[2 + h], codes, table[h]);
                    else
                        integers_of(a[h], a[2 + h], codes, minus[h], zero[h]);
                    if (KIND == BINARY_RESIDUAL && (flag >> t & 1)) {
                        u32 low, high;
                        const uint2 mask = ((const uint2*)masks)[(block * 8 + t) * 4 + q];
                        levels_of(low, high, codes, marked_table[h]);
                        a[h] = (low & mask.x) | (a[h] & ~mask.x);
                        a[2 + h] = (high & mask.y) | (a[2 + h] & ~mask.y);
                    }
                }
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    const uint2 b = ((const uint2*)xs)[((block * 8 + t) * TILES + n) * 32 + lane];
                    product(KIND == GROUPED_INTEGER ? sums[t & 1][n] : y[t & 1][n], a, b.x, b.y);
                }
            }
            if (KIND == GROUPED_INTEGER && (pair == 1 || FINE))
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) y[0][n][i] += scale[i >> 1] * (sums[0][n][i] + sums[1][n][i]);
        }
    }
}
