// Dense 16-bit weight (rows, columns) from packed codes: exactly the plain meaning rounded once.
// For products with many vectors, where a library's matrix product over the decoded weight is the fast way.
//
// An item of a thread block is ROWS rows of a stripe of columns, a thread has eight columns of each of these rows: stores
// are whole lines, marks of columns are read once. While an item is written, the codes and scalars of the block's next are
// on their way. What scales a group of a row is computed once, by one thread, and lies in shared memory. Codes of up to two
// bits choose bytes of a table of levels, as in `expand.cuh`; wider ones become numbers by exponent bits.

#define TABLE (KIND != GROUPED_INTEGER || BITS <= 2)  // and level tables of more bits, which are read for each weight
#define WIDE_TABLE (KIND == LEVEL_TABLE && BITS > 2)
#define TWO_PLACES (BF16 && KIND == GROUPED_INTEGER && (BITS == 3 || BITS == 4))  // codes at two places of a float
#define BY_PAIRS (HALVES && (BITS == 3 || BITS == 4 || BITS == 8))
#define FIRST_PLACE (BITS == 3 ? 14 : 12)
#define FIRST_ONE (BITS == 3 ? 512.0f : 2048.0f)   // 2^(23 - place)
#define SECOND_ONE (BITS == 3 ? 64.0f : 128.0f)
constexpr int STRIPE = 8 * THREADS;
// Groups that a stripe can touch.
constexpr int CELLS = STRIPE % GROUP == 0 ? STRIPE / GROUP : GROUP % STRIPE == 0 ? 1 : STRIPE / GROUP + 2;
constexpr int CELL_WORDS = KIND == BINARY_RESIDUAL || TWO_PLACES ? 4 : 2;

__device__ __forceinline__ float scalar_at(const u8* scalars, u32 index) { return float_of_half(__ldg((const u16*)scalars + index)); }

// ---- Codes of eight columns of a row, kept as loaded ---------------------------------------------------------------------
struct Octet { u32 low, high; };  // `high`: a second plane, or what does not fit
__device__ __forceinline__ Octet fetch_octet(const Weight& w, u32 offset) {  // of its first byte
    const u8* from = w.codes[0] + offset;
    if (KIND == BINARY_RESIDUAL) return {__ldg(from), __ldg(w.codes[1] + offset)};
    if (CODE_BITS == 1) return {__ldg(from), 0};
    if (CODE_BITS == 2) return {__ldg((const u16*)from), 0};  // rows are whole octets
    if (CODE_BITS == 4) return {__ldg((const u32*)from), 0};
    if (CODE_BITS == 8) {
        const uint2 both = __ldg((const uint2*)from);
        return {both.x, both.y};
    }
    if (CODE_BITS == 3) {  // the words that hold the first and the last of three bytes
        const u64 at = (u64)from;
        return {__ldg((const u32*)(at & ~3ull)), __ldg((const u32*)((at + 2) & ~3ull))};
    }
    Octet octet = {};
#pragma unroll
    for (int i = 0; i < CODE_BITS; i++) (i < 4 ? octet.low : octet.high) |= (u32)__ldg(from + i) << (8 * (i & 3));
    return octet;
}
__device__ __forceinline__ u32 code_of(const Octet& octet, int i) {
    const int bit = i * BITS;
    return (bit + BITS <= 32 ? octet.low >> bit : bit >= 32 ? octet.high >> (bit - 32) : funnel_right(octet.low, octet.high, bit)) & ((1u << BITS) - 1);
}

