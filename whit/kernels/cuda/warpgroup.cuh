// Instructions of compute capability 9.0 for warpgroup products: the tensor copy engine (its barriers: `barriers.cuh`) and
// the order of products.

// What the tensor copy engine must know of x: an opaque value made by the driver.
struct __align__(64) TensorMap { u64 words[16]; };

// TOKENS vectors x 64 columns to shared memory; vectors that are not there become zero.
__device__ __forceinline__ void copy_box(u8* shared, const TensorMap& map, u64* barrier, int column, int token) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(shared_address(shared)), "l"(&map), "r"(column), "r"(token), "r"(shared_address(barrier)) : "memory");
}
// ROWS rows x 128 bytes of codes, in the same way.
__device__ __forceinline__ void copy_codes(u8* shared, const TensorMap& map, u64* barrier, int column, int row) { copy_box(shared, map, barrier, column, row); }
__device__ __forceinline__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// Four 8 x 8 matrices of 16-bit values, as the results of a product lie in a warp, to shared memory, transposed: lane i
// names the place of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(u16* place, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(place)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void registers_ready() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// Loads of what no kernel writes; L2 brings the 128 bytes around it, of which the next blocks are.
__device__ __forceinline__ uint4 load_sixteen(const u8* from) {
    uint4 v;
    asm volatile("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
__device__ __forceinline__ uint2 load_eight(const u8* from) {
    uint2 v;
    asm volatile("ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}
// A word of shared memory that is not written any more, by its address.
__device__ __forceinline__ u32 shared_word(u32 address) {
    u32 word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address));
    return word;
}
// Registers of a thread from here on, for all warps of a warpgroup.
template <int COUNT> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
// Barrier of the first 256 threads of a block.
__device__ __forceinline__ void consumers_meet() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
