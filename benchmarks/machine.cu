// What one scheduler of a multiprocessor issues, and how fast memory is read: kernels of `machine.py`.
//
// STEP(i) is one instruction on word i of LANES independent chains. Operands of a step are other chains, so that no two
// steps are the same function of the same words and the compiler has nothing to join. LENGTH steps are unrolled.

typedef unsigned int u32;

#define LANES 8
#define LENGTH 64

#define LOGIC(i) asm volatile("lop3.b32 %0, %0, %1, %2, 0x6a;" : "+r"(a[i]) : "r"(a[(i + 1) % 8]), "r"(a[(i + 3) % 8]))
#define SHIFT(i) asm volatile("shf.l.wrap.b32 %0, %0, %1, %2;" : "+r"(a[i]) : "r"(a[(i + 1) % 8]), "r"(b[0]))
#define PERMUTE(i) asm volatile("prmt.b32 %0, %0, %1, %2;" : "+r"(a[i]) : "r"(a[(i + 1) % 8]), "r"(b[0]))
#define MULTIPLY_ADD(i) asm volatile("mad.lo.u32 %0, %0, %1, %2;" : "+r"(a[i]) : "r"(b[0]), "r"(a[(i + 1) % 8]))
#define TO_FLOAT(i) asm volatile("{ .reg .f32 f; cvt.rn.f32.s32 f, %0; mov.b32 %0, f; }" : "+r"(a[i]))
#define PRODUCT(i, form) \
    asm volatile("mma.sync.aligned." form " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+r"(c[i][0]), "+r"(c[i][1]), "+r"(c[i][2]), "+r"(c[i][3]) \
                 : "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(b[4]), "r"(b[5]))
#define HALVES(i) \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}," \
                 " {%0, %1, %2, %3};" \
                 : "+f"(f[i][0]), "+f"(f[i][1]), "+f"(f[i][2]), "+f"(f[i][3]) \
                 : "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(b[4]), "r"(b[5]))
#define BYTES(i) PRODUCT(i, "m16n8k32.row.col.s32.s8.s8.s32")
#define BITS(i) PRODUCT(i, "m16n8k256.row.col.s32.b1.b1.s32.and.popc")
#define FEW_BITS(i) \
    asm volatile("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5}, {%6}," \
                 " {%0, %1, %2, %3};" \
                 : "+r"(c[i][0]), "+r"(c[i][1]), "+r"(c[i][2]), "+r"(c[i][3]) : "r"(b[0]), "r"(b[1]), "r"(b[4]))

#ifdef STEP
extern "C" __global__ void rate(const u32* seeds, u32* out, long long* cycles, int rounds) {
    u32 a[LANES], b[6], c[LANES][4];
    float f[LANES][4];
    for (int i = 0; i < LANES; i++) {
        a[i] = seeds[i] + threadIdx.x;
        for (int j = 0; j < 4; j++) c[i][j] = seeds[j] ^ i, f[i][j] = (float)(i + j);
    }
    for (int i = 0; i < 6; i++) b[i] = seeds[8 + i];
    __syncthreads();
    long long start = clock64();
#pragma unroll 1
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int step = 0; step < LENGTH; step++) STEP(step % LANES);
    }
    long long end = clock64();
    u32 sum = 0;
    for (int i = 0; i < LANES; i++) {
        sum ^= a[i];
        for (int j = 0; j < 4; j++) sum ^= c[i][j] ^ __float_as_uint(f[i][j]);
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;  // or there were nothing to compute
    if (threadIdx.x % 32 == 0) {
        long long* mine = cycles + 2 * ((blockIdx.x * blockDim.x + threadIdx.x) / 32);
        mine[0] = start, mine[1] = end;
    }
}
#endif

// Every 16 bytes once, AHEAD of them on their way for each thread; the sum is stored if it is what it cannot well be.
#ifdef AHEAD
extern "C" __global__ void read(const uint4* from, u32* out, long long count) {
    long long stride = (long long)gridDim.x * blockDim.x * AHEAD;
    u32 sum = 0;
    for (long long i = (long long)blockIdx.x * blockDim.x * AHEAD + threadIdx.x; i < count; i += stride) {
        uint4 words[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            long long place = i + (long long)j * blockDim.x;
            words[j] = place < count ? __ldcs(from + place) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) sum += words[j].x ^ words[j].y ^ words[j].z ^ words[j].w;
    }
    if (sum == 0x9e3779b9u) out[0] = sum;
}
#endif
