// Brings x into its bit planes (`planes.cuh`), shared among the warps of a thread block and the blocks of a cluster.

// The sum of the eight lanes of a block, or of the four of a part.
__device__ __forceinline__ int sum_of_lanes(int value) {
#pragma unroll
    for (int across = 1; across < 8 / PARTS; across *= 2) value += (int)__shfl_xor_sync(0xffffffffu, (u32)value, across);
    return value;
}
// The marks of the 32 columns from `column` on, below `end`.
__device__ __forceinline__ u32 marks_of(const u8* salient, int column, int end) {
#if X_WHOLE
    return column < end ? read_constant(salient + (column >> 3)) : 0u;
#else
    u32 marks = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (column + 8 * i < end) marks |= (u32)__ldg(salient + (column >> 3) + i) << (8 * i);
    return marks;
#endif
}
// Of signed levels: which columns stand behind all others once more, eight for a lane, and then they themselves. With INPUT
// all of x lies in shared memory, and these are brought to their place before the planes overwrite it.
__device__ __forceinline__ void load_numbers(u32* eight, const u8* salient, int at, int columns, int last) {
    const int own = (columns + 255) & ~255;
    if (at < own || at >= last) return;
    const uint4 four = __ldg((const uint4*)(salient + own / 8 + 2 * (at - own)));
    eight[0] = four.x, eight[1] = four.y, eight[2] = four.z, eight[3] = four.w;
}
__device__ __forceinline__ bool gather_eight(u32* eight, const u16* x, int at, int columns, int last) {
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
// Two of their numbers for a thread, which are asked for before the kernel ahead has ended.
__device__ __forceinline__ u32 first_numbers(const Weight& w) {
    const int at = ORDINARY(w) + 2 * threadIdx.x;
    return at < ((SPAN(w) + 255) & ~255) ? read_constant(w.salient + ORDINARY(w) / 8 + 4 * threadIdx.x) : 0u;
}
__device__ __forceinline__ void gather_marked(u32* shared, const Weight& w, u32 numbers) {
    const u16* const x = (const u16*)shared;
    const int own = ORDINARY(w);
    for (int at = own + 2 * threadIdx.x; at < ((SPAN(w) + 255) & ~255); at += 2 * THREADS) {  // whole pairs of blocks
        if (at >= own + 2 * THREADS) numbers = __ldg((const u32*)(w.salient + own / 8 + 2 * (at - own)));
        const int first = numbers & 0xffffu, second = numbers >> 16;
        *(u32*)X_AT(x, at) = (first < w.columns ? (u32)load_x<u16>(X_AT(x, first)) : 0u) | (second < w.columns ? (u32)load_x<u16>(X_AT(x, second)) : 0u) << 16;
    }
    __syncthreads();
}
#define TURN (512 * STAGERS)  // columns of a turn
// What a lane asks for in LOADS turns: the marks of the 32 columns around its sixteen, which before are numbers of columns
// where signed levels have marked ones once more.
struct Turns {
    u32 marks[LOADS], columns[LOADS][8];
};
__device__ __forceinline__ int first_column(int column0, int warp, int lane) {
    return column0 + (4 * (blockIdx.x % STAGING_BLOCKS * WARPS + warp) + (lane >> 3)) * 128 + 32 * (lane >> 1 & 3) + (PARTED ? 8 : 16) * (lane & 1);
}
__device__ __forceinline__ void load_marks(Turns& turns, const u8* salient, int column, int columns, int last) {
#pragma unroll
    for (int turn = 0; turn < LOADS; turn++) turns.marks[turn] = HAS_MARKS ? marks_of(salient, (column & ~31) + turn * TURN, min(columns, last)) : 0u;
#pragma unroll
    for (int turn = 0; turn < LOADS; turn++)
        for (int i = 0; i < 8 && KIND == SIGNED_LEVELS && INPUT == 0; i += 4) load_numbers(turns.columns[turn] + i, salient, column + turn * TURN + 2 * i, columns, last);
}
// Eight lanes bring a block of 128 columns into its planes, sixteen columns each. The warps of the STAGING_BLOCKS thread
// blocks of a cluster take turns of four blocks: a warp asks for its LOADS turns at once and works on TURNS together (of
// which LOADS is a multiple), since one alone is mostly latency. X_WHOLE: the columns are a multiple of 32, and x starts at a
// multiple of 16 bytes. `x_has_come` is called once, with a number that is not known before. `turns` holds
// the marks of the first ones: no kernel's result, so asked for before anything else.
template <class Here>
__device__ __forceinline__ void stage_x(Turns& turns, u32* words, float2* factors, const u16* x, const u8* salient, int column0, int blocks, int columns, int warp, int lane, bool wait, const Here& x_has_come) {
    constexpr int SECOND = PARTED ? 16 : 8;  // from a lane's first eight columns to its others
    const int q = lane >> 1 & 3, half = lane & 1;
    int four = 4 * (blockIdx.x % STAGING_BLOCKS * WARPS + warp);
    u32(&next)[LOADS][8] = turns.columns, (&next_marks)[LOADS] = turns.marks;
    int column = first_column(column0, warp, lane);  // of the turn to come
    const int last = column0 + blocks * 128;
    int end = min(columns, last);
    const u16* from = x + column;
    known(column, end, from);  // before the wait
    const auto load = [&]() {
#pragma unroll
        for (int turn = 0; turn < LOADS; turn++) {
            const int at = column + turn * TURN;
            if (KIND == SIGNED_LEVELS && gather_eight(next[turn], x, at, columns, last) && gather_eight(next[turn] + 4, x, at + 8, columns, last)) continue;
#if X_WHOLE
#pragma unroll
            for (int i = 0; i < 8; i++) next[turn][i] = 0u;
            if (at < end) {
                load_eight(next[turn], INPUT ? X_AT(x, at) : from + turn * TURN);
                load_eight(next[turn] + 4, INPUT ? X_AT(x, at + SECOND) : from + turn * TURN + SECOND);
            }
#else
            load_eight(next[turn], x, at, at < end ? columns : 0);
            load_eight(next[turn] + 4, x, at + SECOND, at < end ? columns : 0);
#endif
        }
    };
    if (wait) wait_for_previous_kernel();
    MARK(2, 0u);
    bool told = false;
    while (four < blocks) {
        load();
#pragma unroll 1
        for (int done = 0; done < LOADS && four < blocks; done += TURNS) {
            const int first = four + (lane >> 3);
            u32 fixed[TURNS][8], largest[TURNS];
            Unit unit[TURNS];
            int total[TURNS], marked[TURNS];
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                largest[turn] = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) largest[turn] = larger_integers(largest[turn], next[turn][i] & 0x7fff7fffu);
            }
#pragma unroll
            for (int across = 1; across < 8 * WIDTH; across *= 2)
#pragma unroll
                for (int turn = 0; turn < TURNS; turn++) largest[turn] = larger_integers(largest[turn], __shfl_xor_sync(0xffffffffu, largest[turn], across));
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) largest[turn] = max(largest[turn] & 0xffffu, largest[turn] >> 16);
            MARK(3, largest[0]);
            if (!told) x_has_come(largest[0]);
            told = true;
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                unit[turn] = unit_of(float_of_x((u16)largest[turn]), MOST);
                total[turn] = marked[turn] = 0;
                // Bit i of a plane's half word is column i, or where two-bit codes were parted column i / 2 of its first eight or
                // of the others. Adding 1.5 x 2^23 leaves the nearest integer in the lower bits, and 128 carries into the upper digit.
                const auto nearest = [&](int bit) {
                    const int i = PARTED ? bit / 2 + bit % 2 * 8 : bit;
                    return __float_as_uint(float_of_x((u16)(next[turn][i / 2] >> (16 * (i % 2)))) * unit[turn].up + __uint_as_float(ZERO_BITS));
                };
                u32 sum = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const u32 low = nearest(i), high = nearest(i + 8);
                    sum += low + high;
                    fixed[turn][i] = choose_bytes(low, high, 0x5140);
                }
                total[turn] = (int)(sum - 16 * ZERO_BITS);
            }
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                const int block = first + turn * (4 * STAGERS);
                keep_planes(words + (WIDTH == 2 ? (block & ~1) * X_WORDS + (block & 1) : block * X_WORDS), fixed[turn], next_marks[turn], q, half, block, block < blocks, marked[turn]);
            }
