// y = W x for one to 32 vectors and 8-bit weights, read once by the tensor copy engine: codes of INT8, E4M3 or E5M2.
//
//     ROUNDED 0    inputs of 16 bits; codes are widened in registers for the 16-bit tensor cores
//     ROUNDED 1    inputs rounded to INT8, codes multiplied as they are; with OUTLIERS the layer of LLM.int8(): outlier
//                  columns, of which there may be any number, meet widened codes in 64 columns at a time, where there are any
//     ROUNDED 2    inputs rounded to E4M3, whose numbers are float16 numbers too
//
// A cluster of SPLITS blocks takes row tiles of 16, each block a share of the columns. Every block brings its share of the
// inputs into shared memory and rounds it there; of each token the cluster shares one number, the largest magnitude. A warp
// takes items of 16 rows x ITEM columns, one after the other, through a ring of its own, and asks for the first before the
// kernel ahead has ended. Sums of warps and of blocks are added in a fixed order.
//
// A lane reads 16 bytes of a row at a time: the order of columns within 64 is the lanes', for weights and inputs alike.

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
eight(INPUT_TYPE given, const __grid_constant__ TensorMap codes, const __grid_constant__ Work w) {
    extern __shared__ __align__(1024) u8 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int rank = SPLITS > 1 ? blockIdx.x % SPLITS : 0, cluster = blockIdx.x / SPLITS, clusters = gridDim.x / SPLITS;
    const int vectors = w.vectors, span = w.span, begin = rank * span, here = min(span, w.columns - begin);
    const int all_tiles = (w.rows + 15) / 16, tiles = (all_tiles - cluster + clusters - 1) / clusters, across = span / ITEM;
    const int items = tiles * across, each = (items + WARPS - 1) / WARPS, slots = tiles + WARPS;
    const int pitch = span + 64, wide_pitch = 2 * span + 16;  // bytes between vectors
    u8* const ring = memory + warp * (DEPTH * ITEM_BYTES);
    u64* const arrived = (u64*)(memory + WARPS * DEPTH * ITEM_BYTES) + warp * DEPTH;
    float* const row_scales = (float*)(memory + WARPS * DEPTH * (ITEM_BYTES + 8));
    float* const row_biases = row_scales + tiles * 16;
    u32* const most = (u32*)(row_biases + tiles * 16);  // [32] magnitudes of this block, [32] steps of the cluster
    float* const steps = (float*)(most + 32);
    u32* const flags = most + 64;                        // outlier columns
    u32* const loose = flags + (PLACED ? span / 32 : 0);  // those whose weights are codes
    const int stored = (w.stored + 15) / 16 * 16, placed_pitch = 2 * stored + 16;
    u8* const placed_x = (u8*)(loose + (OUTLIERS ? span / 32 : 0));
    u8* const wide = placed_x + (PLACED ? (vectors * placed_pitch + 127) / 128 * 128 : 0);
#if INPUT > 0
    const int wide_bytes = (2 * max(w.columns, (SPLITS - 1) * span + span) + 127) / 128 * 128;
    u8* const wide_x = wide + 2 * begin;
#else
    const int wide_bytes = vectors * wide_pitch;
    u8* const wide_x = wide;
#endif
    u8* const rounded = wide + wide_bytes;
    float* const sums = (float*)(rounded + (ROUNDED == 1 ? (vectors * pitch + 15) / 16 * 16 : 0));
    float* const outer_sums = sums + slots * vectors * 16;
    float* const placed_sums = outer_sums + (LOOSE ? slots * vectors * 16 : 0);  // of every SPLITS-th tile

    MARK(0, 0u);
    if (lane == 0) {
        for (int i = 0; i < DEPTH; i++) barrier_init(arrived + i, 1);
        barriers_ready();
    }
    __syncwarp();
    int next = min(warp * each, items);
    const int last = min(next + each, items);
    int item = next, slot = 0, phase = 0;
    int tile = item / across, part = item % across, ahead_tile = tile, ahead_part = part;
    auto load = [&](int at) {
        if (next < last) {
            if (lane == 0) {
                const int row = (cluster + ahead_tile * clusters) * 16, column = begin + ahead_part * ITEM;
                barrier_expect(arrived + at, ITEM_BYTES);
#pragma unroll
                for (int box = 0; box < BOXES; box++) copy_rows(ring + at * ITEM_BYTES + box * 2048, codes, arrived + at, column + box * 128, row);
            }
            next++;
            if (++ahead_part == across) ahead_part = 0, ahead_tile++;
        }
    };
#pragma unroll 1
    for (int i = 0; i < (PATIENT ? 1 : DEPTH); i++) load(i);
    MARK(1, 0u);
    if (EAGER) start_next_kernel();
    const auto by_row = [&](int i) {
        const int row = (cluster + i / 16 * clusters) * 16 + i % 16;
        return i < tiles * 16 && row < w.rows ? scale_of_row(w, row) : 0.0f;
    };
    const auto bias_of = [&](int i) {
        const int row = (cluster + i / 16 * clusters) * 16 + i % 16;
        if (!(w.bias && i < tiles * 16 && row < w.rows)) return 0.0f;
        return BIAS_FLOAT ? ((const float*)w.bias)[row] : float_of_x(((const u16*)w.bias)[row]);
    };
    const float first_scale = by_row(threadIdx.x), first_bias = bias_of(threadIdx.x);
    if (threadIdx.x < 32) most[threadIdx.x] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < (OUTLIERS ? span / 32 : 0); i += THREADS) flags[i] = loose[i] = 0;
    __syncthreads();
