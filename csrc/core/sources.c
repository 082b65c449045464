/* Where one layer's tensors lie in memory: built once, emitted many times, shared by the checkpoints that
 * read it. */
#include "core/plan.h"

#include <stdlib.h>
#include <string.h>

struct fx_sources *fx_sources_new(const struct fx_view *views, uint32_t n) {
    size_t dims = 0;
    for (uint32_t i = 0; i < n; i++) dims += views[i].ndim > 0 ? (size_t)views[i].ndim : 0;
    struct fx_sources *sources = calloc(1, sizeof *sources + n * sizeof *views + 2 * dims * sizeof(int64_t));
    if (!sources) return NULL;
    sources->refs = 1;
    sources->n = n;
    int64_t *numbers = (int64_t *)(void *)&sources->views[n];
    for (uint32_t i = 0; i < n; i++) {
        struct fx_view *view = &sources->views[i];
        *view = views[i];
        if (view->device && view->device <= 64) sources->devices |= 1ull << (view->device - 1);
        if (view->ndim < 0) continue;
        size_t k = (size_t)view->ndim;
        view->sizes = numbers;
        view->strides = numbers + k;
        if (k) {
            memcpy(view->sizes, views[i].sizes, k * sizeof *numbers);
            memcpy(view->strides, views[i].strides, k * sizeof *numbers);
        }
        numbers += 2 * k;
        fx_view_normalise(view);
    }
    return sources;
}

void fx_sources_hold(struct fx_sources *sources) { atomic_fetch_add(&sources->refs, 1); }

void fx_sources_free(struct fx_sources *sources) {
    if (sources && atomic_fetch_sub(&sources->refs, 1) == 1) free(sources);
}

static bool view_fits(const struct fx_view *view, const struct plan_tensor *tensor) {
    if (view->ndim < 0) return true; /* contiguous: its size is the plan's */
    uint64_t items = 1;
    for (int32_t d = 0; d < view->ndim; d++) items *= (uint64_t)view->sizes[d];
    return items * tensor->itemsize == tensor->nbytes;
}

bool fx_sources_fit(struct fx_sources *sources, const struct fx_plan *plan, uint32_t layer) {
    const struct plan_layer *l = &plan->layers[layer];
    if (sources->n != l->n_tensors) return false;
    for (uint32_t i = 0; i < sources->n; i++)
        if (!view_fits(&sources->views[i], &plan->tensors[l->first_tensor + i])) return false;
    return true;
}