#pragma unroll
            for (int turn = 0; turn < TURNS; turn++) {
                const int block = first + turn * (4 * STAGERS), all = sum_of_lanes(total[turn]);
                const int other = PARTS == 2 ? (int)__shfl_xor_sync(0xffffffffu, (u32)all, 4) : KIND == BINARY_RESIDUAL ? sum_of_lanes(marked[turn]) : 0;
                if (block < blocks && (lane & 7) == 0)
                    *(float4*)(factors + block * X_FACTORS) = float4{unit[turn].down * (1.0f / (SUM_UNIT * UNIT_LEFT)), (float)(PARTS == 2 ? all : all - other) * SUM_UNIT, (float)other * SUM_UNIT, 0.0f};
            }
#pragma unroll
            for (int turn = 0; turn + TURNS < LOADS; turn++) {
#pragma unroll
                for (int i = 0; i < 8; i++) next[turn][i] = next[turn + TURNS][i];
                next_marks[turn] = next_marks[turn + TURNS];
            }
            four += 4 * STAGERS * TURNS;
        }
        column += TURN * LOADS, from += TURN * LOADS;
        if (four < blocks) load_marks(turns, salient, column, columns, last);
    }
    if (!told) x_has_come(0);
}

// What the other blocks of the cluster have staged.
__device__ __forceinline__ void fetch_staged(u32* words, float2* factors, int blocks) {
    constexpr int WORD_PIECES = X_WORDS / 4, PIECES = WORD_PIECES + X_FACTORS / 2;
    for (int piece = threadIdx.x; piece < blocks * PIECES; piece += THREADS) {
        const int block = piece / PIECES, at = piece % PIECES, owner = block / 4 % STAGERS / WARPS;
        uint4* own = at < WORD_PIECES ? (uint4*)(words + block * X_WORDS) + at : (uint4*)(factors + block * X_FACTORS);
        if (owner != (int)(blockIdx.x % STAGING_BLOCKS)) *own = peer_words(own, owner);
    }
}
