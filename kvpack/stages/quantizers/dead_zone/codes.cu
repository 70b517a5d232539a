// Coefficients to codes and back, as reference.py decides them.
//
// Rows [N, D] of U units of equal length; a code's class is (columns[d] - classes[n]) >> 3, within the K tables. A row's
// step and its class are two arrays, because they need not follow from each other. Grid (slices of rows, 1), a warp a row.
// THRESHOLDS and MOST_SHIFT are reference.py's, SHIFT_COST is its SHIFT_BITS.
#define LARGEST 32767
#define BUCKETS 32
#define DIRECT 8

struct Row {
    const int *columns;
    int mine, dims, top;
    __device__ __forceinline__ int class_of(int d) const {
        int k = (columns[d] - mine) >> 3;
        return k < 0 ? 0 : k > top ? top : k;
    }
    __device__ __forceinline__ Row shifted(int shift) const { return {columns, mine - 8 * shift, dims, top}; }
};

__device__ __forceinline__ int bucket_of(u32 m) {
    if (m < DIRECT) return (int)m;
    int octave = 31 - __clz(m);
    return DIRECT + 2 * (octave - 3) + (int)(m >> (octave - 1) & 1);
}

// The largest magnitude whose threshold, of wanted [THRESHOLDS], is reached.
__device__ __forceinline__ int magnitude_of(float scaled, const float *wanted) {
    int m = (int)__fadd_rn(scaled, 0.5f);
    while (m > 0) {
        int beyond = m < THRESHOLDS ? 0 : m - (THRESHOLDS - 1);
        if (scaled >= __fadd_rn(wanted[m - beyond], (float)beyond)) break;
        m--;
    }
    return m;
}

// What a row of magnitudes takes if its classes are shifted; bits are whole numbers, so that no order of sums matters.
__device__ u64 cost(const u16 *magnitudes, const Row &row, const u64 *bits, int shift) {
    Row moved = row.shifted(shift);
    u64 total = 0;
#pragma unroll 4
    for (int d = threadIdx.x % 32; d < row.dims; d += 32)
        total += bits[moved.class_of(d) * BUCKETS + bucket_of(magnitudes[d])];
    return warp_sum(total) + (u64)SHIFT_COST * (shift < 0 ? -shift : shift);
}

__device__ int best_shift(const u16 *magnitudes, const Row &row, const u64 *bits) {
    u64 best = cost(magnitudes, row, bits, 0);
    int shift = 0;
    for (int way = -1; way <= 1; way += 2)
        for (int next = shift + way; -MOST_SHIFT < next && next < MOST_SHIFT && shift * way >= 0; next += way) {
            u64 found = cost(magnitudes, row, bits, next);
            if (found >= best) break;
            best = found, shift = next;
        }
    return shift;
}

// z, steps [N] in the same unit; wanted [K, THRESHOLDS]; bits [K, BUCKETS]. Codes zigzag; shifts [N] and the classes [N] that
// they make of classes. faults [U] are set where a magnitude is too large or not a number.
extern "C" __global__ void __launch_bounds__(256) quantize(
    const float *z, i64 rows, i64 tokens, i64 dims, const float *steps, const int *columns, const int *classes,
    i64 tables, const float *wanted, const u64 *bits, u16 *codes, int *shifts, int *shifted, int *faults) {
    i64 at = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (at >= rows) return;
    float step = steps[at];
    Row row = {columns, classes[at], (int)dims, (int)tables - 1};
    bool bad = false;
    z += at * dims, codes += at * dims;
#pragma unroll 4
    for (int d = threadIdx.x % 32; d < row.dims; d += 32) {
        float scaled = fabsf(z[d]) / step;
        bool fits = scaled < LARGEST;
        codes[d] = (u16)magnitude_of(fits ? scaled : 0, wanted + row.class_of(d) * THRESHOLDS);
        bad |= !fits;
    }
    if (bad) faults[at / tokens] = 1;
    int shift = best_shift(codes, row, bits);
    row = row.shifted(shift);
    if (threadIdx.x % 32 == 0) shifts[at] = shift, shifted[at] = row.mine;
#pragma unroll 4
    for (int d = threadIdx.x % 32; d < row.dims; d += 32) {
        float value = z[d], scaled = fabsf(value) / step;
        int m = magnitude_of(scaled < LARGEST ? scaled : 0, wanted + row.class_of(d) * THRESHOLDS);
        codes[d] = (u16)(value < 0 && m ? 2 * m - 1 : 2 * m);
    }
}

// halves = (value at its bin's centroid * step + prediction * 2^shift) * 2^out. centroids [K, 4]; predicted [N, D] or none.
extern "C" __global__ void __launch_bounds__(256) restore(
    const u16 *codes, i64 rows, i64 dims, const float *steps, const int *columns, const int *classes, i64 tables,
    const float *centroids, const float *predicted, i64 shift, i64 out, u16 *halves) {
    i64 at = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (at >= rows) return;
    float step = steps[at], scale = ldexpf(1, (int)out), unit = ldexpf(1, (int)shift);
    Row row = {columns, classes[at], (int)dims, (int)tables - 1};
    codes += at * dims, halves += at * dims;
    if (predicted) predicted += at * dims;
#pragma unroll 4
    for (int d = threadIdx.x % 32; d < row.dims; d += 32) {
        u32 code = codes[d], m = (code + 1) >> 1;
        float value = 0;
        if (m) {
            value = m + centroids[row.class_of(d) * 4 + (m < 3 ? m : 3)];
            value = __fmul_rn(code & 1 ? -value : value, step);
        }
        if (predicted) value += predicted[d] * unit;
        halves[d] = (u16)to_halves(value * scale, 0);
    }
}
