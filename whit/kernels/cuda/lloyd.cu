// Lloyd's iteration in one dimension, a warp per row: see whit/kernels/lloyd.py. Compiled with LEVELS and WARPS.
static __device__ double warp_sum(double x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;  // the same bits in every lane: sums of two are commutative
}

extern "C" __global__ void lloyd(
    const float* __restrict__ values, const double* __restrict__ mass, double* __restrict__ levels, int rows, int count,
    int iterations) {
    const int lane = threadIdx.x % 32;
    const long long row = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    double level[LEVELS];
    for (int k = 0; k < LEVELS; k++) level[k] = levels[row * LEVELS + k];
    for (int turn = 0; turn < iterations; turn++) {
        double total[LEVELS], moment[LEVELS];
        for (int k = 0; k < LEVELS; k++) total[k] = moment[k] = 0.0;
        for (int j = lane; j < count; j += 32) {
            const double value = values[row * count + j], weight = mass[j];
            int cluster = 0;
#pragma unroll
            for (int k = 1; k < LEVELS; k++) cluster += value >= (level[k - 1] + level[k]) / 2;
#pragma unroll
            for (int k = 0; k < LEVELS; k++) {
                total[k] += cluster == k ? weight : 0.0;
                moment[k] += cluster == k ? weight * value : 0.0;
            }
        }
        bool moved = false;
#pragma unroll
        for (int k = 0; k < LEVELS; k++) {
            const double sum = warp_sum(total[k]), first = warp_sum(moment[k]);
            const double next = sum > 0.0 ? first / sum : level[k];
            moved |= next != level[k];
            level[k] = next;
        }
        if (!moved) break;
    }
    if (lane == 0)
        for (int k = 0; k < LEVELS; k++) levels[row * LEVELS + k] = level[k];
}
