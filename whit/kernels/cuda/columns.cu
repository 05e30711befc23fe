// Rounding or descent along the columns of a block: see whit/kernels/columns.py for the equations and arguments.
//
// One thread per row. SUB columns at a time are held in registers: each is finished in turn and taken off the others at
// once, so nothing but a chain of comparisons and one multiply-add per column is serial. Errors of the columns before
// lie in shared memory, and so does the part of the matrix that is needed. Compiled with
//   LEVELS (entries of a table), GRID, DESCEND, MASKED, HALVES (0 or 1), THREADS (rows per block).
// With HALVES the errors are also written as two bfloat16 numbers, e = high + low to 2^-17, in the rows [high, low, high]
// of a matrix (3 * columns, rows): the right factor of the product that takes them off the columns to come.
#define SUB 32
#define MOST 128
#define AHEAD 4

static __device__ unsigned short bfloat16(float x) {
    const unsigned bits = __float_as_uint(x);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even; x is finite
}

extern "C" __global__ void __launch_bounds__(THREADS) round_columns(
    const float* __restrict__ values, const float* __restrict__ gradient, const float* __restrict__ inner,
    const float* __restrict__ table, const int* __restrict__ book, unsigned char* __restrict__ codes,
    float* __restrict__ errors, const unsigned char* __restrict__ kept, unsigned short* __restrict__ halves, int rows,
    int columns, int stride, float top) {
    __shared__ __align__(16) float panel[MOST * SUB];
    __shared__ float done[MOST * THREADS];
    __shared__ int books[SUB];
    const int row = blockIdx.x * THREADS + threadIdx.x;
    const bool here = row < rows;
    const long long place = here ? row : rows - 1;
    const float* source = DESCEND ? gradient : values;
    for (int first = 0; first < columns; first += SUB) {
        const int last = first + SUB < columns ? first + SUB : columns;
        __syncthreads();
#pragma unroll 16
        for (int t = threadIdx.x; t < last * SUB; t += THREADS) {  // many loads on their way at a time
            const int i = t / SUB, k = first + t % SUB;
            panel[t] = k < columns && i <= k ? inner[i * (long long)stride + k] : 0.f;
        }
        for (int t = threadIdx.x; t < SUB; t += THREADS) books[t] = first + t < columns ? book[first + t] : 0;
        float rest[SUB];
#pragma unroll
        for (int k = 0; k < SUB; k++) rest[k] = first + k < columns ? source[(first + k) * (long long)rows + place] : 0.f;
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < first; i++) {
            const float error = done[i * THREADS + threadIdx.x];
#pragma unroll
            for (int k = 0; k < SUB; k++) rest[k] -= error * panel[i * SUB + k];
        }
        // What the next column needs from memory is asked for before this column is worked on.
        float entries[AHEAD][LEVELS], old[AHEAD];
        bool keep[AHEAD];
#pragma unroll
        for (int j = 0; j < SUB + AHEAD; j++) {
            const int slot = j % AHEAD, column = first + j - AHEAD;
            float entry[LEVELS], before = 0.f;
            bool here_kept = true;
            if (j >= AHEAD) {
#pragma unroll
                for (int level = 0; level < LEVELS; level++) entry[level] = entries[slot][level];
                before = old[slot];
                here_kept = keep[slot];
            }
            if (j < SUB && first + j < columns) {
                const float* from = table + books[j] * (LEVELS * (long long)rows) + place;
#pragma unroll
                for (int level = 0; level < LEVELS; level++) entries[slot][level] = from[level * (long long)rows];
                const long long offset = (first + j) * (long long)rows + place;
                if (DESCEND) old[slot] = values[offset];
                keep[slot] = MASKED ? kept[offset] != 0 : true;
            }
            if (j < AHEAD || column >= columns) continue;
            const int turn = j - AHEAD;
            const long long offset = column * (long long)rows + place;
            const float diagonal = panel[column * SUB + turn];
            const float target = DESCEND ? before + rest[turn] / diagonal : rest[turn];
            float nearest, code = 0.f;
            if (GRID) {
                const float scale = entry[0], zero = entry[LEVELS - 1];
                float ratio = target / (scale == 0.f ? 1.f : scale);
                ratio = fminf(fmaxf(ratio, -4194304.f), 4194303.f);  // larger ones are cut off anyway
                code = fminf(fmaxf(rintf(ratio) + zero, 0.f), top);
                nearest = (code - zero) * scale;
            } else {
                nearest = entry[0];
#pragma unroll
                for (int level = 1; level < LEVELS; level++) {
                    const bool above = target >= (entry[level - 1] + entry[level]) * 0.5f;
                    nearest = above ? entry[level] : nearest;
                    code = above ? code + 1.f : code;
                }
            }
            if (MASKED) nearest = here_kept ? nearest : 0.f;
            const float error = DESCEND ? nearest - before : (target - nearest) / diagonal;
            if (here) {
                codes[offset] = (unsigned char)code;
                errors[offset] = error;
                if (HALVES) {
                    const unsigned short high = bfloat16(error);
                    const long long next = columns * (long long)rows;
                    halves[offset] = halves[offset + 2 * next] = high;
                    halves[offset + next] = bfloat16(error - __uint_as_float((unsigned)high << 16));
                }
            }
            done[column * THREADS + threadIdx.x] = error;
#pragma unroll
            for (int k = turn + 1; k < SUB; k++) rest[k] -= error * panel[column * SUB + k];
        }
    }
}