#if ROUNDED && SPLITS > 1
    cluster_arrive();
#endif
    if (OUTLIERS == 2 || PLACED)
        for (int i = threadIdx.x; i < w.stored; i += THREADS) {
            const int column = w.index[i] - begin;
            if (column >= 0 && column < here) atomicOr((OUTLIERS == 2 ? flags : loose) + column / 32, 1u << column % 32);
        }
#if INPUT > 0
    make_input<64>((u32*)wide, given, w.columns, []() { wait_for_previous_kernel(); });
#else
    wait_for_previous_kernel();
#endif
    MARK(2, 0u);
    if (!EAGER) start_next_kernel();
#if HELD
    uint4 x[HELD][2 * TILES];
    u32 over[HELD], largest[TILES];
#pragma unroll
    for (int u = 0; u < HELD; u++)
#pragma unroll
        for (int j = 0; j < 2 * TILES; j++) {
            const int column = (warp + u * WARPS) * 64 + lane % 8 * 8, v = 4 * j + lane / 8;
            x[u][j] = v < vectors && column < here ? *(const uint4*)(given + (size_t)v * w.columns + begin + column) : make_uint4(0, 0, 0, 0);
        }
    if (PATIENT)
#pragma unroll 1
        for (int i = 1; i < DEPTH; i++) load(i);
    MARK(3, 0u);
#pragma unroll 1
    for (int i = threadIdx.x; i < tiles * 16; i += THREADS) {
        row_scales[i] = i < THREADS ? first_scale : by_row(i);
        row_biases[i] = i < THREADS ? first_bias : bias_of(i);
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) largest[i] = 0;
#pragma unroll
    for (int u = 0; u < HELD; u++) {
        over[u] = 0;
        if (OUTLIERS == 1) {
            u32 most_of[4] = {0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < 2 * TILES; j++) {
                const u32 word[4] = {x[u][j].x, x[u][j].y, x[u][j].z, x[u][j].w};
#pragma unroll
                for (int i = 0; i < 4; i++) most_of[i] = larger_number(most_of[i], word[i] & 0x7fff7fffu);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                over[u] |= (float_of_x((u16)most_of[i]) >= w.threshold) << 2 * i | (float_of_x((u16)(most_of[i] >> 16)) >= w.threshold) << (2 * i + 1);
            over[u] |= __shfl_xor_sync(0xffffffffu, over[u], 8);
            over[u] |= __shfl_xor_sync(0xffffffffu, over[u], 16);
        }
        const uint2 low = pairs_of_bits(~over[u]), high = pairs_of_bits(~over[u] >> 4);
#pragma unroll
        for (int j = 0; j < 2 * TILES; j++) {
            const u32 one = larger_integers(larger_integers(x[u][j].x & low.x & 0x7fff7fffu, x[u][j].y & low.y & 0x7fff7fffu),
                                            larger_integers(x[u][j].z & high.x & 0x7fff7fffu, x[u][j].w & high.y & 0x7fff7fffu));
            const u32 number = max(one & 0xffffu, one >> 16);
            largest[j / 2] = larger_integers(largest[j / 2], j % 2 ? number << 16 : number);
        }
    }
    if (!w.input_scale) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int across = 1; across < 8; across *= 2) largest[i] = larger_integers(largest[i], __shfl_xor_sync(0xffffffffu, largest[i], across));
            const int v = 8 * i + lane / 8 + 4 * (lane % 8);
            if (lane % 8 < 2 && v < vectors) atomicMax(most + v, lane % 8 ? largest[i] >> 16 : largest[i] & 0xffffu);
        }
        __syncthreads();
    }
