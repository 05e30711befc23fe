// Rounding or descent along the columns of a block: see whit/kernels/columns.py for the equations and arguments.
//
// LANES threads share a row. SUB columns at a time: what the columns before them take off is summed by the threads of a
// row together, each a part of those columns; then every one of these threads walks the SUB columns in registers, doing
// the same, and each stores what it found for its part. What the next SUB columns need from memory is asked for before
// that. One warp per scheduler runs most of the time, so what counts is a short chain from column to column and code that
// fits into the instruction cache: hence SUB columns in a loop, not all of them unrolled. Compiled with
//   LEVELS (entries of a table), GRID, DESCEND, MASKED, HALVES (0 or 1), THREADS (per block), LANES, SUB.
// With HALVES the errors are also written as two bfloat16 numbers, e = high + low to 2^-17, as three matrices [high, low,
// high], `plane` numbers apart: the right factor of the product that takes them off the columns to come.
#define MOST 128
#define NEAR (32 / LANES)        // rows of a warp
#define ROWS (THREADS / LANES)   // rows of a block
#define PITCH (ROWS + (LANES > 1 ? NEAR : 0))  // threads of a row look at different columns: in different banks
#define PIECES (MOST * SUB / THREADS)

static __device__ unsigned short bfloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    unsigned short out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
    return out;
#else
    const unsigned bits = __float_as_uint(x);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even; x is finite
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) round_columns(
    float* __restrict__ values, const float* __restrict__ gradient, const float* __restrict__ inner,
    const float* __restrict__ table, const int* __restrict__ book, unsigned char* __restrict__ codes,
    float* __restrict__ errors, const unsigned char* __restrict__ kept, unsigned short* __restrict__ halves, int rows,
    int columns, int stride, int plane, float top) {
    __shared__ __align__(16) float panels[2][MOST * SUB];
    __shared__ float done[MOST * PITCH];
    __shared__ float inverse[MOST];
    __shared__ int books[MOST];
    const int part = threadIdx.x % 32 / NEAR, mine = threadIdx.x / 32 * NEAR + threadIdx.x % NEAR;
    const int row = blockIdx.x * ROWS + mine;
    const bool here = row < rows;
    const int place = here ? row : rows - 1;
    const float* source = DESCEND ? gradient : values;

    // Columns of `inner` from its top down to the diagonal: on their way, then in shared memory.
    float fetched[PIECES];
    auto fetch = [&](int first) {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            const unsigned t = threadIdx.x + piece * THREADS;
            const int i = t / SUB, k = first + t % SUB;
            fetched[piece] = i <= k && k < columns ? inner[i * (long long)stride + k] : 0.f;
        }
    };
    auto keep_panel = [&](int first) {
        float* panel = panels[first / SUB % 2];
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) panel[threadIdx.x + piece * THREADS] = fetched[piece];
    };
    // What a row needs for the next columns.
    float entries[SUB][LEVELS], start[SUB], old[SUB];
    bool keep[SUB];
    auto ask = [&](int first) {
#pragma unroll
        for (int k = 0; k < SUB; k++) {
            const int column = first + k < columns ? first + k : columns - 1;
            const float* from = table + books[column] * (LEVELS * (long long)rows) + place;
            const int offset = column * rows + place;
#pragma unroll
            for (int level = 0; level < LEVELS; level++) entries[k][level] = from[level * rows];
            start[k] = source[offset];
            old[k] = DESCEND ? values[offset] : 0.f;
            keep[k] = MASKED ? kept[offset] != 0 : true;
        }
    };

    for (int t = threadIdx.x; t < columns; t += THREADS) {
        books[t] = book[t];
        inverse[t] = 1.f / inner[t * (stride + 1LL)];
    }
    fetch(0);
    keep_panel(0);
    __syncthreads();
    ask(0);
    for (int first = 0; first < columns; first += SUB) {
        const float* panel = panels[first / SUB % 2];
        float entry[SUB][LEVELS], rest[SUB], before[SUB], sum[SUB], error[SUB];
        bool here_kept[SUB];
        unsigned code[SUB];
#pragma unroll
        for (int k = 0; k < SUB; k++) {
#pragma unroll
            for (int level = 0; level < LEVELS; level++) entry[k][level] = entries[k][level];
            rest[k] = start[k];
            before[k] = old[k];
            here_kept[k] = keep[k];
            sum[k] = 0.f;
        }
        const bool more = first + SUB < columns;
        if (more) {
            fetch(first + SUB);
            ask(first + SUB);
        }
#pragma unroll 4
        for (int i = part; i < first; i += LANES) {
            const float passed = done[i * PITCH + mine];
#pragma unroll
            for (int k = 0; k < SUB; k++) sum[k] += passed * panel[i * SUB + k];
        }
#pragma unroll
        for (int step = 16; step >= NEAR; step /= 2) {
#pragma unroll
            for (int k = 0; k < SUB; k++) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], step);
        }
#pragma unroll
        for (int k = 0; k < SUB; k++) rest[k] -= sum[k];
#pragma unroll
        for (int turn = 0; turn < SUB; turn++) {
            const float over = inverse[first + turn];
            const float target = DESCEND ? before[turn] + rest[turn] * over : rest[turn];
            float nearest;
            unsigned found = 0;
            if (GRID) {
                const float scale = entry[turn][0], zero = entry[turn][LEVELS - 1];
                const float divisor = scale == 0.f ? 1.f : scale, by = __fdividef(1.f, divisor);
                float ratio = fminf(fmaxf(target * by, -4194304.f), 4194303.f);  // larger ones are cut off anyway
                ratio += (target - ratio * divisor) * by;  // what a division gives
                ratio = fminf(fmaxf(ratio, -4194304.f), 4194303.f);
                const float whole = fminf(fmaxf(rintf(ratio) + zero, 0.f), top);
                nearest = (whole - zero) * scale;
                found = (unsigned)whole;
            } else {
                nearest = entry[turn][0];
#pragma unroll
                for (int level = 1; level < LEVELS; level++) {
                    const bool above = target >= (entry[turn][level - 1] + entry[turn][level]) * 0.5f;
                    nearest = above ? entry[turn][level] : nearest;
                    found = above ? level : found;
                }
            }
            if (MASKED) nearest = here_kept[turn] ? nearest : 0.f;
            error[turn] = DESCEND ? nearest - before[turn] : (target - nearest) * over;
            code[turn] = found;
            before[turn] = nearest;
#pragma unroll
            for (int k = turn + 1; k < SUB; k++) rest[k] -= error[turn] * panel[(first + turn) * SUB + k];
        }
#pragma unroll
        for (int turn = 0; turn < SUB; turn += LANES) {
            float own = error[turn], now = before[turn];
            unsigned number = code[turn];
#pragma unroll
            for (int lane = 1; lane < LANES; lane++) {
                own = part == lane ? error[turn + lane] : own;
                now = part == lane ? before[turn + lane] : now;
                number = part == lane ? code[turn + lane] : number;
            }
            const int column = first + turn + part;
            done[column * PITCH + mine] = own;
            if (!here || column >= columns) continue;
            const int offset = column * rows + place;
            codes[offset] = (unsigned char)number;
            errors[offset] = own;
            if (DESCEND) values[offset] = now;
            if (HALVES) {
                const unsigned short high = bfloat16(own);
                halves[offset] = halves[offset + 2 * plane] = high;
                halves[offset + plane] = bfloat16(own - __uint_as_float((unsigned)high << 16));
            }
        }
        if (more) keep_panel(first + SUB);
        __syncthreads();
    }
}
