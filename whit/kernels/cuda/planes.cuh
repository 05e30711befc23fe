// x as bit planes, for the binary tensor cores: 16-bit fixed point (20-bit for codes of three bits) relative to the largest
// magnitude of its 128 columns (256 where groups are multiples of them), two's complement. Word q of plane t of a block is what lane 4 (t % 8) + q of a product
// takes for octet t / 8; bits lie in it as those of the packed codes do.

#define RAW (CODE_BITS == 3)
#define OCTETS (RAW ? 3 : 2)                        // products (of eight columns) per plane
#define KINDS (KIND == BINARY_RESIDUAL ? 2 : 1)     // marked columns have planes of x of their own
#define X_WORDS (RAW ? 3 * 3 * 32 : KINDS * 2 * 32)
#define X_FACTORS 2  // pairs of floats per block: value of a unit, sum of x in units; sum over marked columns in units, nothing
#define WIDTH (!RAW && GROUP % 256 == 0 && BLOCKS % 2 == 0 ? 2 : 1)  // blocks that share a unit, where they share a group
// Sums come with this factor. What makes up for it is multiplied to the value of a unit as far as the largest
// bfloat16 leaves room, and the rest at the end.
#define SUM_UNIT (RAW ? 5.9604644775390625e-8f : 1.52587890625e-5f)
#define UNIT_LEFT (RAW ? 32.0f : 2.0f)
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

// Bit i of byte j becomes bit j of byte i (bytes 0 to 3 in x, 4 to 7 in y).
__device__ __forceinline__ void transpose_bits(u32& x, u32& y) {
    u32 t = (x ^ x >> 7) & 0x00aa00aau;
    x ^= t ^ t << 7;
    t = (y ^ y >> 7) & 0x00aa00aau;
    y ^= t ^ t << 7;
    t = (x ^ x >> 14) & 0x0000ccccu;
    x ^= t ^ t << 14;
    t = (y ^ y >> 14) & 0x0000ccccu;
    y ^= t ^ t << 14;
    t = (x & 0x0f0f0f0fu) | (y << 4 & 0xf0f0f0f0u);
    y = (x >> 4 & 0x0f0f0f0fu) | (y & 0xf0f0f0f0u);
    x = t;
}
// The eight columns whose bits share a byte of a plane, as pairs of 16 bits: those from `column` on, or with two-bit codes
// four from there and, between them, the four that are 16 further.
__device__ __forceinline__ void load_eight(u32 (&pair)[4], const u16* from) {
    if (CODE_BITS == 2) {
        const uint2 a = INPUT ? load_x<uint2>(from) : read_eight(from), b = INPUT ? load_x<uint2>(from + 16) : read_eight(from + 16);
        pair[0] = __byte_perm(a.x, b.x, 0x5410), pair[1] = __byte_perm(a.x, b.x, 0x7632);
        pair[2] = __byte_perm(a.y, b.y, 0x5410), pair[3] = __byte_perm(a.y, b.y, 0x7632);
    } else {
        const uint4 v = INPUT ? load_x<uint4>(from) : read_sixteen(from);
        pair[0] = v.x, pair[1] = v.y, pair[2] = v.z, pair[3] = v.w;
    }
}
__device__ __forceinline__ void load_eight(u32 (&pair)[4], const u16* x, int column, int columns) {
    if (column + (CODE_BITS == 2 ? 20 : 8) <= columns && ((u64)x & 15) == 0) return load_eight(pair, X_AT(x, column));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int first = column + (CODE_BITS == 2 ? i : 2 * i), second = first + (CODE_BITS == 2 ? 16 : 1);
        pair[i] = (first < columns ? load_x<u16>(X_AT(x, first)) : 0u) | (second < columns ? (u32)load_x<u16>(X_AT(x, second)) : 0u) << 16;
    }
}
#if RAW
// Position p of the packed row is bit p % 3 of code p / 3; the bits of x are shifted to meet it: plane t of a code's bit b is
// bit t - b of x, and planes 21 to 23 are the sign. Word 3 i + o of a lane, position word i of octet o: words 0 to 7 lie in
// fours, word 8 behind them.
__device__ __forceinline__ u32* raw_word(u32* words, int word, int lane) {
    return word < 8 ? words + (word >> 2) * 128 + lane * 4 + (word & 3) : words + 256 + lane;
}
__device__ __forceinline__ u32 spread(u32 word, int byte) {  // bit i of the byte becomes bit 3 i
    u32 x = __byte_perm(word, 0, 0x4400 | byte * 0x11) & 0xf00fu;
    x = (x | x << 4) & 0x0c30c3u;
    return (x | x << 2) & 0x249249u;
}
__device__ __forceinline__ void keep_planes(u32* words, const u32 (&fixed)[8], u32, int q, int k, bool there, int&) {
    u32 plane[6];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 first = __byte_perm(fixed[4 * i], fixed[4 * i + 1], 0x5140), second = __byte_perm(fixed[4 * i + 2], fixed[4 * i + 3], 0x5140);
        plane[i] = __byte_perm(first, second, 0x5410);
        plane[i + 2] = __byte_perm(first, second, 0x7632);
        plane[i + 4] = __byte_perm(__byte_perm(fixed[4 * i], fixed[4 * i + 1], 0x62), __byte_perm(fixed[4 * i + 2], fixed[4 * i + 3], 0x62), 0x5410);
    }
