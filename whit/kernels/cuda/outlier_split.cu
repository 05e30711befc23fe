// LLM.int8() for many tokens, before `outlier_product.cu`: which columns are outliers, codes of the others, and the
// outlier columns of inputs and weight side by side in 16 bit, with zeros up to a multiple of 64.
//
// Codes are those of the plain meaning bit for bit: products and sums are not fused, and the largest magnitude of a token
// is found among the bits of its 16-bit numbers, whose order is theirs; NaN, above infinity, spreads.

#define COLUMNS_AT_ONCE 256  // of `mark_columns`, by a warp
#define LEVELS 127.0f
#define ROUNDER 12582912.0f  // 1.5 2^23: a float has no fraction beyond it
#define SMALLEST 0x1p-100f

// flags (shares, words) uint32: bit j of word i says whether column 32 i + j reaches the threshold in a share of the tokens.
extern "C" __global__ void __launch_bounds__(256)
mark_columns(const u16* x, u8* flags, int tokens, int columns, int share, float threshold) {
    __shared__ u8 found[8][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int strips = (columns + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE, strip = blockIdx.x % strips, part = blockIdx.x / strips;
    const int from = strip * COLUMNS_AT_ONCE + lane * 8, last = min(part * share + share, tokens);
    wait_for_previous_kernel();  // the next kernel starts only after that: it reads x, and waits for the flags alone
    start_next_kernel();
    u32 most[4] = {0, 0, 0, 0};
    if (from < columns)
#pragma unroll 4
        for (int token = part * share + warp; token < last; token += 8) {
            const uint4 v = *(const uint4*)(x + (size_t)token * columns + from);
            most[0] = larger_pair(most[0], v.x), most[1] = larger_pair(most[1], v.y), most[2] = larger_pair(most[2], v.z), most[3] = larger_pair(most[3], v.w);
        }
    int bits = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) bits |= (float_of_x((u16)(most[i / 2] >> (16 * (i % 2)))) >= threshold) << i;
    found[warp][lane] = bits;
    __syncthreads();
    const int width = (columns + 31) / 32 * 4;
    if (warp == 0 && from / 8 < width) {
#pragma unroll
        for (int i = 1; i < 8; i++) bits |= found[i][lane];
        flags[part * width + from / 8] = bits;
    }
}

struct Split {
    const u16* x;
    const u32* flags;
    const int* index;       // stored columns
    const short* place;     // of a column among them, or -1
    const signed char* codes;
    const u16* wide;        // (rows, stored)
    signed char* rounded;
    float* largest;
    u16* loose_inputs;
    u16* loose_weight;
    u16* placed_inputs;
    u16* placed_weight;
    int* counts;
    int tokens, rows, columns, stored, shares, capacity, placed_capacity, weight_blocks;
};

// The outlier columns of a mask, ascending, and how many; all threads.
__device__ __forceinline__ int list_columns(const u32* mask, int words, u16* list, int* sums) {
    constexpr int EACH = (WORDS + 255) / 256;  // words of a thread
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = threadIdx.x * EACH;
    u32 own[EACH];
    int count = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        own[i] = first + i < words ? mask[first + i] : 0;
        count += __popc(own[i]);
    }
    int before = count;  // of this thread and the lanes before it
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, before, step);
        if (lane >= step) before += other;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    int all = 0;
    before -= count;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i < warp) before += sums[i];
        all += sums[i];
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
        for (u32 rest = own[i]; rest; rest &= rest - 1) list[before++] = (u16)((first + i) * 32 + __ffs(rest) - 1);
    __syncthreads();
    return all;
}

// Listed columns of a row of x, zeros up to a multiple of 64.
__device__ __forceinline__ void gather_inputs(const u16* from, const u16* list, int count, u16* to) {
    for (int i = threadIdx.x; i < (count + 63) / 64 * 64; i += 256) to[i] = i < count ? from[list[i]] : (u16)0;
}

