/* Keeps copies in order with the streams that train. See Note [the order of events].
 *
 * Note [the order of events]:
 *
 *     training stream   ..update L] (ready)                        [wait copied] [next update of L..
 *     copy stream                      [wait ready] [copy] (copied)
 *     host              emit: record ready            fence: wait until issued, then let the stream wait
 *     copier thread                    issues, in the order of the emits
 *     reaper thread                                          waits for (copied); the chunk is then a writer's
 *
 * 1. `ready` is recorded on the stream that the caller trains on: copies read nothing older.
 * 2. The copy stream waits for it before the layer's first copy.
 * 3. `copied` is recorded behind each piece's copies.
 * 4. A fence waits on the host until every piece of the layer was issued (before that there is no event to wait
 *    for), then lets the training stream wait for the newest `copied`. A stream runs in order, so it covers all.
 * 5. A chunk goes to a writer, and a piece counts as done, only after a host wait for its `copied`.
 * 6. An event goes back to the pool when nobody means its last record any more: counted in `refs`.
 *
 * The calls of the driver are made without the engine's lock: any of them may wait for the device's queue.
 */
#include "cuda/device.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#ifdef FX_MUTATIONS
int fx_mutation;
#endif

/* ---- calls of the driver ---- */

bool fx_cuda_tried(struct failure *failure, const char *call, CUresult result) {
    if (result && !failure->result) *failure = (struct failure){call, result};
    return !result;
}

int fx_cuda_explain(struct device *device, struct failure failure, struct fx_error *error) {
    return fx_driver_error(&device->engine->cuda->driver, failure.call, failure.result, error);
}

CUstreamCaptureMode fx_cuda_relax(const struct fx_driver *driver) {
    CUstreamCaptureMode mode = FX_CU_CAPTURE_RELAXED;
    if (FX_KEEPS(CALLERS_MODE)) driver->ThreadExchangeStreamCaptureMode(&mode);
    return mode;
}

void fx_cuda_unrelax(const struct fx_driver *driver, CUstreamCaptureMode before) {
    if (FX_KEEPS(CALLERS_MODE) && FX_KEEPS(MODE_NOT_GIVEN_BACK)) driver->ThreadExchangeStreamCaptureMode(&before);
}

bool fx_cuda_enter(struct device *device, CUstreamCaptureMode *before, struct failure *failure) {
    const struct fx_driver *driver = &device->engine->cuda->driver;
    *before = fx_cuda_relax(driver);
    if (fx_cuda_tried(failure, "cuCtxPushCurrent", driver->CtxPushCurrent(device->context))) return true;
    fx_cuda_unrelax(driver, *before);
    return false;
}

void fx_cuda_leave(struct device *device, CUstreamCaptureMode before) {
    const struct fx_driver *driver = &device->engine->cuda->driver;
    CUcontext context;
    driver->CtxPopCurrent(&context);
    fx_cuda_unrelax(driver, before);
}

static bool is_stopping(struct device *device) {
    fx_lock(device->engine);
    bool stopping = device->engine->cuda->stopping;
    fx_unlock(device->engine);
    return stopping;
}

