/* Strided tensors to and from row-major bytes. */
#include "engine.h"

#include <stdbool.h>
#include <string.h>

void fx_view_normalise(struct fx_view *view) {
    int32_t kept = 0;
    for (int32_t d = 0; d < view->ndim; d++) {
        int64_t size = view->sizes[d], stride = view->strides[d];
        if (size == 1) continue;
        if (kept && view->strides[kept - 1] == stride * size) {
            view->sizes[kept - 1] *= size;
            view->strides[kept - 1] = stride;
            continue;
        }
        view->sizes[kept] = size;
        view->strides[kept++] = stride;
    }
    if (view->ndim >= 0) view->ndim = kept;
}

/* Copies `count` runs of `n` bytes between two strides; the usual item sizes become single moves. */
static void copy_runs(char *to, int64_t to_stride, const char *from, int64_t from_stride, uint64_t count,
                      uint64_t n) {
#define RUNS(size)                                                                                           \
    for (; count; count--, to += to_stride, from += from_stride) memcpy(to, from, size)
    switch (n) {
    case 1: RUNS(1); break;
    case 2: RUNS(2); break;
    case 4: RUNS(4); break;
    case 8: RUNS(8); break;
    case 16: RUNS(16); break;
    default: RUNS(n);
    }
#undef RUNS
}

/* One end of a copy is the packed buffer, the other the tensor at `offset` from its address. */
static void move(const struct fx_view *view, int64_t offset, int64_t stride, char *packed, uint64_t count,
                 uint64_t n, bool gather) {
    if (gather) copy_runs(packed, (int64_t)n, view->address + offset, stride, count, n);
    else copy_runs(view->address + offset, stride, packed, (int64_t)n, count, n);
}

/* A row-major walk over the runs of a view: index[] of the current one and its offset from the address. */
struct walk {
    int32_t ndim; /* without the innermost dimension, if that is contiguous and thus part of the run */
    uint64_t run; /* bytes that lie together */
    int64_t index[FX_MAX_DIMS];
    int64_t offset;
};

static void walk_start(struct walk *walk, const struct fx_view *view, uint64_t itemsize, uint64_t from) {
    walk->ndim = view->ndim;
    walk->run = itemsize;
    walk->offset = 0;
    if (walk->ndim > 0 && view->strides[walk->ndim - 1] == (int64_t)itemsize)
        walk->run *= (uint64_t)view->sizes[--walk->ndim];
    uint64_t at = from / walk->run;
    for (int32_t d = walk->ndim - 1; d >= 0; d--) {
        walk->index[d] = (int64_t)(at % (uint64_t)view->sizes[d]);
        at /= (uint64_t)view->sizes[d];
        walk->offset += walk->index[d] * view->strides[d];
    }
}

/* Steps `count` runs ahead, at most to the end of the innermost row. */
static void walk_ahead(struct walk *walk, const struct fx_view *view, int64_t count) {
    for (int32_t d = walk->ndim - 1; d >= 0; d--, count = 1) {
        walk->index[d] += count;
        walk->offset += count * view->strides[d];
        if (walk->index[d] < view->sizes[d]) return;
        walk->offset -= walk->index[d] * view->strides[d];
        walk->index[d] = 0;
    }
}

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

static void move_range(const struct fx_view *view, uint64_t itemsize, uint64_t from, uint64_t n, char *packed,
                       bool gather) {
    struct walk walk;
    walk_start(&walk, view, itemsize, from);
    uint64_t within = from % walk.run; /* a chunk's border may cut a run, even an item */
    while (n) {
        uint64_t count = 1, bytes = smaller(n, walk.run - within);
        int32_t last = walk.ndim - 1;
        if (last >= 0 && within == 0 && n >= walk.run)
            count = smaller(n / walk.run, (uint64_t)(view->sizes[last] - walk.index[last]));
        move(view, walk.offset + (int64_t)within, last >= 0 ? view->strides[last] : 0, packed, count, bytes,
             gather);
        packed += count * bytes;
        n -= count * bytes;
        within = 0;
        walk_ahead(&walk, view, (int64_t)count);
    }
}

void fx_view_gather(const struct fx_view *view, uint64_t itemsize, uint64_t from, uint64_t n, void *to) {
    if (view->ndim < 0) memcpy(to, view->address + from, n);
    else move_range(view, itemsize, from, n, to, true);
}

void fx_view_scatter(const struct fx_view *view, uint64_t itemsize, uint64_t from, uint64_t n,
                     const void *in) {
    if (view->ndim < 0) memcpy(view->address + from, in, n);
    else move_range(view, itemsize, from, n, (char *)(uintptr_t)in, false);
}