// ---- What scales a group of a row ----------------------------------------------------------------------------------------
struct Scalars { u32 word[NS > 4 ? NS : 3]; };  // as loaded
__device__ __forceinline__ void fetch_scalars(Scalars& scalars, const Weight& w, u32 cell) {
    if (KIND == BINARY_RESIDUAL && NS == 7) {
#pragma unroll
        for (int i = 0; i < NS; i++) scalars.word[i] = __ldg((const u16*)w.scalars + (cell * NS + i));
    } else if (KIND == BINARY_RESIDUAL || (KIND == LEVEL_TABLE && BITS == 2)) {
        const uint2 four = __ldg((const uint2*)w.scalars + cell);
        scalars.word[0] = four.x, scalars.word[1] = four.y;
    } else if (KIND == LEVEL_TABLE && BITS == 1) {
        scalars.word[0] = __ldg((const u32*)w.scalars + cell);
    } else if (KIND == GROUPED_INTEGER) {
        scalars.word[0] = __ldg((const u16*)w.scalars + cell);
        if (ASYM) {
            const u32 bit = cell * BITS;
            scalars.word[1] = __ldg(w.zeros + (bit >> 3));
            if (8 % BITS) scalars.word[2] = (bit & 7) + BITS > 8 ? __ldg(w.zeros + (bit >> 3) + 1) : 0;
        }
    }
}
// Four levels, and for two planes four of marked columns; of wider integers a scale and what is added or taken off.
struct Cell { u32 word[CELL_WORDS]; };
__device__ __forceinline__ float half_at(const Scalars& scalars, int i) {  // of `binary-residual`
    return float_of_half((u16)(NS == 7 ? scalars.word[i % (NS > 4 ? NS : 3)] : scalars.word[i / 2 % 2] >> (16 * (i % 2))));
}
__device__ __forceinline__ Cell cell_of(const Scalars& scalars, u32 cell) {
    Cell made = {};
    if (KIND == BINARY_RESIDUAL) {
#pragma unroll
        for (int marked = 0; marked < 2; marked++) {
            const int at = marked * (NS == 7 ? 4 : 2);
            const float mean = NS == 7 ? half_at(scalars, at) : 0.0f, scale = half_at(scalars, at + (NS == 7 ? 1 : 0));
            const float third = half_at(scalars, at + (NS == 7 ? 2 : 1)), two = marked ? third : 0.0f;
            const float other_mean = NS == 7 && !marked ? third : mean;
            const float other_scale = marked ? scale : NS == 7 ? half_at(scalars, 3) : third;
            made.word[2 * marked % CELL_WORDS] = parted_pair((mean - scale) - two, (mean + scale) - two);
            made.word[(2 * marked + 1) % CELL_WORDS] = parted_pair((other_mean - other_scale) + two, (other_mean + other_scale) + two);
        }
    } else if (KIND == LEVEL_TABLE && BITS <= 2) {
#pragma unroll
        for (int i = 0; i < BITS; i++) {
            const u32 pair = scalars.word[i];
            made.word[i] = BF16 ? pair_of_floats(float_of_half((u16)pair), float_of_half((u16)(pair >> 16))) : pair;
        }
    } else if (KIND == GROUPED_INTEGER) {
        float zero = BITS > 1 ? (float)(1 << (BITS - 1)) : 0.5f;
        if (ASYM) {
            const u32 window = scalars.word[1] | (8 % BITS ? scalars.word[2] << 8 : 0);
            zero = (float)(window >> (cell * BITS & 7) & ((1 << BITS) - 1));
        }
        const float scale = float_of_half((u16)scalars.word[0]) * (!ASYM && BITS == 1 ? 2.0f : 1.0f);
        if (TABLE) {
            made.word[0] = pair_of_floats(scale * (0.0f - zero), scale * (1.0f - zero));
            made.word[1] = pair_of_floats(scale * (2.0f - zero), scale * (3.0f - zero));
        } else if (BY_PAIRS) {
            made.word[0] = pair_of_floats(scale, scale), made.word[1] = bias_of_pair((u32)zero);
        } else {
            made.word[0] = __float_as_uint(scale);
            made.word[1] = __float_as_uint(TWO_PLACES ? -((FIRST_ONE + zero) * scale) : 8388608.0f + zero);
            made.word[CELL_WORDS - 2] = TWO_PLACES ? __float_as_uint(-((SECOND_ONE + zero) * scale)) : made.word[0];
        }
    }
    return made;
}

