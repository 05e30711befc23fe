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

// A number to the place of `own` in the shared memory of block `rank` of the cluster, whose barrier there counts its bytes:
// so no one waits until all memory shows what was stored, as at a barrier of the cluster.
__device__ __forceinline__ void send_sum(float* own, int rank, float value, u64* barrier) {
    asm volatile("{.reg .b32 place, counter; mapa.shared::cluster.u32 place, %0, %2; mapa.shared::cluster.u32 counter, %1, %2; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [place], %3, [counter];}"
        ::"r"(shared_address(own)), "r"(shared_address(barrier)), "r"(rank), "f"(value) : "memory");
}
__device__ __forceinline__ void peers_wait(u64* barrier) {
    asm volatile(
        "{.reg .pred p; waiting: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0; @p bra done; bra waiting; done:}"
        ::"r"(shared_address(barrier)) : "memory");
}
