/* Buffers that hold chunks between copy and write: made when first needed, recycled, never more than the limit. */
#include "core/sink.h"
#include "cuda/cuda.h"

bool fx_staging_has_room(const struct fx_engine *engine) {
    return engine->staging.n_free > engine->staging.reserve || engine->staging.n_made < engine->staging.limit;
}

void *fx_staging_take(struct fx_engine *engine) {
    struct staging *staging = &engine->staging;
    void *buffer = NULL;
    if (staging->n_free) {
        buffer = staging->free[--staging->n_free];
    } else if (staging->n_made < staging->limit) {
        buffer = fx_buffer_new(engine->options.chunk_bytes);
        if (buffer) staging->n_made++;
        else staging->limit = staging->n_made; /* no memory: make do with what there is */
    }
    if (!buffer) return NULL;
    staging->used_bytes += engine->options.chunk_bytes;
    if (staging->used_bytes > staging->peak_bytes) staging->peak_bytes = staging->used_bytes;
    return buffer;
}

void fx_staging_give(struct fx_engine *engine, void *buffer) { engine->sink->give(engine, buffer); }

void fx_staging_keep(struct fx_engine *engine, void *buffer) {
    engine->staging.free[engine->staging.n_free++] = buffer;
    engine->staging.used_bytes -= engine->options.chunk_bytes;
    fx_cuda_wake(engine); /* the copier may have waited for it */
}
