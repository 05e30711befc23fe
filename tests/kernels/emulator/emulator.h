// Enough of CUDA to run the kernels of whit/kernels/cuda on a CPU: every thread is a fiber, collectives and barriers hand
// over, tensor-core products are written out. Slow and exact: it checks indexing, barriers and arithmetic, not speed.
// Asynchronous copies happen as late as they may, when their group is waited for. Between barriers of the block one
// warp after the other runs, in ascending or descending order, so that a missing barrier changes one of the two results.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(x)
#define __shared__ static
using std::max;
using std::min;

struct Index { int x; };
static Index threadIdx, blockIdx, gridDim;
static int block_threads, first_block;  // of the cluster that runs
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
static inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
static inline float2 make_float2(float a, float b) { return {a, b}; }

// ---- Fibers and barriers ---------------------------------------------------------------------------------------------
struct Fiber {
    ucontext_t context;
    bool done;
    int parked;  // generation of the block barrier that it waits for, or -1
    std::vector<char> stack;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static uint8_t* shared_memory;
static std::vector<uint8_t*> shared_memories;  // by block of the cluster

static void become(int fiber) {
    current = fiber;
    threadIdx.x = fiber % block_threads;
    blockIdx.x = first_block + fiber / block_threads;
    shared_memory = shared_memories[fiber / block_threads];
}
static void hand_over() {
    int me = current;
    swapcontext(&fibers[me].context, &scheduler);
    become(me);
}
struct Barrier {
    int arrived = 0, generation = 0;
    void wait(int all) {
        int before = generation;
        if (++arrived == all) {
            arrived = 0;
            generation++;
        } else {
            while (generation == before) hand_over();
        }
    }
};
static Barrier block_barriers[8], cluster_wide, warp_barriers[256];
static uint32_t slots[256][32][8];
static Barrier& block_barrier() { return block_barriers[current / block_threads]; }
static void __syncthreads() {
    fibers[current].parked = block_barrier().generation;
    block_barrier().wait(block_threads);
    fibers[current].parked = -1;
}
static bool waits_unparked;  // someone waits in a way that the scheduler does not see
static std::vector<int> cluster_arrived;  // by thread: the generation in which it arrived
static void cluster_arrive() {
    waits_unparked = true;
    cluster_arrived[current] = cluster_wide.generation;
    if (++cluster_wide.arrived == (int)fibers.size()) cluster_wide.arrived = 0, cluster_wide.generation++;
}
static void cluster_wait() {
    while (cluster_wide.generation == cluster_arrived[current]) hand_over();
}
static void __syncwarp() { warp_barriers[current / 32].wait(32); }

// Every lane shows its words to the others; `f(slots of the warp, lane)` is its result.
template <class F> static auto collective(const uint32_t* words, int count, F f) {
    int warp = current / 32, lane = current % 32;
    for (int i = 0; i < count; i++) slots[warp][lane][i] = words[i];
    __syncwarp();
    auto result = f(slots[warp], lane);
    __syncwarp();
    return result;
}
typedef uint32_t (*Slots)[8];

// ---- Asynchronous copies ---------------------------------------------------------------------------------------------
// Like vector accesses they must be aligned to their size, as on the device.
struct Copy {
    uint8_t* to;
    const uint8_t* from;
    int bytes, valid;
};
static std::vector<std::deque<std::vector<Copy>>> copy_groups;  // by thread; the last group is still open

template <int BYTES> static void copy_later(void* to, const uint8_t* from, int valid) {
    if ((uintptr_t)to % BYTES || (uintptr_t)from % BYTES) abort();
    copy_groups[current].back().push_back({(uint8_t*)to, from, BYTES, valid});
}
static void close_group() { copy_groups[current].emplace_back(); }
static void finish_groups(int left) {
    auto& groups = copy_groups[current];
    for (; (int)groups.size() > left + 1; groups.pop_front())
        for (const Copy& copy : groups.front())
            for (int i = 0; i < copy.bytes; i++) copy.to[i] = i < copy.valid ? copy.from[i] : 0;
}

#define __builtin_assume(what) if (!(what)) abort()

// ---- Intrinsics ------------------------------------------------------------------------------------------------------
static unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
template <class T> static T __ldg(const T* p) { return *p; }
static unsigned __reduce_max_sync(unsigned, unsigned v) {
    return collective(&v, 1, [](Slots s, int) { unsigned m = 0; for (int i = 0; i < 32; i++) m = max(m, s[i][0]); return m; });
}
static int __reduce_add_sync(unsigned, int v) {
    uint32_t word = (uint32_t)v;
    return collective(&word, 1, [](Slots s, int) { int m = 0; for (int i = 0; i < 32; i++) m += (int)s[i][0]; return m; });
}
static unsigned __ballot_sync(unsigned, unsigned v) {
    return collective(&v, 1, [](Slots s, int) { unsigned m = 0; for (int i = 0; i < 32; i++) m |= (s[i][0] ? 1u : 0u) << i; return m; });
}
static int __any_sync(unsigned all, unsigned v) { return __ballot_sync(all, v) != 0; }
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int j = 0; j < 32; j += 8) c += (a >> j & 255) * (b >> j & 255);
    return c;
}
static unsigned __shfl_xor_sync(unsigned, unsigned v, int with) {
    return collective(&v, 1, [with](Slots s, int lane) { return s[lane ^ with][0]; });
}
static unsigned __shfl_sync(unsigned, unsigned v, int from) {
    return collective(&v, 1, [from](Slots s, int) { return s[from][0]; });
}
static float __shfl_xor_sync(unsigned all, float v, int with) { return __uint_as_float(__shfl_xor_sync(all, __float_as_uint(v), with)); }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = a | (uint64_t)b << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned nibble = selector >> (4 * i) & 15, byte = bytes >> (8 * (nibble & 7)) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned s) { return (unsigned)(((uint64_t)high << 32 | low) >> (s & 31)); }
static int __popc(unsigned v) { return __builtin_popcount(v); }
static int __ffs(unsigned v) { return __builtin_ffs((int)v); }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static unsigned atomicOr(unsigned* place, unsigned v) { const unsigned old = *place; *place |= v; return old; }
static unsigned atomicMax(unsigned* place, unsigned v) { const unsigned old = *place; *place = max(old, v); return old; }
static int __shfl_up_sync(unsigned, int v, int by) {
    const uint32_t word = (uint32_t)v;
    return (int)collective(&word, 1, [by](Slots s, int lane) { return s[lane < by ? lane : lane - by][0]; });
}
static int __float2int_rn(float f) { return std::isnan(f) ? 0 : (int)lrintf(f); }
static float __fdividef(float a, float b) { return a / b; }
#define __expf expf
static float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// ---- 16-bit floats and tensor cores ----------------------------------------------------------------------------------
static float from_half(uint16_t h) { _Float16 x; memcpy(&x, &h, 2); return (float)x; }
static uint16_t to_half(float f) { _Float16 x = (_Float16)f; uint16_t h; memcpy(&h, &x, 2); return h; }
static float from_bfloat(uint16_t b) { return __uint_as_float((unsigned)b << 16); }
static uint16_t to_bfloat(float f) {
    unsigned u = __float_as_uint(f);
    return std::isnan(f) ? 0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static float from16(uint16_t v) { return BF16 ? from_bfloat(v) : from_half(v); }
static uint16_t to16(float f) { return BF16 ? to_bfloat(f) : to_half(f); }
// E4M3: the float16 of a code, and of the number nearest to a float.
static uint16_t from_small(unsigned code) {
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const float value = exponent ? ldexpf(1 + fraction / 8.0f, exponent - 7) : ldexpf(fraction / 8.0f, -6);
    return to_half((code & 127) == 127 ? NAN : code & 128 ? -value : value);
}
static unsigned to_small(float f) {
    if (std::isnan(f)) return 0x7fff;
    int exponent;
    frexpf(f, &exponent);
    exponent = max(exponent - 1, -6) - 3;
    return to_half(fminf(fmaxf(ldexpf(rintf(ldexpf(f, -exponent)), exponent), -448.0f), 448.0f));
}

// m16n8: rows of A in words a, columns of B in words b, as the instruction set lays them out over the lanes. `multiply`
// is the sum of products of one word of each.
template <class Sum, class F> static void tensor_product(Sum (&c)[4], int words_a, const uint32_t* a, int words_b, const uint32_t* b, F multiply) {
    uint32_t shown[8];
    for (int i = 0; i < words_a; i++) shown[i] = a[i];
    for (int i = 0; i < words_b; i++) shown[words_a + i] = b[i];
    collective(shown, words_a + words_b, [&](Slots s, int lane) {
        for (int e = 0; e < 4; e++) {
            const int row = lane / 4 + 8 * (e / 2), column = lane % 4 * 2 + e % 2;
            double sum = 0;
            for (int quad = 0; quad < 4; quad++)
                for (int half = 0; half < words_b; half++)
                    sum += multiply(s[row % 8 * 4 + quad][row / 8 + 2 * half], s[column * 4 + quad][words_a + half]);
            c[e] += (Sum)sum;
        }
        return 0;
    });
}
static double bytes_times_bytes(uint32_t a, uint32_t b) {
    int sum = 0;
    for (int j = 0; j < 32; j += 8) sum += (int)(a >> j & 255) * (int)(int8_t)(b >> j);
    return sum;
}
static double signed_bytes_times_bytes(uint32_t a, uint32_t b) {
    int sum = 0;
    for (int j = 0; j < 32; j += 8) sum += (int)(int8_t)(a >> j) * (int)(int8_t)(b >> j);
    return sum;
}
static double ones_in_both(uint32_t a, uint32_t b) { return __builtin_popcount(a & b); }
static double halves_times_halves(uint32_t a, uint32_t b) {
    return (double)from_half(a) * from_half(b) + (double)from_half(a >> 16) * from_half(b >> 16);
}
static double floats_times_floats(uint32_t a, uint32_t b) {
    return (double)from16(a) * from16(b) + (double)from16(a >> 16) * from16(b >> 16);
}

// ---- Clusters and warpgroup products --------------------------------------------------------------------------------------
static uint4 peer_words(const void* own, int rank) {
    return *(const uint4*)(shared_memories[rank] + ((const uint8_t*)own - shared_memory));
}
// A box of x comes when it is waited for. A barrier's phase ends when all have arrived and, if one expected a box, it has come.
struct Box {
    uint8_t* to;
    const uint16_t* x;
    int columns, tokens, column, token, rows;
};
struct Meeting {
    int expected = 0, arrived = 0, phase = 0, bytes = 0;
    std::vector<Box> boxes;
    std::vector<Copy> runs;  // of bytes
    std::vector<std::pair<float*, float>> numbers;  // on their way
};
static std::map<void*, Meeting> meetings;
static void barrier_init(void* barrier, int arrivals) { meetings[barrier] = Meeting{arrivals}; }
static void barrier_arrive(void* barrier) {
    Meeting& meeting = meetings.at(barrier);
    if (++meeting.arrived == meeting.expected) meeting.arrived = 0, meeting.phase ^= 1;
}
static void barrier_expect(void* barrier, int bytes) {
    Meeting& meeting = meetings.at(barrier);
    if (meeting.arrived || meeting.expected != 1) abort();
    meeting.arrived = 1, meeting.bytes = bytes;
}
static void send_sum(float* own, int rank, float value, void* barrier) {
    const auto there = [&](void* place) { return shared_memories[rank] + ((uint8_t*)place - shared_memory); };
    meetings.at(there(barrier)).numbers.push_back({(float*)there(own), value});
}
static void barrier_wait(void* barrier, int parity) {
    waits_unparked = true;
    for (Meeting& meeting = meetings.at(barrier); meeting.phase == parity; ) {
        int bytes = 0;
        for (const Box& box : meeting.boxes) bytes += box.rows * 128;
        for (const Copy& run : meeting.runs) bytes += run.bytes;
        bytes += 4 * meeting.numbers.size();
        if (bytes == 0 || bytes != meeting.bytes) {
            hand_over();
            continue;
        }
        for (const Box& box : meeting.boxes)
            for (int token = 0; token < box.rows; token++)
                for (int k = 0; k < 64; k++) {
                    const bool there = box.token + token < box.tokens && box.column + k < box.columns;
                    const uint16_t value = there ? box.x[(size_t)(box.token + token) * box.columns + box.column + k] : 0;
                    *(uint16_t*)(box.to + token * 128 + ((k / 8) ^ (token & 7)) * 16 + k % 8 * 2) = value;
                }
        for (const Copy& run : meeting.runs)
            for (int i = 0; i < run.bytes; i++) run.to[i] = i < run.valid ? run.from[i] : 0;
        for (const auto& [place, value] : meeting.numbers) *place = value;
        meeting.boxes.clear(), meeting.runs.clear(), meeting.numbers.clear();
        meeting.arrived = meeting.bytes = 0, meeting.phase ^= 1;
    }
}
template <class Map> static void copy_box(uint8_t* to, const Map& map, void* barrier, int column, int token, int rows) {
    if ((uintptr_t)to % 1024) abort();
    meetings.at(barrier).boxes.push_back({to, (const uint16_t*)map.words[0], (int)map.words[1], (int)map.words[2], column, token, rows});
}
static void copy_bulk(uint8_t* to, const uint8_t* from, int bytes, void* barrier) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) abort();
    meetings.at(barrier).runs.push_back({to, from, bytes, bytes});
}
// Sixteen rows of a matrix of 16-bit words; `map`: its place, columns, rows, the columns of a box, bytes of the swizzle.
template <class Map> static void copy_tile(uint8_t* to, const Map& map, void* barrier, int column, int row) {
    const int columns = (int)map.words[1], rows = (int)map.words[2], width = (int)map.words[3] * 2, swizzle = (int)map.words[4];
    if ((uintptr_t)to % (swizzle ? 8 * swizzle : 128) || width % 16 || (swizzle && width != swizzle)) abort();
    for (int r = 0; r < 16; r++)
        for (int c = 0; c < width / 16; c++) {
            const int at = r * width + c * 16, place = swizzle ? at ^ (at >> 3 & (swizzle - 16)) : at;
            const int left = row + r < rows ? (columns - column - c * 8) * 2 : 0;
            meetings.at(barrier).runs.push_back({to + place, (const uint8_t*)((const uint16_t*)map.words[0] + (size_t)(row + r) * columns + column + c * 8), 16, left});
        }
}
static void store_transposed(uint16_t* place, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint64_t address = (uint64_t)place;
    const uint32_t shown[6] = {a, b, c, d, (uint32_t)address, (uint32_t)(address >> 32)};
    collective(shown, 6, [](Slots s, int lane) {
        uint16_t* to = (uint16_t*)(s[lane][4] | (uint64_t)s[lane][5] << 32);  // row lane % 8 of matrix lane / 8
        if ((uintptr_t)to % 16) abort();
        for (int i = 0; i < 8; i++) to[i] = (uint16_t)(s[i * 4 + lane % 8 / 2][lane / 8] >> (16 * (lane % 2)));
        return 0;
    });
}
// A product of a warpgroup happens when it is waited for: shared memory that is filled again too early changes it. Each
// lane keeps the two rows of codes of its results; x is read through the swizzle of 128 bytes.
struct LateProduct {
    float* sums;
    float codes[2][16];
    const uint8_t* tile;
    int count, step;
    void finish(int quad) const {
        for (int i = 0; i < count; i++) {
            const int token = i / 4 * 8 + 2 * quad + i % 2;
            double sum = 0;
            for (int k = 0; k < 16; k++) {
                const int chunk = (step * 2 + k / 8) ^ (token & 7);
                sum += (double)codes[i % 4 / 2][k] * from16(*(const uint16_t*)(tile + token * 128 + chunk * 16 + k % 8 * 2));
            }
            sums[i] += (float)sum;
        }
    }
};
static std::vector<std::deque<std::vector<std::function<void()>>>> product_groups;  // by thread; the last group is still open
static void late_product(float* sums, int count, const uint32_t (&a)[4], const uint8_t* tile, int step) {
    if ((uintptr_t)tile % 1024) abort();
    LateProduct late{sums, {}, tile, count, step};
    collective(a, 4, [&](Slots s, int lane) {
        for (int h = 0; h < 2; h++)
            for (int k = 0; k < 16; k++) late.codes[h][k] = from16(s[lane / 4 * 4 + k % 8 / 2][h + 2 * (k / 8)] >> (16 * (k % 2)));
        return 0;
    });
    product_groups[current].back().push_back([late, quad = current % 4] { late.finish(quad); });
}
// 64 rows of `left` times `count / 16` rows of `right`, 32 bytes of each from `step` on, both through the swizzle: 8-bit
// integers, or 16-bit floats (the sums then are the bits of floats). Without `more` there is nothing to add to.
static void late_product(uint32_t* sums, int count, uint32_t left, uint32_t right, bool integers, bool more) {
    const uint8_t *one = shared_memory + left / 64 * 1024, *other = shared_memory + right / 64 * 1024;
    const int left_step = left % 64 / 2, right_step = right % 64 / 2, warp = current % block_threads / 32 % 4, lane = current % 32;
    product_groups[current].back().push_back([=] {
        for (int i = 0; i < count; i++) {
            const int row = warp * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            double sum = 0;
            for (int k = 0; k < 32; k += integers ? 1 : 2) {
                const uint8_t* a = one + row * 128 + ((left_step * 2 + k / 16) ^ (row & 7)) * 16 + k % 16;
                const uint8_t* b = other + column * 128 + ((right_step * 2 + k / 16) ^ (column & 7)) * 16 + k % 16;
                sum += integers ? (double)((int)(int8_t)*a * (int8_t)*b) : (double)from16(*(const uint16_t*)a) * from16(*(const uint16_t*)b);
            }
            if (integers)
                sums[i] = (more ? sums[i] : 0) + (uint32_t)(int)sum;
            else
                sums[i] = __float_as_uint((more ? __uint_as_float(sums[i]) : 0.0f) + (float)sum);
        }
    });
}
static void close_products() { product_groups[current].emplace_back(); }
static void finish_products(int left) {
    auto& groups = product_groups[current];
    for (; (int)groups.size() > left + 1; groups.pop_front())
        for (const auto& late : groups.front()) late();
}

