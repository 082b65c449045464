/* Copies out of CUDA devices. See Note [the order of events].
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
 * Copies go into the engine's staging buffers, which are pinned then; there is nothing else. A piece under way
 * holds its chunk by `helpers`, as a fence that copies does. The calls of the driver are made without the lock:
 * any of them may wait for the device's queue.
 */
#include "cuda/cuda.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef FX_MUTATIONS
int fx_mutation;
#endif

struct event {
    CUevent handle;
    struct device *device;
    struct event *next; /* in the pool */
    uint64_t order;     /* of records on the copy stream */
    uint32_t refs;
};

/* One piece's copies on one device, from their issue until the reaper has seen them done. */
struct flight {
    struct fx_checkpoint *ck;
    uint32_t piece;
    struct event *copied;
    struct flight *next;
    uint64_t nbytes;
    int64_t issued_ns;
};

struct device {
    struct fx_engine *engine;
    uint32_t ordinal;
    CUdevice handle;
    CUcontext context;
    CUstream stream;
    pthread_t reaper;
    struct flight *oldest, *newest;
    struct event *pool;
    uint64_t order;
    bool one_by_one; /* the copier's: the driver refused a batch */
    bool lost;
    struct fx_error why;
    int64_t last_end_ns; /* the reaper's: for the trace */
};

struct cuda {
    struct fx_driver driver;
    pthread_cond_t work; /* copier and reapers wait */
    pthread_t copier;
    struct device *devices[FX_MAX_DEVICES];
    char *memory;
    uint64_t nbytes;
    bool shared; /* the memory is the sink's, not ours */
    bool copying, stopping, stopped;
};

/* One layer of one checkpoint, on each of its devices. */
struct ck_devices {
    uint32_t n, next; /* next: pieces before it were taken */
    struct on_device {
        struct device *device;
        struct event *ready, *copied;
    } each[];
};

/* The device side of a checkpoint: its layers in the order of their emits. */
struct ck_cuda {
    uint32_t n, first;
    uint32_t *layers;
    uint8_t *parts; /* by piece: flights under way, and one while it is being issued */
};

/* ---- the driver, and a device that is gone ---- */

static CUresult enter(struct device *device) {
    return device->engine->cuda->driver.CtxPushCurrent(device->context);
}

static void leave(struct device *device) {
    CUcontext context;
    device->engine->cuda->driver.CtxPopCurrent(&context);
}

/* Where a call failed. */
struct failure {
    const char *call;
    CUresult result;
};

static bool tried(struct failure *failure, const char *call, CUresult result) {
    if (result && !failure->result) *failure = (struct failure){call, result};
    return !result;
}

static void explain(struct device *device, struct failure failure, struct fx_error *error) {
    fx_driver_error(&device->engine->cuda->driver, failure.call, failure.result, error);
}

/* Lock held. The first reason stays. */
static void lose(struct device *device, const struct fx_error *why) {
    if (device->lost) return;
    device->lost = true;
    device->why = *why;
}

/* ---- events ---- */

static struct event *event_take(struct device *device, struct failure *failure) {
    struct fx_driver *driver = &device->engine->cuda->driver;
    fx_lock(device->engine);
    struct event *event = device->pool;
    if (event) device->pool = event->next;
    fx_unlock(device->engine);
    if (!event) {
        event = calloc(1, sizeof *event);
        if (!event) {
            tried(failure, "memory for an event", 2);
            return NULL;
        }
        event->device = device;
        if (!tried(failure, "cuEventCreate", driver->EventCreate(&event->handle, CU_EVENT_QUIET))) {
            free(event);
            return NULL;
        }
    }
    event->refs = 1;
    return event;
}

/* Lock held. */
static void event_drop(struct event *event) {
    if (!event || --event->refs) return;
    event->next = event->device->pool;
    event->device->pool = event;
}

/* ---- emit ---- */

void fx_cuda_wake(struct fx_engine *engine) {
    if (engine->cuda) pthread_cond_broadcast(&engine->cuda->work);
}