#if SPLITS > 1
    cluster_wait();  // all blocks have begun
    for (int i = threadIdx.x; i < 32 * SPLITS; i += THREADS)
        if (i % 32 < vectors && i / 32 != rank) largest_at_peer(most + i % 32, i / 32, most[i % 32]);
    cluster_arrive();
    cluster_wait();
#endif
    MARK(4, 0u);
    float step = 0.0f, factor = 0.0f;
    if (lane < vectors) {
        step = float_of_x((u16)most[lane]);
#if LLM
        factor = __fmul_rn(__fdiv_rn(1.0f, fmaxf(step, SMALLEST)), 127.0f);
#else
        if (w.input_scale) step = *w.input_scale;
        else step = __fmul_rn(step, __fdiv_rn(1.0f, w.maximum)), step = step == 0.0f ? 1.0f : step;
        factor = step;
#endif
        if (warp == 0) steps[lane] = step;
    }
#pragma unroll
    for (int u = 0; u < HELD; u++) {
        const int column = (warp + u * WARPS) * 64 + lane % 8 * 8;
        if (column >= span) break;
        const uint2 low = pairs_of_bits(~over[u]), high = pairs_of_bits(~over[u] >> 4);
        const bool met = OUTLIERS && __any_sync(0xffffffffu, over[u]);
        if (OUTLIERS && lane == 0) *(uint2*)(loose + column / 32) = make_uint2(met, 0);
#pragma unroll
        for (int j = 0; j < 2 * TILES; j++) {
            const int v = 4 * j + lane / 8;
            const float by = __uint_as_float(__shfl_sync(0xffffffffu, __float_as_uint(factor), v));
            const u32 pairs[4] = {x[u][j].x & low.x, x[u][j].y & low.y, x[u][j].z & high.x, x[u][j].w & high.y};
            float value[8];
#pragma unroll
            for (int e = 0; e < 8; e++) {
                value[e] = float_of_x((u16)(pairs[e / 2] >> (16 * (e % 2))));
#if LLM
                value[e] = fminf(fmaxf(__fmul_rn(value[e], by), -127.0f), 127.0f);
#else
                const float ratio = __fdiv_rn(value[e], by);
                value[e] = ratio > w.maximum ? w.maximum : ratio < -w.maximum ? -w.maximum : ratio;
#endif
            }
            if (v >= vectors) continue;
#if ROUNDED == 1
            u32 code[8];
#pragma unroll
            for (int e = 0; e < 8; e++) code[e] = __float_as_uint(__fadd_rn(value[e], ROUNDER));
            *(uint2*)(rounded + v * pitch + column) =
                make_uint2(bytes_of(bytes_of(code[0], code[1], 0x0040), bytes_of(code[2], code[3], 0x0040), 0x5410),
                           bytes_of(bytes_of(code[4], code[5], 0x0040), bytes_of(code[6], code[7], 0x0040), 0x5410));
            if (met)
                *(uint4*)(wide_x + v * wide_pitch + 2 * column) =
                    make_uint4(x[u][j].x & ~low.x, x[u][j].y & ~low.y, x[u][j].z & ~high.x, x[u][j].w & ~high.y);
#else
            *(uint4*)(wide_x + v * wide_pitch + 2 * column) = make_uint4(nearest_pair(value[0], value[1]), nearest_pair(value[2], value[3]),
                                                                        nearest_pair(value[4], value[5]), nearest_pair(value[6], value[7]));
#endif
        }
    }
    __syncthreads();
