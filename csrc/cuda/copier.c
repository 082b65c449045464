/* Issues copies out of devices, in the order of the emits, and waits for their ends. See events.c, Note [the order of
 * events].
 *
 * Copies go into the engine's staging buffers, which are pinned then; there is nothing else. A piece under way
 * holds its chunk by `helpers`, as a fence that copies does.
 */
#include "cuda/device.h"

#include <errno.h>
#include <stdlib.h>

void fx_cuda_wake(struct fx_engine *engine) {
    if (engine->cuda) pthread_cond_broadcast(&engine->cuda->work);
}

/* ---- the queue ---- */

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

/* ---- copies ---- */

#define RANGES 64

/* Copies that are issued together. Each is one tensor's: tensors that are neighbours in memory may lie in two
 * allocations, and a driver refuses a copy that reads across the two. */
struct ranges {
    struct device *device;
    CUdeviceptr to[RANGES], from[RANGES];
    size_t n[RANGES];
    uint32_t count;
    uint64_t nbytes;
    struct failure failure;
};

/* What part of a refused batch was issued is issued again: the same bytes to the same place. */
static bool one_call(struct ranges *ranges) {
    struct device *device = ranges->device;
    struct fx_driver *driver = &device->engine->cuda->driver;
    struct fx_copy_attributes in_order = {.source_order = FX_KEEPS(NO_SOURCE_ORDER) ? FX_CU_SOURCE_IN_STREAM_ORDER : 0};
    size_t start = 0, failed = 0;
    if (ranges->count < 2 || device->one_by_one || !driver->MemcpyBatchAsync) return false;
    CUresult r = driver->MemcpyBatchAsync(ranges->to, ranges->from, ranges->n, ranges->count, (CUmemcpyAttributes *)&in_order,
                                          &start, 1, &failed, device->stream);
    if (!r) return true;
    device->one_by_one = true;
    device->engine->unbatched_devices++;
    return false;
}

static void flush(struct ranges *ranges) {
    struct fx_driver *driver = &ranges->device->engine->cuda->driver;
    CUstream stream = ranges->device->stream;
    bool done = ranges->failure.result || one_call(ranges);
    for (uint32_t i = 0; !done && i < ranges->count; i++) {
        CUresult r = driver->MemcpyDtoHAsync((void *)(uintptr_t)ranges->to[i], ranges->from[i], ranges->n[i], stream);
        done = !fx_cuda_tried(&ranges->failure, "cuMemcpyDtoHAsync", r);
    }
    ranges->count = 0;
}

static bool touches_last(const struct ranges *ranges, CUdeviceptr to, CUdeviceptr from) {
    uint32_t last = ranges->count - 1;
    return ranges->count && ranges->to[last] + ranges->n[last] == to && ranges->from[last] + ranges->n[last] == from;
}

static void add_range(struct ranges *ranges, char *to, const char *from, uint64_t n) {
    CUdeviceptr a = (CUdeviceptr)(uintptr_t)to, b = (CUdeviceptr)(uintptr_t)from;
    ranges->nbytes += n;
    if (!FX_KEEPS(TWO_ALLOCATIONS) && touches_last(ranges, a, b)) {
        ranges->n[ranges->count - 1] += n;
        return;
    }
    if (ranges->count == RANGES) flush(ranges);
    ranges->to[ranges->count] = a;
    ranges->from[ranges->count] = b;
    ranges->n[ranges->count++] = n;
}

/* What of one piece lies on ranges->device. */
static void copy_from_device(struct fx_checkpoint *ck, uint32_t piece, char *to, struct ranges *ranges) {
    struct part part;
    for (uint32_t next = 0; fx_next_part(ck, piece, &next, &part);)
        if (part.view->device == ranges->device->ordinal + 1 && part.nbytes)
            add_range(ranges, to + part.at, part.view->address + part.from, part.nbytes);
    flush(ranges);
}

/* Puts the copies into the stream, with *copied behind them. False: there were none, or *failure says what went wrong;
 * then what was put there has ended, unless the device is lost. */
static bool put_into_stream(struct flight *flight, char *to, struct on_device *on, struct failure *failure) {
    struct device *device = on->device;
    struct fx_driver *driver = &device->engine->cuda->driver;
    struct ranges ranges = {.device = device};
    if (on->ready && FX_KEEPS(NO_COPY_WAIT))
        fx_cuda_tried(failure, "cuStreamWaitEvent", driver->StreamWaitEvent(device->stream, on->ready->handle, 0));
    if (failure->result) return false;
    copy_from_device(flight->ck, flight->piece, to, &ranges);
    *failure = ranges.failure;
    flight->nbytes = ranges.nbytes;
    if (!ranges.nbytes) return false;
    if (!failure->result) flight->copied = fx_cuda_event(device, COPIED, failure);
    if (flight->copied && FX_KEEPS(NO_COPY_RECORD))
        fx_cuda_tried(failure, "cuEventRecord", driver->EventRecord(flight->copied->handle, device->stream));
    if (failure->result) fx_cuda_drain(device);
    return !failure->result;
}