static const struct fx_stream *stream_of(const struct device *device, const struct fx_stream *streams,
                                         uint32_t n) {
    for (uint32_t i = 0; i < n; i++)
        if (streams[i].device == device->ordinal) return &streams[i];
    return NULL;
}

bool fx_cuda_covers(const struct ck_devices *devices, const struct fx_stream *streams, uint32_t n) {
    if (!FX_KEEPS(NO_HOST_WAIT)) return true;
    for (uint32_t i = 0; i < devices->n; i++)
        if (!stream_of(devices->each[i].device, streams, n)) return false;
    return true;
}

/* Lock held. */
void fx_cuda_drop(struct ck_devices *devices) {
    for (uint32_t i = 0; devices && i < devices->n; i++) {
        event_drop(devices->each[i].ready);
        event_drop(devices->each[i].copied);
    }
    free(devices);
}

/* The point after which the layer's memory is what this checkpoint wants. */
static struct event *record_ready(struct device *device, uint64_t stream, struct failure *failure) {
    struct fx_driver *driver = &device->engine->cuda->driver;
    if (!tried(failure, "cuCtxPushCurrent", enter(device))) return NULL;
    struct event *event = event_take(device, failure);
    if (event && FX_KEEPS(NO_EMIT_RECORD))
        tried(failure, "cuEventRecord", driver->EventRecord(event->handle, (CUstream)(uintptr_t)stream));
    leave(device);
    return event;
}

static bool is_lost(struct device *device, struct fx_error *error) {
    fx_lock(device->engine);
    bool lost = device->lost;
    if (lost) *error = device->why;
    fx_unlock(device->engine);
    return lost;
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
    for (uint32_t ordinal = 0; ordinal < FX_MAX_DEVICES && !r; ordinal++) {
        if (!(sources->devices >> ordinal & 1)) continue;
        struct device *device = cuda->devices[ordinal];
        const struct fx_stream *stream = device ? stream_of(device, streams, n_streams) : NULL;
        struct failure failure = {0};
        if (!stream) {
            r = -EINVAL;
            break;
        }
        if (is_lost(device, error)) {
            r = -error->err;
            break;
        }
        struct event *ready = record_ready(device, stream->handle, &failure);
        marked->each[marked->n++] = (struct on_device){device, ready, NULL};
        if (failure.result) {
            explain(device, failure, error);
            r = -error->err;
        }
    }
    if (!r) {
        *out = marked;
        return 0;
    }
    fx_lock(ck->engine);
    fx_cuda_drop(marked);
    fx_unlock(ck->engine);
    return r;
}

int fx_cuda_enqueue(struct fx_checkpoint *ck, uint32_t layer) {
    const struct fx_plan *plan = ck->plan;
    if (!ck->cuda) {
        struct ck_cuda *made = calloc(1, sizeof *made);
        if (!made) return -ENOMEM;
        made->layers = calloc(plan->n_layers + 1, sizeof *made->layers);
        made->parts = calloc(plan->n_pieces + 1, 1);
        ck->cuda = made;
        if (!made->layers || !made->parts) return -ENOMEM;
    }
    ck->cuda->layers[ck->cuda->n++] = layer;
    const struct plan_layer *l = &plan->layers[layer];
    for (uint32_t i = 0; i < l->n_pieces; i++)
        ck->chunks[plan->pieces[plan->layer_pieces[l->first_piece + i]].chunk].device_left++;
    fx_cuda_wake(ck->engine);
    return 0;
}

void fx_cuda_forget(struct fx_checkpoint *ck) {
    for (uint32_t i = 0; ck->layers && i < ck->plan->n_layers; i++) fx_cuda_drop(ck->layers[i].devices);
    if (!ck->cuda) return;
    free(ck->cuda->layers);
    free(ck->cuda->parts);
    free(ck->cuda);
}

/* ---- copies ---- */

#define RUNS 64

