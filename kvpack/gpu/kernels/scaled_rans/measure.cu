// Finds what a plane's codes will cost, and from that how many symbols each group takes (docs/format.md).
#include "planes.cuh"

// costs [K, SYMBOLS] are in 64ths of a bit. Written are raw [U * T], the number of raw bits of each row, and picks [U * T * D],
// class * SYMBOLS + symbol of each code. The costs are added to totals [U], which must be 0 before. A warp handles one row.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS) measure(
    const u16 *codes, const int *columns, const int *rows, i64 all_rows, i64 tokens, i64 dims, i64 tables,
    const u16 *costs, int *raw, u64 *totals, u16 *picks) {
    Plane plane = {columns, rows, (int)tokens, (int)dims, (int)tables - 1};
    int row = (int)(blockIdx.x * ROW_WARPS + threadIdx.x / 32), bits = 0;
    u32 cost = 0;
    if (row >= all_rows) return;
    int mine = rows[row];
    codes += (i64)row * dims, picks += (i64)row * dims;
#pragma unroll 4
    for (int c = threadIdx.x % 32; c < plane.dims; c += 32) {
        u32 code = __ldg(codes + c), pick = plane.class_of(__ldg(columns + c), mine) * SYMBOLS + symbol_of(code);
        cost += __ldg(costs + pick);
        bits += raw_width(magnitude_of(code));
        picks[c] = (u16)pick;
    }
    u64 sum = warp_sum((u64)cost);
    bits = warp_total(bits);
    if (threadIdx.x % 32) return;
    raw[row] = bits;
    atomicAdd(&totals[row / plane.tokens], sum);
}

// Writes meta [U, META] and starts [U * T], where in the raw bits those of each row begin. A block handles one plane.
extern "C" __global__ void __launch_bounds__(1024) divide(
    const int *raw, const u64 *totals, i64 tokens, i64 dims, int *starts, int *meta) {
    int bits = block_scan(raw + blockIdx.x * tokens, (int)tokens, starts + blockIdx.x * tokens);
    if (threadIdx.x) return;
    i64 size = tokens * dims, payload = (i64)(totals[blockIdx.x] / (64 * 8)), groups = payload / GROUP_BYTES;
    groups = groups ? groups : 1;
    i64 span = (size + groups * 32 - 1) / (groups * 32) * 32;
    int *own = meta + blockIdx.x * META;
    own[SPAN] = (int)span, own[GROUPS] = (int)((size + span - 1) / span), own[RAW_BYTES] = (bits + 7) / 8;
}