/* Issues one piece's copies on one device. NULL: there were none, or *failure says what went wrong. */
static struct flight *issue_on(struct fx_checkpoint *ck, uint32_t piece, char *to, struct on_device *on,
                               struct failure *failure) {
    struct flight *flight = calloc(1, sizeof *flight);
    CUstreamCaptureMode before;
    bool issued = false;
    if (!flight) fx_cuda_tried(failure, "memory for a copy", FX_CU_ERROR_OUT_OF_MEMORY);
    if (flight && fx_cuda_enter(on->device, &before, failure)) {
        *flight = (struct flight){.ck = ck, .piece = piece, .issued_ns = fx_now()};
        issued = put_into_stream(flight, to, on, failure);
        fx_cuda_leave(on->device, before);
    }
    if (issued) return flight;
    if (flight && flight->copied) {
        fx_lock(ck->engine);
        fx_cuda_event_drop(flight->copied);
        fx_unlock(ck->engine);
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
    if (on->copied) fx_cuda_event_drop(on->copied);
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
    if (failed) fx_cuda_explain(failed, failure, &error);
    fx_span_add(engine, FX_SPAN_ISSUE, 0, start,
                (struct fx_span){.checkpoint = ck->id, .layer = layer, .chunk = ck->plan->pieces[piece].chunk});

    fx_lock(engine);
    for (uint32_t i = 0; i < devices->n; i++) {
        if (flights[i]) take_off(flights[i], &devices->each[i]);
        if (failed || !devices->each[i].ready) continue;
        fx_cuda_event_drop(devices->each[i].ready); /* the stream waits for what it was: it may be recorded anew */
        devices->each[i].ready = NULL;
    }
    ck->pieces[piece] = ISSUED;
    if (failed) fx_fail(ck, &error);
    fx_cuda_wake(engine); /* the reapers */
    fx_wake(engine);      /* fences */
    part_done(ck, piece);
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

void *fx_cuda_copier_main(void *argument) {
    struct fx_engine *engine = argument;
    fx_lock(engine);
    while (!engine->cuda->stopping)
        if (!issue_next(engine)) pthread_cond_wait(&engine->cuda->work, &engine->lock);
    fx_unlock(engine);
    return NULL;
}

/* ---- their ends ---- */

/* Until the flight has landed; true unless *error says why it did not. */
static bool await_landing(struct device *device, struct flight *flight, struct fx_error *error) {
    struct failure failure = {0};
    if (!FX_KEEPS(NO_REAP_WAIT)) return true;
    if (fx_cuda_tried(&failure, "cuEventSynchronize", fx_cuda_await(device, flight->copied->handle))) return true;
    fx_cuda_drain(device);
    fx_cuda_explain(device, failure, error);
    return false;
}

/* Lock held on entry and return: the oldest copy of a device, to its end. */
static void reap(struct device *device) {
    struct fx_engine *engine = device->engine;
    struct flight *flight = device->oldest;
    struct fx_error error;
    fx_unlock(engine);
    bool landed = await_landing(device, flight, &error);
    int64_t end = fx_now(), begin = flight->issued_ns;
    if (begin < device->last_end_ns) begin = device->last_end_ns; /* it waited for the copy before it */
    if (landed) engine->copy_ns += (uint64_t)(end - begin);
    const struct piece *piece = &flight->ck->plan->pieces[flight->piece];
    fx_span_add(engine, FX_SPAN_DEVICE, device->ordinal, begin,
                (struct fx_span){.checkpoint = flight->ck->id, .layer = piece->layer, .chunk = piece->chunk,
                                 .nbytes = flight->nbytes});
    device->last_end_ns = fx_now(); /* not before the span's end: spans of a track must not overlap */

    fx_lock(engine);
    device->oldest = flight->next;
    if (!device->oldest) device->newest = NULL;
    if (!landed) fx_fail(flight->ck, &error);
    fx_cuda_event_drop(flight->copied);
    part_done(flight->ck, flight->piece);
    fx_wake(engine);
    free(flight);
}

void *fx_cuda_reaper_main(void *argument) {
    struct device *device = argument;
    struct fx_engine *engine = device->engine;
    CUstreamCaptureMode before;
    bool entered = fx_cuda_enter(device, &before, &device->reaper_failure);
    fx_lock(engine);
    device->reaper_began = true;
    fx_wake(engine);
    while (entered && (device->oldest || !engine->cuda->stopping)) {
        if (device->oldest) reap(device);
        else pthread_cond_wait(&engine->cuda->work, &engine->lock);
    }
    fx_unlock(engine);
    if (entered) fx_cuda_leave(device, before);
    return NULL;
}