#pragma unroll
    for (int i = 0; i < 6; i += 2) transpose_bits(plane[i], plane[i + 1]);
    const u32 sign = spread(plane[4], 3);
    const bool odd = k & 1, upper = k & 2;
    u32 before = 0, earlier = 0;
#pragma unroll
    for (int g = 0; g < 6; g++) {
        u32 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = 4 * g + i;
            const u32 now = t <= 18 ? spread(plane[t / 4 % 6], t % 4) : 0u;
            v[i] = t <= 20 ? now | before << 1 | earlier << 2 : sign << (t - 21);
            earlier = before, before = now;
        }
        // the 24 bits of plane 4 g + k from the four lanes of the 32 columns
        const u32 first = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1), second = __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);
        const u32 a0 = odd ? first : v[0], a1 = odd ? v[1] : first, b0 = odd ? second : v[2], b1 = odd ? v[3] : second;
        const u32 c0 = __shfl_xor_sync(0xffffffffu, upper ? a0 : b0, 2), c1 = __shfl_xor_sync(0xffffffffu, upper ? a1 : b1, 2);
        const u32 part[4] = {upper ? c0 : a0, upper ? c1 : a1, upper ? b0 : c0, upper ? b1 : c1};
        const int to = (4 * (g & 1) + k) * 4 + q, octet = g >> 1;
        if (there) {
            *raw_word(words, octet, to) = part[0] | part[1] << 24;
            *raw_word(words, 3 + octet, to) = part[1] >> 8 | part[2] << 16;
            *raw_word(words, 6 + octet, to) = part[2] >> 16 | part[3] << 8;
        }
    }
}
#else
__device__ __forceinline__ void keep_planes(u32* words, const u32 (&fixed)[8], u32 marks, int q, int k, bool there, int& marked) {
    u32 plane[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 first = __byte_perm(fixed[4 * i], fixed[4 * i + 1], 0x5140), second = __byte_perm(fixed[4 * i + 2], fixed[4 * i + 3], 0x5140);
        plane[i] = __byte_perm(first, second, 0x5410);
        plane[i + 2] = __byte_perm(first, second, 0x7632);
    }
    transpose_bits(plane[0], plane[1]);
    transpose_bits(plane[2], plane[3]);
    // the bytes of four lanes change places so that each lane has whole words, of planes 4 i + k
    const u32 by_one = k & 1 ? 0x3715u : 0x6240u, by_two = k & 2 ? 0x3276u : 0x5410u;
#pragma unroll
    for (int i = 0; i < 4; i++) plane[i] = __byte_perm(plane[i], __shfl_xor_sync(0xffffffffu, plane[i], 1), by_one);
#pragma unroll
    for (int i = 0; i < 4; i++) plane[i] = __byte_perm(plane[i], __shfl_xor_sync(0xffffffffu, plane[i], 2), by_two);
    if (HAS_MARKS) {
        marks |= __shfl_xor_sync(0xffffffffu, marks, 1);
        marks |= __shfl_xor_sync(0xffffffffu, marks, 2);
#pragma unroll
        for (int i = 0; i < 4 && KIND == BINARY_RESIDUAL; i++) marked += __popc(plane[i] & marks) * (i == 3 && k == 3 ? -32768 : 1 << (4 * i + k));
    }
    if (!there) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32* out = words + ((4 * i + k) * 4 + q) * (2 * KINDS * WIDTH);
        if (WIDTH == 2) {  // the words of both blocks side by side
            out[0] = plane[i] & ~marks, out[2] = plane[i + 2] & ~marks;
            if (KIND == BINARY_RESIDUAL) out[4] = plane[i] & marks, out[6] = plane[i + 2] & marks;
        } else if (KIND == BINARY_RESIDUAL)
            *(uint4*)out = make_uint4(plane[i] & ~marks, plane[i + 2] & ~marks, plane[i] & marks, plane[i + 2] & marks);
        else
            *(uint2*)out = make_uint2(plane[i], plane[i + 2]);
    }
}
#endif
// The largest, and the sum, of sixteen lanes (of all for WIDTH 2).
__device__ __forceinline__ u32 largest_of(u32 value, int lane) {
    if (WIDTH == 2) return __reduce_max_sync(0xffffffffu, value);
    const u32 low = __reduce_max_sync(0xffffffffu, lane < 16 ? value : 0u), high = __reduce_max_sync(0xffffffffu, lane < 16 ? 0u : value);
    return lane < 16 ? low : high;
}
__device__ __forceinline__ int sum_of_sixteen(int value, int lane) {
    const int low = __reduce_add_sync(0xffffffffu, lane < 16 ? value : 0), high = __reduce_add_sync(0xffffffffu, lane < 16 ? 0 : value);
    return lane < 16 ? low : high;
}
// Of signed levels: which columns stand behind all others once more, eight for a lane, and then they themselves. With INPUT
// all of x lies in shared memory, and these are brought to their place before the planes overwrite it.
__device__ __forceinline__ void load_numbers(u32 (&eight)[4], const u8* salient, int at, int columns, int last) {
    const int own = (columns + 255) & ~255;
    if (at < own || at >= last) return;
    const uint4 four = __ldg((const uint4*)(salient + own / 8 + 2 * (at - own)));
    eight[0] = four.x, eight[1] = four.y, eight[2] = four.z, eight[3] = four.w;
}
__device__ __forceinline__ bool gather_eight(u32 (&eight)[4], const u16* x, int at, int columns, int last) {
    if (at < ((columns + 255) & ~255) || at >= last) return false;
    if (INPUT) {
        const uint4 v = load_x<uint4>(X_AT(x, at));
        eight[0] = v.x, eight[1] = v.y, eight[2] = v.z, eight[3] = v.w;
        return true;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int first = eight[i] & 0xffffu, second = eight[i] >> 16;
        eight[i] = (first < columns ? (u32)load_x<u16>(X_AT(x, first)) : 0u) | (second < columns ? (u32)load_x<u16>(X_AT(x, second)) : 0u) << 16;
    }
    return true;
}
__device__ __forceinline__ void gather_marked(u32* shared, const Weight& w) {
    const u16* const x = (const u16*)shared;
    const int own = ORDINARY(w);
    for (int at = own + 2 * threadIdx.x; at < SPAN(w); at += 2 * THREADS) {
        const u32 numbers = __ldg((const u32*)(w.salient + own / 8 + 2 * (at - own)));
        const int first = numbers & 0xffffu, second = numbers >> 16;
        *(u32*)X_AT(x, at) = (first < w.columns ? (u32)load_x<u16>(X_AT(x, first)) : 0u) | (second < w.columns ? (u32)load_x<u16>(X_AT(x, second)) : 0u) << 16;
    }
    __syncthreads();
}
// Sixteen lanes bring a block of 128 columns into its planes, each a byte of every plane: eight columns are transposed in
// registers. The half warps of the STAGING_BLOCKS thread blocks of a cluster take turns: a warp asks for its LOADS turns at
// once and works on TURNS together (of which LOADS is a multiple), since one alone is mostly latency. X_WHOLE: the columns
// are a multiple of 32, and x starts at a multiple of 16 bytes. `x_has_come` is called once, with a number that is not known
// before.
template <class Here>
__device__ __forceinline__ void stage_x(u32* words, float2* factors, const u16* x, const u8* salient, int column0, int blocks, int columns, int warp, int lane, bool wait, const Here& x_has_come) {
    constexpr int STEP = 256 * STAGERS;  // columns of a turn
    const int q = lane >> 2 & 3, k = lane & 3;
    int both = 2 * (blockIdx.x % STAGING_BLOCKS * WARPS + warp);
    u32 next[LOADS][4], next_marks[LOADS] = {};
    int column = column0 + (both + (lane >> 4)) * 128 + 32 * q + (CODE_BITS == 2 ? 4 : 8) * k;  // of the turn to come
    const int last = column0 + blocks * 128;
    int end = min(columns, last);
    const u16* from = x + column;
    known(column, end, from);  // before the wait
    const auto load_marks = [&]() {
#pragma unroll
        for (int turn = 0; turn < LOADS; turn++)
            if (HAS_MARKS) next_marks[turn] = column + turn * STEP < end ? (u32)__ldg(salient + ((column + turn * STEP) >> 3)) << (8 * k) : 0u;
#pragma unroll
        for (int turn = 0; turn < LOADS; turn++)
            if (KIND == SIGNED_LEVELS && INPUT == 0) load_numbers(next[turn], salient, column + turn * STEP, columns, last);
    };
    const auto load = [&]() {
#pragma unroll
        for (int turn = 0; turn < LOADS; turn++) {
            const int at = column + turn * STEP;
#if X_WHOLE
            if (KIND == SIGNED_LEVELS && gather_eight(next[turn], x, at, columns, last)) continue;
            next[turn][0] = next[turn][1] = next[turn][2] = next[turn][3] = 0u;
            if (at < end) load_eight(next[turn], INPUT ? X_AT(x, at) : from + turn * STEP);
#else
            if (KIND == SIGNED_LEVELS && gather_eight(next[turn], x, at, columns, last)) continue;
            load_eight(next[turn], x, at, at < end ? columns : 0);
#endif
        }
    };
    load_marks();  // no kernel's result
    if (wait) wait_for_previous_kernel();
    MARK(2, 0u);
    bool told = false;
    while (both < blocks) {
        load();
#pragma unroll 1
        for (int done = 0; done < LOADS && both < blocks; done += TURNS) {
            const int first = both + (lane >> 4);
            u32 pair[TURNS][4], fixed[TURNS][8], largest[TURNS];
            Unit unit[TURNS];
            int total[TURNS], marked[TURNS];
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                u32 high = 0, low = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    pair[turn][i] = next[turn][i];
                    high = max(high, pair[turn][i] & 0x7fff0000u), low = max(low, pair[turn][i] & 0x7fffu);
                }
                largest[turn] = max(high >> 16, low);
            }
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) largest[turn] = largest_of(largest[turn], lane);
            MARK(3, largest[0]);
            if (!told) x_has_come(largest[0]);
            told = true;
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                unit[turn] = unit_of(float_of_x((u16)largest[turn]), RAW ? 524287.0f : 32767.0f);
                total[turn] = marked[turn] = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) {  // adding 1.5 x 2^23 leaves the nearest integer in the lower bits
                    fixed[turn][i] = __float_as_uint(float_of_x((u16)(pair[turn][i / 2] >> (16 * (i % 2)))) * unit[turn].up + 12582912.0f);
                    total[turn] += (int)(fixed[turn][i] - 0x4b400000u);
                }
            }
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                const int block = first + turn * (2 * STAGERS);
                keep_planes(words + (WIDTH == 2 ? (block & ~1) * X_WORDS + (block & 1) : block * X_WORDS), fixed[turn], next_marks[turn], q, k, block < blocks, marked[turn]);
            }
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                const int block = first + turn * (2 * STAGERS), all = sum_of_sixteen(total[turn], lane);
                const int of_marked = KIND == BINARY_RESIDUAL ? sum_of_sixteen(marked[turn], lane) : 0;
                if (block < blocks && (lane & 15) == 0)
                    *(float4*)(factors + block * X_FACTORS) = float4{unit[turn].down * (1.0f / (SUM_UNIT * UNIT_LEFT)), (float)(all - of_marked) * SUM_UNIT, (float)of_marked * SUM_UNIT, 0.0f};
            }
#pragma unroll
            for (int turn = 0; turn + TURNS < LOADS; turn++) {
#pragma unroll
                for (int i = 0; i < 4; i++) next[turn][i] = next[turn + TURNS][i];
                next_marks[turn] = next_marks[turn + TURNS];
            }
            both += 2 * STAGERS * TURNS;
        }
        column += STEP * LOADS, from += STEP * LOADS;
        if (both < blocks) load_marks();
    }
    if (!told) x_has_come(0);
}

// What the other blocks of the cluster have staged.
__device__ __forceinline__ void fetch_staged(u32* words, float2* factors, int blocks) {
    constexpr int WORD_PIECES = X_WORDS / 4, PIECES = WORD_PIECES + X_FACTORS / 2;
    for (int piece = threadIdx.x; piece < blocks * PIECES; piece += THREADS) {
        const int block = piece / PIECES, at = piece % PIECES, owner = block / 2 % STAGERS / WARPS;
        uint4* own = at < WORD_PIECES ? (uint4*)(words + block * X_WORDS) + at : (uint4*)(factors + block * X_FACTORS);
        if (owner != (int)(blockIdx.x % STAGING_BLOCKS)) *own = peer_words(own, owner);
    }
}
