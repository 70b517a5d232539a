// Quantizes coefficients to codes, as reference.py decides them, and restores values from codes.
//
// There are N rows of D coefficients, of U units with equally many rows. A code's class is (columns[d] - classes[n]) >> 3, but
// never outside the K tables. A row's step and its class are in two arrays, because neither follows from the other. A warp
// handles one row. Arrays that are only read are loaded by __ldg, so that the compiler may move loads before stores.
// Names in capitals that are not defined here come from kernels/constants.py; SHIFT_COST is reference.py's SHIFT_BITS.
#define SIGN (LARGEST + 1)
#define AHEAD 8

struct Row {
    const int *columns;
    int mine, dims, top;
    __device__ __forceinline__ int bounded(int k) const { return k < 0 ? 0 : k > top ? top : k; }
    __device__ __forceinline__ int class_of(int d) const { return bounded(unbounded(d)); }
    __device__ __forceinline__ int unbounded(int d) const { return (__ldg(columns + d) - mine) >> 3; }
};

__device__ __forceinline__ int bucket_of(u32 m) {
    if (m < DIRECT) return (int)m;
    int octave = 31 - __clz(m);
    return DIRECT + 2 * (octave - 3) + (int)(m >> (octave - 1) & 1);
}

// The largest magnitude whose threshold in wanted [THRESHOLDS] is reached.
__device__ __forceinline__ int magnitude_of(float scaled, const float *wanted) {
    int m = (int)__fadd_rn(scaled, 0.5f);
    while (m > 0) {
        int beyond = m < THRESHOLDS ? 0 : m - (THRESHOLDS - 1);
        if (scaled >= __fadd_rn(wanted[m - beyond], (float)beyond)) break;
        m--;
    }
    return m;
}

// What a row costs if its classes are shifted. Costs are integers, so that the order of sums does not matter.
struct Costs {
    const u32 *table;  // [K, BUCKETS]
    __device__ __forceinline__ u64 of(int k, int bucket) const { return table[k * BUCKETS + bucket]; }
    __device__ __forceinline__ u64 sum(u64 share, int shift) const {
        return warp_sum(share) + (u64)SHIFT_COST * (shift < 0 ? -shift : shift);
    }
    __device__ u64 row(const u16 *held, const Row &row, int shift) const {
        u64 total = 0;
#pragma unroll 4
        for (int d = threadIdx.x % 32; d < row.dims; d += 32)
            total += of(row.bounded(row.unbounded(d) + shift), bucket_of(held[d] & LARGEST));
        return sum(total, shift);
    }
};

// The shift in this direction (way is 1 or -1) at which the next one would not cost less. That by `way` costs `best`.
__device__ int climb(const u16 *held, const Row &row, const Costs &costs, int way, u64 best) {
    int shift = way;
    for (int next = 2 * way; -MAX_SHIFT < next && next < MAX_SHIFT; next += way) {
        u64 found = costs.row(held, row, next);
        if (found >= best) break;
        best = found, shift = next;
    }
    return shift;
}

// The next coefficients of a lane and their classes, loaded early because device memory is slow.
struct Ahead {
    float values[AHEAD];
    int classes[AHEAD];  // may be outside the tables
    __device__ __forceinline__ Ahead(const float *z, const Row &row, int first) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int d = first + 32 * i;
            values[i] = d < row.dims ? __ldg(z + d) : 0, classes[i] = d < row.dims ? row.unbounded(d) : 0;
        }
    }
};

