// Rounding or descent along groups of columns, each group of a row to the nearest of COUNT words or its negative: see
// whit/kernels/groups.py for the equations and arguments.
//
// LANES threads share a row: each sums what a part of the columns before takes off a group, and looks at a part of the
// words; everything else they all do. Compiled with WIDTH (columns of a group), COUNT (words), DESCEND (0 or 1), THREADS,
// LANES, MOST (columns of a launch).
#define NEAR (32 / LANES)       // rows of a warp
#define ROWS (THREADS / LANES)  // rows of a block
#define PITCH (ROWS + NEAR)     // threads of a row look at different columns at a time: in different banks
#define PADDED ((WIDTH + 3) / 4 * 4)

extern "C" __global__ void __launch_bounds__(THREADS) round_groups(
    const float* __restrict__ values, const float* __restrict__ gradient, const float* __restrict__ inner,
    const float* __restrict__ metric, const float* __restrict__ inverse, const float* __restrict__ rotated,
    const float* __restrict__ lengths, const float* __restrict__ words, const float* __restrict__ scales,
    const int* __restrict__ bounds, long long* __restrict__ codes, float* __restrict__ errors,
    float* __restrict__ results, int rows, int groups, int values_stride, int gradient_stride, int inner_stride,
    int codes_stride, int errors_stride, int results_stride) {
    __shared__ __align__(16) float panel[MOST * PADDED];
    __shared__ __align__(16) float turned[COUNT * PADDED];
    __shared__ float square[WIDTH * WIDTH], solution[DESCEND ? WIDTH * WIDTH : 1], sizes[COUNT];
    __shared__ float done[MOST * PITCH];
    const int part = threadIdx.x % 32 / NEAR, mine = threadIdx.x / 32 * NEAR + threadIdx.x % NEAR;
    const int row = blockIdx.x * ROWS + mine;
    const bool here = row < rows;
    const long long place = here ? row : rows - 1;
    const float scale = scales[place];
    for (int group = 0; group < groups; group++) {
        const int first = bounds[group] - bounds[0], width = bounds[group + 1] - bounds[group];
        __syncthreads();
        for (int t = threadIdx.x; t < first * WIDTH; t += THREADS) {
            const int i = t / WIDTH, k = t % WIDTH;
            panel[i * PADDED + k] = k < width ? inner[i * (long long)inner_stride + first + k] : 0.f;
        }
        for (int t = threadIdx.x; t < WIDTH * WIDTH; t += THREADS) {
            square[t] = metric[group * (WIDTH * WIDTH) + t];
            if (DESCEND) solution[t] = inverse[group * (WIDTH * WIDTH) + t];
        }
        for (int t = threadIdx.x; t < COUNT * PADDED; t += THREADS)
            turned[t] = t % PADDED < WIDTH ? rotated[(group * COUNT + t / PADDED) * WIDTH + t % PADDED] : 0.f;
        for (int t = threadIdx.x; t < COUNT; t += THREADS) sizes[t] = lengths[group * COUNT + t];
        float before[WIDTH], target[WIDTH], sum[WIDTH];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            before[k] = k < width ? values[place * values_stride + first + k] : 0.f;
            target[k] = DESCEND ? (k < width ? gradient[place * gradient_stride + first + k] : 0.f) : before[k];
            sum[k] = 0.f;
        }
        __syncthreads();
#pragma unroll 2
        for (int i = part; i < first; i += LANES) {
            const float passed = done[i * PITCH + mine];
#pragma unroll
            for (int k = 0; k < WIDTH; k++) sum[k] += passed * panel[i * PADDED + k];
        }
#pragma unroll
        for (int step = 16; step >= NEAR; step /= 2) {
#pragma unroll
            for (int k = 0; k < WIDTH; k++) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], step);
        }
#pragma unroll
        for (int k = 0; k < WIDTH; k++) target[k] -= sum[k];
        if (DESCEND) {
            float slope[WIDTH];
#pragma unroll
            for (int k = 0; k < WIDTH; k++) slope[k] = target[k];
#pragma unroll
            for (int k = 0; k < WIDTH; k++) {
                target[k] = before[k];
#pragma unroll
                for (int i = 0; i < WIDTH; i++) target[k] += slope[i] * solution[i * WIDTH + k];
            }
        }
        float moved[PADDED];  // the target in the metric
#pragma unroll
        for (int k = 0; k < PADDED; k++) {
            moved[k] = 0.f;
            if (k >= WIDTH) continue;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) moved[k] += target[i] * square[i * WIDTH + k];
        }
        // |t - a c|^2 = |t|^2 - 2 a |t.c| + a^2 |c|^2 at the better sign; the first of equals.
        float best = -3.4e38f;
        int chosen = part;
        bool negative = false;
#pragma unroll 4
        for (int word = part; word < COUNT; word += LANES) {
            float along = 0.f;
#pragma unroll
            for (int k = 0; k < PADDED; k++) along += moved[k] * turned[word * PADDED + k];
            const float score = 2.f * fabsf(along) - scale * sizes[word];
            if (score > best) {
                best = score;
                chosen = word;
                negative = along < 0.f;
            }
        }
#pragma unroll
        for (int step = 16; step >= NEAR; step /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, best, step);
            const unsigned packed = __shfl_xor_sync(0xffffffffu, (unsigned)(2 * chosen + negative), step);
            const int word = packed / 2;
            if (other > best || (other == best && word < chosen)) {
                best = other;
                chosen = word;
                negative = packed % 2;
            }
        }
        const float signed_scale = negative ? -scale : scale;
        float nearest[WIDTH], error[WIDTH];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) nearest[k] = k < width ? signed_scale * words[chosen * WIDTH + k] : 0.f;
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            error[k] = nearest[k] - before[k];
            if (DESCEND) continue;
            error[k] = 0.f;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) error[k] += (target[i] - nearest[i]) * square[i * WIDTH + k];
        }
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            if (k >= width || k % LANES != part) continue;
            done[(first + k) * PITCH + mine] = error[k];
            if (!here) continue;
            errors[place * errors_stride + first + k] = error[k];
            results[place * results_stride + first + k] = DESCEND ? nearest[k] : target[k];
        }
        if (here && part == 0) codes[place * codes_stride + group] = chosen + (negative ? COUNT : 0);
    }
}
