// Layer norm: what the launchers take. Matrices are seen as [batches, batch_rows, cols]; outputs
// are row-major [rows, cols].
#pragma once
#include "fastnorm.h"

namespace fastnorm {

// A matrix, strides in elements. Columns are adjacent (column is 1), or rows are.
struct Rows {
    const void* data;
    long batch, row, column;
};

// How a launch is cut; fastnorm/ops/layer_norm/cuda.py has the rule. Zero where a form has no use.
struct LayerNormPlan {
    bool ticket;              // rows cut into chunks of columns, else whole rows in registers
    long blocks;              // of the launch ...
    int block, shared_bytes;  // ... their threads and dynamic shared memory
    // whole rows
    int threads;  // of a row, a power of two
    int tile;     // rows of a block at a time
    long tiles;
    // chunks
    long chunk, chunks;  // columns of one, and how many a row has
    long lag;            // tiles from the first visit of a tile to the second
    bool by_columns;     // forward: tiles go through the rows first, then to the next chunk ...
    int group;           // backward: rows of a tile ...
    long groups;         // ... how many groups ...
    long span;           // ... and how many groups, or rows, a tile has when it is visited again
    bool streams;        // backward: each block keeps its chunk; span, group have no use
    // backward: the first blocks work, the others finish dweight and dbias
    // parts: rows of partial sums; streams, where there are some; 0: tiles that have all rows
    long workers, parts;
};

struct LayerNormForward {
    Array y;               // [rows, cols], dtype of x or another
    void* sum;             // [rows, cols], x + residual in the dtype of x, or null
    void* mean;            // [rows], wide
    void* rstd;            // [rows], wide
    Rows x;                // [rows, cols]
    Rows residual;         // [rows, cols], or null ...
    Dtype residual_dtype;  // ... of x's dtype, or half where x is fp32
    Array weight;          // [cols], or null
    Array bias;            // [cols], or null
    void* partials;        // chunks: [rows, chunks, 2], wide
    unsigned* counters;    // chunks: [2 + rows], zero before and after
    double eps;
    long rows, batch_rows, cols;
    Activation activation;
    LayerNormPlan plan;
};
cudaError_t layer_norm_forward(const LayerNormForward& a, Dtype dtype, cudaStream_t stream);

struct LayerNormBackward {
    void* dx;       // [rows, cols], or null
    Array dweight;  // [cols], or null
    Array dbias;    // [cols], or null
    Rows x;         // [rows, cols]
    Rows dy;        // [rows, cols], dtype of x, or fp32 where x is narrower
    Dtype dy_dtype;
    const void* dsum;  // [rows, cols], added to dx, or null
    Array weight;      // [cols], or null
    Array bias;        // [cols], or null
    const void* mean;  // [rows], wide
    const void* rstd;  // [rows], wide
    void* parts;       // [wanted of dweight and dbias, parts, cols], wide
    void* partials;    // chunks: [rows, chunks, 2], wide: of the sums of g and g * x_hat ...
    void* totals;      // chunks: [rows, 2], wide: ... and their means
    // [3], chunks: [3 + groups + parts * chunks], streams: [3 + rows]; zero before and after
    unsigned* counters;
    long rows, batch_rows, cols;
    Activation activation;
    LayerNormPlan plan;
};
cudaError_t layer_norm_backward(const LayerNormBackward& a, Dtype dtype, cudaStream_t stream);

}  // namespace fastnorm
