// Two-bit codes (bit 0 = positive, bit 1 = the larger magnitude): see whit/kernels/signs.py.
//
// Everything is held transposed, (columns, rows); a thread has one row, neighbours read neighbouring addresses. Blocks
// number t * height ... t * height + height - 1 share the columns of one tile of rows.

// Patterns as bfloat16, -1, 0 or 1: out[column][0 or 1][row], of the smaller and the larger magnitude.
extern "C" __global__ void pattern_rows(const unsigned char* codes, unsigned short* out, int columns, int rows, int height) {
    const int row = blockIdx.x / height * THREADS + threadIdx.x;
    if (row >= rows) return;
    for (int c = blockIdx.x % height; c < columns; c += height) {
        const unsigned char code = codes[c * (long long)rows + row];
        const unsigned short one = code & 1 ? 0x3f80 : 0xbf80;
        out[c * 2ll * rows + row] = code & 2 ? 0 : one;
        out[c * 2ll * rows + rows + row] = code & 2 ? one : 0;
    }
}

// Sums over one part of the columns: sums[part][k][0 or 1][row] of signed products[column][k][row].
extern "C" __global__ void signed_sums(
    const float* products, const unsigned char* codes, float* sums, int columns, int count, int rows, int chunk,
    int height) {
    const int row = blockIdx.x / height * THREADS + threadIdx.x;
    if (row >= rows) return;
    const int part = blockIdx.x % height;
    const int first = part * chunk, last = first + chunk < columns ? first + chunk : columns;
    for (int k = 0; k < count; k++) {
        float smaller = 0.f, larger = 0.f;
        for (int c = first; c < last; c++) {
            const unsigned char code = codes[c * (long long)rows + row];
            const float product = products[(c * (long long)count + k) * rows + row];
            const float signed_product = code & 1 ? product : -product;
            smaller += code & 2 ? 0.f : signed_product;
            larger += code & 2 ? signed_product : 0.f;
        }
        float* out = sums + (part * (long long)count + k) * 2 * rows + row;
        out[0] = smaller;
        out[rows] = larger;
    }
}

// values[column][row]: the magnitude low or high of the column's book, with its sign.
extern "C" __global__ void decode_signs(
    const unsigned char* codes, const float* low, const float* high, const long long* book, float* values,
    int columns, int rows, int height) {
    const int row = blockIdx.x / height * THREADS + threadIdx.x;
    if (row >= rows) return;
    for (int c = blockIdx.x % height; c < columns; c += height) {
        const unsigned char code = codes[c * (long long)rows + row];
        const float magnitude = (code & 2 ? high : low)[book[c] * rows + row];
        values[c * (long long)rows + row] = code & 1 ? magnitude : -magnitude;
    }
}
