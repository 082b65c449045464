/* Single values of a device: copied in the order of the caller's stream, waited for by whoever needs them, in any thread.
 *
 * Copies go into pinned blocks that are a device's until it closes, and are used again and again: making one may wait
 * for the device.
 */
#include "cuda/device.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct fx_fetch {
    struct fx_engine *engine;
    struct device *device; /* NULL: it was closed; then `arrived`, or never */
    struct fx_fetch *next; /* of the device's */
    CUevent end;           /* of the newest copy into it */
    char *memory;
    uint64_t capacity, nbytes;
    bool used;    /* somebody has it */
    bool arrived; /* a host wait saw the end of the copy */
};

/* Lock held: the smallest that is free. */
static struct fx_fetch *take(struct device *device, uint64_t nbytes) {
    struct fx_fetch *best = NULL;
    for (struct fx_fetch *each = device->fetches; each; each = each->next)
        if (!each->used && each->capacity >= nbytes && (!best || each->capacity < best->capacity)) best = each;
    if (best) best->used = true;
    return best;
}

/* Not the driver's any more; freed now, or by whoever has it. */
static void free_memory(struct fx_fetch *fetch) {
    fx_buffer_free(fetch->memory, fetch->capacity);
    free(fetch);
}

/* A new block, which is the caller's. */
static struct fx_fetch *make(struct device *device, uint64_t nbytes, struct failure *failure) {
    struct fx_driver *driver = &device->engine->cuda->driver;
    struct fx_fetch *fetch = calloc(1, sizeof *fetch);
    if (fetch) {
        fetch->capacity = (nbytes + FX_BLOCK - 1) / FX_BLOCK * FX_BLOCK;
        fetch->memory = fx_buffer_new(fetch->capacity);
    }
    if (!fetch || !fetch->memory) {
        fx_cuda_tried(failure, "memory for a copy", FX_CU_ERROR_OUT_OF_MEMORY);
        free(fetch);
        return NULL;
    }
    if (!fx_cuda_tried(failure, "cuEventCreate",
                       driver->EventCreate(&fetch->end, FX_CU_EVENT_NO_TIMING | FX_CU_EVENT_BLOCKING_SYNC))) {
        free_memory(fetch);
        return NULL;
    }
    if (!fx_cuda_tried(failure, "cuMemHostRegister",
                       driver->MemHostRegister(fetch->memory, fetch->capacity, FX_CU_HOST_PORTABLE))) {
        driver->EventDestroy(fetch->end);
        free_memory(fetch);
        return NULL;
    }
    fetch->engine = device->engine;
    fetch->device = device;
    fetch->used = fetch->arrived = true; /* nothing was copied to it yet */
    fx_lock(device->engine);
    fetch->next = device->fetches;
    device->fetches = fetch;
    fx_unlock(device->engine);
    return fetch;
}

/* Puts the copy into the stream, behind the one that may still write to the block. If that fails the block is free again,
 * unless the copy has no end to wait for. */
static void put_into_stream(struct fx_fetch *fetch, CUstream stream, const void *from, struct failure *failure) {
    struct fx_driver *driver = &fetch->engine->cuda->driver;
    CUdeviceptr source = (CUdeviceptr)(uintptr_t)from;
    bool good = fetch->arrived ||
                fx_cuda_tried(failure, "cuStreamWaitEvent", driver->StreamWaitEvent(stream, fetch->end, 0));
    good = good && fx_cuda_tried(failure, "cuMemcpyDtoHAsync",
                                 driver->MemcpyDtoHAsync(fetch->memory, source, fetch->nbytes, stream));
    if (good) {
        fetch->arrived = false;
        fx_cuda_tried(failure, "cuEventRecord", driver->EventRecord(fetch->end, stream));
        return;
    }
    fx_lock(fetch->engine);
    fetch->used = false;
    fx_unlock(fetch->engine);
}

