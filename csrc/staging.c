/* Buffers: page-aligned, made when first needed, recycled, never more than the limit. */
#include "cuda.h"

#include <sys/mman.h>

/* Not inherited by forked children: they never touch it, and a fork would mark each page copy-on-write. */
void *fx_buffer_new(uint64_t nbytes) {
    void *buffer = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED) return NULL;
    madvise(buffer, nbytes, MADV_DONTFORK);
    madvise(buffer, nbytes, MADV_HUGEPAGE);
    return buffer;
}

void fx_buffer_free(void *buffer, uint64_t nbytes) {
    if (buffer) munmap(buffer, nbytes);
}

bool fx_staging_has_room(const struct fx_engine *engine) {
    return engine->staging.n_free > fx_relay_reserve(engine) || engine->staging.n_made < engine->staging.limit;
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

void fx_staging_give(struct fx_engine *engine, void *buffer) {
    if (fx_relay_returns(engine, buffer)) return;
    engine->staging.free[engine->staging.n_free++] = buffer;
    engine->staging.used_bytes -= engine->options.chunk_bytes;
    fx_cuda_wake(engine); /* the copier may have waited for it */
}
