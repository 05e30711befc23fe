// What a product with one vector does to its input first, so that no kernel of its own has to. With INPUT it adds what the
// block before left to add, and normalises:
//     x = weight h / sqrt(mean(h^2) + epsilon),   h = states + update
// Every thread block does all of it, in the same order, and keeps the result in shared memory, rounded where the kernels
// of whit/kernels/decode_ops.py round: 128 columns at the beginning of the very words that hold their operand form later,
// which takes no less room and is made by one warp for one block of columns. The first thread block also writes h.
// Compiled with EIGHTS, the eights of columns of a thread, and ADD, whether there is an `update`.

#ifndef INPUT
#define INPUT 0
#endif

struct Input {
    const u16 *states, *update, *weight;
    u16* sum;  // h
    float epsilon;
};

// How a kernel is given x.
#if INPUT == 0
#define INPUT_TYPE const u16*
#else
#define INPUT_TYPE const __grid_constant__ Input
#endif

// Entries of x. Not by __ldg: the compiler may move loads of what never changes to before the wait for the kernel that
// writes x.
template <class T> __device__ __forceinline__ T load_x(const u16* from) { return *(const T*)from; }

// Where column `column` of x lies.
#if INPUT == 0
#define X_AT(x, column) ((x) + (column))
#else
#define X_AT(x, column) ((const u16*)((const u32*)(x) + (column) / 128 * X_WORDS) + (column) % 128)
#endif

#if INPUT > 0

__device__ __forceinline__ void floats_of(float (&v)[8], uint4 words) {
    const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) v[2 * i] = float_of_x((u16)w[i]), v[2 * i + 1] = float_of_x((u16)(w[i] >> 16));
}
__device__ __forceinline__ uint4 rounded(const float (&v)[8]) {
    return make_uint4(pair_of_floats(v[0], v[1]), pair_of_floats(v[2], v[3]), pair_of_floats(v[4], v[5]), pair_of_floats(v[6], v[7]));
}

// The part of the norm's weight that a thread multiplies by: no kernel's result.
__device__ __forceinline__ void load_scale(uint4 (&scale)[EIGHTS], const Input& in, int columns) {
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        const int at = threadIdx.x + i * THREADS;
        scale[i] = at < columns / 8 ? __ldg((const uint4*)in.weight + at) : make_uint4(0, 0, 0, 0);
    }
}
// Everything from the call of `wait` on may depend on the kernel before this one. `shared` gets x, 128 columns every PITCH
// words. Ends with a barrier.
template <int PITCH, class Wait> __device__ __forceinline__ void make_input(u32* shared, const Input& in, const uint4 (&scale)[EIGHTS], int columns, Wait wait) {
    const int eights = columns / 8;
    const auto place = [&](int at) { return (uint4*)(shared + at / 16 * PITCH) + at % 16; };
    uint4 kept[EIGHTS], added[EIGHTS];
    wait();
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        const int at = threadIdx.x + i * THREADS;
        kept[i] = at < eights ? *((const uint4*)in.states + at) : make_uint4(0, 0, 0, 0);
        if (ADD) added[i] = at < eights ? *((const uint4*)in.update + at) : make_uint4(0, 0, 0, 0);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        float v[8];
        floats_of(v, kept[i]);
        if (ADD) {
            float more[8];
            floats_of(more, added[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] += more[j];
            kept[i] = rounded(v);
            floats_of(v, kept[i]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) squares += v[j] * v[j];
    }
#pragma unroll
    for (int across = 16; across > 0; across /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, across);
    float* const parts = (float*)shared;  // of the warps, before x
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) squares += parts[i];
    __syncthreads();
    const float factor = rsqrtf(squares / (float)columns + in.epsilon);
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
        const int at = threadIdx.x + i * THREADS;
        float v[8], by[8];
        floats_of(v, kept[i]);
        floats_of(by, scale[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= factor;
        floats_of(v, rounded(v));
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= by[j];
        if (at < eights) {
            *place(at) = rounded(v);
            if (ADD && blockIdx.x == 0) *((uint4*)in.sum + at) = kept[i];
        }
    }
    __syncthreads();
}
template <int PITCH, class Wait> __device__ __forceinline__ void make_input(u32* shared, const Input& in, int columns, Wait wait) {
    uint4 scale[EIGHTS];
    load_scale(scale, in, columns);
    make_input<PITCH>(shared, in, scale, columns, wait);
}
#endif
