// ---- The algebra of a group -----------------------------------------------------------------------------------------
#define HIGH_PLANE (BITWISE ? 1.0f : 0.5f)  // limbs: the planes of the second bit stand at twice the weight of the first
#define SUMS (KIND == SIGNED_LEVELS ? 4 : KIND == BINARY_RESIDUAL || (KIND == LEVEL_TABLE && BITS == 2) ? 3 : 1)
constexpr int BLOCKS_AT_ONCE = UNROLL;  // blocks of an item whose instructions are interleaved

// What one row and group adds, in the units of its arguments: sums s[p] of x over the ones of plane p (over HIGH_PLANE for p > 0 in tables), `total` the sum of
// x, for each lane its share of both. `marks`: of the marked columns of `binary-residual`.
// Written so that every scalar is multiplied once, by a combination of sums, and added to what was there `before`.
__device__ __forceinline__ float group_value(const float (&s)[SUMS], float total, const u8* scalars, const Weight& w, int row, int row0, int column0, int parity, int group, bool marks, float before = 0.0f) {
    const u32* words = (const u32*)scalars + row * SCALAR_WORDS;
    float v[4];
    if (KIND == BINARY_RESIDUAL) {
        const float other = marks ? 0.0f : 2.0f * s[2 % SUMS] - s[1 % SUMS];  // sum of sign over the second group
        const float first = 2.0f * s[0] - total - other;                  // of sign over the first group; marked: of the first sign
        const float second = marks ? 2.0f * s[1 % SUMS] - total : s[1 % SUMS];    // sum over the second group; marked: of the second sign
        if (NS == 7) {
            if (PIECE > 2) {
                const u32* from = words + (group * 7) / 2 + (marks ? 2 : 0);
                const int odd = group % 2 * 16;  // a group of an odd number starts in the middle of a word
                const u32 first = funnel_right(from[0], from[1], odd), second = funnel_right(from[1], marks ? 0u : from[2], odd);
                v[0] = low_half(first), v[1] = high_half(first), v[2] = low_half(second), v[3] = high_half(second);
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) v[i] = staged_scalar(scalars, row, parity, group, (marks && i < 3 ? 4 : 0) + i);
            }
            if (marks) return v[0] * total + (v[1] * first + (v[2] * second + before));
            return v[0] * (total - s[1 % SUMS]) + (v[1] * first + (v[2] * second + (v[3] * other + before)));
        }
        const u32 pair = PIECE > 2 ? words[group * 2 + marks] : 0;
        v[0] = PIECE > 2 ? low_half(pair) : staged_scalar(scalars, row, parity, group, 2 * marks);
        v[1] = PIECE > 2 ? high_half(pair) : staged_scalar(scalars, row, parity, group, 2 * marks + 1);
        return v[0] * first + (v[1] * (marks ? second : other) + before);
    }
    if (KIND == LEVEL_TABLE && BITS == 1) {
        const u32 pair = PIECE > 2 ? words[group] : 0;
        v[0] = PIECE > 2 ? low_half(pair) : staged_scalar(scalars, row, parity, group, 0);
        v[1] = PIECE > 2 ? high_half(pair) : staged_scalar(scalars, row, parity, group, 1);
        return v[0] * (total - s[0]) + (v[1] * s[0] + before);
    }
    if (KIND == LEVEL_TABLE) {
        if (PIECE > 2) {
            const uint2 four = *(const uint2*)(words + group * 2);
            v[0] = low_half(four.x), v[1] = high_half(four.x), v[2] = low_half(four.y), v[3] = high_half(four.y);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = staged_scalar(scalars, row, parity, group, i);
        }
        const float both = HIGH_PLANE * s[2 % SUMS];
        const float high = HIGH_PLANE * s[1 % SUMS] - both, low = s[0] - both;
        return v[0] * (total - s[0] - high) + (v[1] * low + (v[2] * high + (v[3] * both + before)));
    }
    const float scale = staged_scalar(scalars, row, parity, group, 0);
    return scale * (!ASYM && BITS == 1 ? 2.0f : 1.0f) * (s[0] - staged_zero(scalars, w, row, row0, GROUP >= (1 << 30) ? 0 : column0 / GROUP, group) * total) + before;
}