// z [N, D] and steps [N] have the same unit; wanted is [K, THRESHOLDS]; table [K, BUCKETS] has costs. Written are zigzag codes,
// shifts [N], and shifted [N], the classes after these shifts. faults [U] are set to 1 where a magnitude is too large or not a
// number. The magnitudes of a row are held in shared memory, with their signs; the costs of shifts by one in both directions
// are summed while magnitudes are found.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS) quantize(
    const float *z, i64 rows, i64 tokens, i64 dims, const float *steps, const int *columns, const int *classes,
    i64 tables, const float *wanted_, const u32 *table, u16 *codes, int *shifts, int *shifted, int *faults) {
    extern __shared__ u32 shared[];  // costs, then thresholds, then magnitudes
    float *wanted = (float *)shared + tables * BUCKETS;
    for (int i = threadIdx.x; i < tables * BUCKETS; i += blockDim.x) shared[i] = table[i];
    for (int i = threadIdx.x; i < tables * THRESHOLDS; i += blockDim.x) wanted[i] = wanted_[i];
    __syncthreads();
    i64 at = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (at >= rows) return;
    u16 *held = (u16 *)(wanted + tables * THRESHOLDS) + threadIdx.x / 32 * dims;
    float step = steps[at];
    Row row = {columns, classes[at], (int)dims, (int)tables - 1};
    Costs costs = {shared};
    bool bad = false;
    u64 down = 0, same = 0, up = 0;
    z += at * dims, codes += at * dims;
    for (int first = threadIdx.x % 32; first < row.dims; first += 32 * AHEAD) {
        Ahead ahead(z, row, first);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (first + 32 * i >= row.dims) break;
            float value = ahead.values[i], scaled = fabsf(value) / step;
            bool fits = scaled < LARGEST;
            int k = ahead.classes[i], m = magnitude_of(fits ? scaled : 0, wanted + row.bounded(k) * THRESHOLDS);
            held[first + 32 * i] = (u16)(m | (value < 0 ? SIGN : 0));
            bad |= !fits;
            int bucket = bucket_of(m);
            down += costs.of(row.bounded(k - 1), bucket);
            same += costs.of(row.bounded(k), bucket);
            up += costs.of(row.bounded(k + 1), bucket);
        }
    }
    if (bad) faults[at / tokens] = 1;
    down = costs.sum(down, -1), same = costs.sum(same, 0), up = costs.sum(up, 1);
    int shift = down < same ? climb(held, row, costs, -1, down) : up < same ? climb(held, row, costs, 1, up) : 0;
    row.mine -= 8 * shift;
    if (threadIdx.x % 32 == 0) shifts[at] = shift, shifted[at] = row.mine;
    if (shift)
        for (int first = threadIdx.x % 32; first < row.dims; first += 32 * AHEAD) {
            Ahead ahead(z, row, first);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (first + 32 * i >= row.dims) break;
                float value = ahead.values[i], scaled = fabsf(value) / step;
                const float *mine = wanted + row.bounded(ahead.classes[i]) * THRESHOLDS;
                held[first + 32 * i] = (u16)(magnitude_of(scaled < LARGEST ? scaled : 0, mine) | (value < 0 ? SIGN : 0));
            }
        }
#pragma unroll 8
    for (int d = threadIdx.x % 32; d < row.dims; d += 32) {
        u32 m = held[d] & LARGEST;
        codes[d] = (u16)(held[d] & SIGN && m ? 2 * m - 1 : 2 * m);
    }
}

// Restores (value at its bin's centroid * step + prediction * 2^shift) * 2^out as fp16 numbers. centroids are [K, 4], predicted
// is [N, D] or null. Of a row's values the first `common` are for all groups, and the others in equal shares for one group
// each. A row of the result has, for each group, the common values and then the group's own. With PAIRS, both numbers are even,
// and two values are handled at a time.
struct Restored {
    const u16 *codes;
    const float *centroids, *predicted;
    float step, unit, scale;
    __device__ __forceinline__ float value(const Row &row, int d, u32 code, float expected) const {
        u32 m = (code + 1) >> 1;
        float value = 0;
        if (m) {
            value = m + __ldg(centroids + row.class_of(d) * 4 + (m < 3 ? m : 3));
            value = __fmul_rn(code & 1 ? -value : value, step);
        }
        return (value + expected * unit) * scale;
    }
#if PAIRS
    typedef u32 Half;
    __device__ __forceinline__ Half at(const Row &row, int i) const {
        u32 two = __ldg((const u32 *)codes + i);
        float2 expected = predicted ? __ldg((const float2 *)predicted + i) : make_float2(0, 0);
        return to_halves(value(row, 2 * i, two & 0xFFFF, expected.x), value(row, 2 * i + 1, two >> 16, expected.y));
    }
#else
    typedef u16 Half;
    __device__ __forceinline__ Half at(const Row &row, int d) const {
        return (u16)to_halves(value(row, d, __ldg(codes + d), predicted ? __ldg(predicted + d) : 0), 0);
    }
#endif
};

extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS) restore(
    const u16 *codes, i64 rows, i64 dims, const float *steps, const int *columns, const int *classes, i64 tables,
    const float *centroids, const float *predicted, i64 shift, i64 out, i64 common_, i64 groups_, u16 *halves) {
    i64 at = (i64)blockIdx.x * ROW_WARPS + threadIdx.x / 32;
    if (at >= rows) return;
    Row row = {columns, classes[at], (int)dims, (int)tables - 1};
    Restored values = {codes + at * dims, centroids, predicted ? predicted + at * dims : 0, steps[at],
                       ldexpf(1, (int)shift), ldexpf(1, (int)out)};
    const int by = 1 + PAIRS;
    int common = (int)common_ / by, groups = (int)groups_, own = (row.dims / by - common) / groups, width = common + own;
    Restored::Half *to = (Restored::Half *)halves + at * groups * width;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < common; i += 32) {
        Restored::Half half = values.at(row, i);
        for (int g = 0; g < groups; g++) to[g * width + i] = half;
    }
    for (int g = 0; g < groups; g++)
#pragma unroll 4
        for (int i = threadIdx.x % 32; i < own; i += 32) to[g * width + common + i] = values.at(row, common + g * own + i);
}
