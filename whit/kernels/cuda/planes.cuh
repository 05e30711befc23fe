// x as bit planes, for the binary tensor cores: 16-bit fixed point relative to the largest magnitude of its 128 columns (256
// where groups are multiples of them), two's complement. Word q of plane t of a block is what lane 4 (t % 8) + q of a product
// takes for octet t / 8; bits lie in it as those of the packed codes do.

#define PARTS (GROUP % 128 ? 2 : 1)  // of a block of 128 columns, each in a group of its own
#define RAW (KIND == GROUPED_INTEGER && (CODE_BITS > 2 || CODE_BITS == 2 && PARTS == 2))  // codes go in unparted
#define THIRDS (CODE_BITS == 3 && PARTS == 1)       // three words of a row for each lane and block
#define PARTED (CODE_BITS == 2 && !RAW)
#define OCTETS (RAW ? 3 : 2)                        // products (of eight columns) per plane
#define KINDS (KIND == BINARY_RESIDUAL ? 2 : 1)     // marked columns have planes of x of their own
// Words of 128 columns, and raw of 64, with some that are not used, so that stores meet other banks.
#define HALF_WORDS (CODE_BITS == 2 ? 96 : 208)
#define X_WORDS (THIRDS ? 3 * 3 * 32 + 16 : RAW ? 2 * HALF_WORDS + (CODE_BITS == 2 ? 16 : 4) : KINDS * 2 * 32)
#define X_FACTORS 2  // pairs of floats per block: value of a unit, sum of x in units; sum over marked columns (of the second part) in units, nothing
#define WIDTH (!RAW && GROUP % 256 == 0 && BLOCKS % 2 == 0 ? 2 : 1)  // blocks that share a unit, where they share a group
// Whether counts are weighed as bytes (`bits.cuh`). Then x is two signed digits of eight bits, so plane 7 is a sign like
// plane 15, and the largest is 127 * 256 + 127.
#define DIGITS (!RAW && WIDTH == 1)
#define MOST (DIGITS ? 32639.0f : 32767.0f)
#define ZERO_BITS (0x4b400000u + (DIGITS ? 128u : 0u))  // of a column that is zero, before its lower digit is one
// Sums come with this factor. What makes up for it is multiplied to the value of a unit as far as the largest
// bfloat16 leaves room, and the rest at the end.
#define SUM_UNIT (DIGITS ? 1.0f : RAW ? 5.9604644775390625e-8f : 1.52587890625e-5f)
#define UNIT_LEFT (DIGITS ? 1.0f : RAW ? 512.0f : 2.0f)
#define FIRST_SIGN (14 + CODE_BITS)                  // raw: plane from which on signs lie, one for each bit of a code
#define PLANES_OF_X (FIRST_SIGN + CODE_BITS)         // others of the third octet weigh nothing, whatever they are
#define STAGERS (WARPS * STAGING_BLOCKS)
#define ORDINARY(w) (((w).columns + 255) & ~255)  // signed levels: where the marked columns come once more

// What a unit is worth, and how many units a value is.
struct Unit {
    float down, up;
};
__device__ __forceinline__ Unit unit_of(float magnitude, float most) {
    const bool tiny = magnitude < 1e-30f;  // (false for NaN, which must reach the result)
    const float part = 0.00390625f;        // __fdividef is zero for divisors above 2^126
    return {tiny ? 0.0f : magnitude * (1.0f / most), tiny ? 0.0f : __fdividef(most * part, magnitude * part)};
}

