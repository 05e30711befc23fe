// Dense 16-bit weight (rows, columns) from packed codes: exactly the plain meaning rounded once, eight or, for
// `binary-residual`, mostly sixteen columns a thread.
// For products with many vectors, where a library's matrix product over the decoded weight is the fast way.

constexpr bool PAIRED = KIND == BINARY_RESIDUAL && GROUP % 16 == 0;

__device__ __forceinline__ float scalar_at(const u8* scalars, u32 index) { return float_of_half(((const u16*)scalars)[index]); }

__device__ __forceinline__ void decode_octet(const Weight& w, u16* out, int row, int octet) {
    u64 codes = 0, second = 0;
    const u8* from = w.codes[0] + (u32)(row * w.width + octet * CODE_BITS);
    if (CODE_BITS == 2)  // rows of two-bit codes are whole 16-bit words
        codes = *(const u16*)from;
    else if (CODE_BITS == 4)
        codes = *(const u32*)from;
    else if (CODE_BITS == 8)
        codes = *(const u64*)from;
    else
#pragma unroll
        for (int i = 0; i < CODE_BITS; i++) codes |= (u64)from[i] << (8 * i);
    u32 marks = 0;
    if (KIND == BINARY_RESIDUAL) {
        second = w.codes[1][(u32)(row * w.width + octet)];
        marks = w.salient[octet];
    }
    const u32 cell_group = (u32)(row * w.groups) + octet * 8 / GROUP;
    const u32 at = cell_group * NS;
    float value[8];
    if (KIND == BINARY_RESIDUAL) {
        float mean_c = 0, mean_s = 0, mean = 0;
        if (NS == 7) mean_c = scalar_at(w.scalars, at), mean_s = scalar_at(w.scalars, at + 2), mean = scalar_at(w.scalars, at + 4);
        const float scale_c = scalar_at(w.scalars, at + (NS == 7 ? 1 : 0)), scale_s = scalar_at(w.scalars, at + (NS == 7 ? 3 : 1));
        const float one = scalar_at(w.scalars, at + NS - 2), two = scalar_at(w.scalars, at + NS - 1);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float sign = codes >> i & 1 ? 1.0f : -1.0f;
            const bool other = second >> i & 1;
            const float ordinary = other ? mean_s + sign * scale_s : mean_c + sign * scale_c;
            value[i] = marks >> i & 1 ? (mean + sign * one) + (other ? two : -two) : ordinary;
        }
    } else if (KIND == LEVEL_TABLE && BITS <= 2) {
        const u64 table = BITS == 2 ? *(const u64*)(w.scalars + at * 2) : *(const u32*)(w.scalars + at * 2);
#pragma unroll
        for (int i = 0; i < 8; i++) value[i] = float_of_half((u16)(table >> (16 * ((u32)codes >> (i * BITS) & ((1 << BITS) - 1)))));
    } else if (KIND == LEVEL_TABLE) {
#pragma unroll
        for (int i = 0; i < 8; i++) value[i] = scalar_at(w.scalars, at + (codes >> (i * BITS) & ((1 << BITS) - 1)));
    } else {
        float scale = scalar_at(w.scalars, at), zero = BITS > 1 ? (float)(1 << (BITS - 1)) : 0.5f;
        if (!ASYM && BITS == 1) scale *= 2.0f;
        if (ASYM) {
            const u64 bit = (u64)cell_group * BITS;
            u32 window = w.zeros[bit >> 3];
            if ((bit & 7) + BITS > 8) window |= (u32)w.zeros[(bit >> 3) + 1] << 8;
            zero = (float)(window >> (bit & 7) & ((1 << BITS) - 1));
        }
#pragma unroll
        for (int i = 0; i < 8; i++) value[i] = scale * ((float)(codes >> (i * BITS) & ((1 << BITS) - 1)) - zero);
    }
    u16* to = out + (size_t)row * w.columns + octet * 8;
    if (w.columns % 8 == 0) {
        u32 word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) word[i] = x_of_float(value[2 * i]) | (u32)x_of_float(value[2 * i + 1]) << 16;
        *(uint4*)to = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (octet * 8 + i < w.columns) to[i] = x_of_float(value[i]);
    }
}

// Sixteen columns of `binary-residual`: the eight levels of a group are made once, and bytes of them chosen as in `wide.cu`.
__device__ __forceinline__ void decode_sixteen(const Weight& w, u16* out, int row, int part) {
    const u32 first = *(const u16*)(w.codes[0] + (u32)(row * w.width + part * 2)), second = *(const u16*)(w.codes[1] + (u32)(row * w.width + part * 2));
    const u32 marks = *(const u16*)(w.salient + part * 2), at = ((u32)(row * w.groups) + part * 16 / GROUP) * NS;
    float mean_c = 0, mean_s = 0, mean = 0;
    if (NS == 7) mean_c = scalar_at(w.scalars, at), mean_s = scalar_at(w.scalars, at + 2), mean = scalar_at(w.scalars, at + 4);
    const float scale_c = scalar_at(w.scalars, at + (NS == 7 ? 1 : 0)), scale_s = scalar_at(w.scalars, at + (NS == 7 ? 3 : 1));
    const u32 table[2] = {pair_of_floats(mean_c - scale_c, mean_c + scale_c), pair_of_floats(mean_s - scale_s, mean_s + scale_s)};
    u32 word[8], selector[4];
#pragma unroll
    for (int i = 0; i < 8; i += 2) {  // bits 2 i to 2 i + 3: two pairs of columns, one in each half of a selector
        const u32 s = (first >> (2 * i) & 3u) | (first << (14 - 2 * i) & 0x30000u), t = (second >> (2 * i) & 3u) | (second << (14 - 2 * i) & 0x30000u);
        selector[i / 2] = (s & 0x10001u) * 0x22u + (s & 0x20002u) * 0x1100u + (t & 0x10001u) * 0x44u + (t & 0x20002u) * 0x2200u + 0x10101010u;
        word[i] = choose_bytes(table[0], table[1], selector[i / 2]);
        word[i + 1] = choose_bytes(table[0], table[1], selector[i / 2] >> 16);
    }
    if (marks) {
        const float one = scalar_at(w.scalars, at + NS - 2), two = scalar_at(w.scalars, at + NS - 1);
        const u32 marked[2] = {pair_of_floats(mean - one - two, mean + one - two), pair_of_floats(mean - one + two, mean + one + two)};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 v = marks >> (2 * i), here = (v & 1) * 0xffffu | (v & 2) * 0x7fff8000u;
            word[i] = (word[i] & ~here) | (choose_bytes(marked[0], marked[1], selector[i / 2] >> (16 * (i % 2))) & here);
        }
    }
    uint4* const to = (uint4*)(out + (size_t)row * w.columns + part * 16);
    to[0] = make_uint4(word[0], word[1], word[2], word[3]);
    to[1] = make_uint4(word[4], word[5], word[6], word[7]);
}

extern "C" __global__ void __launch_bounds__(256)
decode(Weight w, u16* out) {
    if (PAIRED && w.columns % 16 == 0) {
        for (int row = blockIdx.x; row < w.rows; row += gridDim.x)
#pragma unroll 2
            for (int part = threadIdx.x; part < w.columns / 16; part += 256) decode_sixteen(w, out, row, part);
        return;
    }
    const int octets = (w.columns + 7) / 8;
    for (int row = blockIdx.x; row < w.rows; row += gridDim.x)
#pragma unroll 2
        for (int octet = threadIdx.x; octet < octets; octet += 256) decode_octet(w, out, row, octet);
}
