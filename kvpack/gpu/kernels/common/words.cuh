// A group's words while a warp decodes it: a ring in shared memory, and the words behind it on their way.
// A ring has RING bytes, in two halves. It begins at a multiple of RING, so kernels that use it have no static shared memory.

struct Words {
    const u64 *next;      // what follows ahead
    u64 ahead;            // of the half behind those in the ring
    u64 *ring;
    u32 base, at, full;   // the ring's shared address; next word, end of the half that it is in, both in bytes
};

__device__ __forceinline__ Words open_words(const u16 *first, u64 *ring) {
    int l = threadIdx.x % 32;
    u64 address = (u64)first;
    const u64 *aligned = pin_register((const u64 *)(address & ~7ull) + l);
    ring[l] = aligned[0], ring[32 + l] = aligned[32];
    __syncwarp();
    return {aligned + 96, aligned[64], ring, pin_register(shared_address(ring)), (u32)(address & 7), RING / 2};
}

// To be called at least every four codes: fills the half of the ring that is used up, and asks for the one after.
__device__ __forceinline__ void refill(Words &words) {
    if (words.at < words.full) return;
    __syncwarp();
    words.ring[(words.full - RING / 2) % RING / 8 + threadIdx.x % 32] = words.ahead;
    words.ahead = *words.next;
    words.next += 32;
    words.full += RING / 2;
    __syncwarp();
}

// The next words for the lanes that are due, in their order: x with a word below it for those, x for the others.
__device__ __forceinline__ u32 take(Words &words, u32 x, bool due, u32 below) {
    u32 mask = __ballot_sync(ALL, due);
    u32 word = shared_half((words.at + 2 * __popc(mask & below)) & (RING - 1) | words.base);
    words.at += 2 * __popc(mask);
    return due ? x << 16 | word : x;
}