/* Copies that are issued together. Neighbours in memory and in the file become one. */
struct runs {
    struct device *device;
    CUdeviceptr to[RUNS], from[RUNS];
    size_t n[RUNS];
    uint32_t count;
    uint64_t nbytes;
    struct failure failure;
};

static bool one_call(struct runs *runs) {
    struct device *device = runs->device;
    struct fx_driver *driver = &device->engine->cuda->driver;
    struct cu_copy_attributes in_order = {.source_order = CU_SOURCE_IN_STREAM_ORDER};
    size_t start = 0, failed = 0;
    if (runs->count < 2 || device->one_by_one || !driver->MemcpyBatchAsync) return false;
    CUresult r = driver->MemcpyBatchAsync(runs->to, runs->from, runs->n, runs->count, &in_order, &start, 1, &failed,
                                          device->stream);
    device->one_by_one = r != 0; /* what part of it was issued is issued again: the same bytes to the same place */
    return !r;
}

static void flush(struct runs *runs) {
    struct fx_driver *driver = &runs->device->engine->cuda->driver;
    CUstream stream = runs->device->stream;
    bool done = runs->failure.result || one_call(runs);
    for (uint32_t i = 0; !done && i < runs->count; i++) {
        CUresult r = driver->MemcpyDtoHAsync((void *)(uintptr_t)runs->to[i], runs->from[i], runs->n[i], stream);
        done = !tried(&runs->failure, "cuMemcpyDtoHAsync", r);
    }
    runs->count = 0;
}

static void add_run(struct runs *runs, char *to, const char *from, uint64_t n) {
    CUdeviceptr a = (CUdeviceptr)(uintptr_t)to, b = (CUdeviceptr)(uintptr_t)from;
    uint32_t last = runs->count - 1;
    runs->nbytes += n;
    if (runs->count && runs->to[last] + runs->n[last] == a && runs->from[last] + runs->n[last] == b) {
        runs->n[last] += n;
        return;
    }
    if (runs->count == RUNS) flush(runs);
    runs->to[runs->count] = a;
    runs->from[runs->count] = b;
    runs->n[runs->count++] = n;
}

/* What of one piece lies on runs->device. */
static void copy_from_device(struct fx_checkpoint *ck, uint32_t piece, char *to, struct runs *runs) {
    struct part part;
    for (uint32_t next = 0; fx_next_part(ck, piece, &next, &part);)
        if (part.view->device == runs->device->ordinal + 1)
            add_run(runs, to + part.at, part.view->address + part.from, part.nbytes);
    flush(runs);
}

/* After a call failed behind others: whether those have ended. */
static bool drain(struct device *device, struct fx_error *error) {
    struct failure failure = {0};
    if (tried(&failure, "cuStreamSynchronize", device->engine->cuda->driver.StreamSynchronize(device->stream)))
        return true;
    explain(device, failure, error);
    return false;
}

/* Issues one piece's copies on one device. NULL: there were none, or *failure says what went wrong. */
static struct flight *issue_on(struct fx_checkpoint *ck, uint32_t piece, char *to, struct on_device *on,
                               struct failure *failure) {
    struct device *device = on->device;
    struct fx_driver *driver = &device->engine->cuda->driver;
    struct runs runs = {.device = device};
    struct flight *flight = calloc(1, sizeof *flight);
    if (!flight) tried(failure, "memory for a copy", 2);
    if (!flight || !tried(failure, "cuCtxPushCurrent", enter(device))) goto fail;
    int64_t start = fx_now();
    if (on->ready && FX_KEEPS(NO_COPY_WAIT))
        tried(failure, "cuStreamWaitEvent", driver->StreamWaitEvent(device->stream, on->ready->handle, 0));
    if (!failure->result) {
        copy_from_device(ck, piece, to, &runs);
        *failure = runs.failure;
    }
    if (!failure->result && runs.nbytes) flight->copied = event_take(device, failure);
    if (flight->copied && FX_KEEPS(NO_COPY_RECORD))
        tried(failure, "cuEventRecord", driver->EventRecord(flight->copied->handle, device->stream));
    if (failure->result && runs.nbytes) {
        struct fx_error error;
        if (!drain(device, &error)) {
            fx_lock(device->engine);
            lose(device, &error);
            fx_unlock(device->engine);
        }
    }
    leave(device);
    if (failure->result || !runs.nbytes) goto fail;
    flight->ck = ck;
    flight->piece = piece;
    flight->nbytes = runs.nbytes;
    flight->issued_ns = start;
    return flight;
fail:
    if (flight && flight->copied) {
        fx_lock(device->engine);
        event_drop(flight->copied);
        fx_unlock(device->engine);
    }
    free(flight);
    return NULL;
}