// ---- Launch ----------------------------------------------------------------------------------------------------------
// A buffer that ends (but for rounding to 16 bytes) where the next page may not be touched.
static uint8_t* guarded(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
    uint8_t* base = (uint8_t*)mmap(nullptr, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(base + body, page, PROT_NONE);
    return base + body - (bytes + 15) / 16 * 16;
}
static void (*kernel_body)();
static void fiber_main() {
    kernel_body();
    fibers[current].done = true;
}
static void run_blocks(int grid, int threads, size_t shared, bool descending, int cluster) {
    gridDim.x = grid;
    block_threads = threads;
    const int all = threads * cluster;
    fibers.resize(all);
    for (int i = 0; i < cluster; i++) shared_memories.push_back(guarded(shared));
    for (first_block = 0; first_block < grid; first_block += cluster) {
        for (uint8_t* memory : shared_memories) memset(memory, 0xff, shared);
        cluster_wide = Barrier();
        cluster_arrived.assign(all, -1);
        for (Barrier& barrier : block_barriers) barrier = Barrier();
        for (Barrier& barrier : warp_barriers) barrier = Barrier();
        copy_groups.assign(all, std::deque<std::vector<Copy>>(1));
        product_groups.assign(all, std::deque<std::vector<std::function<void()>>>(1));
        for (Fiber& fiber : fibers) {
            fiber.done = false;
            fiber.parked = -1;
            fiber.stack.resize(1 << 16);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, fiber_main, 0);
        }
        // One warp runs as far as it can before the next: what another warp should have written first is not there yet.
        for (int left = all; left;)
            for (int turn = 0; turn < all / 32; turn++) {
                const int warp = descending ? all / 32 - 1 - turn : turn;
                // Some waits do not park a fiber: a turn then ends after some rounds.
                for (int rounds = 0; rounds < 64; rounds++) {
                    bool moved = false;
                    for (int lane = 0; lane < 32; lane++) {
                        const int next = warp * 32 + (descending ? 31 - lane : lane);
                        Fiber& fiber = fibers[next];
                        if (fiber.done || fiber.parked == block_barriers[next / threads].generation) continue;
                        moved = true;
                        become(next);
                        swapcontext(&scheduler, &fiber.context);
                        left -= fiber.done;
                    }
                    if (moved && !waits_unparked) rounds = 0;
                    if (!moved) break;
                }
            }
    }
}