#else
#if ROUNDED && SPLITS > 1
    cluster_wait();  // all blocks have begun
#endif

    // Units of 128 columns of a vector, four of them a lane's: what a thread has brought it alone reads again.
    const int strips = span / 128, units = strips * vectors;
    const Unit own = {warp / strips, warp % strips};
    const Unit step_on = {WARPS / strips, WARPS % strips};
    const auto largest_of = [&](uint2 x, int v) {  // of a unit, to where it is wanted
        u32 largest = larger_integers(x.x & 0x7fff7fffu, x.y & 0x7fff7fffu);
        largest = __reduce_max_sync(0xffffffffu, max(largest & 0xffffu, largest >> 16));
        if (SPLITS > 1 && ROUNDED) {
            if (lane < SPLITS) largest_at_peer(most + v, lane, largest);
        } else if (lane == 0) {
            atomicMax(most + v, largest);
        }
    };
    bool asked = !PATIENT;
    const auto ask = [&]() {
#pragma unroll 1
        for (int i = 1; i < DEPTH; i++) load(i);
        asked = true;
    };
    Unit at = own;
#pragma unroll 1
    for (int unit = warp; unit < units; unit += 4 * WARPS) {
        uint2 x[4];
        Unit of[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int column = at.strip * 128 + lane * 4;
            of[j] = at;
#if INPUT > 0
            const uint2* const from = (const uint2*)(wide_x + 2 * column);
#else
            const uint2* const from = (const uint2*)(given + (size_t)at.v * w.columns + begin + column);
#endif
            x[j] = unit + j * WARPS < units && column < here ? *from : make_uint2(0, 0);
            at.go(step_on, strips);
        }
        if (!asked) ask();
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (unit + j * WARPS < units) {
                const int column = of[j].strip * 128 + lane * 4;
                *(uint2*)(wide_x + of[j].v * wide_pitch + 2 * column) = x[j];
#if OUTLIERS == 1
                const u32 low = x[j].x & 0x7fff7fffu, high = x[j].y & 0x7fff7fffu;
                u32 bits = (float_of_x((u16)low) >= w.threshold) | (float_of_x((u16)(low >> 16)) >= w.threshold) << 1;
                bits |= (float_of_x((u16)high) >= w.threshold) << 2 | (float_of_x((u16)(high >> 16)) >= w.threshold) << 3;
                if (bits) atomicOr(flags + column / 32, bits << column % 32);
#elif OUTLIERS == 0 && (ROUNDED || CONVERTS)
                if (CONVERTS || !w.input_scale) largest_of(x[j], of[j].v);
#endif
            }
    }
    if (!asked) ask();
    MARK(3, 0u);
#if PLACED
    for (int i = threadIdx.x; i < stored; i += THREADS) {
#if INPUT > 0
        const u16* const from = (const u16*)wide + (i < w.stored ? w.index[i] : 0);
#else
        const u16* const from = given + (i < w.stored ? w.index[i] : 0);
#endif
        bool outlier = OUTLIERS == 2 && i < w.stored;
        if (OUTLIERS == 1 && i < w.stored)
            for (int v = 0; v < vectors; v++) outlier |= fabsf(float_of_x(from[(size_t)v * w.columns])) >= w.threshold;
        for (int v = 0; v < vectors; v++) ((u16*)(placed_x + v * placed_pitch))[i] = outlier ? from[(size_t)v * w.columns] : (u16)0;
    }
#endif
#pragma unroll 1
    for (int i = threadIdx.x; i < tiles * 16; i += THREADS) {
        row_scales[i] = i < THREADS ? first_scale : by_row(i);
        row_biases[i] = i < THREADS ? first_bias : bias_of(i);
    }
