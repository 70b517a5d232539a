// The 64-bit checksum of byte ranges: sums[s] += sum over words of mixed(word, index), + length.
//
// starts [S] addresses, sizes [S] bytes, sums [S] zeroed before. Grid (S, Y). Ranges may start anywhere; up to 15 bytes
// around a range are read, never used.
extern "C" __global__ void __launch_bounds__(256) checksum(const u64 *starts, const i64 *sizes, u64 *sums) {
    i64 size = sizes[blockIdx.x];
    u64 start = starts[blockIdx.x];
    const u64 *words = (const u64 *)(start & ~7ull);
    int skew = (int)(start & 7) * 8;
    i64 count = (size + 7) / 8;
    u64 total = 0;
#pragma unroll 4
    for (i64 i = (i64)blockIdx.y * 256 + threadIdx.x; i < count; i += (i64)gridDim.y * 256) {
        u64 word = words[i] >> skew;
        if (skew && i * 8 + 8 - skew / 8 < size) word |= words[i + 1] << (64 - skew);
        if (i * 8 + 8 > size) word &= ~0ull >> (64 - (size & 7) * 8);
        total += mixed(word, i);
    }
    if (blockIdx.y == 0 && threadIdx.x == 0) total += size;
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) atomicAdd(&sums[blockIdx.x], total);
}
