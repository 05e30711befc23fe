// Attention of one new token per sequence to itself and to the keys and values in a cache, with rotary positions: see
// `rotate_and_attend` in whit/kernels/decode_ops.py. Compiled with
//   SIZE (of a head), SPLITS (thread blocks of a cluster, which share the keys of a head), THREADS, ROWS, EAGER.
//
// LANES threads hold a row of the cache, eight columns each, in registers: the same ones its key and its value, so that
// no barrier stands between scores and sums. What the cache holds is no result of the kernel before this one: a block
// asks for its first rows before it waits for that one. Every team of lanes keeps sums relative to the largest score it
// has met; they are added within a warp, a block and the cluster, always in the same order.

#define LANES (SIZE / 8)
#define TEAMS (THREADS / LANES)  // rows that a block takes at once
#define CHUNK (TEAMS * ROWS)
#define WARP_COUNT (THREADS / 32)
#define SHARE (SIZE / SPLITS)    // columns of the result that a block of a cluster writes

struct Eight {
    float v[8];
};
__device__ __forceinline__ Eight eight_of(uint4 words) {
    const u32 w[4] = {words.x, words.y, words.z, words.w};
    Eight out;
#pragma unroll
    for (int i = 0; i < 4; i++) out.v[2 * i] = float_of_x((u16)w[i]), out.v[2 * i + 1] = float_of_x((u16)(w[i] >> 16));
    return out;
}
__device__ __forceinline__ uint4 words_of(const Eight& e) {
    return make_uint4(pair_of_floats(e.v[0], e.v[1]), pair_of_floats(e.v[2], e.v[3]), pair_of_floats(e.v[4], e.v[5]), pair_of_floats(e.v[6], e.v[7]));
}
// straight cos + turned sin, each product and the sum rounded; the partner of the upper half of a head is negative
__device__ __forceinline__ Eight rotated(uint4 straight, uint4 partner, const Eight& cos, const Eight& sin, float sign) {
    const Eight a = eight_of(straight), b = eight_of(partner);
    Eight first, second, out;
#pragma unroll
    for (int i = 0; i < 8; i++) first.v[i] = a.v[i] * cos.v[i], second.v[i] = sign * b.v[i] * sin.v[i];
    first = eight_of(words_of(first)), second = eight_of(words_of(second));
#pragma unroll
    for (int i = 0; i < 8; i++) out.v[i] = first.v[i] + second.v[i];
    return eight_of(words_of(out));
}
__device__ __forceinline__ float dot(const Eight& a, const Eight& b) {
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i += 2) even += a.v[i] * b.v[i], odd += a.v[i + 1] * b.v[i + 1];
    return even + odd;
}

extern "C" __global__ void __launch_bounds__(THREADS)
attend(const u16* query, const u16* key, const u16* value, const u16* cosine, const u16* sine, u16* keys, u16* values, const long long* position, const long long* start, u16* out, int query_stride, int key_stride, int value_stride, int length, int heads, int group, float scaling) {
    extern __shared__ __align__(16) u8 memory[];
    float* const sums = (float*)memory;                    // of every warp
    float* const tops = sums + WARP_COUNT * SIZE;          // the score that they are relative to
    float* const weights = tops + WARP_COUNT;
    float* const inbox = weights + WARP_COUNT;             // from every block of the cluster, for the columns of this one
    float* const inbox_tops = inbox + SIZE;
    float* const inbox_weights = inbox_tops + SPLITS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = threadIdx.x / LANES, c = threadIdx.x % LANES;
    const int rank = blockIdx.x % SPLITS, head = blockIdx.x / SPLITS, sequence = head / heads, own = head % heads, shared = own / group;
    if (EAGER) start_next_kernel();
#if SPLITS > 1
    cluster_begun();
#endif
    // Nothing up to the wait was written by the kernel before this one.
    const int at = (int)__ldg(position), first = (int)__ldg(start + sequence);
    const size_t turn = (size_t)(at - first) * SIZE + 8 * c;
    const Eight cos = eight_of(__ldg((const uint4*)(cosine + turn))), sin = eight_of(__ldg((const uint4*)(sine + turn)));
    const float sign = c < LANES / 2 ? -1.0f : 1.0f;
    const size_t cache = (size_t)(sequence * (heads / group) + shared) * length * SIZE + 8 * c;
    const int each = (at - first + SPLITS * CHUNK - 1) / (SPLITS * CHUNK) * CHUNK, begin = first + rank * each, end = min(begin + each, at);
    uint4 known[ROWS], held[ROWS];
    auto load = [&](uint4 (&to)[ROWS], const u16* from, int index) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = index + i * TEAMS + team;
            to[i] = row < end ? __ldg((const uint4*)(from + cache + (size_t)row * SIZE)) : make_uint4(0, 0, 0, 0);
        }
    };
    load(known, keys, begin);
    load(held, values, begin);
    wait_for_previous_kernel();

    const bool newest = rank == SPLITS - 1 && warp == 0;  // these attend to the token itself too
    const int partner = 8 * (c ^ (LANES / 2));
    const u16* const q = query + (size_t)sequence * query_stride + own * SIZE;
    const u16* const k = key + (size_t)sequence * key_stride + shared * SIZE;
    const uint4 straight = *(const uint4*)(q + 8 * c), other = *(const uint4*)(q + partner);
    uint4 fresh = make_uint4(0, 0, 0, 0), fresh_other = fresh, given = fresh;
    if (newest) {
        fresh = *(const uint4*)(k + 8 * c), fresh_other = *(const uint4*)(k + partner);
        given = *(const uint4*)(value + (size_t)sequence * value_stride + shared * SIZE + 8 * c);
    }
    Eight asked = rotated(straight, other, cos, sin, sign);