#if OUTLIERS
    __syncthreads();
#if PLACED && OUTLIERS == 1
    for (int i = threadIdx.x; i < span / 32; i += THREADS) loose[i] = flags[i] & ~loose[i];
#endif
    if (!w.input_scale) {
        Unit at = own;
#pragma unroll 4
        for (int unit = warp; unit < units; unit += WARPS) {
            const int column = at.strip * 128 + lane * 4;
            const uint2 x = *(const uint2*)(wide_x + at.v * wide_pitch + 2 * column), kept = pairs_of_bits(~(flags[column / 32] >> column % 32));
            largest_of(make_uint2(x.x & kept.x, x.y & kept.y), at.v);
            at.go(step_on, strips);
        }
    }
#endif
#if ROUNDED && SPLITS > 1
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
    MARK(4, 0u);
#if ROUNDED || CONVERTS
    float step = 0.0f, factor = 0.0f;
    if (lane < vectors) {
#if CONVERTS  // largest magnitudes come to lie between 2^14 and 2^15
        const u32 exponent = max(most[lane] >> 7, 15u);
        factor = __uint_as_float((268 - exponent) << 23), step = __uint_as_float((exponent - 14) << 23);
#elif LLM
        step = float_of_x((u16)most[lane]);
        factor = __fmul_rn(__fdiv_rn(1.0f, fmaxf(step, SMALLEST)), 127.0f);
#else
        step = float_of_x((u16)most[lane]);
        if (w.input_scale) step = *w.input_scale;
        else step = __fmul_rn(step, __fdiv_rn(1.0f, w.maximum)), step = step == 0.0f ? 1.0f : step;
        factor = step;
#endif
        if (warp == 0) steps[lane] = step;
    }
    at = own;
#pragma unroll 2
    for (int unit = warp; unit < units; unit += WARPS) {
        const int column = at.strip * 128 + lane * 4;
        const float by = __uint_as_float(__shfl_sync(0xffffffffu, __float_as_uint(factor), at.v));
        uint2* const place = (uint2*)(wide_x + at.v * wide_pitch + 2 * column);
        const uint2 x = *place, kept = pairs_of_bits(OUTLIERS ? ~(flags[column / 32] >> column % 32) : 15);
        const u32 pairs[2] = {x.x & kept.x, x.y & kept.y};
        float value[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            value[e] = float_of_x((u16)(pairs[e / 2] >> (16 * (e % 2))));
#if CONVERTS
            value[e] *= by;
#elif LLM
            value[e] = fminf(fmaxf(__fmul_rn(value[e], by), -127.0f), 127.0f);
#else
            const float ratio = __fdiv_rn(value[e], by);
            value[e] = ratio > w.maximum ? w.maximum : ratio < -w.maximum ? -w.maximum : ratio;
#endif
        }
#if ROUNDED == 0
        *place = make_uint2(pair_of_halves(value[0], value[1]), pair_of_halves(value[2], value[3]));
#elif ROUNDED == 1
        u32 code[4];
#pragma unroll
        for (int e = 0; e < 4; e++) code[e] = __float_as_uint(__fadd_rn(value[e], ROUNDER));
        *(u32*)(rounded + at.v * pitch + column) = bytes_of(bytes_of(code[0], code[1], 0x0040), bytes_of(code[2], code[3], 0x0040), 0x5410);
        if (LOOSE && (loose[column / 64 * 2] | loose[column / 64 * 2 + 1])) {  // what is no outlier is zero there
            const uint2 outer = pairs_of_bits(loose[column / 32] >> column % 32);
            *place = make_uint2(x.x & outer.x, x.y & outer.y);
        }
#else
        *place = make_uint2(nearest_pair(value[0], value[1]), nearest_pair(value[2], value[3]));
#endif
        at.go(step_on, strips);
    }
    __syncthreads();
#endif
#endif
    MARK(5, 0u);

    int whole[TILES][4];
    float outer[TILES][4];
    const int row = (g & 1) * 4 + (g >> 1);  // lanes of a quarter read rows 4 apart, whose pieces of 16 bytes lie in other banks
    int vector_of[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) vector_of[t] = min(8 * t + g, vectors - 1);
    const auto cleared = [&]() {
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) whole[t][i] = 0, outer[t][i] = 0.0f;
    };
    cleared();
