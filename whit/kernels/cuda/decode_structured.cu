
// Dense 16-bit weight (rows, columns) from N:M sparse binary weights: exactly the plain meaning rounded once. A thread takes
// one group of OF columns: the number of its pattern is a digit of base PATTERNS of the word of WORD_GROUPS groups it is in,
// and the place of its kept weights among those of the row is known without looking at other groups. The tables
// `columns_of_pattern` (bits) and `trits_of_byte` (two bits each) stand before this file.

#define WORD_BYTES BITS
#define MEANS (NS == 2 * REGIONS + 3)

__device__ __forceinline__ u32 bits_at(const u8* from, u32 bit, int count) {  // at most 16
    u32 window = 0;
#pragma unroll
    for (int i = 0; i < 3; i++)
        if (8 * i < (int)(bit & 7) + count) window |= (u32)__ldg(from + (bit >> 3) + i) << (8 * i);
    return window >> (bit & 7) & ((1u << count) - 1);
}

extern "C" __global__ void __launch_bounds__(256)
decode(Weight w, u16* out) {
    constexpr int SIGN_ROUNDING = 8;
    const int groups = (w.columns + OF - 1) / OF, rest = w.columns % OF;
    const int kept_in_row = w.columns / OF * KEPT + (rest * KEPT + OF - 1) / OF;
    const int sign_bytes = (kept_in_row + SIGN_ROUNDING - 1) / 8, region_bytes = REGIONS == 3 ? (kept_in_row + 4) / 5 : sign_bytes;
    for (int row = blockIdx.x; row < w.rows; row += gridDim.x)
        for (int group = threadIdx.x; group < groups; group += 256) {
            u32 columns = (1u << OF) - 1;
            if (KEPT < OF) {
                const u8* from = w.codes[0] + (size_t)row * w.width + group / WORD_GROUPS * WORD_BYTES;
                u64 word = 0;
#pragma unroll
                for (int i = 0; i < WORD_BYTES; i++) word |= (u64)__ldg(from + i) << (8 * i);
                for (int i = group % WORD_GROUPS; i > 0; i--) word /= PATTERNS;
                columns = columns_of_pattern[word % PATTERNS];
            }
            const int first = group * KEPT, here = min(KEPT, kept_in_row - first);
            const u32 signs = bits_at(w.codes[1] + (size_t)row * sign_bytes, first, here);
            const u8* regions = w.zeros + (size_t)row * region_bytes;
            const u32 bits = REGIONS == 2 ? bits_at(regions, first, here) : 0;
            u16 value[OF];
            int kept = 0;
#pragma unroll
            for (int i = 0; i < OF; i++) {
                const int column = group * OF + i;
                value[i] = 0;
                if (column >= w.columns || !(columns >> i & 1)) continue;
                const u8* scalars = w.scalars + (size_t)((u32)row * w.groups + (GROUP >= (1 << 30) ? 0 : column / GROUP)) * (2 * NS);
                auto scalar = [&](int j) { return float_of_half(__ldg((const u16*)scalars + j)); };
                const float sign = signs >> kept & 1 ? 1.0f : -1.0f;
                const int place = first + kept;
                const int region = REGIONS == 3 ? trits_of_byte[__ldg(regions + place / 5)] >> (2 * (place % 5)) & 3 : bits >> kept & 1;
                kept++;
                float level;
                if (REGIONS > 1 && (__ldg(w.salient + (column >> 3)) >> (column & 7) & 1)) {
                    const float base = MEANS ? scalar(NS - 3) : 0.0f;
                    level = region == 2 ? 0.0f : (base + sign * scalar(NS - 2)) + (region ? scalar(NS - 1) : -scalar(NS - 1));
                } else {
                    level = MEANS ? scalar(2 * region) + sign * scalar(2 * region + 1) : sign * scalar(region);
                }
                value[i] = x_of_float(level);
            }
            u16* const to = out + (size_t)row * w.columns + group * OF;
            if (OF == 8 && w.columns % 8 == 0) {
                *(uint4*)to = make_uint4(value[0] | (u32)value[1] << 16, value[2 % OF] | (u32)value[3 % OF] << 16, value[4 % OF] | (u32)value[5 % OF] << 16, value[6 % OF] | (u32)value[7 % OF] << 16);
            } else {
#pragma unroll
                for (int i = 0; i < OF; i++)
                    if (group * OF + i < w.columns) to[i] = value[i];
            }
        }
}
