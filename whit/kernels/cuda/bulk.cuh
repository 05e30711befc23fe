// Weights by the tensor copy engine: one lane of a warp asks for an item whole, and a barrier (`barriers.cuh`) says when it
// has come. Codes lie in boxes of 16 rows x at most 128 bytes, swizzled; scalars of a group as a box of their own, those of
// whole rows as one run of bytes.

#define CODE_STAGE (PLANES * PLANE_BYTES)
#define SCALAR_STAGE ((16 * 4 * SCALAR_WORDS + 127) / 128 * 128)

struct __align__(64) TensorMap { u64 words[16]; };
struct Maps {
    TensorMap codes[3], scalars;
};

// A box of 16 rows; `column`, in 16-bit words, must be a multiple of 8. What lies beyond the matrix becomes zero.
__device__ __forceinline__ void copy_tile(u8* shared, const TensorMap& map, u64* barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}

// All of an item, by one lane.
__device__ __forceinline__ void bulk_item(u8* codes, u8* scalars, u64* barrier, const Weight& w, const Maps& maps, int row0, int column0) {
    constexpr int SCALAR_BYTES = GROUP >= (1 << 30) ? 16 * NS * 2 : 16 * 4 * SCALAR_WORDS;
    barrier_expect(barrier, CODE_STAGE + SCALAR_BYTES);
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++)
#pragma unroll
        for (int box = 0; box < ROW_BYTES / ROW_PITCH; box++)
            copy_tile(codes + plane * PLANE_BYTES + box * (16 * ROW_PITCH), maps.codes[plane], barrier, column0 / 16 * CODE_BITS + box * (ROW_PITCH / 2), row0);
    if (GROUP >= (1 << 30))
        copy_bulk(scalars, w.scalars + row0 * (NS * 2), SCALAR_BYTES, barrier);
    else
        copy_tile(scalars, maps.scalars, barrier, column0 / GROUP * NS, row0);
}