#pragma unroll 1
    for (; item < last; item++) {
        barrier_wait(arrived + slot, phase);
        MARK(6, 0u);
        const u8* const stage = ring + slot * ITEM_BYTES;
#pragma unroll
        for (int half = 0; half < ITEM / 64; half++) {
            const u8* const from = stage + half / 2 * 2048 + row * 128 + ((half % 2 * 4 + q) ^ row) * 16;
            const uint4 top = *(const uint4*)from, bottom = *(const uint4*)(from + 1024);
            const int column = part * ITEM + half * 64;
#if ROUNDED == 1
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const uint4 x = *(const uint4*)(rounded + vector_of[t] * pitch + column + 16 * q);
                whole_product(whole[t], top.x, bottom.x, top.y, bottom.y, x.x, x.y);
                whole_product(whole[t], top.z, bottom.z, top.w, bottom.w, x.z, x.w);
            }
#endif
#if WIDENS
            const uint2 marks = ROUNDED == 1 ? *(const uint2*)(loose + column / 32) : make_uint2(1, 1);
            if (marks.x | marks.y) {
                u32 above[8], below[8];
                const u32 tops[4] = {top.x, top.y, top.z, top.w}, bottoms[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    widen(*(u32(*)[2])(above + 2 * i), tops[i]);
                    widen(*(u32(*)[2])(below + 2 * i), bottoms[i]);
                }
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const uint4* const x = (const uint4*)(wide_x + vector_of[t] * wide_pitch + 2 * column + 32 * q);
                    const uint4 first = x[0], second = x[1];
                    wide_product(outer[t], above[0], below[0], above[1], below[1], first.x, first.y);
                    wide_product(outer[t], above[2], below[2], above[3], below[3], first.z, first.w);
                    wide_product(outer[t], above[4], below[4], above[5], below[5], second.x, second.y);
                    wide_product(outer[t], above[6], below[6], above[7], below[7], second.z, second.w);
                }
            }
#endif
        }
        __syncwarp();  // all lanes have read what is overwritten
        load(slot);
        if (++slot == DEPTH) slot = 0, phase ^= 1;
        if (++part == across || item + 1 == last) {
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int v = 8 * t + 2 * q + i % 2, at = ((tile + warp) * vectors + v) * 16 + row + i / 2 * 8;
                    if (v < vectors) {
                        if (ROUNDED == 1) ((int*)sums)[at] = whole[t][i];
                        else sums[at] = CONVERTS ? outer[t][i] * steps[v] : outer[t][i];
                        if (LOOSE) outer_sums[at] = outer[t][i];
                    }
                }
#if PLACED
            if (part == across && tile % SPLITS == rank) {  // stored columns of the whole row
                const int first = (cluster + tile * clusters) * 16 + row;
                float beside[TILES][4];
#pragma unroll
                for (int t = 0; t < TILES; t++) beside[t][0] = beside[t][1] = beside[t][2] = beside[t][3] = 0.0f;
                for (int k = 2 * q; k < stored; k += 16) {
                    u32 a[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int line = first + i % 2 * 8, at = k + i / 2 * 8;
                        const u16* const from = w.cached + (size_t)line * w.stored + at;
                        a[i] = (line < w.rows && at < w.stored ? (u32)__ldg(from) : 0) | (line < w.rows && at + 1 < w.stored ? (u32)__ldg(from + 1) : 0) << 16;
                    }
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        const u32* const x = (const u32*)(placed_x + vector_of[t] * placed_pitch + 2 * k);
                        wide_product(beside[t], a[0], a[1], a[2], a[3], x[0], x[4]);
                    }
                }
#pragma unroll
                for (int t = 0; t < TILES; t++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int v = 8 * t + 2 * q + i % 2;
                        if (v < vectors) placed_sums[(tile / SPLITS * vectors + v) * 16 + row + i / 2 * 8] = beside[t][i];
                    }
            }