/* Lock held: one part of a piece ended; the last one ends the piece. The checkpoint may be gone afterwards. */
static void part_done(struct fx_checkpoint *ck, uint32_t piece) {
    if (--ck->cuda->parts[piece] == 0) fx_end_help(ck, piece);
}

/* Lock held. */
static void take_off(struct flight *flight, struct on_device *on) {
    struct device *device = on->device;
    *(device->newest ? &device->newest->next : &device->oldest) = flight;
    device->newest = flight;
    flight->copied->order = ++device->order;
    if (on->copied) event_drop(on->copied);
    on->copied = flight->copied;
    if (FX_KEEPS(EARLY_REUSE)) flight->copied->refs++;
    flight->ck->cuda->parts[flight->piece]++;
}

/* Lock held on entry and return: the copier takes one piece and issues its copies. */
static void issue(struct fx_checkpoint *ck, uint32_t layer, uint32_t piece) {
    struct fx_engine *engine = ck->engine;
    struct ck_devices *devices = ck->layers[layer].devices;
    struct ck_chunk *chunk = &ck->chunks[ck->plan->pieces[piece].chunk];
    struct flight *flights[FX_MAX_DEVICES] = {0};
    struct failure failure = {0};
    struct device *failed = NULL;
    if (!chunk->staging) chunk->staging = fx_staging_take(engine);
    chunk->helpers++;
    chunk->device_left--;
    fx_take_piece(ck, piece);
    ck->cuda->parts[piece] = 1;
    char *to = chunk->staging;
    fx_unlock(engine);

    int64_t start = fx_now();
    fx_copy_delay();
    fx_copy_piece(ck, piece, to);
    for (uint32_t i = 0; i < devices->n && !failed; i++) {
        flights[i] = issue_on(ck, piece, to, &devices->each[i], &failure);
        if (failure.result) failed = devices->each[i].device;
    }
    struct fx_error error;
    if (failed) explain(failed, failure, &error);
    fx_span_add(engine, FX_SPAN_ISSUE, 0, start,
                (struct fx_span){.checkpoint = ck->id, .layer = layer, .chunk = ck->plan->pieces[piece].chunk});

    fx_lock(engine);
    for (uint32_t i = 0; i < devices->n; i++) {
        if (flights[i]) take_off(flights[i], &devices->each[i]);
        if (failed || !devices->each[i].ready) continue;
        event_drop(devices->each[i].ready); /* the stream waits for what it was: it may be recorded anew */
        devices->each[i].ready = NULL;
    }
    ck->pieces[piece] = ISSUED;
    if (failed) fx_fail(ck, &error);
    fx_cuda_wake(engine); /* the reapers */
    fx_wake(engine);      /* fences */
    part_done(ck, piece);
}

/* Lock held: the next piece that has, or can get, a place to be copied to; in the order of the emits. */
static uint32_t next_piece(struct fx_checkpoint *ck, uint32_t *layer) {
    const struct fx_plan *plan = ck->plan;
    for (uint32_t k = ck->cuda->first; k < ck->cuda->n; k++) {
        *layer = ck->cuda->layers[k];
        const struct plan_layer *l = &plan->layers[*layer];
        struct ck_devices *devices = ck->layers[*layer].devices;
        for (uint32_t i = devices->next; i < l->n_pieces; i++) {
            uint32_t piece = plan->layer_pieces[l->first_piece + i];
            if (ck->pieces[piece] != IDLE) {
                if (i == devices->next) devices->next++;
                continue;
            }
            if (ck->chunks[plan->pieces[piece].chunk].staging || fx_staging_has_room(ck->engine)) return piece;
        }
        if (k == ck->cuda->first && devices->next == l->n_pieces) ck->cuda->first++;
    }
    return NOTHING;
}

