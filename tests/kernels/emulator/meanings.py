"""What the inline assembly of the sources means, for the emulator beside this file."""

MEANINGS = {
    "float float_of_half(": "static float float_of_half(u16 h) { return from_half(h); }",
    "u16 half_of_float(": "static u16 half_of_float(float f) { return to_half(f); }",
    "u16 x_of_float(": "static u16 x_of_float(float f) { return to16(f); }",
    "u32 shared_address(": "static u32 shared_address(const void* p) { return (uint8_t*)p - shared_memory; }",
    "u32 shared_word(": "static u32 shared_word(u32 address) { return *(const u32*)(shared_memory + address); }",
    "void copy16(": "static void copy16(u8* to, const u8* from, int valid)"
    " { if (ALIGN == 16) copy_later<16>(to, from, valid);"
    " else if (ALIGN == 4)"
    " for (int i = 0; i < 16; i += 4) copy_later<4>(to + i, valid > i ? from + i : from, valid - i);"
    " else for (int i = 0; i < 16; i++) to[i] = i < valid ? from[i] : 0; }",
    "void copy4(": "static void copy4(void* to, const u8* from, int valid) { copy_later<4>(to, from, valid); }",
    "void copy_whole(": "template <int BYTES> static void copy_whole(u8* to, const u8* from)"
    " { copy_later<BYTES>(to, from, BYTES); }",
    "void copy_piece(": "static void copy_piece(u8* to, const u8* from, int valid)"
    " { copy_later<16>(to, from, valid); }",
    "void copies_commit(": "static void copies_commit() { close_group(); }",
    "void copies_wait(": "template <int LEFT> static void copies_wait() { finish_groups(LEFT); }",
    "void wait_for_previous_kernel(": "static void wait_for_previous_kernel() {}",
    "void start_next_kernel(": "static void start_next_kernel() {}",
    "void start_next_kernel_after(": "static void start_next_kernel_after(u32) {}",
    "void prefetch_x(": "static void prefetch_x(const u16*, int) {}",
    "void product(int": "static void product(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(c, 4, a, 2, b, bytes_times_bytes); }",
    "void product(float": "static void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1)"
    " { u32 b[2] = {b0, b1}; tensor_product(c, 4, a, 2, b, floats_times_floats); }",
    "void count(int (&c)[4], u32 a0, u32 a1, u32 a2": "static void count(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3,"
    " u32 b0, u32 b1) { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(c, 4, a, 2, b, ones_in_both); }",
    "void count(int (&c)[4], u32 a0, u32 a1, u32 b)": "static void count(int (&c)[4], u32 a0, u32 a1, u32 b)"
    " { u32 a[2] = {a0, a1}; tensor_product(c, 2, a, 1, &b, ones_in_both); }",
    "u32 even_and_odd(": "static u32 even_and_odd(u32 even, u32 odd)"
    " { return (even & 0x55555555u) | (odd & 0xaaaaaaaau); }",
    "void weigh_bytes(": "static void weigh_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(d, 4, a, 2, b, bytes_times_bytes); }",
    "u32 counts_before(": "static u32 counts_before(int low, int high, u32 rest)"
    " { return (u32)min(low, 255) | (u32)min(high, 255) << 8 | rest << 16; }",
    "void weigh(": "static void weigh(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(d, 4, a, 2, b, halves_times_halves); }",
    "void barrier_init(": "",
    "void barriers_ready(": "static void barriers_ready() {}",
    "void barrier_arrive(": "",
    "void barrier_expect(": "",
    "void barrier_wait(": "",
    "uint4 read_sixteen(": "static uint4 read_sixteen(const void* from) { return *(const uint4*)from; }",
    "uint2 read_eight(": "static uint2 read_eight(const void* from) { return *(const uint2*)from; }",
    "u32 read_constant(": "static u32 read_constant(const void* from) { return *(const u32*)from; }",
    "void known(": "static void known(int&, int&, const u16*&) {}",
    "void copy_tile(": "",
    "void copy_box(": "static void copy_box(u8* to, const TensorMap& map, u64* barrier, int column, int token)"
    " { copy_box(to, map, barrier, column, token, TOKENS); }",
    "void copy_bulk(": "",
    "uint4 load_sixteen(": "static uint4 load_sixteen(const u8* from) { return *(const uint4*)from; }",
    "uint2 load_eight(": "static uint2 load_eight(const u8* from) { return *(const uint2*)from; }",
    "void store_to_peer(": "static void store_to_peer(float* own, int rank, float value)"
    " { *(float*)(shared_memories[rank] + ((uint8_t*)own - shared_memory)) = value; }",
    "void send_sum(": "",
    "void send_word(": "static void send_word(u32* own, int rank, u32 value, u64* barrier)"
    " { send_sum((float*)own, rank, __uint_as_float(value), barrier); }",
    "void send_four(": "static void send_four(u32* own, int rank, const u32 (&v)[4], u64* barrier)"
    " { for (int i = 0; i < 4; i++) send_sum((float*)own + i, rank, __uint_as_float(v[i]), barrier); }",
    "void peers_wait(": "static void peers_wait(u64* barrier) { barrier_wait(barrier, 0); }",
    "void copy_codes(": "static void copy_codes(u8* to, const TensorMap& map, u64* barrier, int column, int row)"
    " { copy_box(to, map, barrier, column, row, 64 * ROW_GROUPS); }",
    "void prefetch_map(": "static void prefetch_map(const TensorMap&) {}",
    "void store_transposed(": "",
    "void registers_ready(": "static void registers_ready() {}",
    "void products_commit(": "static void products_commit() { close_products(); }",
    "void products_wait(": "template <int LEFT> static void products_wait() { finish_products(LEFT); }",
    "void cluster_begun(": "static void cluster_begun() { cluster_arrive(); }",
    "void cluster_arrive(": "",
    "void cluster_wait(": "",
    "void cluster_leave(": "static void cluster_leave() { cluster_arrive(), cluster_wait(); }",
    "uint4 peer_words(": "",
    "u32 descriptor_of(": "static u32 descriptor_of(const u8* tile) { return (tile - shared_memory) / 16; }",
    "u64 descriptor_of(": "static u64 descriptor_of(const u8* tile) { return (tile - shared_memory) / 16; }",
    "void warpgroup_product(": "static void warpgroup_product(float (&c)[TOKENS / 2], const u32 (&a)[4],"
    " u64 descriptor) { late_product(c, TOKENS / 2, a, shared_memory + descriptor / 64 * 1024, descriptor % 64 / 2); }",
    "void codes_product(": "static void codes_product(u32 (&c)[N / 2], u32 left, u32 right, int more)"
    " { late_product(c, N / 2, left, right, true, more != 0); }",
    "void columns_product(": "static void columns_product(u32 (&c)[N / 2], u32 left, u32 right, int more)"
    " { late_product(c, N / 2, left, right, false, more != 0); }",
    "void consumers_meet(": "static void consumers_meet()"
    " { static Barrier meeting; waits_unparked = true; meeting.wait(256); }",
    "void fewer_registers(": "template <int COUNT> static void fewer_registers() {}",
    "void more_registers(": "template <int COUNT> static void more_registers() {}",
    "u32 larger_pair(": "static u32 larger_pair(u32 most, u32 pair)"
    " { return to16(fmaxf(from16(most), fabsf(from16(pair))))"
    " | (u32)to16(fmaxf(from16(most >> 16), fabsf(from16(pair >> 16)))) << 16; }",
    "u32 larger_integers(": "static u32 larger_integers(u32 a, u32 b)"
    " { return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16; }",
    "u32 choose_bytes(": "static u32 choose_bytes(u32 low, u32 high, u32 selector)"
    " { return __byte_perm(low, high, selector); }",
    "u32 fma_pairs(": "static u32 fma_pairs(u32 a, u32 b, u32 c)"
    " { return to16(from16(a) * from16(b) + from16(c))"
    " | (u32)to16(from16(a >> 16) * from16(b >> 16) + from16(c >> 16)) << 16; }",
    "u32 multiply_pairs(": "static u32 multiply_pairs(u32 a, u32 b)"
    " { return to16(from16(a) * from16(b)) | (u32)to16(from16(a >> 16) * from16(b >> 16)) << 16; }",
    "u32 in_register(": "static u32 in_register(u32 constant) { return constant; }",
    "u32 pair_of_floats(": "static u32 pair_of_floats(float low, float high)"
    " { return to16(low) | (u32)to16(high) << 16; }",
    "void whole_product(": "static void whole_product(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(c, 4, a, 2, b, signed_bytes_times_bytes); }",
    "void wide_product(": "static void wide_product(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};"
    " tensor_product(c, 4, a, 2, b, FLOATS ? floats_times_floats : halves_times_halves); }",
    "u32 bytes_of(": "static u32 bytes_of(u32 low, u32 high, u32 selector)"
    " { return __byte_perm(low, high, selector); }",
    "u32 subtracted(": "static u32 subtracted(u32 a, u32 b) { const auto one = [](u32 x, u32 y) -> u32"
    " { return FLOATS ? to_bfloat(from_bfloat(x) - from_bfloat(y)) : to_half(from_half(x) - from_half(y)); };"
    " return one(a, b) | one(a >> 16, b >> 16) << 16; }",
    "u32 pair_of_halves(float": "static u32 pair_of_halves(float low, float high)"
    " { return to_half(low) | (u32)to_half(high) << 16; }",
    "void from_e4m3(": "static void from_e4m3(u32& low, u32& high, u32 codes)"
    " { const auto one = [&](int i) -> u32 { return from_small(codes >> 8 * i & 255); };"
    " low = one(0) | one(1) << 16, high = one(2) | one(3) << 16; }",
    "u32 nearest_pair(": "static u32 nearest_pair(float low, float high)"
    " { return to_small(low) | to_small(high) << 16; }",
    "void largest_at_peer(": "static void largest_at_peer(u32* own, int rank, u32 value)"
    " { atomicMax((u32*)(shared_memories[rank] + ((uint8_t*)own - shared_memory)), value); }",
    "void copy_rows(": "static void copy_rows(u8* to, const TensorMap& map, u64* barrier, int column, int row)"
    " { copy_box(to, map, barrier, column / 2, row, 16); }",
    "u32 add_pairs(": "static u32 add_pairs(u32 a, u32 b)"
    " { return to16(from16(a) + from16(b)) | (u32)to16(from16(a >> 16) + from16(b >> 16)) << 16; }",
}
"""Functions of the sources that are inline assembly, by what their definition starts with, and what they mean."""