/* A capture that makes the driver refuse a wait ends some time; meanwhile what we wait for may still be running. */
CUresult fx_cuda_await(struct device *device, CUevent event) {
    const struct fx_driver *driver = &device->engine->cuda->driver;
    for (;;) {
        CUresult r = event ? driver->EventSynchronize(event) : driver->StreamSynchronize(device->stream);
        bool captured = (int)r >= FX_CU_ERROR_CAPTURE_FIRST && (int)r <= FX_CU_ERROR_CAPTURE_LAST;
        if (!captured || !FX_KEEPS(LOST_BY_CAPTURE) || is_stopping(device)) return r;
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
}

/* ---- a device that is gone ---- */

/* The first reason stays. */
static void lose(struct device *device, struct failure failure) {
    struct fx_error why;
    fx_cuda_explain(device, failure, &why);
    fx_lock(device->engine);
    if (!device->lost) device->why = why;
    device->lost = true;
    fx_unlock(device->engine);
}

bool fx_cuda_drain(struct device *device) {
    struct failure failure = {0};
    if (fx_cuda_tried(&failure, "cuStreamSynchronize", fx_cuda_await(device, NULL))) return true;
    lose(device, failure);
    return false;
}

bool fx_cuda_is_lost(struct device *device, struct fx_error *error) {
    fx_lock(device->engine);
    bool lost = device->lost;
    if (lost) *error = device->why;
    fx_unlock(device->engine);
    return lost;
}

/* ---- events ---- */

/* Only `copied` is waited for on the host, which is to sleep: an event that wakes somebody costs an interrupt. */
static struct event *make_event(struct device *device, enum event_kind kind, struct failure *failure) {
    struct event *event = calloc(1, sizeof *event);
    unsigned flags = FX_CU_EVENT_NO_TIMING;
    if (kind == COPIED && FX_KEEPS(SPINNING_WAIT)) flags |= FX_CU_EVENT_BLOCKING_SYNC;
    if (!event) {
        fx_cuda_tried(failure, "memory for an event", FX_CU_ERROR_OUT_OF_MEMORY);
        return NULL;
    }
    event->device = device;
    event->kind = kind;
    if (fx_cuda_tried(failure, "cuEventCreate", device->engine->cuda->driver.EventCreate(&event->handle, flags))) return event;
    free(event);
    return NULL;
}

static struct event **pool_of(struct device *device, enum event_kind kind) {
    return &device->pools[FX_KEEPS(EARLY_REUSE) ? kind : READY];
}

struct event *fx_cuda_event(struct device *device, enum event_kind kind, struct failure *failure) {
    fx_lock(device->engine);
    struct event **pool = pool_of(device, kind), *event = *pool;
    if (event) *pool = event->next;
    fx_unlock(device->engine);
    if (!event) event = make_event(device, kind, failure);
    if (event) event->refs = 1;
    return event;
}

void fx_cuda_event_drop(struct event *event) {
    if (!event || --event->refs) return;
    struct event **pool = pool_of(event->device, event->kind);
    event->next = *pool;
    *pool = event;
}

/* ---- emit ---- */

const struct fx_stream *fx_cuda_stream_of(const struct device *device, const struct fx_stream *streams, uint32_t n) {
    for (uint32_t i = 0; i < n; i++)
        if (streams[i].device == device->ordinal) return &streams[i];
    return NULL;
}

bool fx_cuda_covers(const struct ck_devices *devices, const struct fx_stream *streams, uint32_t n) {
    if (!FX_KEEPS(NO_HOST_WAIT)) return true;
    for (uint32_t i = 0; i < devices->n; i++)
        if (!fx_cuda_stream_of(devices->each[i].device, streams, n)) return false;
    return true;
}

void fx_cuda_drop(struct ck_devices *devices) {
    for (uint32_t i = 0; devices && i < devices->n; i++) {
        fx_cuda_event_drop(devices->each[i].ready);
        fx_cuda_event_drop(devices->each[i].copied);
    }
    free(devices);
}

bool fx_cuda_runs(struct device *device, CUstream stream, struct failure *failure) {
    CUstreamCaptureStatus status = 0;
    CUresult r = device->engine->cuda->driver.StreamIsCapturing(stream, &status);
    if (!fx_cuda_tried(failure, "cuStreamIsCapturing", r)) return false;
    if (!FX_KEEPS(RECORD_IN_CAPTURE)) return true;
    return fx_cuda_tried(failure, "a stream whose work is captured as a graph", status ? FX_CU_ERROR_CAPTURE_FIRST : 0);
}

/* The point after which the layer's memory is what this checkpoint wants. */
static struct event *record_ready(struct device *device, uint64_t handle, struct failure *failure) {
    CUstream stream = (CUstream)(uintptr_t)handle;
    CUstreamCaptureMode before;
    struct event *event = NULL;
    if (!fx_cuda_enter(device, &before, failure)) return NULL;
    if (fx_cuda_runs(device, stream, failure)) event = fx_cuda_event(device, READY, failure);
    if (event && FX_KEEPS(NO_EMIT_RECORD))
        fx_cuda_tried(failure, "cuEventRecord", device->engine->cuda->driver.EventRecord(event->handle, stream));
    fx_cuda_leave(device, before);
    return event;
}

/* Marks one device; 0, or the negative errno that fx_cuda_mark returns. */
static int mark(struct device *device, const struct fx_stream *streams, uint32_t n_streams, struct ck_devices *marked,
                struct fx_error *error) {
    const struct fx_stream *stream = device ? fx_cuda_stream_of(device, streams, n_streams) : NULL;
    struct failure failure = {0};
    if (!stream) return -EINVAL;
    if (fx_cuda_is_lost(device, error)) return -error->err;
    struct event *ready = record_ready(device, stream->handle, &failure);
    marked->each[marked->n++] = (struct on_device){device, ready, NULL};
    return failure.result ? fx_cuda_explain(device, failure, error) : 0;
}

static bool all_contiguous(const struct fx_sources *sources) {
    for (uint32_t i = 0; i < sources->n; i++)
        if (sources->views[i].device && sources->views[i].ndim >= 0) return false;
    return true;
}

int fx_cuda_mark(struct fx_checkpoint *ck, struct fx_sources *sources, const struct fx_stream *streams,
                 uint32_t n_streams, struct ck_devices **out, struct fx_error *error) {
    struct cuda *cuda = ck->engine->cuda;
    uint32_t n = (uint32_t)__builtin_popcountll(sources->devices);
    if (!cuda || !all_contiguous(sources)) return -EINVAL;
    struct ck_devices *marked = calloc(1, sizeof *marked + n * sizeof *marked->each);
    if (!marked) return -ENOMEM;
    int r = 0;
    for (uint32_t ordinal = 0; ordinal < FX_MAX_DEVICES && !r; ordinal++)
        if (sources->devices >> ordinal & 1) r = mark(cuda->devices[ordinal], streams, n_streams, marked, error);
    if (!r) {
        *out = marked;
        return 0;
    }
    fx_lock(ck->engine);
    fx_cuda_drop(marked);
    fx_unlock(ck->engine);
    return r;
}

/* ---- fences ---- */

/* Lock held: the newest copy of the layers, on each device, that no host wait has seen the end of. */
static void newest_copies(struct fx_engine *engine, int64_t layer, struct event **found) {
    for (struct fx_checkpoint *ck = engine->oldest; ck; ck = ck->next) {
        if (!ck->cuda || !ck->left || (layer >= 0 && layer >= ck->plan->n_layers)) continue;
        uint32_t first = layer < 0 ? 0 : (uint32_t)layer, end = layer < 0 ? ck->plan->n_layers : first + 1;
        for (uint32_t l = first; l < end; l++) {
            struct ck_devices *devices = ck->layers[l].left ? ck->layers[l].devices : NULL;
            for (uint32_t i = 0; devices && i < devices->n; i++) {
                struct event *copied = devices->each[i].copied, **best = &found[devices->each[i].device->ordinal];
                if (copied && (!*best || copied->order > (*best)->order)) *best = copied;
            }
        }
    }
}

/* Whether the stream waits for it. */
static bool order_one(struct event *event, uint64_t stream) {
    struct device *device = event->device;
    struct failure failure = {0};
    CUstreamCaptureMode before;
    if (!FX_KEEPS(NO_FENCE_WAIT)) return true;
    if (!fx_cuda_enter(device, &before, &failure)) return false;
    CUresult r = device->engine->cuda->driver.StreamWaitEvent((CUstream)(uintptr_t)stream, event->handle, 0);
    fx_cuda_leave(device, before);
    return !r;
}

/* Lock held: until the reaper has seen the copy's end, or failed its checkpoint. */
static void wait_for_reaper(const struct event *copied) {
    struct device *device = copied->device;
    while (device->oldest && device->oldest->copied->order <= copied->order) fx_wait(device->engine, INT64_MAX);
}

/* If the stream cannot be made to wait, the host waits. */
void fx_cuda_order(struct fx_engine *engine, int64_t layer, const struct fx_stream *streams, uint32_t n) {
    struct event *found[FX_MAX_DEVICES] = {0};
    bool ordered[FX_MAX_DEVICES] = {0};
    if (!engine->cuda) return;
    newest_copies(engine, layer, found);
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++)
        if (found[i]) found[i]->refs++;
    fx_unlock(engine);
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++) {
        const struct fx_stream *stream = found[i] ? fx_cuda_stream_of(found[i]->device, streams, n) : NULL;
        ordered[i] = !stream || order_one(found[i], stream->handle);
    }
    fx_lock(engine);
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++) {
        if (!ordered[i]) wait_for_reaper(found[i]);
        fx_cuda_event_drop(found[i]);
    }
}
