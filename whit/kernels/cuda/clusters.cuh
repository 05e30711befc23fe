// What the thread blocks of a cluster share: a barrier, and each other's shared memory. Behind `common.cuh` or `words.cuh`.

// Barrier of all threads of a cluster of blocks, in two parts.
__device__ __forceinline__ void cluster_begun() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }  // shows nothing
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Four words at the place of `own` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint4 peer_words(const void* own, int rank) {
    uint4 v;
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

// A number to the place of `own` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void store_to_peer(float* own, int rank, float value) {
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
