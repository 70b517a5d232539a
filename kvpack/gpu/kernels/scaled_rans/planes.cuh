// Codes of planes [U, T, D], their classes, and their symbols as in codecs/chain/symbols.py. META ints are known of each plane's
// stream; SPAN, GROUPS, ... are their positions. These and all other names in capitals that no source defines come from
// kernels/constants.py.
static_assert(PRECISION == 14 && DIRECT == 8, "entries have fields of 14 bits, and octaves begin at 8");

struct Plane {
    const int *columns, *rows;  // [D] and [U * T]; a code's class is (column - row) >> 3, but never outside the tables
    int tokens, dims, top;      // top is the last table
    __device__ __forceinline__ int class_of(int column, int row) const {
        int k = (column - row) >> 3;
        return k < 0 ? 0 : k > top ? top : k;
    }
};

__device__ __forceinline__ u32 magnitude_of(u32 code) { return (code + 1) >> 1; }

// The number of raw bits of a magnitude; 0 for a magnitude that has a symbol of its own.
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

// Loads BATCH times 32 codes of a row, of which `left` are there; lane l has those at l, 32 + l, ... Returns whether any of
// them has raw bits.
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

// The sum of the values of all lanes, in every lane.
__device__ __forceinline__ int warp_total(int value) { return (int)__reduce_add_sync(ALL, (u32)value); }

// The sum of the values of all lanes up to and including this one.
__device__ __forceinline__ int warp_scan(int value) {
    int lane = threadIdx.x % 32;
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(ALL, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// Writes to starts [count] the sum of all values before each; returns the sum of all. A block must have 1,024 threads.
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
