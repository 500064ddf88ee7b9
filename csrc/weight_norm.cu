// Weight norm: how blocks are cut from the layers, and the launchers. weight_norm_kernel.cuh has
// the kernel.
#include "weight_norm_kernel.cuh"

namespace fastnorm {
namespace weight_norm_kernels {
namespace {

// A channel whose elements are in runs of this many is a block's own where A > 1.
constexpr long kLongRun = 64;

long ceil_divide(long a, long b) {
    return (a + b - 1) / b;
}

short lanes_for(long elements, long of_each, int most) {
    int lanes = 1;
    while (lanes < most && lanes * of_each < elements) lanes *= 2;
    return short(lanes);
}

int vector_size(Dtype dtype) {
    return dtype == Dtype::float64 ? 2 : dtype == Dtype::float32 ? 4 : 8;
}

bool on_boundary(const void* p) {
    return misalignment(static_cast<const char*>(p)) == 0;
}

// A = 1: the fewest lanes that hold a channel, but enough to read adjacent bytes.
void cut_flat(Cut& c, const WeightNormSizes& s, long held) {
    const short most = lanes_for(s.B, held, kThreads);
    const short least = lanes_for(s.B, c.aligned ? kUnit : 1, 8);
    c.form = Form::flat;
    c.lanes = most > least ? most : least;
    c.group = short(kThreads / c.lanes);
    c.tiles = ceil_divide(s.B, c.lanes * held);
}

void cut_single(Cut& c, const WeightNormSizes& s, long held) {
    const int run = c.aligned ? kUnit : 1;
    c.form = Form::single;
    c.group = 1;
    c.lanes = lanes_for(s.B, run, kThreads);
    c.column_tiles = int(ceil_divide(s.B, long(c.lanes) * run));
    c.tiles = ceil_divide(s.A, kThreads / c.lanes * (held / run)) * c.column_tiles;
}

// As many channels as make kColumns columns, and whole vectors of them.
void cut_columns(Cut& c, const WeightNormSizes& s, long held, int vector) {
    long step = 1;
    while (c.aligned && step * s.B % vector != 0) step *= 2;
    const long most = kColumns / (s.B * step);
    const long group = step * (most > 1 ? most : 1);
    const int run = c.aligned ? kUnit : 1;
    c.form = Form::columns;
    c.group = short(group < s.K ? group : s.K);
    c.lanes = lanes_for(c.group * s.B, run, kThreads);
    c.tiles = ceil_divide(s.A, kThreads / c.lanes * (held / run));
}

// The sizes, and how blocks are cut from them. Every group of channels in as many parts as hold it
// in registers, but no more than half of the multiprocessors: a part waits for the others, and
// several such launches may run at once, each multiprocessor having room for two blocks at least.
Cut cut_of(WeightNormSizes& s, bool aligned, int processors) {
    if (s.K == 1) s.B *= s.A, s.A = 1;
    const long held = wide_is_double(s) ? kHeld<double> : kHeld<float>;
    const int w = vector_size(s.w), v = vector_size(s.v), vector = w > v ? w : v;
    const bool columns = s.A > 1 && s.B < kLongRun;
    Cut c = {};
    c.aligned = aligned && (columns ? s.K * s.B : s.B) % vector == 0;
    c.column_tiles = 1;
    if (columns) {
        cut_columns(c, s, held, vector);
    } else if (s.A == 1) {
        cut_flat(c, s, held);
    } else {
        cut_single(c, s, held);
    }
    const long most = processors > 4 ? processors / 2 : 2;
    c.tiles_of_part = int(ceil_divide(c.tiles, c.tiles < most ? c.tiles : most));
    c.parts = int(ceil_divide(c.tiles, c.tiles_of_part));
    return c;
}

long groups_of(const WeightNormSizes& s, const Cut& c) {
    return ceil_divide(s.K, c.group);
}

// Takes workspace for a layer's parts, if it has some.
void reserve(const WeightNormSizes& s, Cut& c, WeightNormWorkspace& used) {
    if (c.parts == 1) return;
    if (used.counters == 0) used.counters = 1;  // which numbers the blocks
    c.partial = used.partials, c.counter = int(used.counters);
    used.partials += groups_of(s, c) * c.parts * c.group;
    used.counters += groups_of(s, c);
}

bool takes_large_parameters() {
    static const bool takes = [] {
        int driver = 0;
        return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
    }();
    return takes && kMany > kFew;
}

template <class Pass>
cudaError_t launch_all(const WeightNorm& a, cudaStream_t stream) {
    constexpr bool kForward = std::is_same_v<Pass, Forward>;
    for (int next = 0; next < a.count;) {
        if (a.count - next <= kFew || !takes_large_parameters()) {
            FASTNORM_TRY((launch_table<Pass, float, kFew>(a, next, stream)));
        } else if constexpr (kForward) {
            FASTNORM_TRY(launch_many_forward(a, next, stream));
        } else {
            FASTNORM_TRY(launch_many_backward(a, next, stream));
        }
    }
    for (int next = 0; next < a.count;)
        FASTNORM_TRY((launch_table<Pass, double, kFew>(a, next, stream)));
    return cudaSuccess;
}

}  // namespace

bool enter(Entry& entry, const WeightNormLayer& layer, int processors, Filling& filling) {
    entry.layer = layer;
    const bool aligned = on_boundary(layer.out) && on_boundary(layer.v) && on_boundary(layer.dw);
    WeightNormSizes& sizes = entry.layer.sizes;
    entry.cut = cut_of(sizes, aligned, processors);
    const long blocks = groups_of(sizes, entry.cut) * entry.cut.parts;
    if (filling.blocks + blocks > std::numeric_limits<int>::max()) return false;
    entry.cut.first = int(filling.blocks);
    filling.blocks += blocks;
    reserve(sizes, entry.cut, filling.used);
    return true;
}

}  // namespace weight_norm_kernels

// ---- launchers ----------------------------------------------------------------------------------

WeightNormWorkspace weight_norm_workspace(const WeightNormSizes* sizes, int count, int processors) {
    using namespace weight_norm_kernels;
    WeightNormWorkspace all = {0, 0};
    for (int i = 0; i < count; ++i) {
        const WeightNormWorkspace before = all;
        for (const bool aligned : {false, true}) {  // as its addresses will turn out
            WeightNormWorkspace used = before;
            WeightNormSizes s = sizes[i];
            Cut cut = cut_of(s, aligned, processors);
            reserve(s, cut, used);
            if (used.partials > all.partials) all.partials = used.partials;
            if (used.counters > all.counters) all.counters = used.counters;
        }
    }
    return all;
}

cudaError_t weight_norm_forward(const WeightNorm& a, cudaStream_t stream) {
    return weight_norm_kernels::launch_all<weight_norm_kernels::Forward>(a, stream);
}

cudaError_t weight_norm_backward(const WeightNorm& a, cudaStream_t stream) {
    return weight_norm_kernels::launch_all<weight_norm_kernels::Backward>(a, stream);
}

}  // namespace fastnorm
