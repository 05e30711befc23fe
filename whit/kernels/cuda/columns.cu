// Rounding or descent along the columns of a block: see whit/kernels/columns.py for the equations and arguments.
//
// One thread per row. SUB columns at a time are held in registers: each is finished in turn and taken off the others at
// once, so nothing but a chain of one comparison and one multiply-add per column is serial. Errors of the columns before
// lie in shared memory, and so does the part of the matrix that is needed. Compiled with
//   LEVELS (entries of a table), GRID, DESCEND, MASKED, HALVES (0 or 1), THREADS (rows per block).
// With HALVES the errors are also written as two bfloat16 numbers, e = high + low to 2^-17, in the rows [high, low, high]
// of a matrix (3 * columns, rows): the right factor of the product that takes them off the columns to come.
#define SUB 32
#define MOST 128

static __device__ unsigned short bfloat16(float x) {
    const unsigned bits = __float_as_uint(x);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even; x is finite
}

extern "C" __global__ void __launch_bounds__(THREADS) round_columns(
    const float* values, const float* gradient, const float* inner, const float* table, const int* book,
    unsigned char* codes, float* errors, const unsigned char* kept, unsigned short* halves, int rows, int columns,
    int stride, float top) {
    __shared__ __align__(16) float panel[MOST * SUB];
    __shared__ float done[MOST * THREADS];
    const int row = blockIdx.x * THREADS + threadIdx.x;
    const bool here = row < rows;
    const long long place = here ? row : rows - 1;
    const float* source = DESCEND ? gradient : values;
    for (int first = 0; first < columns; first += SUB) {
        const int last = first + SUB < columns ? first + SUB : columns;
        __syncthreads();
        for (int t = threadIdx.x; t < last * SUB; t += THREADS) {
            const int i = t / SUB, k = first + t % SUB;
            panel[t] = k < columns && i <= k ? inner[i * (long long)stride + k] : 0.f;
        }
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
#pragma unroll
        for (int j = 0; j < SUB; j++) {
            const int column = first + j;
            if (column >= columns) break;
            const long offset = column * (long long)rows + place;
            const float diagonal = panel[column * SUB + j];
            const float before = DESCEND ? values[offset] : rest[j];
            const float target = DESCEND ? before + rest[j] / diagonal : rest[j];
            const float* entry = table + book[column] * (long long)(LEVELS * (long long)rows) + place;
            float nearest, code = 0.f;
            if (GRID) {
                const float scale = entry[0], zero = entry[rows];
                float ratio = target / (scale == 0.f ? 1.f : scale);
                ratio = fminf(fmaxf(ratio, -4194304.f), 4194303.f);  // larger ones are cut off anyway
                code = fminf(fmaxf(rintf(ratio) + zero, 0.f), top);
                nearest = (code - zero) * scale;
            } else {
                float lower = nearest = entry[0];
#pragma unroll
                for (int level = 1; level < LEVELS; level++) {
                    const float upper = entry[level * (long long)rows];
                    const bool above = target >= (lower + upper) * 0.5f;
                    nearest = above ? upper : nearest;
                    code = above ? code + 1.f : code;
                    lower = upper;
                }
            }
            if (MASKED) nearest = kept[offset] ? nearest : 0.f;
            const float error = DESCEND ? nearest - before : (target - nearest) / diagonal;
            if (here) {
                codes[offset] = (unsigned char)code;
                errors[offset] = error;
                if (HALVES) {
                    const unsigned short high = bfloat16(error);
                    const long next = columns * (long long)rows;
                    halves[offset] = halves[offset + 2 * next] = high;
                    halves[offset + next] = bfloat16(error - __uint_as_float((unsigned)high << 16));
                }
            }
            done[column * THREADS + threadIdx.x] = error;
#pragma unroll
            for (int k = j + 1; k < SUB; k++) rest[k] -= error * panel[column * SUB + k];
        }
    }
}
