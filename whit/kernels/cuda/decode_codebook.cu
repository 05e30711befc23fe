
// Dense 16-bit weight (rows, columns) from the numbers of codewords: exactly the plain meaning rounded once. The codebook
// lies in shared memory as float32, each thread writes eight columns.

__device__ __forceinline__ u32 code_at(const u8* codes, u32 group) {
    const u32 bit = group * BITS;
    u32 window = __ldg(codes + (bit >> 3));
    if (8 % BITS && (bit & 7) + BITS > 8) window |= (u32)__ldg(codes + (bit >> 3) + 1) << 8;
    return window >> (bit & 7) & ((1 << BITS) - 1);
}

extern "C" __global__ void __launch_bounds__(256)
decode(Weight w, u16* out) {
    extern __shared__ __align__(16) u8 memory[];
    float* const codebook = (float*)memory;  // the half that is stored
    for (int entry = threadIdx.x; entry < CODES / 2 * WIDTH; entry += 256) {
        const int code = entry / WIDTH, at = entry % WIDTH;
        if (TERNARY) {
            int trits = w.zeros[code * ((WIDTH + 4) / 5) + at / 5];
            for (int i = 0; i < at % 5; i++) trits /= 3;
            codebook[entry] = (float)(trits % 3 - 1);
        } else {
            codebook[entry] = (float)(signed char)w.zeros[entry] * (1.0f / 128.0f);
        }
    }
    __syncthreads();
    const int octets = (w.columns + 7) / 8;
    for (int row = blockIdx.x; row < w.rows; row += gridDim.x) {
        const float scale = float_of_half(__ldg((const u16*)w.scalars + row));
        const u8* codes = w.codes[0] + (size_t)row * w.width;
        for (int octet = threadIdx.x; octet < octets; octet += 256) {
            u32 group = octet * 8u / WIDTH, at = octet * 8u % WIDTH, code = code_at(codes, group);
            u16 value[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float entry = codebook[(code & (CODES / 2 - 1)) * WIDTH + at];
                value[i] = x_of_float(scale * (code < CODES / 2 ? entry : -entry));
                if (++at == WIDTH && i < 7 && ++group < w.groups) at = 0, code = code_at(codes, group);
                if (at == WIDTH) at = 0;  // beyond the last column: not written
            }
            u16* const to = out + (size_t)row * w.columns + octet * 8;
            if (w.columns % 8 == 0) {
                *(uint4*)to = make_uint4(value[0] | (u32)value[1] << 16, value[2] | (u32)value[3] << 16, value[4] | (u32)value[5] << 16, value[6] | (u32)value[7] << 16);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (octet * 8 + i < w.columns) to[i] = value[i];
            }
        }
    }
}