#endif
            cleared();
            part = 0, tile++;
        }
    }
    MARK(7, 0u);
    __syncthreads();
    const auto first_of = [&](int tile) { return tile * across / each; };  // warp of those that have sums of a tile
    const auto add_slots = [&](u32 (&words)[4], const float* from, int tile, int v, int four) {
#pragma unroll 1
        for (int one = first_of(tile); one <= ((tile + 1) * across - 1) / each; one++) {
            const uint4 more = *(const uint4*)(from + ((tile + one) * vectors + v) * 16 + four);
            const u32 word[4] = {more.x, more.y, more.z, more.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
                words[i] = ROUNDED == 1 && from == sums ? words[i] + word[i] : __float_as_uint(__uint_as_float(words[i]) + __uint_as_float(word[i]));
        }
    };
#if SPLITS > 1
#pragma unroll 1
    for (int at = threadIdx.x; at < tiles * vectors * 4; at += THREADS) {
        const int tile = at / (4 * vectors), v = at / 4 % vectors, four = at % 4 * 4, place = ((tile + first_of(tile)) * vectors + v) * 16 + four;
        u32 words[4] = {0, 0, 0, 0}, more[4] = {0, 0, 0, 0};
        add_slots(words, sums, tile, v, four);
        *(uint4*)(sums + place) = make_uint4(words[0], words[1], words[2], words[3]);
        if (LOOSE) {
            add_slots(more, outer_sums, tile, v, four);
            *(uint4*)(outer_sums + place) = make_uint4(more[0], more[1], more[2], more[3]);
        }
    }
    cluster_arrive();
    cluster_wait();
#endif
    MARK(8, 0u);
#pragma unroll 1
    for (int at = rank * THREADS + threadIdx.x; at < tiles * vectors * 4; at += SPLITS * THREADS) {  // four rows of a vector
        const int tile = at / (4 * vectors), v = at / 4 % vectors, four = at % 4 * 4;
        float total[4] = {0, 0, 0, 0}, beyond[4] = {0, 0, 0, 0};
        int exact[4] = {0, 0, 0, 0};
#if SPLITS > 1
        const int place = ((tile + first_of(tile)) * vectors + v) * 16 + four;
        uint4 words[SPLITS], more[SPLITS];
#pragma unroll
        for (int other = 0; other < SPLITS; other++) {
            words[other] = peer_words(sums + place, other);
            if (LOOSE) more[other] = peer_words(outer_sums + place, other);
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
        add_slots(words, sums, tile, v, four);
        if (LOOSE) add_slots(more, outer_sums, tile, v, four);
#pragma unroll
        for (int i = 0; i < 4; i++) exact[i] = (int)words[i], total[i] = __uint_as_float(words[i]), beyond[i] = __uint_as_float(more[i]);
#endif
        float beside[4] = {0, 0, 0, 0};
        if (PLACED) {
            const float* const place = placed_sums + (tile / SPLITS * vectors + v) * 16 + four;
            const uint4 words = SPLITS > 1 ? peer_words(place, tile % SPLITS) : *(const uint4*)place;
            beside[0] = __uint_as_float(words.x), beside[1] = __uint_as_float(words.y);
            beside[2] = __uint_as_float(words.z), beside[3] = __uint_as_float(words.w);
        }
        const float step = ROUNDED ? steps[v] : 1.0f;
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float by = row_scales[tile * 16 + four + i], shift = row_biases[tile * 16 + four + i];
#if LLM
            y[i] = __fadd_rn(__fmul_rn(__fadd_rn(__fmul_rn((float)exact[i], __fdiv_rn(step, 127.0f)), beyond[i]), __fdiv_rn(by, 127.0f)), beside[i] + shift);
#else
            y[i] = __fadd_rn(__fmul_rn(__fmul_rn(ROUNDED == 1 ? (float)exact[i] : total[i], by), step), shift);
#endif
        }
        const int first = (cluster + tile * clusters) * 16 + four;
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
#if SPLITS > 1
    cluster_arrive();  // no block goes while another one reads its memory
    cluster_wait();
#endif
    MARKS_END(w.bias);
}
