// Decodes the streams of planes to codes. Kernels follow each other: heads checks heads and lengths, classify finds the classes
// of codes, decode decodes symbols, tally makes codes of them, place finds where raw bits are, join adds them to the codes.
//
// streams [U] are addresses divisible by 4. In meta [U, META], FAULT is not 0 where a stream is not sound.
#include "planes.cuh"
#include "words.cuh"

// Writes bases [U, groups_most + 1], the first word of each group. A block handles one plane.
extern "C" __global__ void __launch_bounds__(1024) heads(
    const u64 *streams, const i64 *sizes, i64 count, i64 groups_most, int *bases, int *meta) {
    int *own = meta + blockIdx.x * META;
    const u32 *stream = (const u32 *)streams[blockIdx.x];
    i64 size = sizes[blockIdx.x];
    if (threadIdx.x == 0) own[FAULT] = 1;
    if (size < HEAD) return;
    i64 span = stream[0], raw_bytes = stream[1], groups = span && span % 32 == 0 ? (count + span - 1) / span : 0;
    i64 body = size - HEAD - GROUP_OVERHEAD * groups - raw_bytes;
    if (groups < 1 || groups > groups_most || body < 0 || body % 2) return;
    __shared__ int huge;
    if (threadIdx.x == 0) huge = 0;
    __syncthreads();
    for (int g = threadIdx.x; g < groups; g += 1024)
        if (stream[2 + g] > (u32)(span < count ? span : count)) huge = 1;  // this also keeps the sums below 2^31
    __syncthreads();
    if (huge) return;
    bases += blockIdx.x * (groups_most + 1);
    int words = block_scan((const int *)stream + 2, (int)groups, bases);
    if (threadIdx.x) return;
    bases[groups] = words;
    own[SPAN] = (int)(span < count ? span : (count + 31) / 32 * 32), own[GROUPS] = (int)groups;
    own[RAW_BYTES] = (int)raw_bytes, own[WORDS] = words, own[FAULT] = 2 * words != body;
}

// Writes cells [U * T * D], the class of each code. A warp handles one row.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS) classify(
    const int *columns, const int *rows, i64 all_rows, i64 dims, i64 tables, u8 *cells) {
    Plane plane = {columns, rows, 1, (int)dims, (int)tables - 1};
    i64 row = (i64)blockIdx.x * ROW_WARPS + threadIdx.x / 32;
    if (row >= all_rows) return;
    int mine = rows[row];
    cells += row * dims;
#pragma unroll 4
    for (int c = threadIdx.x % 32; c < plane.dims; c += 32) cells[c] = (u8)plane.class_of(__ldg(columns + c), mine);
}

#define RUNS ((1 << PRECISION) / RUN)
#define STEPS 4  // codes between two refills, as many as words.cuh allows

struct Lookup {
    const u16 *runs;
    const u32 *held;
};

// Decodes the symbol of a code of class k, for a lane that is live.
__device__ __forceinline__ int get(u32 &x, const Lookup &by, int k, Words &words, bool live, u32 below) {
    u32 slot = x & ((1u << PRECISION) - 1);
    u32 run = by.runs[k * RUNS + slot / RUN];
    int symbol = run & 255, last = run >> 8;
    const u32 *held = by.held + k * SYMBOLS;
    while (symbol < last) {
        int middle = (symbol + last + 1) / 2;
        bool reached = (held[middle] & 0x3FFF) <= slot;
        symbol = reached ? middle : symbol, last = reached ? last : middle - 1;
    }
    u32 entry = held[symbol];
    u32 state = (entry >> PRECISION) * (x >> PRECISION) + slot - (entry & 0x3FFF);
    state = take(words, state, live && state < LOW, below);
    if (live) x = state;
    return symbol;
}