// ---- Weights -------------------------------------------------------------------------------------------------------------
// Nibbles that choose the bytes of the levels of two pairs of columns, one pair in each half of a word: columns 0 to 3, and
// with `part` 1 columns 4 to 7. For two planes, codes s and t choose byte s + 4 t and the second after it.
__device__ __forceinline__ u32 selectors(const Octet& octet, int part) {
    const u32 codes = octet.low;
    if (KIND == BINARY_RESIDUAL) {
        const u32 first = codes * 0x4001u, second = octet.high * 0x10004u;
        const u32 nibbles = ((first & 0x00330033u) | (second & 0x00cc00ccu)) >> (4 * part);
        return (nibbles & 0x00050005u) * 0x11u + ((nibbles & 0x000a000au) * 0x880u + 0x20202020u);
    }
    if (CODE_BITS == 1) {
        const u32 bits = codes * 0x4001u >> (4 * part);
        return (bits & 0x00010001u) * 0x22u + ((bits & 0x00020002u) * 0x1100u + 0x10101010u);
    }
    const u32 twos = (codes | codes << 12) >> (8 * part);
    return (twos & 0x00030003u) * 0x22u + ((twos & 0x000c000cu) * 0x880u + 0x10101010u);
}

// `marked`: ones for the columns that are, of two columns each.
__device__ __forceinline__ void expand(u32 (&word)[4], const Octet& octet, const Cell& cell, const u32 (&marked)[4], const u8* table) {
    if (WIDE_TABLE) {
#pragma unroll
        for (int i = 0; i < 4; i++) word[i] = pair_of_floats(scalar_at(table, code_of(octet, 2 * i)), scalar_at(table, code_of(octet, 2 * i + 1)));
    } else if (TABLE) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 selector = selectors(octet, i / 2) >> (16 * (i % 2));
            word[i] = choose_bytes(cell.word[0], cell.word[1], selector);
            if (KIND == BINARY_RESIDUAL)
                word[i] = (word[i] & ~marked[i]) | (choose_bytes(cell.word[2 % CELL_WORDS], cell.word[3 % CELL_WORDS], selector) & marked[i]);
        }
    } else if (BY_PAIRS) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 low = octet.low, pair = BITS == 8 && i >= 2 ? octet.high : low;
            const u32 biased = BITS == 3   ? ((low >> (6 * i) & 63) * 0x2001u & 0x00070007u) | 0x64006400u
                               : BITS == 4 ? (choose_bytes(low, 0, 0x4040u | i | i << 8) & 0x00f0000fu) | 0x64006400u
                                           : choose_bytes(pair, 0x64u, i % 2 ? 0x4342u : 0x4140u);
            word[i] = pair_of_halves(biased, cell.word[0], cell.word[1]);
        }
    } else if (TWO_PLACES) {
        // A code among the low bits of a power of two is that plus the code: times the scale, and what was added taken off.
        // 12 bits times 11: no step rounds.
        const float scale = __uint_as_float(cell.word[0]), first = __uint_as_float(cell.word[1]), second = __uint_as_float(cell.word[2 % CELL_WORDS]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int shift = FIRST_PLACE - 2 * BITS * i;
            const u32 pair = shift > 0 ? octet.low << (shift > 0 ? shift : 0) : octet.low >> (shift < 0 ? -shift : 0);
            constexpr u32 MASK = (1u << BITS) - 1;
            const float a = __uint_as_float((pair & MASK << FIRST_PLACE) | __float_as_uint(FIRST_ONE));
            const float b = __uint_as_float((pair & MASK << (FIRST_PLACE + BITS)) | __float_as_uint(SECOND_ONE));
            word[i] = pair_of_floats(a * scale + first, b * scale + second);
        }
    } else {
        const float scale = __uint_as_float(cell.word[0]), zero = __uint_as_float(cell.word[1]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float pair[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int at = 2 * i + j;
                const u32 code = BITS == 8 ? choose_bytes(at < 4 ? octet.low : octet.high, 0x4b000000u, 0x7440u | at % 4) : 0x4b000000u | code_of(octet, at);
                pair[j] = scale * (__uint_as_float(code) - zero);
            }
            word[i] = pair_of_floats(pair[0], pair[1]);
        }
    }
}

// `left`: columns from this octet on.
template <bool WHOLE> __device__ __forceinline__ void store(u16* to, const u32 (&word)[4], int left) {
    if (WHOLE) {
        *(uint4*)to = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < left) to[i] = (u16)(word[i / 2] >> (16 * (i % 2)));
    }
}

