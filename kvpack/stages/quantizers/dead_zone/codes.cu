// Coefficients to codes and back: what dead_zone does, with a rounding for each class.
//
// Rows [N, D] of U units of equal length; a code's class is (columns[d] - classes[n]) >> 3, within the K tables. A row's
// step and its class are two arrays, because they need not follow from each other. Grid (slices of rows, 1), a warp a row.
#define LARGEST 32767

__device__ __forceinline__ int class_of(int column, int row, int tables) {
    int k = (column - row) >> 3;
    return k < 0 ? 0 : k >= tables ? tables - 1 : k;
}

// z, steps [N] in the same unit; codes zigzag. faults [U] are set where a magnitude is too large or not a number.
extern "C" __global__ void __launch_bounds__(256) quantize(
    const float *z, i64 rows, i64 tokens, i64 dims, const float *steps, const int *columns, const int *classes,
    i64 tables, const float *roundings, u16 *codes, int *faults) {
    i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    float step = steps[row];
    int mine = classes[row];
    bool bad = false;
    z += row * dims, codes += row * dims;
#pragma unroll 4
    for (int d = threadIdx.x % 32; d < dims; d += 32) {
        float value = z[d], rounding = roundings[class_of(columns[d], mine, (int)tables)];
        float magnitude = floorf(__fadd_rn(fabsf(value) / step, rounding));
        bool fits = magnitude <= LARGEST;
        u32 m = fits ? (u32)magnitude : 0;
        bad |= !fits;
        codes[d] = (u16)(value < 0 && m ? 2 * m - 1 : 2 * m);
    }
    if (bad) faults[row / tokens] = 1;
}

// halves = (value at its bin's centroid * step + prediction * 2^shift) * 2^out. centroids [K, 4]; predicted [N, D] or none.
extern "C" __global__ void __launch_bounds__(256) restore(
    const u16 *codes, i64 rows, i64 dims, const float *steps, const int *columns, const int *classes, i64 tables,
    const float *centroids, const float *predicted, i64 shift, i64 out, u16 *halves) {
    i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    float step = steps[row], scale = ldexpf(1, (int)out), unit = ldexpf(1, (int)shift);
    int mine = classes[row];
    codes += row * dims, halves += row * dims;
    if (predicted) predicted += row * dims;
#pragma unroll 4
    for (int d = threadIdx.x % 32; d < dims; d += 32) {
        u32 code = codes[d], m = (code + 1) >> 1;
        float value = 0;
        if (m) {
            value = m + centroids[class_of(columns[d], mine, (int)tables) * 4 + (m < 3 ? m : 3)];
            value = __fmul_rn(code & 1 ? -value : value, step);
        }
        if (predicted) value += predicted[d] * unit;
        halves[d] = (u16)to_halves(value * scale, 0);
    }
}