// Decodes symbols, which replace the classes in cells. coarse [K, RUNS] has the symbol of the first of RUN slots and, above it,
// that of the last; entries [K, SYMBOLS] are frequency << 14 | start. A warp handles one group.
extern "C" __global__ void __launch_bounds__(32 * WARPS) decode(
    const u64 *streams, const int *bases, i64 groups_most, i64 size, i64 tables, const u32 *entries, const uint4 *coarse,
    u8 *cells, int *meta) {
    extern __shared__ u32 shared[];  // the warps' rings, then entries, then coarse
    int *own = meta + blockIdx.y * META;
    if (own[FAULT] == 1 || blockIdx.x * WARPS >= own[GROUPS]) return;
    u32 *held = shared + WARPS * RING / 4;
    u16 *runs = (u16 *)(held + tables * SYMBOLS);
#pragma unroll 8
    for (int i = threadIdx.x; i < tables * SYMBOLS; i += 32 * WARPS) held[i] = entries[i];
#pragma unroll 8
    for (int i = threadIdx.x; i < tables * RUNS / 8; i += 32 * WARPS) ((uint4 *)runs)[i] = coarse[i];
    __syncthreads();
    int group = blockIdx.x * WARPS + threadIdx.x / 32, l = threadIdx.x % 32, span = own[SPAN];
    if (group >= own[GROUPS]) return;
    i64 first = (i64)group * span;
    int count = size - first < span ? (int)(size - first) : span;
    u8 *cell = pin_register(cells + blockIdx.y * size + first + l);
    const u8 *stream = (const u8 *)streams[blockIdx.y] + HEAD + 4ll * own[GROUPS];
    bases += blockIdx.y * (groups_most + 1) + group;
    u32 x = ((const u32 *)stream)[group * 32 + l], below = pin_register((1u << l) - 1);
    Words words = open_words((const u16 *)(stream + 128ll * own[GROUPS]) + bases[0], (u64 *)shared + threadIdx.x / 32 * (RING / 8));
    u32 begin = words.at;
    Lookup by = {runs, held};
    int next[STEPS], steps = count / 32;
#pragma unroll
    for (int i = 0; i < STEPS; i++) next[i] = i < steps ? cell[32 * i] : 0;
    for (; steps >= STEPS; steps -= STEPS, cell += 32 * STEPS) {
        int now[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            now[i] = next[i];
            next[i] = STEPS + i < steps ? cell[32 * (STEPS + i)] : 0;
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) cell[32 * i] = (u8)get(x, by, now[i], words, true, below);
        refill(words);
    }
    for (; steps; steps--, cell += 32) *cell = (u8)get(x, by, *cell, words, true, below);
    if (l < count % 32) steps = *cell;
    int last = get(x, by, steps, words, l < count % 32, below);
    if (l < count % 32) *cell = (u8)last;
    bool fine = __ballot_sync(ALL, x == LOW) == ALL && words.at - begin == 2u * (bases[1] - bases[0]);
    if (l == 0 && !fine) own[FAULT] = 2;
}

// Makes codes of symbols, with all raw bits 0, and counts the raw bits of each row. A warp handles one row.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS) tally(const u8 *cells, i64 all_rows, i64 dims_, u16 *codes, int *raw) {
    __shared__ u32 known[SYMBOLS];  // for each symbol: number of raw bits << 16 | code
    if (threadIdx.x < SYMBOLS) {
        u32 code = code_of(threadIdx.x);
        known[threadIdx.x] = (u32)raw_width(magnitude_of(code)) << 16 | code;
    }
    __syncthreads();
    i64 row = (i64)blockIdx.x * ROW_WARPS + threadIdx.x / 32;
    int dims = (int)dims_, bits = 0;
    if (row >= all_rows) return;
    cells += row * dims, codes += row * dims;
#pragma unroll 8
    for (int c = threadIdx.x % 32; c < dims; c += 32) {
        u32 found = known[__ldg(cells + c)];
        codes[c] = (u16)found;
        bits += found >> 16;
    }
    bits = warp_total(bits);
    if (threadIdx.x % 32 == 0) raw[row] = bits;
}

// Where in the raw bits each row's begin, and whether there are as many as there must be. A block a plane.
extern "C" __global__ void __launch_bounds__(1024) place(
    const u64 *streams, const i64 *sizes, const int *raw, i64 tokens, int *starts, int *meta) {
    int *own = meta + blockIdx.x * META;
    if (own[FAULT]) return;
    int bits = block_scan(raw + blockIdx.x * tokens, (int)tokens, starts + blockIdx.x * tokens);
    if (threadIdx.x) return;
    const u8 *last = (const u8 *)streams[blockIdx.x] + sizes[blockIdx.x] - 1;
    own[FAULT] = (bits + 7) / 8 != own[RAW_BYTES] || (bits % 8 && *last >> bits % 8) ? 3 : 0;
}

// Adds the raw bits to the codes of rows that have some. A warp handles one row.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS) join(
    const u64 *streams, i64 all_rows, i64 tokens, i64 dims, const int *raw, const int *starts, const int *meta, u16 *codes) {
    int row = (int)(blockIdx.x * ROW_WARPS + threadIdx.x / 32), unit = row / (int)tokens, l = threadIdx.x % 32;
    if (row >= all_rows || !raw[row]) return;
    const int *own = meta + unit * META;
    if (own[FAULT]) return;
    const u8 *tail = (const u8 *)streams[unit] + HEAD + (i64)GROUP_OVERHEAD * own[GROUPS] + 2ll * own[WORDS];
    i64 bit = starts[row];
    codes += (i64)row * dims;
    for (int first = 0; first < dims; first += 32 * BATCH) {
        u32 held[BATCH];
        if (!any_raw(held, codes + first, (int)dims - first)) continue;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int width = raw_width(magnitude_of(held[i])), sum = warp_scan(width);
            if (width) {
                i64 at = bit + sum - width;
                u32 value = 0;
                for (int j = 0; j < (int)(at & 7) + width; j += 8) value |= (u32)tail[at / 8 + j / 8] << j;
                codes[first + 32 * i + l] = (u16)(held[i] + 2 * (value >> (at & 7) & ((1u << width) - 1)));
            }
            bit += __shfl_sync(ALL, sum, 31);
        }
    }
}