struct Item { int row0, octet0; };
__device__ __forceinline__ Item item_at(int item, int stripes) { return {item / stripes * ROWS, item % stripes * THREADS}; }
__device__ __forceinline__ void fetch_codes(Octet (&codes)[ROWS], const Weight& w, Item item, int octets) {
    const u32 at = (u32)(min(item.octet0 + (int)threadIdx.x, octets - 1) * CODE_BITS);
#pragma unroll
    for (int i = 0; i < ROWS; i++) codes[i] = fetch_octet(w, (u32)(min(item.row0 + i, w.rows - 1) * w.width) + at);
}
__device__ __forceinline__ u32 cell_at(const Weight& w, Item item, int task) {
    const int group = GROUP >= (1 << 30) ? 0 : item.octet0 * 8 / GROUP + task % CELLS;
    return (u32)(min(item.row0 + task / CELLS, w.rows - 1) * w.groups + min(group, w.groups - 1));
}
constexpr int TASKS = WIDE_TABLE ? 0 : ROWS * CELLS;

// Rows beyond the last are the last once more.
template <bool WHOLE> __device__ __forceinline__ void write(const Weight& w, u16* out, Item item, const Octet (&codes)[ROWS], const Cell* cells) {
    const int octet = item.octet0 + threadIdx.x, group = GROUP >= (1 << 30) ? 0 : octet * 8 / GROUP;
    const u32 marks = KIND == BINARY_RESIDUAL ? __ldg(w.salient + octet) : 0;
    u32 marked[4];
#pragma unroll
    for (int i = 0; i < 4; i++) marked[i] = (marks >> (2 * i) & 1) * 0xffffu | (marks >> (2 * i) & 2) * 0x7fff8000u;
    cells += GROUP >= (1 << 30) ? 0 : group - item.octet0 * 8 / GROUP;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int row = min(item.row0 + i, w.rows - 1);
        Octet octets = codes[i];
        if (CODE_BITS == 3) octets.low = funnel_right(octets.low, octets.high, ((u32)(u64)w.codes[0] + (u32)(row * w.width + octet * 3)) % 4 * 8);
        u32 word[4];
        expand(word, octets, cells[i * CELLS], marked, w.scalars + (u32)(row * w.groups + group) * (2 * NS));
        store<WHOLE>(out + (size_t)row * w.columns + octet * 8, word, w.columns - octet * 8);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
decode(Weight w, u16* out) {
    extern __shared__ __align__(16) u8 memory[];
    Cell(*const shared)[ROWS * CELLS] = (Cell(*)[ROWS * CELLS])memory;  // [2]
    const int octets = (w.columns + 7) / 8, stripes = (octets + THREADS - 1) / THREADS, items = (w.rows + ROWS - 1) / ROWS * stripes;
    Octet codes[ROWS];
    Scalars scalars = {};
    int number = blockIdx.x;
    Item item = item_at(number, stripes);
    fetch_codes(codes, w, item, octets);
    for (int task = threadIdx.x; task < TASKS; task += THREADS) {
        fetch_scalars(scalars, w, cell_at(w, item, task));
        shared[0][task] = cell_of(scalars, cell_at(w, item, task));
    }
    wait_for_previous_kernel();  // it may still read what this one is to overwrite
    __syncthreads();
#pragma unroll 1
    for (int turn = 0; number < items; turn ^= 1) {
        number += gridDim.x;
        const Item next = item_at(number < items ? number : 0, stripes);
        Octet coming[ROWS];
        fetch_codes(coming, w, next, octets);
        if (threadIdx.x < TASKS) fetch_scalars(scalars, w, cell_at(w, next, threadIdx.x));
        if (item.octet0 + (int)threadIdx.x < octets) {
            if (w.columns % 8 == 0)
                write<true>(w, out, item, codes, shared[turn]);
            else
                write<false>(w, out, item, codes, shared[turn]);
        }
        if (threadIdx.x < TASKS) shared[turn ^ 1][threadIdx.x] = cell_of(scalars, cell_at(w, next, threadIdx.x));
        for (int task = threadIdx.x + THREADS; task < TASKS; task += THREADS) {
            fetch_scalars(scalars, w, cell_at(w, next, task));
            shared[turn ^ 1][task] = cell_of(scalars, cell_at(w, next, task));
        }
        __syncthreads();
        item = next;
#pragma unroll
        for (int i = 0; i < ROWS; i++) codes[i] = coming[i];
    }
}
