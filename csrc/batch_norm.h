// Batch norm and mean-only batch norm: how a tensor is cut, and what the launchers take.
#pragma once
#include "fastnorm.h"

namespace fastnorm {

// How a block's work on a group of channels is ordered. A group's statistics must be complete
// before the first of its elements is normalised; a tile is one block's share of a group.
//   pass    one pass: nothing depends on the group's sums
//   owner   one block has the whole group: nobody to wait for
//   hold    tiles stay in shared memory until all blocks of the group have reduced theirs
//   ticket  tickets hand out tiles to reduce and, some way behind, tiles to apply, read from L2
//   stream  as hold, but only the last part of each tile fits: the rest is read again, reversed
#define FASTNORM_BATCH_NORM_FORMS(X) X(pass) X(owner) X(hold) X(ticket) X(stream)

enum class BatchNormForm : int {
#define FASTNORM_BATCH_NORM_FORM(name) name,
    FASTNORM_BATCH_NORM_FORMS(FASTNORM_BATCH_NORM_FORM)
#undef FASTNORM_BATCH_NORM_FORM
};

// i / divisor without a division for 0 <= i < 2^31.
struct Divisor {
    unsigned divisor, magic, shift;
};

// A tensor as the kernels see it.
struct BatchNormShape {
    long N, C, S;                             // of x, y, dy, ... alike
    long x_stride_n, x_stride_c, x_stride_s;  // x alone has strides of its own
    long y_stride_n, y_stride_c, y_stride_s;  // of all others: [N, C, S] or [N, S, C], dense
};

// How the tensor is cut. A slot is 16 bytes of adjacent elements; a batch is a fixed number of
// slots for every thread of a block, copied to shared memory together.
struct BatchNormPlan {
    BatchNormShape shape;
    bool last;           // slots lie along channels, else along positions
    bool transposed;     // slots lie along positions of y, but x has its channels adjacent
    bool ragged;         // a row is not a whole number of slots
    bool skewed;         // slots begin on 16 bytes of y, not at the beginning of a row
    bool dense;          // x lies as y does
    bool quick;          // 32 bits count elements, and every slot begins on 16 bytes of each tensor
    int lanes;           // adjacent threads on adjacent positions of one column
    int columns;         // of slots: channels, or vectors of channels; lanes * columns <= threads
    int threads;         // of a column
    int channels;        // of a group
    unsigned positions;  // slots of one column
    int pitch, pad;      // of a row of slots in shared memory: threads + (threads >> pad)
    int operands;        // tensors that a tile is read from before its group's sums are known
    unsigned buffers;    // for batches of these in shared memory
    long elements;       // of y
    Divisor row;         // positions of one n
    BatchNormForm form;
    unsigned groups;
    unsigned members;  // blocks, or pairs of blocks, that share a group: its tiles
    unsigned total;    // batches of a group
    unsigned batches;  // of a tile
    unsigned held;     // batches of a tile that stay in shared memory
    unsigned lag;      // tiles by which applying stays behind reducing, beyond a group
    bool hints;        // L2 is told what is read again, and what is not
    // how members tell each other what they found: see Exchange
    unsigned fan, branches;  // members of a branch, branches of a group; no branches: 0
    unsigned partial_rows;   // of channels: of members, of branches, the result
    unsigned arrivals;       // counters of a group
    // for the launcher and for Python
    bool ordered;  // blocks talk through counters
    unsigned blocks;
    long tiles_bytes, table_bytes, shared_bytes;
    long partials;  // wide elements
    long counters;  // ticket, finished blocks, those of each group
};

// What the plan depends on beside the shape.
struct BatchNormRequest {
    Dtype dtype;
    Activation activation;
    bool y_last;  // all tensors but x are [N, S, C], else [N, C, S]
    bool backward;
    bool one_pass;  // nothing depends on the group's sums
    int operands;   // tensors of x's size that are read before the group's sums are known
    int extras;     // and that are read afterwards only
    // what the closed rule chooses where it is -1
    int form;     // a BatchNormForm
    int batches;  // of a tile
    int columns;  // of a group
    int blocks;   // of a multiprocessor, that shared memory is given out for
    int lag;      // in hundredths of the resident blocks
    int hints;    // as of the plan
};
cudaError_t batch_norm_plan(const BatchNormShape& shape, const BatchNormRequest& request,
                            BatchNormPlan* plan);

// Statistics that a batch moves towards its own, and by how much.
struct BatchNormRunning {
    Array mean, var;  // [C], each may be null
    long* num_batches_tracked;
    double momentum;
    bool cumulative;  // momentum=None: 1 / num_batches_tracked
};

struct BatchNormForward {
    void* y;      // x's shape; null for the local statistics of synchronised batch norm
    void* mean;   // [C], wide; null in mean-only
    void* rstd;   // [C], wide; the sum of squared deviations where y is null
    void* count;  // [], wide; values per channel, where y is null
    BatchNormRunning running;
    const void *x, *residual;
    Array weight, bias;  // [C]
    void* partials;      // [groups, partial_rows, channels] moments
    unsigned* counters;  // zero before and after
    double eps;
    Activation activation;
    bool batch_stats;
    bool center_only;  // mean-only
    BatchNormPlan plan;
};
cudaError_t batch_norm_forward(const BatchNormForward& given, Dtype dtype, cudaStream_t stream);

// The statistics of all processes as one.
struct BatchNormMerge {
    void *mean, *var;  // [C]; var is biased
    void* count;       // []
    BatchNormRunning running;
    const void* gathered;  // [ranks, 2 * C + 1]: mean, sum of squared deviations, count
    unsigned* counters;    // [2], zero before and after
    long ranks, C;
};
cudaError_t batch_norm_merge(const BatchNormMerge& a, Dtype dtype, cudaStream_t stream);

struct BatchNormBackward {
    void *dx, *dresidual;  // x's shape, or null
    Array dweight, dbias;  // [C], or null
    const void *x, *dy;
    const void* kept;          // the residual, y or null
    bool keeps_output;         // y: the activation has the same slope there as before it
    Array weight, bias;        // [C]
    const void *mean, *rstd;   // [C], wide
    const void *sums, *count;  // [2, C] and [], wide: given sums (synchronised), or null
    void* partials;            // [groups, partial_rows, channels] pairs of sums
    unsigned* counters;        // zero before and after
    Activation activation;
    bool center_only;  // mean-only: x, mean and rstd are null
    BatchNormPlan plan;
};
cudaError_t batch_norm_backward(const BatchNormBackward& given, Dtype dtype, cudaStream_t stream);

// For the plan: how many blocks of such a kernel the current device holds at once.
cudaError_t batch_norm_forward_resident(const BatchNormPlan& plan, const BatchNormRequest& request,
                                        int* blocks);
cudaError_t batch_norm_backward_resident(const BatchNormPlan& plan, const BatchNormRequest& request,
                                         int* blocks);

}  // namespace fastnorm