/* Lock held. */
static bool issue_next(struct fx_engine *engine) {
    for (struct fx_checkpoint *ck = engine->oldest; ck; ck = ck->next) {
        uint32_t layer, piece = ck->state == ACTIVE && ck->cuda ? next_piece(ck, &layer) : NOTHING;
        if (piece == NOTHING) continue;
        issue(ck, layer, piece);
        return true;
    }
    return false;
}

/* ---- threads ---- */

/* Another thread may be capturing a graph. By default the driver then refuses calls like ours in every thread, or ends
 * that capture; ours have nothing to do with it. */
static void ignore_captures(struct fx_engine *engine) {
    int mode = CU_CAPTURE_RELAXED;
    engine->cuda->driver.ThreadExchangeStreamCaptureMode(&mode);
}

static void *copier_main(void *argument) {
    struct fx_engine *engine = argument;
    ignore_captures(engine);
    fx_lock(engine);
    while (!engine->cuda->stopping)
        if (!issue_next(engine)) pthread_cond_wait(&engine->cuda->work, &engine->lock);
    fx_unlock(engine);
    return NULL;
}

/* Lock held on entry and return: the oldest copy of a device, to its end. */
static void reap(struct device *device) {
    struct fx_engine *engine = device->engine;
    struct flight *flight = device->oldest;
    struct failure failure = {0};
    struct fx_error error, gone;
    fx_unlock(engine);
    if (FX_KEEPS(NO_REAP_WAIT))
        tried(&failure, "cuEventSynchronize", engine->cuda->driver.EventSynchronize(flight->copied->handle));
    bool lost = failure.result && !drain(device, &gone);
    int64_t end = fx_now(), begin = flight->issued_ns;
    if (begin < device->last_end_ns) begin = device->last_end_ns; /* it waited for the copy before it */
    if (failure.result) explain(device, failure, &error);
    else engine->copy_ns += (uint64_t)(end - begin);
    const struct piece *piece = &flight->ck->plan->pieces[flight->piece];
    fx_span_add(engine, FX_SPAN_DEVICE, device->ordinal, begin,
                (struct fx_span){.checkpoint = flight->ck->id, .layer = piece->layer, .chunk = piece->chunk,
                                 .nbytes = flight->nbytes});
    device->last_end_ns = fx_now(); /* not before the span's end: spans of a track must not overlap */

    fx_lock(engine);
    device->oldest = flight->next;
    if (!device->oldest) device->newest = NULL;
    if (lost) lose(device, &gone);
    if (failure.result) fx_fail(flight->ck, &error);
    event_drop(flight->copied);
    part_done(flight->ck, flight->piece);
    free(flight);
}

