/* Spans of time for a picture of what the engine did: recorded while somebody asks for it, else nothing. */
#include "core/internal.h"

#include <errno.h>
#include <stdlib.h>

struct trace {
    pthread_mutex_t lock;
    atomic_bool on;
    uint32_t capacity, n;
    uint64_t dropped;
    struct fx_span *spans;
};

int fx_trace_new(struct fx_engine *engine) {
    struct trace *trace = calloc(1, sizeof *trace);
    if (!trace || pthread_mutex_init(&trace->lock, NULL)) {
        free(trace);
        return -ENOMEM;
    }
    engine->trace = trace;
    return 0;
}

void fx_trace_free(struct fx_engine *engine) {
    if (!engine->trace) return;
    free(engine->trace->spans);
    pthread_mutex_destroy(&engine->trace->lock);
    free(engine->trace);
}

int fx_trace(struct fx_engine *engine, uint32_t capacity) {
    struct trace *trace = engine->trace;
    struct fx_span *spans = capacity ? calloc(capacity, sizeof *spans) : NULL;
    if (capacity && !spans) return -ENOMEM;
    pthread_mutex_lock(&trace->lock);
    free(trace->spans);
    trace->spans = spans;
    trace->capacity = capacity;
    trace->n = 0;
    trace->dropped = 0;
    trace->on = capacity > 0;
    pthread_mutex_unlock(&trace->lock);
    return 0;
}

uint32_t fx_trace_take(struct fx_engine *engine, struct fx_span *out, uint32_t n, uint64_t *dropped) {
    struct trace *trace = engine->trace;
    pthread_mutex_lock(&trace->lock);
    uint32_t taken = trace->n < n ? trace->n : n;
    for (uint32_t i = 0; i < taken; i++) out[i] = trace->spans[i];
    for (uint32_t i = taken; i < trace->n; i++) trace->spans[i - taken] = trace->spans[i];
    trace->n -= taken;
    *dropped = trace->dropped;
    pthread_mutex_unlock(&trace->lock);
    return taken;
}

void fx_span_add(struct fx_engine *engine, enum fx_span_kind kind, uint32_t track, int64_t begin_ns, struct fx_span span) {
    struct trace *trace = engine->trace;
    if (!atomic_load_explicit(&trace->on, memory_order_relaxed)) return;
    span.kind = kind;
    span.track = track;
    span.begin_ns = begin_ns;
    span.end_ns = fx_now();
    pthread_mutex_lock(&trace->lock);
    if (trace->n < trace->capacity) trace->spans[trace->n++] = span;
    else trace->dropped++;
    pthread_mutex_unlock(&trace->lock);
}

/* Its layer is the first that has a piece of the chunk; -1: only the header or zeros. */
struct fx_span fx_chunk_span(const struct fx_checkpoint *ck, uint32_t index) {
    const struct chunk *chunk = &ck->plan->chunks[index];
    return (struct fx_span){
        .checkpoint = ck->id,
        .layer = chunk->n_pieces ? (int64_t)ck->plan->pieces[chunk->first_piece].layer : -1,
        .chunk = index,
        .nbytes = chunk->nbytes,
    };
}

uint32_t fx_track(const struct writer *writer) { return (uint32_t)(writer - writer->engine->writers); }
