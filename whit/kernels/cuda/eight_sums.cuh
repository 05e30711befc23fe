// The end of `eight.cu`: sums of warps and of blocks, in a fixed order, scales, bias, and results of 16 bits.

// Four rows of a vector: result number `at` of the cluster's.
struct Four {
    int tile, v, row;
    __device__ __forceinline__ explicit Four(int at) : tile(at / (4 * MOST)), v(at / 4 % MOST), row(at % 4 * 4) {}
};

__device__ __forceinline__ u32 added(u32 a, u32 b) {
    return WHOLE_SUMS ? a + b : __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
}
__device__ __forceinline__ void add_words(u32 (&words)[4], const float* from) {
    const uint4 more = *(const uint4*)from;
    words[0] = added(words[0], more.x), words[1] = added(words[1], more.y), words[2] = added(words[2], more.z), words[3] = added(words[3], more.w);
}
// What the warps of the block have; `inverse` of the items of a warp: quotients of less than 2^22 by it are exact, see below.
__device__ __forceinline__ void sum_of_warps(const Block& b, u32 (&words)[4], const Four& at, float inverse) {
    const int begin = at.tile * b.across, end = begin + b.across - 1;  // a half more than a whole number is not rounded up to one
    const int last = (int)(((float)end + 0.5f) * inverse);
#pragma unroll 1
    for (int one = (int)(((float)begin + 0.5f) * inverse); one <= last; one++)
        add_words(words, b.sums + ((at.tile + one) * MOST + at.v) * 16 + at.row);
}

#if SPLITS > 1
// Sums of this block, to those that write the results.
__device__ __forceinline__ void send_sums(const Block& b) {
    const float inverse = __fdiv_rn(1.0f, (float)b.each);
#pragma unroll 1
    for (int at = threadIdx.x; at < b.tiles * MOST * 4; at += THREADS) {
        u32 words[4] = {0, 0, 0, 0};
        sum_of_warps(b, words, Four(at), inverse);
        const int run = at / 32, slot = run / SPLITS * 32 + at % 32;
        send_four((u32*)b.inbox + (b.rank * b.room + slot) * 4, run % SPLITS, words, b.sent + 1);
    }
}
#endif

// Results of four rows of a vector, to memory.
__device__ __forceinline__ void write_four(const Block& b, const Work& w, const Four& at, const u32 (&words)[4]) {
    if (at.v >= b.vectors) return;
    float beside[4] = {0, 0, 0, 0};
    if (PLACED) {
        const float* const place = b.placed_sums + (at.tile / SPLITS * b.vectors + at.v) * 16 + at.row;
        const uint4 placed = SPLITS > 1 ? peer_words(place, at.tile % SPLITS) : *(const uint4*)place;
        beside[0] = __uint_as_float(placed.x), beside[1] = __uint_as_float(placed.y);
        beside[2] = __uint_as_float(placed.z), beside[3] = __uint_as_float(placed.w);
    }
    const float step = ROUNDED ? b.steps[at.v] : 1.0f;
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float by = b.row_scales[at.tile * 16 + at.row + i], shift = b.row_biases[at.tile * 16 + at.row + i];
        const float sum = WHOLE_SUMS ? (float)(int)words[i] : __uint_as_float(words[i]);
#if LLM
        y[i] = __fadd_rn(__fmul_rn(LOOSE ? sum : __fmul_rn(sum, step), by), beside[i] + shift);
#else
        y[i] = __fadd_rn(__fmul_rn(__fmul_rn(sum, by), step), shift);
#endif
    }
    const int first = b.first_row(at.tile) + at.row;
    u16* const out = w.out + (size_t)at.v * w.rows + first;
    const u32 low = pair_of_floats(y[0], y[1]), high = pair_of_floats(y[2], y[3]);
    if (w.rows % 4 == 0) {
        if (first < w.rows) *(uint2*)out = make_uint2(low, high);
    } else {
        if (first < w.rows) out[0] = (u16)low;
        if (first + 1 < w.rows) out[1] = (u16)(low >> 16);
        if (first + 2 < w.rows) out[2] = (u16)high;
        if (first + 3 < w.rows) out[3] = (u16)(high >> 16);
    }
}

__device__ __forceinline__ void write_results(const Block& b, const Work& w) {
#if SPLITS > 1
    const int own = b.own_results();
#pragma unroll 1
    for (int slot = threadIdx.x; slot < own; slot += THREADS) {
        u32 words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int other = 0; other < SPLITS; other++) add_words(words, b.inbox + (other * b.room + slot) * 4);
        write_four(b, w, Four((slot / 32 * SPLITS + b.rank) * 32 + slot % 32), words);
    }
#else
    const float inverse = __fdiv_rn(1.0f, (float)b.each);
#pragma unroll 1
    for (int at = threadIdx.x; at < b.tiles * MOST * 4; at += THREADS) {
        u32 words[4] = {0, 0, 0, 0};
        sum_of_warps(b, words, Four(at), inverse);
        write_four(b, w, Four(at), words);
    }
#endif
}