#pragma unroll
    for (int i = 0; i < 8; i++) asked.v[i] *= scaling;

    float largest = -1e30f, weight = 0.0f;
    Eight total;
#pragma unroll
    for (int i = 0; i < 8; i++) total.v[i] = 0.0f;
    auto add = [&](float share, const Eight& row) {
        weight += share;
#pragma unroll
        for (int i = 0; i < 8; i++) total.v[i] += share * row.v[i];
    };
    auto relative_to = [&](float top) {
        const float kept = __expf(largest - top);
        largest = top;
        weight *= kept;
#pragma unroll
        for (int i = 0; i < 8; i++) total.v[i] *= kept;
    };
#pragma unroll 1
    for (int index = begin; index < end; index += CHUNK) {
        float score[ROWS], top = largest;
#pragma unroll
        for (int i = 0; i < ROWS; i++) score[i] = dot(eight_of(known[i]), asked);
#pragma unroll
        for (int across = LANES / 2; across > 0; across /= 2)
#pragma unroll
            for (int i = 0; i < ROWS; i++) score[i] += __shfl_xor_sync(0xffffffffu, score[i], across);
        if (index + CHUNK < end) load(known, keys, index + CHUNK);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            if (index + i * TEAMS + team >= end) score[i] = -1e30f;
            top = fmaxf(top, score[i]);
        }
        relative_to(top);
#pragma unroll
        for (int i = 0; i < ROWS; i++) add(score[i] > -1e30f ? __expf(score[i] - top) : 0.0f, eight_of(held[i]));
        if (index + CHUNK < end) load(held, values, index + CHUNK);
    }
    if (newest) {
        const Eight turned = rotated(fresh, fresh_other, cos, sin, sign);
        float score = dot(turned, asked);
#pragma unroll
        for (int across = LANES / 2; across > 0; across /= 2) score += __shfl_xor_sync(0xffffffffu, score, across);
        if (team == 0) {
            if (own % group == 0) {
                *(uint4*)(keys + cache + (size_t)at * SIZE) = words_of(turned);
                *(uint4*)(values + cache + (size_t)at * SIZE) = given;
            }
            const float top = fmaxf(largest, score);
            relative_to(top);
            add(__expf(score - top), eight_of(given));
        }
    }
    // The sums of the teams of a warp, then of the warps of a block.
#pragma unroll
    for (int across = LANES; across < 32; across *= 2) {
        relative_to(fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, across)));
        weight += __shfl_xor_sync(0xffffffffu, weight, across);
#pragma unroll
        for (int i = 0; i < 8; i++) total.v[i] += __shfl_xor_sync(0xffffffffu, total.v[i], across);
    }
    if (lane < LANES) {
        float4* const to = (float4*)(sums + warp * SIZE + 8 * c);
        to[0] = float4{total.v[0], total.v[1], total.v[2], total.v[3]};
        to[1] = float4{total.v[4], total.v[5], total.v[6], total.v[7]};
    }
    if (lane == 0) tops[warp] = largest, weights[warp] = weight;
    __syncthreads();
    const int column = threadIdx.x;
    auto together = [&](const float* of, const float* relative, const float* shares, int count, int stride, float& top, float& sum) {
        float result = 0.0f;
        top = -1e30f, sum = 0.0f;
        for (int i = 0; i < count; i++) top = fmaxf(top, relative[i]);
        for (int i = 0; i < count; i++) {
            const float kept = __expf(relative[i] - top);
            sum += kept * shares[i];
            result += kept * of[i * stride];
        }
        return result;
    };
    float top, sum;
#if SPLITS == 1
    if (column < SIZE) {
        const float result = together(sums + column, tops, weights, WARP_COUNT, SIZE, top, sum);
        out[(size_t)head * SIZE + column] = x_of_float(__fdividef(result, sum));
    }
#else
    cluster_wait();  // all blocks have begun: their memory may be written
    if (column < SIZE) {
        const float result = together(sums + column, tops, weights, WARP_COUNT, SIZE, top, sum);
        store_to_peer(inbox + rank * SHARE + column % SHARE, column / SHARE, result);
        if (column % SHARE == 0) store_to_peer(inbox_tops + rank, column / SHARE, top), store_to_peer(inbox_weights + rank, column / SHARE, sum);
    }
    cluster_arrive();
    cluster_wait();
    if (column < SHARE) {
        const float result = together(inbox + column, inbox_tops, inbox_weights, SPLITS, SHARE, top, sum);
        out[(size_t)head * SIZE + rank * SHARE + column] = x_of_float(__fdividef(result, sum));
    }
#endif
}