__device__ __forceinline__ u32 larger_integers(u32 a, u32 b) { return __vmaxu2(a, b); }
// The bits of sixteen columns, of which column i is the lower and column i + 8 the upper half of what comes in register i:
// plane w of them in the lower half of register w, plane w + 8 in its upper half. The columns' bytes have met already, by the
// order 0 of the lower, 0 of the upper, 1 of the lower, 1 of the upper, so bits change places between registers alone.
__device__ __forceinline__ void planes_of_sixteen(u32 (&v)[8]) {
#pragma unroll
    for (int apart = 4; apart > 0; apart /= 2) {
        const u32 mask = apart == 4 ? 0x0f0f0f0fu : apart == 2 ? 0x33333333u : 0x55555555u;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i & apart) continue;
            const u32 a = v[i], b = v[i + apart];
            v[i] = (a & mask) | (b << apart & ~mask);
            v[i + apart] = (a >> apart & mask) | (b & ~mask);
        }
    }
}
// Eight columns from `column` on, as pairs of 16 bits.
__device__ __forceinline__ void load_eight(u32* pair, const u16* from) {
    const uint4 v = INPUT ? load_x<uint4>(from) : read_sixteen(from);
    pair[0] = v.x, pair[1] = v.y, pair[2] = v.z, pair[3] = v.w;
}
__device__ __forceinline__ void load_eight(u32* pair, const u16* x, int column, int columns) {
    if (column + 8 <= columns && ((u64)x & 15) == 0) return load_eight(pair, X_AT(x, column));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int first = column + 2 * i, second = first + 1;
        pair[i] = (first < columns ? load_x<u16>(X_AT(x, first)) : 0u) | (second < columns ? (u32)load_x<u16>(X_AT(x, second)) : 0u) << 16;
    }
}
// Which cell of a block of columns a lane of the product finds its words in: stores and loads both meet all banks.
__device__ __forceinline__ int cell_of(int lane, int block) { return lane ^ (lane >> 4 << 2) ^ (KINDS * WIDTH == 1 ? (block & 1) << 3 : 0); }
#if RAW
// Position p of the packed row is bit p % BITS of code p / BITS; the bits of x are shifted to meet it: plane t of a code's
// bit b is bit t - b of x, and the last planes are the sign. Groups of 128 columns of three bits: word 3 i + o of a lane,
// position word i of octet o, words 0 to 7 in fours, word 8 behind them. Otherwise every 64 columns have products of their
// own, of one word of a lane (two bits) or two (three bits, of which lanes 2 and 3 of a quad have one; four bits).

