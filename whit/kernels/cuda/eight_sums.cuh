// The end of `eight.cu`: sums of warps and of blocks, in a fixed order, scales, bias, and results of 16 bits.

// Warp that has the first sums of a tile.
__device__ __forceinline__ int first_warp(const Block& b, int tile) { return tile * b.across / b.each; }

// Adds what the warps of the block have for four rows of a tile.
__device__ __forceinline__ void add_slots(const Block& b, u32 (&words)[4], const float* from, int tile, int v, int four) {
#pragma unroll 1
    for (int one = first_warp(b, tile); one <= ((tile + 1) * b.across - 1) / b.each; one++) {
        const uint4 more = *(const uint4*)(from + ((tile + one) * b.vectors + v) * 16 + four);
        const u32 word[4] = {more.x, more.y, more.z, more.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            words[i] = ROUNDED == 1 && from == b.sums ? words[i] + word[i] : __float_as_uint(__uint_as_float(words[i]) + __uint_as_float(word[i]));
    }
}

#if SPLITS > 1
// Adds the block's own sums, where those of the first warp lie.
__device__ __forceinline__ void add_own(const Block& b) {
    const int vectors = b.vectors;
#pragma unroll 1
    for (int at = threadIdx.x; at < b.tiles * vectors * 4; at += THREADS) {
        const int tile = at / (4 * vectors), v = at / 4 % vectors, four = at % 4 * 4, place = ((tile + first_warp(b, tile)) * vectors + v) * 16 + four;
        u32 words[4] = {0, 0, 0, 0}, more[4] = {0, 0, 0, 0};
        add_slots(b, words, b.sums, tile, v, four);
        *(uint4*)(b.sums + place) = make_uint4(words[0], words[1], words[2], words[3]);
        if (LOOSE) {
            add_slots(b, more, b.outer_sums, tile, v, four);
            *(uint4*)(b.outer_sums + place) = make_uint4(more[0], more[1], more[2], more[3]);
        }
    }
}
#endif

// Results of four rows of a vector, to memory.
__device__ __forceinline__ void write_results(const Block& b, const Work& w, int at) {
    const int vectors = b.vectors, tile = at / (4 * vectors), v = at / 4 % vectors, four = at % 4 * 4;
    float total[4] = {0, 0, 0, 0}, beyond[4] = {0, 0, 0, 0};
    int exact[4] = {0, 0, 0, 0};
#if SPLITS > 1
    const int place = ((tile + first_warp(b, tile)) * vectors + v) * 16 + four;
    uint4 words[SPLITS], more[SPLITS];
#pragma unroll
    for (int other = 0; other < SPLITS; other++) {
        words[other] = peer_words(b.sums + place, other);
        if (LOOSE) more[other] = peer_words(b.outer_sums + place, other);
    }
#pragma unroll
    for (int other = 0; other < SPLITS; other++) {
        const u32 word[4] = {words[other].x, words[other].y, words[other].z, words[other].w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (ROUNDED == 1) exact[i] += (int)word[i];
            else total[i] += __uint_as_float(word[i]);
        }
        if (LOOSE) {
            beyond[0] += __uint_as_float(more[other].x), beyond[1] += __uint_as_float(more[other].y);
            beyond[2] += __uint_as_float(more[other].z), beyond[3] += __uint_as_float(more[other].w);
        }
    }
#else
    u32 words[4] = {0, 0, 0, 0}, more[4] = {0, 0, 0, 0};
    add_slots(b, words, b.sums, tile, v, four);
    if (LOOSE) add_slots(b, more, b.outer_sums, tile, v, four);
#pragma unroll
    for (int i = 0; i < 4; i++) exact[i] = (int)words[i], total[i] = __uint_as_float(words[i]), beyond[i] = __uint_as_float(more[i]);
#endif
    float beside[4] = {0, 0, 0, 0};
    if (PLACED) {
        const float* const place = b.placed_sums + (tile / SPLITS * vectors + v) * 16 + four;
        const uint4 words = SPLITS > 1 ? peer_words(place, tile % SPLITS) : *(const uint4*)place;
        beside[0] = __uint_as_float(words.x), beside[1] = __uint_as_float(words.y);
        beside[2] = __uint_as_float(words.z), beside[3] = __uint_as_float(words.w);
    }
    const float step = ROUNDED ? b.steps[v] : 1.0f;
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float by = b.row_scales[tile * 16 + four + i], shift = b.row_biases[tile * 16 + four + i];
#if LLM
        y[i] = __fadd_rn(__fmul_rn(__fadd_rn(__fmul_rn((float)exact[i], __fdiv_rn(step, 127.0f)), beyond[i]), __fdiv_rn(by, 127.0f)), beside[i] + shift);
#else
        y[i] = __fadd_rn(__fmul_rn(__fmul_rn(ROUNDED == 1 ? (float)exact[i] : total[i], by), step), shift);
#endif
    }
    const int first = b.first_row(tile) + four;
    u16* const out = w.out + (size_t)v * w.rows + first;
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
