// Packs and unpacks streams without a model: a mode byte, then `width` bits for each code in row-major order; the spare bits
// of the last byte are zero. An element has ITEM bytes, and its code is the `width` bits above `shift`; width is at most 12.
// The grid is (Y, P), with any Y.
#include "meta.cuh"
#if ITEM == 2
typedef u16 Item;
#else
typedef u8 Item;
#endif

// sources are those of scan.cu. With meta, only parts in mode PACKED are packed. A thread takes eight codes, which are
// whole bytes.
extern "C" __global__ void __launch_bounds__(256) pack(
    const u64 *sources, i64 head_stride, i64 heads, i64 tokens, i64 dims, i64 width_, i64 shift_, const int *meta,
    const i64 *places, u8 *arena) {
    if (meta && meta[blockIdx.y * META + MODE] == CODED) return;
    const Item *source = (const Item *)sources[blockIdx.y];
    u8 *out = arena + places[blockIdx.y];
    i64 count = heads * tokens * dims, run = tokens * dims;
    int width = (int)width_, shift = (int)shift_;
    u32 mask = (1u << width) - 1;
    if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = PACKED;
    for (i64 i = ((i64)blockIdx.x * 256 + threadIdx.x) * 8; i < count; i += (i64)gridDim.x * 2048) {
        i64 left = run - i % run, at = i / run * head_stride + run - left;
        u8 *to = out + 1 + i / 8 * width;
        u32 held = 0, bits = 0;
        for (int k = 0; k < 8 && i + k < count; k++) {
            held |= (source[at] >> shift & mask) << bits;
            for (bits += width; bits >= 8; bits -= 8, held >>= 8) *to++ = (u8)held;
            at++;
            if (--left == 0) left = run, at += head_stride - run;
        }
        if (bits) *to = (u8)held;
    }
}

// Unpacks streams [P], addresses divisible by 4, to targets [P], addresses of `count` elements without gaps. With merge, the
// other bits of the elements keep their values. faults [P] are set to 1 where a stream is not sound.
extern "C" __global__ void __launch_bounds__(256) unpack(
    const u64 *streams, const i64 *sizes, const u64 *targets, i64 count, i64 width, i64 shift, i64 merge, int *faults) {
    const u32 *words = (const u32 *)streams[blockIdx.y];
    const u8 *bytes = (const u8 *)words;
    Item *target = (Item *)targets[blockIdx.y];
    i64 last = (count * width + 7) / 8;
    u32 mask = (1u << width) - 1, used = (u32)(count * width) & 7;
    bool sound = sizes[blockIdx.y] == 1 + last && bytes[0] == PACKED;
    if (!sound || (used && bytes[last] >> used)) {
        if (blockIdx.x == 0 && threadIdx.x == 0) faults[blockIdx.y] = 1;
        return;
    }
    for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < count; i += (i64)gridDim.x * 256) {
        i64 bit = 8 + i * width;
        u32 code = __funnelshift_r(words[bit / 32], words[bit / 32 + 1], (u32)bit & 31) & mask;
        target[i] = (Item)(merge ? target[i] | code << shift : code << shift);
    }
}
