// How batch norm's kernels cut a tensor and which form they take: one closed rule, here alone.
// Nothing depends on more than shape, strides, dtype and the size of the device.
#include <algorithm>

#include "batch_norm_tiles.cuh"

namespace fastnorm {
namespace {

using namespace batch_norm;

constexpr long kRun = 1024;           // bytes of adjacent memory worth a read of their own
constexpr long kLine = 128;           // bytes of channels, where these are adjacent
constexpr int kWidest = 128;          // channels, where as many as memory likes are adjacent
constexpr long kMerge = 8 << 10;      // bytes of partial results that every block may read
constexpr long kInFlight = 13 << 20;  // of L2, taken by tiles between their two reads
constexpr int kLag = 25;              // of a ticket, in hundredths of the resident blocks

long divide_up(long a, long b) {
    return (a + b - 1) / b;
}

int power_of_two(long n, int most) {  // at least n
    int p = 1;
    while (p < n && p < most) p *= 2;
    return p;
}

int log2(int n) {
    int k = 0;
    while ((1 << k) < n) ++k;
    return k;
}

Divisor divisor(unsigned d) {
    unsigned shift = 0;
    while (d > 1u << shift) ++shift;
    return {d, unsigned((((1ull << shift) - d) << 32) / d + 1), shift};
}

struct Device {
    int processors, shared_each, shared_block, l2;
};

cudaError_t current_device(Device* d) {
    int device = 0;
    FASTNORM_TRY(cudaGetDevice(&device));
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
        return cudaDeviceGetAttribute(value, attribute, device);
    };
    FASTNORM_TRY(ask(&d->processors, cudaDevAttrMultiProcessorCount));
    FASTNORM_TRY(ask(&d->shared_each, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
    FASTNORM_TRY(ask(&d->shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin));
    return ask(&d->l2, cudaDevAttrL2CacheSize);
}

// A plan in the making.
struct Planner {
    const BatchNormRequest& request;
    const Device& device;
    BatchNormPlan& p;
    int size, vector, wide;  // bytes, elements of 16 bytes, bytes

    // Blocks of a multiprocessor, as registers allow.
    int share() const { return request.blocks > 0 ? request.blocks : blocks_for(p.last, size); }
    int few() const { return std::min(share(), 2); }
    int slots() const { return request.backward ? kBackwardSlots : kForwardSlots; }
    long batch_bytes() const { return long(p.pitch) * slots() * 16; }  // of one operand
    long tensor() const { return long(p.total) * p.groups; }           // in batches

    // Whether 32 bits count the elements of x and y and, where the tensors themselves begin on 16
    // bytes, all their slots do.
    bool is_quick(const BatchNormShape& s) const {
        const auto whole = [&](long stride, long size) {
            return size == 1 || stride % vector == 0;
        };
        const long x_last =
            (s.N - 1) * s.x_stride_n + (s.C - 1) * s.x_stride_c + (s.S - 1) * s.x_stride_s;
        if (p.transposed || p.elements >= 1l << 31 || x_last >= 1l << 31) return false;
        if (p.last)
            return s.C % vector == 0 && whole(s.x_stride_n, s.N) && whole(s.x_stride_s, s.S);
        return p.ragged ? p.dense : whole(s.x_stride_n, s.N) && whole(s.x_stride_c, s.C);
    }

    // What does not depend on how many channels make a group.
    cudaError_t lay_out(const BatchNormShape& shape) {
        const bool x_last =
            shape.C > 1 && shape.x_stride_c == 1 && (shape.x_stride_s != 1 || shape.S == 1);
        p.shape = shape;
        p.last = x_last && request.y_last;
        p.transposed = x_last && !p.last;
        p.ragged = !p.last && shape.S % vector != 0;
        p.skewed = p.ragged && !p.transposed;
        // one position is the same in both layouts of y
        p.shape.y_stride_n = shape.C * shape.S;
        p.shape.y_stride_c = p.last ? 1 : shape.S;
        p.shape.y_stride_s = p.last ? shape.C : 1;
        p.dense = (shape.N == 1 || shape.x_stride_n == p.shape.y_stride_n) &&
                  (shape.C == 1 || shape.x_stride_c == p.shape.y_stride_c) &&
                  (shape.S == 1 || shape.x_stride_s == p.shape.y_stride_s);
        p.operands = request.operands;
        p.elements = shape.N * shape.C * shape.S;
        p.quick = is_quick(shape);
        p.hints = request.hints != 0;
        long row = p.last ? shape.S : divide_up(shape.S, vector);
        if (p.skewed) row = (shape.S + 2 * vector - 3) / vector + 1;
        if (shape.N * row >= 1l << 31) return cudaErrorInvalidValue;
        p.row = divisor(unsigned(row));
        p.positions = unsigned(shape.N * row);
        return cudaSuccess;
    }

    void cut(int columns) {
        p.columns = columns;
        p.lanes = power_of_two(p.last ? 1 : p.row.divisor, kWarp);
        while (p.lanes * columns > kThreads) p.lanes /= 2;
        p.threads = kThreads / columns;
        p.channels = columns * (p.last ? vector : 1);
        p.pad = p.transposed ? log2(vector * p.lanes) : 31;
        p.pitch = kThreads + (p.transposed ? kThreads >> p.pad : 0);
        p.groups = unsigned(divide_up(p.shape.C, p.channels));
        p.total = unsigned(divide_up(p.positions, long(slots()) * p.threads));
    }

    // The fewest columns of a group that read memory well.
    int columns() const {
        if (request.columns > 0) return request.columns;
        const long lines = p.last ? divide_up(p.shape.C, vector) : p.shape.C;
        if (p.last) return power_of_two(lines, int(kLine / 16));
        if (p.transposed) {
            const int most = int(kLine / size), fewest = power_of_two(lines, most);
            return fewest < vector ? vector : fewest;
        }
        return power_of_two(divide_up(kRun, p.shape.S * size), power_of_two(lines, 64));
    }

    long table_bytes() const {
        const int owned = p.lanes * p.columns, span = owned < kWarp ? kWarp : owned;
        const long rows = kThreads / span > 1 ? kThreads / span : 1;
        const long block = rows * p.channels, members = kThreads;
        return (block > members ? block : members) * (request.backward ? 2 : 3) * wide;
    }

    // The memory of a block whose tiles hold so many batches beside those that pass through.
    void take_memory(unsigned held, bool staged) {
        p.held = held;
        p.buffers = (held + (staged ? kStages : 0)) * p.operands;
        p.tiles_bytes = (p.buffers + (request.extras ? kStages : 0)) * batch_bytes();
        p.table_bytes = table_bytes();
        p.shared_bytes =
            p.tiles_bytes + p.table_bytes +
            (request.backward ? kBackwardValues : kForwardValues) * long(p.channels) * wide;
    }

    // How many batches a tile can hold where so many blocks share a multiprocessor.
    unsigned most_held(int blocks, bool staged) {
        take_memory(0, staged);
        long room = device.shared_each / blocks - 1024;
        if (room > device.shared_block) room = device.shared_block;
        const long held = (room - p.shared_bytes) / (p.operands * batch_bytes());
        return held > 1 ? unsigned(held) : 1;
    }

    cudaError_t resident(int* blocks) const {
        return request.backward ? batch_norm_backward_resident(p, request, blocks)
                                : batch_norm_forward_resident(p, request, blocks);
    }

    // How many of the resident blocks may wait for each other: half of every multiprocessor's, so
    // that two such launches of any sizes, on two streams, cannot take each other's place for ever.
    unsigned most_waiting(int blocks) const {
        return unsigned(blocks / device.processors / 2 * device.processors);
    }

    void split(unsigned batches) {
        p.batches = batches < 1 ? 1 : batches < p.total ? batches : p.total;
        p.members = unsigned(divide_up(p.total, p.batches));
    }

    // Batches of a tile, of which every multiprocessor is to have some; no more than `most`.
    unsigned spread(long most, int blocks) const {
        const long each = tensor() / (long(device.processors) * blocks);
        return unsigned(each < 1 ? 1 : each < most ? each : most);
    }

    bool forced() const { return request.form >= 0; }
    bool possible() const {
        const int n = request.columns;
        return n <= 0 || ((n & (n - 1)) == 0 && n * (p.last ? vector : 1) <= kWidest &&
                          (!p.transposed || (n >= vector && n <= kLine / size)));
    }
    bool takes(BatchNormForm form, unsigned batches) {
        p.form = form;
        split(request.batches > 0 ? unsigned(request.batches) : batches);
        return !forced() || request.form == int(form);
    }

    cudaError_t pass();
    cudaError_t choose();
    cudaError_t stream();
    cudaError_t finish();
};

cudaError_t Planner::pass() {
    const int widest = power_of_two(divide_up(p.shape.C, vector), kWidest / vector);
    cut(p.last && request.columns <= 0 ? widest : columns());
    if (!takes(BatchNormForm::pass, spread(4, 8))) return cudaErrorInvalidValue;
    take_memory(0, true);
    return finish();
}

// Takes the first form that fits, from the one that waits for nobody to the one that always can.
cudaError_t Planner::choose() {
    if (!possible()) return cudaErrorInvalidValue;
    if (request.one_pass) return pass();
    cut(columns());
    // small planes: fewer channels where they would leave multiprocessors idle
    while (request.columns <= 0 && !p.last && !p.transposed && p.columns > 1 &&
           p.groups < unsigned(device.processors))
        cut(p.columns / 2);

    // owner: a group is one tile, or the tensor one wave of blocks
    const unsigned tile = most_held(share(), false), half = most_held(few(), false);
    const bool one_wave = tensor() <= long(few()) * half * device.processors;
    const bool busy = 4l * p.groups >= device.processors || p.total <= 2;
    if (takes(BatchNormForm::owner, p.total) &&
        (forced() || (busy && p.total <= (one_wave ? half : tile)))) {
        split(p.total);
        const unsigned held = p.total <= half ? p.total : most_held(few(), true);
        take_memory(held, p.total > held);
        return finish();
    }

    // hold: few enough blocks wait for each other; if need be of fewer and larger tiles
    int blocks = 0;
    for (const int each : {share(), few()}) {
        const unsigned most = each == few() ? half : tile;
        if (!takes(BatchNormForm::hold, spread(most, each)) || p.batches > most) continue;
        take_memory(p.batches, false);
        FASTNORM_TRY(resident(&blocks));
        if (p.members == 1 || p.members <= most_waiting(blocks)) return finish();
        // fewer and larger tiles
        const long needed = divide_up(p.total, std::max(most_waiting(blocks), 1u));
        if (request.batches > 0 || needed > most) continue;
        split(unsigned(needed));
        take_memory(p.batches, false);
        FASTNORM_TRY(resident(&blocks));
        if (p.members <= most_waiting(blocks)) return finish();
    }
    if (request.form == int(BatchNormForm::hold)) return cudaErrorCooperativeLaunchTooLarge;

    // ticket: the second read finds the group in L2
    const long bytes = long(p.total) * batch_bytes() * p.operands;
    if (takes(BatchNormForm::ticket, 1) &&
        (forced() || bytes <= long(device.l2) / 8 * 5 - kInFlight)) {
        take_memory(0, true);
        FASTNORM_TRY(resident(&blocks));
        p.lag = unsigned(blocks * (request.lag >= 0 ? request.lag : kLag) / 100);
        return finish();
    }
    return stream();
}

// The chip has no room for a group: lines of channels may be as long as memory likes.
cudaError_t Planner::stream() {
    if (p.last && !forced() && request.columns <= 0)
        cut(power_of_two(divide_up(p.shape.C, vector), kWidest / vector));
    // at most half of the resident blocks share a group: the other half wants one too
    while (p.last && !forced() && request.columns <= 0 && p.columns > 1 && p.groups < 2)
        cut(p.columns / 2);
    take_memory(most_held(share(), true), true);
    int blocks = 0;
    FASTNORM_TRY(resident(&blocks));
    const long most = most_waiting(blocks) > 1 ? most_waiting(blocks) : 1;
    if (!takes(BatchNormForm::stream, unsigned(divide_up(p.total, most))))
        return forced() ? cudaErrorInvalidValue : cudaErrorCooperativeLaunchTooLarge;
    return p.members <= most ? finish() : cudaErrorCooperativeLaunchTooLarge;
}

cudaError_t Planner::finish() {
    const long blocks = long(p.groups) * p.members * (p.form == BatchNormForm::ticket ? 2 : 1);
    if (blocks >= 1l << 31 || p.shared_bytes > device.shared_block) return cudaErrorInvalidValue;
    p.blocks = unsigned(blocks);
    const bool shares = p.members > 1 || p.form == BatchNormForm::ticket;
    const long partial = request.backward ? 2 : 3;
    if (p.form != BatchNormForm::pass && p.members * p.channels * partial * wide > kMerge) {
        while (p.fan * p.fan < p.members) ++p.fan;
        p.branches = (p.members + p.fan - 1) / p.fan;
    }
    p.partial_rows = p.members + p.branches + (p.branches > 0);
    p.arrivals = p.branches > 0 ? 2 + p.branches : 1;
    p.partials = shares ? long(p.groups) * p.partial_rows * p.channels * partial : 0;
    p.ordered = shares || p.form == BatchNormForm::hold || p.form == BatchNormForm::stream;
    p.counters = kArrivals + (p.ordered ? long(p.groups) * p.arrivals : 0);
    return cudaSuccess;
}

}  // namespace

cudaError_t batch_norm_plan(const BatchNormShape& shape, const BatchNormRequest& request,
                            BatchNormPlan* plan) {
    Device device = {};
    FASTNORM_TRY(current_device(&device));
    *plan = {};
    const int size = request.dtype == Dtype::float64 ? 8 : request.dtype == Dtype::float32 ? 4 : 2;
    Planner planner = {request, device, *plan, size, 16 / size, size == 8 ? 8 : 4};
    FASTNORM_TRY(planner.lay_out(shape));
    return planner.choose();
}

}  // namespace fastnorm
