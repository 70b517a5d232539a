// Codes of planes [U, T, D] and their classes; what is known of each plane's stream; symbols as in stages/symbols.py.
static_assert(PRECISION == 14 && DIRECT == 8, "entries have fields of 14 bits, and octaves begin at 8");

struct Plane {
    const int *columns, *rows;  // [D], [U * T]: a code's class is (column - row) >> 3, within the tables
    int tokens, dims, top;      // top: the last table
    __device__ __forceinline__ int class_of(int column, int row) const {
        int k = (column - row) >> 3;
        return k < 0 ? 0 : k > top ? top : k;
    }
};

__device__ __forceinline__ u32 magnitude_of(u32 code) { return (code + 1) >> 1; }

// Raw bits of a magnitude, 0 for those that are symbols of their own.
__device__ __forceinline__ int raw_width(u32 magnitude) { return magnitude < DIRECT ? 0 : 30 - __clz(magnitude); }

__device__ __forceinline__ int symbol_of(u32 code) {
    u32 magnitude = magnitude_of(code);
    if (magnitude < DIRECT) return (int)(code ? 2 * magnitude - 1 + (code & 1) : 0);
    int octave = 31 - __clz(magnitude), bucket = DIRECT + 2 * (octave - 3) + (int)(magnitude >> (octave - 1) & 1);
    return 2 * bucket - 1 + (int)(code & 1);
}

// The code of a symbol with no raw bits set.
__device__ __forceinline__ u32 code_of(int symbol) {
    u32 bucket = (u32)(symbol + 1) >> 1, octave = 3 + (bucket - DIRECT) / 2;
    u32 magnitude = bucket < DIRECT ? bucket : (2 | (bucket & 1)) << (octave - 1);
    return symbol ? 2 * magnitude - ((symbol & 1) ^ 1) : 0;
}

// Four times 32 codes of a row, of which so many are left, those of lane l at l, 32 + l, ...; whether any has raw bits.
#define BATCH 4
__device__ __forceinline__ bool any_raw(u32 *held, const u16 *codes, int left) {
    int l = threadIdx.x % 32;
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
        held[i] = 32 * i + l < left ? codes[32 * i + l] : 0;
        most = held[i] > most ? held[i] : most;
    }
    return __ballot_sync(ALL, magnitude_of(most) >= DIRECT);
}

__device__ __forceinline__ int warp_total(int value) { return (int)__reduce_add_sync(ALL, (u32)value); }

// Sum of the lanes' values up to and with the own one's.
__device__ __forceinline__ int warp_scan(int value) {
    int lane = threadIdx.x % 32;
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(ALL, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// Exclusive sums of values [count] into starts; returns the total. A block of 1,024.
__device__ int block_scan(const int *values, int count, int *starts) {
    __shared__ int totals[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, carry = 0;
    for (int first = 0; first < count; first += 1024) {
        int i = first + threadIdx.x, value = i < count ? values[i] : 0, sum = warp_scan(value), before = 0;
        if (lane == 31) totals[warp] = sum;
        __syncthreads();
        for (int w = 0; w < warp; w++) before += totals[w];
        if (i < count) starts[i] = carry + before + sum - value;
        for (int w = 0; w < 32; w++) carry += totals[w];
        __syncthreads();
    }
    return carry;
}