extern "C" __global__ void __launch_bounds__(256)
split_tokens(Split s) {
    extern __shared__ __align__(16) u8 memory[];
    const int words = (s.columns + 31) / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32* const mask = (u32*)memory;
    u32* const own_mask = mask + WORDS;                  // of one list
    u32* const most = own_mask + WORDS;                  // [2][8]
    int* const sums = (int*)(most + 16);                 // [8]
    u16* const list = (u16*)(sums + 8);
    u16* const placed_list = list + (LOOSE ? WORDS * 32 : 0);
    const bool rounds = (int)blockIdx.x >= s.weight_blocks;
    const int block = rounds ? blockIdx.x - s.weight_blocks : blockIdx.x, blocks = rounds ? gridDim.x - s.weight_blocks : s.weight_blocks;
    start_next_kernel();
    uint4 next[ITEMS];
    auto fetch = [&](int token) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int column = (i * 256 + threadIdx.x) * 8;
            next[i] = token < s.tokens && column < s.columns ? *(const uint4*)(s.x + (size_t)token * s.columns + column) : make_uint4(0, 0, 0, 0);
        }
    };
    if (!COUNTED) wait_for_previous_kernel();
    if (rounds) fetch(block);
    if (COUNTED) {
        wait_for_previous_kernel();
        for (int i = threadIdx.x; i < words; i += 256) {
            u32 found = 0;
#pragma unroll
            for (int part = 0; part < MOST_SHARES; part++) found |= part < s.shares ? s.flags[part * words + i] : 0;
            mask[i] = found;
        }
    } else {
        for (int i = threadIdx.x; i < words; i += 256) mask[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < s.stored; i += 256) atomicOr(mask + s.index[i] / 32, 1u << s.index[i] % 32);
    }
    __syncthreads();
    int loose = 0, placed = 0;
    if (PLACED) {  // those with a 16-bit weight and those without
        for (int i = threadIdx.x; i < words; i += 256) own_mask[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < s.stored; i += 256) {
            const int column = s.index[i];
            if (mask[column / 32] >> column % 32 & 1) atomicOr(own_mask + column / 32, 1u << column % 32);
        }
        __syncthreads();
        placed = list_columns(own_mask, words, placed_list, sums);
        for (int i = threadIdx.x; i < words; i += 256) own_mask[i] = mask[i] & ~own_mask[i];
        __syncthreads();
    }
    if (LOOSE) loose = list_columns(PLACED ? own_mask : mask, words, list, sums);
    if (blockIdx.x == 0 && threadIdx.x == 0) s.counts[0] = loose, s.counts[1] = placed;

    if (!rounds) {
        if (LOOSE) {
            const int pairs = (loose + 63) / 64 * 32, rows = block < s.rows ? (s.rows - block + blocks - 1) / blocks : 0;
#pragma unroll 4
            for (int cell = threadIdx.x; cell < rows * pairs; cell += 256) {
                const int row = block + cell / pairs * blocks, i = cell % pairs * 2;
                const signed char* const from = s.codes + (size_t)row * s.columns;
                const float low = i < loose ? from[list[i]] : 0, high = i + 1 < loose ? from[list[i + 1]] : 0;
                *(u32*)(s.loose_weight + (size_t)row * s.capacity + i) = pair_of_floats(low, high);
            }
        }
        if (PLACED) {
            const int width = (placed + 63) / 64 * 64, rows = block < s.rows ? (s.rows - block + blocks - 1) / blocks : 0;
            for (int cell = threadIdx.x; cell < rows * width; cell += 256) {
                const int row = block + cell / width * blocks, i = cell % width;
                s.placed_weight[(size_t)row * s.placed_capacity + i] = i < placed ? s.wide[(size_t)row * s.stored + s.place[placed_list[i]]] : (u16)0;
            }
        }
        return;
    }
    const u8* const bytes = (const u8*)mask;
    int side = 0;
    for (int token = block; token < s.tokens; token += blocks, side ^= 1) {
        uint4 given[ITEMS];
        u32 largest = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int byte = i * 256 + threadIdx.x, marks = byte < words * 4 ? bytes[byte] : 0;
            given[i] = next[i];
            u32* const pairs = (u32*)&given[i];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                if (marks) pairs[p] &= (marks >> 2 * p & 1 ? 0 : 0xffffu) | (marks >> 2 * p & 2 ? 0 : 0xffff0000u);
                largest = larger_integers(largest, pairs[p] & 0x7fff7fffu);
            }
        }
        fetch(token + blocks);
        largest = max(largest & 0xffffu, largest >> 16);
        largest = __reduce_max_sync(0xffffffffu, largest);
        if (lane == 0) most[side * 8 + warp] = largest;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) largest = max(largest, most[side * 8 + i]);
        const float absmax = float_of_x((u16)largest), factor = __fmul_rn(__fdiv_rn(1.0f, fmaxf(absmax, SMALLEST)), LEVELS);
        if (threadIdx.x == 0) s.largest[token] = absmax;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int column = (i * 256 + threadIdx.x) * 8;
            const u32* const pairs = (const u32*)&given[i];
            u32 code[8];
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const float value = __fmul_rn(float_of_x((u16)(pairs[e / 2] >> (16 * (e % 2)))), factor);
                code[e] = __float_as_uint(__fadd_rn(fminf(fmaxf(value, -LEVELS), LEVELS), ROUNDER));
            }
            u32 two[2];
#pragma unroll
            for (int h = 0; h < 2; h++)
                two[h] = __byte_perm(__byte_perm(code[4 * h], code[4 * h + 1], 0x0040), __byte_perm(code[4 * h + 2], code[4 * h + 3], 0x0040), 0x5410);
            if (column < s.columns) *(uint2*)(s.rounded + (size_t)token * s.columns + column) = make_uint2(two[0], two[1]);
        }
        if (LOOSE) gather_inputs(s.x + (size_t)token * s.columns, list, loose, s.loose_inputs + (size_t)token * s.capacity);
        if (PLACED) gather_inputs(s.x + (size_t)token * s.columns, placed_list, placed, s.placed_inputs + (size_t)token * s.placed_capacity);
    }
}
