// Dense 16-bit weight (rows, columns) from bytes that number codewords of a multiple of four columns: exactly the plain
// meaning rounded once. Items and their order are those of `decode.cu`; all codewords lie in shared memory, exact in 16 bits.

constexpr bool WHOLE_CODES = WIDTH % 8 == 0;  // eight columns have one codeword, else two of four columns each

struct Item { int row0, octet; };
struct Octets { u32 first[ROWS], second[ROWS], scale[ROWS]; };  // as loaded
__device__ __forceinline__ Item item_at(int item, int stripes, int octets) {
    return {item / stripes * ROWS, min(item % stripes * THREADS + (int)threadIdx.x, octets - 1)};
}
__device__ __forceinline__ void fetch(Octets& codes, const Weight& w, Item item) {
    const int first = item.octet * 8 / WIDTH, second = min((item.octet * 8 + 4) / WIDTH, w.groups - 1);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const u32 row = min(item.row0 + i, w.rows - 1), at = row * w.width;
        codes.first[i] = __ldg(w.codes[0] + (at + first));
        if (!WHOLE_CODES) codes.second[i] = __ldg(w.codes[0] + (at + second));
        codes.scale[i] = __ldg((const u16*)w.scalars + row);
    }
}
__device__ __forceinline__ u32 scaled(u32 entries, u32 scale) {  // of two codewords' entries; the products are rounded once
    if (!BF16) return multiply_pairs(entries, scale * 0x10001u);
    const float factor = float_of_half((u16)scale);
    return pair_of_floats(__uint_as_float(entries << 16) * factor, __uint_as_float(entries & 0xffff0000u) * factor);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
decode(Weight w, u16* out) {
    extern __shared__ __align__(16) u8 memory[];
    u16* const codebook = (u16*)memory;
    const int octets = (w.columns + 7) / 8, stripes = (octets + THREADS - 1) / THREADS, items = (w.rows + ROWS - 1) / ROWS * stripes;
    int number = blockIdx.x;
    Item item = item_at(number, stripes, octets);
    Octets codes, coming;
    fetch(codes, w, item);
    for (int entry = threadIdx.x; entry < CODES / 2 * WIDTH; entry += THREADS) {
        const int code = entry / WIDTH, at = entry % WIDTH;
        float value;
        if (TERNARY) {
            int trits = w.zeros[code * ((WIDTH + 4) / 5) + at / 5];
            for (int i = 0; i < at % 5; i++) trits /= 3;
            value = (float)(trits % 3 - 1);
        } else {
            value = (float)(signed char)w.zeros[entry] * (1.0f / 128.0f);
        }
        codebook[entry] = x_of_float(value), codebook[entry + CODES / 2 * WIDTH] = x_of_float(-value);
    }
    wait_for_previous_kernel();  // it may still read what this one is to overwrite
    __syncthreads();
#pragma unroll 1
    while (number < items) {
        number += gridDim.x;
        const Item next = item_at(number < items ? number : 0, stripes, octets);
        fetch(coming, w, next);
        const int column = item.octet * 8;
        const u16 *const first = codebook + column % WIDTH, *const second = codebook + (column + 4) % WIDTH;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            u32 word[4];
            if (WHOLE_CODES) {
                const uint4 eight = *(const uint4*)(first + codes.first[i] * WIDTH);
                word[0] = eight.x, word[1] = eight.y, word[2] = eight.z, word[3] = eight.w;
            } else {
                const uint2 four = *(const uint2*)(first + codes.first[i] * WIDTH), others = *(const uint2*)(second + codes.second[i] * WIDTH);
                word[0] = four.x, word[1] = four.y, word[2] = others.x, word[3] = others.y;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) word[j] = scaled(word[j], codes.scale[i]);
            u16* const to = out + (size_t)min(item.row0 + i, w.rows - 1) * w.columns + column;
            if (w.columns % 8 == 0) {
                *(uint4*)to = make_uint4(word[0], word[1], word[2], word[3]);
            } else {
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (column + j < w.columns) to[j] = (u16)(word[j / 2] >> (16 * (j % 2)));
            }
        }
        item = next, codes = coming;
    }
}
