/* The sink of a mock: chunks are copied and checksummed, and nothing is opened, written or synced. */
#include "core/sink.h"

int fx_always_admit(struct fx_engine *engine, struct fx_error *error) {
    (void)engine, (void)error;
    return 0;
}

int fx_nowhere_open(struct fx_checkpoint *ck, struct fx_error *error) {
    (void)ck, (void)error;
    return 0;
}

static int store(struct writer *writer, struct fx_checkpoint *ck, uint32_t chunk, void *data, struct fx_error *error) {
    (void)data, (void)error;
    fx_span_add(ck->engine, FX_SPAN_WRITE, fx_track(writer), fx_now(), fx_chunk_span(ck, chunk));
    return 0;
}

int fx_nowhere_sync(struct writer *writer, struct fx_checkpoint *ck, struct ck_file *file, struct fx_error *error) {
    (void)writer, (void)ck, (void)file, (void)error;
    return 0;
}

void fx_nowhere_close(struct fx_checkpoint *ck) { (void)ck; }

static void nothing(struct fx_engine *engine) { (void)engine; }

const struct fx_sink_ops fx_nowhere = {
    .admit = fx_always_admit,
    .open = fx_nowhere_open,
    .store = store,
    .sync = fx_nowhere_sync,
    .close = fx_nowhere_close,
    .give = fx_staging_keep,
    .close_in_child = nothing,
    .end = nothing,
};