// Where position word `word` of the 32 columns `q` (0 to BITS - 1) lies for plane t.
__device__ __forceinline__ u32* place_of_word(u32* words, int q, int word, int t) {
    if (THIRDS) {
        const int at = 3 * word + t / 8, lane = t % 8 * 4 + q;
        return at < 8 ? words + (at >> 2) * 128 + lane * 4 + (at & 3) : words + 256 + lane;
    }
    const int half = q >> 1, in_half = (q & 1) * CODE_BITS + word, lane = t % 8 * 4 + (in_half & 3);
    const int at = CODE_BITS == 2 ? half * 3 + t / 8 : t / 8 * 2 + (in_half >> 2);
    return words + (CODE_BITS == 2 ? 0 : half * HALF_WORDS) + (at < 4 ? lane * 4 + at : 128 + lane * 2 + at - 4);
}
__device__ __forceinline__ u32 spread(u32 word, int byte) {  // bit i of the byte becomes bit BITS i
    if (CODE_BITS == 3) {
        u32 x = __byte_perm(word, 0, 0x4400 | byte * 0x11) & 0xf00fu;
        x = (x | x << 4) & 0x0c30c3u;
        return (x | x << 2) & 0x249249u;
    }
    u32 x = __byte_perm(word, 0, 0x4440 | byte) * 0x1001u & 0x000f000fu;  // what is added has no bit in common
    x = x * 0x41u & 0x03030303u;
    return x * 9u & 0x11111111u;
}
__device__ __forceinline__ u32 spread_two(u32 word, bool upper) {  // bit i of the half becomes bit 2 i
    u32 x = __byte_perm(word, 0, upper ? 0x4342 : 0x4140);
    x = (x | x << 4) & 0x0f0f0f0fu;
    x = (x | x << 2) & 0x33333333u;
    return (x | x << 1) & 0x55555555u;
}
__device__ __forceinline__ void keep_planes(u32* words, u32 (&v)[8], u32, int q, int half, int, bool there, int&) {
    constexpr int BYTES = CODE_BITS == 2 ? 1 : 2;                             // parts of the lane's sixteen columns that are spread
    constexpr u32 KEPT = CODE_BITS == 4 ? 0xeeeeeeeeu : CODE_BITS == 3 ? 0xdb6db6u : 0xaaaaaaaau;
    planes_of_sixteen(v);
    u32 before[BYTES] = {}, sign[BYTES];
#pragma unroll
    for (int i = 0; i < BYTES; i++) sign[i] = CODE_BITS == 2 ? spread_two(v[7], true) : spread(v[7], 2 + i);
#pragma unroll
    for (int t = 0; t < PLANES_OF_X; t++) {
        u32 word[BYTES];
#pragma unroll
        for (int i = 0; i < BYTES; i++) {  // what the plane before has moves up by one bit of a code
            const u32 own = t >= 15 ? 0u : CODE_BITS == 2 ? spread_two(v[t % 8], t >= 8) : spread(v[t % 8], t / 8 * 2 + i);
            before[i] = (before[i] << 1 & KEPT) | own;
            word[i] = t >= FIRST_SIGN ? sign[i] << (t - FIRST_SIGN) : before[i];
        }
        if (!there) continue;
        if (CODE_BITS == 2)
            *place_of_word(words, q, half, t) = word[0];
        else if (CODE_BITS == 4)
#pragma unroll
            for (int i = 0; i < BYTES; i++) *place_of_word(words, q, 2 * half + i, t) = word[i];
        else {  // 48 bits: a word and a half
            const u32 low = word[0] | word[1] << 24, high = word[1 % BYTES] >> 8;
            *place_of_word(words, q, 2 * half, t) = half ? low >> 16 | high << 16 : low;
            ((u16*)place_of_word(words, q, 1, t))[half] = (u16)(half ? low : high);
            if (!THIRDS && half) *place_of_word(words, q | 1, 3 + (q & 1), t) = 0u;
        }
    }
}
#else
__device__ __forceinline__ void keep_planes(u32* words, u32 (&v)[8], u32 marks, int q, int half, int block, bool there, int& marked) {
    planes_of_sixteen(v);
    if (DIGITS) v[7] ^= 0x0000ffffu;  // 128 was added, which turned bit 7 over
    // two lanes share 32 columns: one takes their words of planes 0 to 3 and 8 to 11, the other those of the others
    const u32 lower = half ? 0x1054u : 0x5410u, upper = half ? 0x3276u : 0x7632u;
    u32 plane[2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 own = half ? v[i + 4] : v[i], other = __shfl_xor_sync(0xffffffffu, half ? v[i] : v[i + 4], 1);
        plane[0][i] = choose_bytes(own, other, lower), plane[1][i] = choose_bytes(own, other, upper);
    }
    if (KIND == BINARY_RESIDUAL) {
#pragma unroll
        for (int o = 0; o < 2; o++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int ones = __popc(plane[o][i] & marks) << (8 * o + i);
                marked += (DIGITS || o == 1) && i == 3 && half ? -(ones << 4) : half ? ones << 4 : ones;
            }
    }
    if (!there) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32* out = words + cell_of((4 * half + i) * 4 + q, block) * (2 * KINDS * WIDTH);
        if (WIDTH == 2) {  // the words of both blocks side by side
            out[0] = plane[0][i] & ~marks, out[2] = plane[1][i] & ~marks;
            if (KIND == BINARY_RESIDUAL) out[4] = plane[0][i] & marks, out[6] = plane[1][i] & marks;
        } else if (KIND == BINARY_RESIDUAL)
            *(uint4*)out = make_uint4(plane[0][i] & ~marks, plane[1][i] & ~marks, plane[0][i] & marks, plane[1][i] & marks);
        else
            *(uint2*)out = make_uint2(plane[0][i], plane[1][i]);
    }
}
#endif