/* Starts one; NULL: *failure says why not. */
static struct fx_fetch *start(struct device *device, CUstream stream, const void *from, uint64_t nbytes,
                              struct failure *failure) {
    CUstreamCaptureMode before;
    struct fx_fetch *fetch = NULL;
    if (!fx_cuda_enter(device, &before, failure)) return NULL;
    if (fx_cuda_runs(device, stream, failure)) {
        fx_lock(device->engine);
        fetch = take(device, nbytes);
        fx_unlock(device->engine);
        if (!fetch) fetch = make(device, nbytes, failure);
    }
    if (fetch) {
        fetch->nbytes = nbytes;
        put_into_stream(fetch, stream, from, failure);
    }
    fx_cuda_leave(device, before);
    return failure->result ? NULL : fetch;
}

/* Lock held: this thread is in calls about the device now, which may not close meanwhile. */
static void leave_device(struct fx_engine *engine) {
    if (--engine->cuda->inside == 0) fx_wake(engine);
}

int fx_fetch_new(struct fx_engine *engine, const struct fx_stream *stream, const void *from, uint64_t nbytes,
                 struct fx_fetch **out, struct fx_error *error) {
    struct failure failure = {0};
    fx_lock(engine);
    struct cuda *cuda = engine->cuda;
    struct device *device = cuda && !cuda->stopping && stream->device < FX_MAX_DEVICES ? cuda->devices[stream->device] : NULL;
    if (device) cuda->inside++;
    fx_unlock(engine);
    if (!device) return fx_error_set(error, "a value of a CUDA device that is not open", "", -1, ECANCELED);
    int r = fx_cuda_is_lost(device, error) ? -error->err : 0;
    if (!r) *out = start(device, (CUstream)(uintptr_t)stream->handle, from, nbytes, &failure);
    if (failure.result) r = fx_cuda_explain(device, failure, error);
    fx_lock(engine);
    if (!r) engine->refs++;
    leave_device(engine);
    fx_unlock(engine);
    return r;
}

/* Between fx_cuda_enter and fx_cuda_leave. */
static bool arrive(struct fx_fetch *fetch, struct failure *failure) {
    return fetch->arrived || fx_cuda_tried(failure, "cuEventSynchronize", fx_cuda_await(fetch->device, fetch->end));
}

int fx_fetch_wait(struct fx_fetch *fetch, void *to, struct fx_error *error) {
    struct fx_engine *engine = fetch->engine;
    struct failure failure = {0};
    CUstreamCaptureMode before;
    int r = 0;
    fx_lock(engine);
    struct device *device = fetch->arrived ? NULL : fetch->device;
    if (device) engine->cuda->inside++;
    fx_unlock(engine);
    if (device) {
        bool arrived = fx_cuda_enter(device, &before, &failure);
        if (arrived) {
            arrived = arrive(fetch, &failure);
            fx_cuda_leave(device, before);
        }
        if (!arrived) r = fx_cuda_explain(device, failure, error);
        fx_lock(engine);
        fetch->arrived = fetch->arrived || arrived;
        leave_device(engine);
        fx_unlock(engine);
    }
    if (!r && !fetch->arrived) r = fx_error_set(error, "a value of a CUDA device that was lost", "", -1, ECANCELED);
    if (!r) memcpy(to, fetch->memory, fetch->nbytes);
    return r;
}

/* Memory that a copy may still write to is kept for good. */
void fx_fetch_free(struct fx_fetch *fetch) {
    struct fx_engine *engine = fetch->engine;
    fx_lock(engine);
    fetch->used = false;
    if (!fetch->device && fetch->arrived) free_memory(fetch);
    fx_engine_release(engine);
}

void fx_cuda_end_fetches(struct device *device, bool entered) {
    struct fx_driver *driver = &device->engine->cuda->driver;
    for (struct fx_fetch *fetch = device->fetches, *next; fetch; fetch = next) {
        struct failure failure = {0};
        next = fetch->next;
        bool arrived = entered && arrive(fetch, &failure);
        driver->EventDestroy(fetch->end);
        if (arrived) driver->MemHostUnregister(fetch->memory);
        fx_lock(device->engine);
        fetch->arrived = arrived;
        fetch->device = NULL;
        bool mine = arrived && !fetch->used;
        fx_unlock(device->engine);
        if (mine) free_memory(fetch);
    }
}