static void *reaper_main(void *argument) {
    struct device *device = argument;
    struct fx_engine *engine = device->engine;
    ignore_captures(engine);
    enter(device);
    fx_lock(engine);
    while (device->oldest || !engine->cuda->stopping) {
        if (device->oldest) reap(device);
        else pthread_cond_wait(&engine->cuda->work, &engine->lock);
    }
    fx_unlock(engine);
    leave(device);
    return NULL;
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

/* If the stream cannot be made to wait, the host waits; if that fails too, the device is gone, and its copies
 * with it. */
static void order_one(struct event *event, uint64_t stream) {
    struct device *device = event->device;
    struct fx_driver *driver = &device->engine->cuda->driver;
    struct failure failure = {0};
    if (!FX_KEEPS(NO_FENCE_WAIT)) return;
    if (tried(&failure, "cuCtxPushCurrent", enter(device))) {
        CUstream waiting = (CUstream)(uintptr_t)stream;
        tried(&failure, "cuStreamWaitEvent", driver->StreamWaitEvent(waiting, event->handle, 0));
        leave(device);
    }
    if (failure.result && driver->EventSynchronize(event->handle)) {
        struct fx_error error;
        explain(device, failure, &error);
        fx_lock(device->engine);
        lose(device, &error);
        fx_unlock(device->engine);
    }
}

void fx_cuda_order(struct fx_engine *engine, int64_t layer, const struct fx_stream *streams, uint32_t n) {
    struct event *found[FX_MAX_DEVICES] = {0};
    if (!engine->cuda) return;
    newest_copies(engine, layer, found);
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++)
        if (found[i]) found[i]->refs++;
    fx_unlock(engine);
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++) {
        const struct fx_stream *stream = found[i] ? stream_of(found[i]->device, streams, n) : NULL;
        if (stream) order_one(found[i], stream->handle);
    }
    fx_lock(engine);
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++) event_drop(found[i]);
}

/* ---- a device's life ---- */

int fx_cuda_open(struct fx_engine *engine, const char *path, struct fx_error *error) {
    if (engine->cuda) return 0;
    struct cuda *cuda = calloc(1, sizeof *cuda);
    if (!cuda) return fx_error_set(error, "cuda", "", -1, ENOMEM);
    int r = fx_driver_open(path, &cuda->driver, error);
    if (!r && pthread_cond_init(&cuda->work, NULL)) r = fx_error_set(error, "cuda", "", -1, ENOMEM);
    if (r) {
        free(cuda);
        return r;
    }
    fx_lock(engine);
    engine->cuda = cuda;
    fx_unlock(engine);
    return 0;
}

/* From here on, staging buffers are pinned. Those in use end first; pageable memory would make copies wait. */
static int pin(struct fx_engine *engine, struct device *device, struct fx_error *error) {
    struct cuda *cuda = engine->cuda;
    struct staging *staging = &engine->staging;
    uint64_t chunk = engine->options.chunk_bytes;
    struct failure failure = {0};
    char pci[32] = "";
    if (cuda->memory) return 0;
    if (staging->limit < 2) return fx_error_set(error, "staging: devices need two chunks or more", "", -1, EINVAL);
    tried(&failure, "cuDeviceGetPCIBusId", cuda->driver.DeviceGetPCIBusId(pci, sizeof pci, device->handle));
    uint64_t nbytes = staging->limit * chunk;
    cuda->shared = staging->block != NULL;
    char *memory = cuda->shared ? staging->block : fx_pinned_new(nbytes, failure.result ? "" : pci);
    if (!memory) return fx_error_set(error, "pinned memory", "", -1, ENOMEM);
    failure.result = 0;
    if (!tried(&failure, "cuMemHostRegister", cuda->driver.MemHostRegister(memory, nbytes, CU_HOST_PORTABLE))) {
        if (!cuda->shared) fx_buffer_free(memory, nbytes);
        explain(device, failure, error);
        return -error->err;
    }
    fx_lock(engine);
    cuda->memory = memory;
    cuda->nbytes = nbytes;
    if (cuda->shared) {
        fx_unlock(engine);
        return 0;
    }
    while (staging->n_free < staging->n_made) fx_wait(engine, INT64_MAX);
    while (staging->n_free) fx_buffer_free(staging->free[--staging->n_free], chunk);
    for (uint32_t i = 0; i < staging->limit; i++) staging->free[i] = memory + (staging->limit - 1 - i) * chunk;
    staging->n_free = staging->n_made = staging->limit;
    fx_unlock(engine);
    return 0;
}

static int start_threads(struct fx_engine *engine, struct device *device, struct fx_error *error) {
    struct cuda *cuda = engine->cuda;
    char name[16];
    snprintf(name, sizeof name, "fxckpt-gpu%u", device->ordinal % 100);
    int r = fx_thread_start(&device->reaper, reaper_main, device, name);
    if (!r && !cuda->copying) {
        r = fx_thread_start(&cuda->copier, copier_main, engine, "fxckpt-copy");
        cuda->copying = !r;
    }
    return r ? fx_error_set(error, "start of a thread for copies", "", -1, r) : 0;
}

