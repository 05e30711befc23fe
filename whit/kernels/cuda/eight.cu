// y = W x for one to 32 vectors and 8-bit weights, read once by the tensor copy engine: codes of INT8, E4M3 or E5M2.
//
//     ROUNDED 0    inputs of 16 bits; codes are widened in registers for the 16-bit tensor cores
//     ROUNDED 1    inputs rounded to INT8, codes multiplied as they are; with OUTLIERS the layer of LLM.int8(): outlier
//                  columns, of which there may be any number, meet widened codes in 64 columns at a time, where there are any
//     ROUNDED 2    inputs rounded to E4M3, whose numbers are float16 numbers too
//
// A cluster of SPLITS blocks takes row tiles of 16, each block a share of the columns. Every block rounds its share of the
// inputs, from registers (HELD) or from shared memory; of each token the cluster shares one number, the largest magnitude. A warp
// takes items of 16 rows x ITEM columns, one after the other, through a ring of its own, and asks for the first before the
// kernel ahead has ended. Sums of warps and of blocks are added in a fixed order.
//
// A lane reads 16 bytes of a row at a time: the order of columns within 64 is the lanes', for weights and inputs alike.

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
eight(INPUT_TYPE given, const __grid_constant__ TensorMap codes, const __grid_constant__ Work w) {
    extern __shared__ __align__(1024) u8 memory[];
    const Block b(memory, w);
    Ring ring(memory, b);
    MARK(0, 0u);
    if (b.lane == 0) {
        for (int i = 0; i < DEPTH; i++) barrier_init(ring.arrived + i, 1);
        if (SPLITS > 1 && b.warp == 0) barrier_init(b.sent, 1), barrier_init(b.sent + 1, 1);
        barriers_ready();
        if (SPLITS > 1 && b.warp == 0) {
            barrier_expect(b.sent, 4 * SPLITS * b.vectors);
            barrier_expect(b.sent + 1, 16 * SPLITS * b.own_results());
        }
    }
    __syncwarp();
    int item = ring.next, slot = 0, phase = 0, tile = ring.tile, part = ring.part;
    const int last = ring.last;
#pragma unroll 1
    for (int i = 0; i < (PATIENT ? 1 : DEPTH); i++) ring.load(i, b, codes);
    MARK(1, 0u);
    if (EAGER) start_next_kernel();
    const float first_scale = b.scale_of(w, threadIdx.x), first_bias = b.bias_of(w, threadIdx.x);
    if (threadIdx.x < 32) b.most[threadIdx.x] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < (OUTLIERS ? b.span / 32 : 0); i += THREADS) b.flags[i] = b.loose[i] = 0;
    __syncthreads();
#if SPLITS > 1 && (HELD || !ROUNDED)
    cluster_begun();
#elif SPLITS > 1
    cluster_arrive();  // nobody's largest magnitudes come before they are zero here
#endif
    if (OUTLIERS == 2 || PLACED)
        for (int i = threadIdx.x; i < w.stored; i += THREADS) {
            const int column = w.index[i] - b.begin;
            if (column >= 0 && column < b.here) atomicOr((OUTLIERS == 2 ? b.flags : b.loose) + column / 32, 1u << column % 32);
        }
#if INPUT > 0
    make_input<64>((u32*)b.wide, given, w.columns, []() { wait_for_previous_kernel(); });
    const u16* const x = (const u16*)b.wide;
#else
    wait_for_previous_kernel();
    const u16* const x = given;
#endif
    MARK(2, 0u);
    if (!EAGER) start_next_kernel();
#if HELD
    HeldInputs held;
    held.load(b, w, x);
    if (PATIENT) ring.load_others(b, codes);
    MARK(3, 0u);
    held.mark(w);
    if (!w.input_scale) held.keep_largest(b);
#if SPLITS > 1
    cluster_wait();  // all blocks have begun
    if (!w.input_scale) {
        for (int i = threadIdx.x; i < 32 * SPLITS; i += THREADS)
            if (i % 32 < b.vectors) send_word(b.sent_most + b.rank * 32 + i % 32, i / 32, b.most[i % 32], b.sent);
        peers_wait(b.sent);
    }
#endif
    MARK(4, 0u);
    held.round(b, w);
    b.keep_rows(w, first_scale, first_bias);
    __syncthreads();
#else
#if ROUNDED && SPLITS > 1
    cluster_wait();  // all blocks have begun
#endif
    bring_inputs(b, w, x, ring, codes);
    MARK(3, 0u);
#if PLACED
    place_inputs(b, w, x);
#endif
    b.keep_rows(w, first_scale, first_bias);
#if OUTLIERS
    __syncthreads();
#if PLACED && OUTLIERS == 1
    for (int i = threadIdx.x; i < b.span / 32; i += THREADS) b.loose[i] = b.flags[i] & ~b.loose[i];
#endif
    if (!w.input_scale) keep_largest_kept(b);
#endif
#if ROUNDED && SPLITS > 1
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
    MARK(4, 0u);
#if ROUNDED || CONVERTS
    round_inputs(b, w);
    __syncthreads();
#endif
#endif
    MARK(5, 0u);

    const int row = (b.g & 1) * 4 + (b.g >> 1);  // lanes of a quarter read rows 4 apart, whose pieces of 16 bytes lie in other banks
    int vector_of[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) vector_of[t] = min(8 * t + b.g, b.vectors - 1);
    Sums sums;
    sums.clear();
#pragma unroll 1
    for (; item < last; item++) {
        barrier_wait(ring.arrived + slot, phase);
        MARK(6, 0u);
        multiply_item(sums, b, ring.stages + slot * ITEM_BYTES, row, part * ITEM, vector_of);
        __syncwarp();  // all lanes have read what is overwritten
        ring.load(slot, b, codes);
        if (++slot == DEPTH) slot = 0, phase ^= 1;
        if (++part == b.across || item + 1 == last) {
            keep_sums(sums, b, tile, row);
#if PLACED
            if (part == b.across && tile % SPLITS == b.rank) multiply_placed(b, w, tile, row, vector_of);
#endif
            sums.clear();
            part = 0, tile++;
        }
    }
    MARK(7, 0u);
#if PLACED && SPLITS > 1  // whose sums of stored columns are read by peers
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
#if SPLITS > 1
#if !ROUNDED
    cluster_wait();  // all blocks have begun
#endif
    send_sums(b);
    if (b.own_results() > 0) peers_wait(b.sent + 1);
#endif
    MARK(8, 0u);
    write_results(b, w);
#if PLACED && SPLITS > 1
    cluster_arrive();  // no block goes while another one reads its memory
    cluster_wait();
#endif
    MARKS_END(w.bias);
}