static void close_device(struct device *device) {
    struct fx_driver *driver = &device->engine->cuda->driver;
    if (device->context && !enter(device)) {
        for (struct event *event = device->pool, *next; event; event = next) {
            next = event->next;
            driver->EventDestroy(event->handle);
            free(event);
        }
        if (device->stream) driver->StreamDestroy(device->stream);
        leave(device);
        driver->DevicePrimaryCtxRelease(device->handle);
    }
    free(device);
}

static int open_device(struct fx_engine *engine, struct device *device, struct fx_error *error) {
    struct fx_driver *driver = &engine->cuda->driver;
    struct failure failure = {0};
    if (tried(&failure, "cuDeviceGet", driver->DeviceGet(&device->handle, (int)device->ordinal)) &&
        tried(&failure, "cuDevicePrimaryCtxRetain", driver->DevicePrimaryCtxRetain(&device->context, device->handle)) &&
        tried(&failure, "cuCtxPushCurrent", enter(device))) {
        int r = 0;
        if (tried(&failure, "cuStreamCreate", driver->StreamCreate(&device->stream, CU_STREAM_NON_BLOCKING)))
            r = pin(engine, device, error);
        leave(device);
        if (r) return r;
    }
    if (!failure.result) return 0;
    explain(device, failure, error);
    return -error->err;
}

int fx_cuda_device(struct fx_engine *engine, uint32_t ordinal, struct fx_error *error) {
    struct cuda *cuda = engine->cuda;
    if (!cuda || cuda->stopped || ordinal >= FX_MAX_DEVICES)
        return fx_error_set(error, "a CUDA device of an engine that has no driver open, or is closed", "", -1, EINVAL);
    if (cuda->devices[ordinal]) return 0;
    struct device *device = calloc(1, sizeof *device);
    if (!device) return fx_error_set(error, "cuda", "", -1, ENOMEM);
    device->engine = engine;
    device->ordinal = ordinal;
    int r = open_device(engine, device, error);
    if (!r) r = start_threads(engine, device, error);
    if (r) {
        close_device(device);
        return r;
    }
    fx_lock(engine);
    cuda->devices[ordinal] = device;
    fx_unlock(engine);
    return 0;
}

void fx_cuda_stop(struct fx_engine *engine) {
    struct cuda *cuda = engine->cuda;
    fx_lock(engine);
    bool mine = cuda && !cuda->stopping;
    if (mine) cuda->stopping = true;
    fx_cuda_wake(engine);
    fx_unlock(engine);
    if (!mine) return;
    if (cuda->copying) pthread_join(cuda->copier, NULL);
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++)
        if (cuda->devices[i]) pthread_join(cuda->devices[i]->reaper, NULL);
    fx_lock(engine);
    cuda->stopped = true;
    fx_unlock(engine);
}

static bool anyone_lost(const struct cuda *cuda) {
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++)
        if (cuda->devices[i] && cuda->devices[i]->lost) return true;
    return false;
}

void fx_cuda_free(struct fx_engine *engine) {
    struct cuda *cuda = engine->cuda;
    if (!cuda) return;
    if (cuda->memory) {
        if (!cuda->shared) engine->staging.n_free = engine->staging.n_made = engine->staging.limit = 0;
        /* Kept for good if a device was lost: nobody can say any more that it will not write there. */
        if (!anyone_lost(cuda)) {
            cuda->driver.MemHostUnregister(cuda->memory);
            if (!cuda->shared) fx_buffer_free(cuda->memory, cuda->nbytes);
        }
    }
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++)
        if (cuda->devices[i]) close_device(cuda->devices[i]);
    pthread_cond_destroy(&cuda->work);
    free(cuda);
    engine->cuda = NULL;
}
