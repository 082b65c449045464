/* A device's life: opened with its context, a stream, pinned memory and threads; given back. */
#include "cuda/device.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

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

/* ---- pinned memory ---- */

/* Memory for all staging; that of a sink which has its own is pinned as it is. */
static int pin(struct device *device, struct fx_error *error) {
    struct cuda *cuda = device->engine->cuda;
    struct staging *staging = &device->engine->staging;
    struct failure failure = {0};
    char pci[32] = "";
    if (staging->limit < 2) return fx_error_set(error, "staging: devices need two chunks or more", "", -1, EINVAL);
    if (cuda->driver.DeviceGetPCIBusId(pci, sizeof pci, device->handle)) pci[0] = 0;
    cuda->nbytes = staging->limit * device->engine->options.chunk_bytes;
    cuda->shared = staging->block != NULL;
    cuda->memory = cuda->shared ? staging->block : fx_pinned_new(cuda->nbytes, pci);
    if (!cuda->memory) return fx_error_set(error, "pinned memory", "", -1, ENOMEM);
    CUresult r = cuda->driver.MemHostRegister(cuda->memory, cuda->nbytes, FX_CU_HOST_PORTABLE);
    if (fx_cuda_tried(&failure, "cuMemHostRegister", r)) {
        cuda->pinned_by = device;
        return 0;
    }
    if (!cuda->shared) fx_buffer_free(cuda->memory, cuda->nbytes);
    cuda->memory = NULL;
    return fx_cuda_explain(device, failure, error);
}

/* Memory that a lost device may still write to is kept for good. */
static void unpin(struct cuda *cuda, bool lost) {
    if (!lost && !cuda->driver.MemHostUnregister(cuda->memory) && !cuda->shared) fx_buffer_free(cuda->memory, cuda->nbytes);
    cuda->memory = NULL;
    cuda->pinned_by = NULL;
}

/* From here on, staging buffers are pinned. Those in use end first; pageable memory would make copies wait. */
static void use_pinned_memory(struct fx_engine *engine) {
    struct cuda *cuda = engine->cuda;
    struct staging *staging = &engine->staging;
    uint64_t chunk = engine->options.chunk_bytes;
    if (cuda->shared) return;
    fx_lock(engine);
    while (staging->n_free < staging->n_made) fx_wait(engine, INT64_MAX);
    while (staging->n_free) fx_buffer_free(staging->free[--staging->n_free], chunk);
    for (uint32_t i = 0; i < staging->limit; i++) staging->free[i] = cuda->memory + (staging->limit - 1 - i) * chunk;
    staging->n_free = staging->n_made = staging->limit;
    fx_unlock(engine);
}

/* ---- one device ---- */

static void close_pools(struct device *device) {
    for (int kind = 0; kind < EVENT_KINDS; kind++)
        for (struct event *event = device->pools[kind], *next; event; event = next) {
            next = event->next;
            device->engine->cuda->driver.EventDestroy(event->handle);
            free(event);
        }
}

static void close_device(struct device *device, bool lost) {
    struct cuda *cuda = device->engine->cuda;
    struct fx_driver *driver = &cuda->driver;
    struct failure failure = {0};
    CUstreamCaptureMode before;
    bool entered = device->context && fx_cuda_enter(device, &before, &failure), pinned = cuda->pinned_by == device;
    fx_cuda_end_fetches(device, entered);
    close_pools(device);
    if (device->stream) driver->StreamDestroy(device->stream);
    if (pinned && FX_KEEPS(NO_CONTEXT)) unpin(cuda, lost || !entered);
    if (entered) fx_cuda_leave(device, before);
    if (pinned && !FX_KEEPS(NO_CONTEXT)) unpin(cuda, lost);
    before = fx_cuda_relax(driver);
    if (device->context) driver->DevicePrimaryCtxRelease(device->handle);
    fx_cuda_unrelax(driver, before);
    free(device);
}

/* The device's context, and whether it can take the addresses of pinned memory as they are: a batch has no other way to
 * say them. */
static bool retain(struct device *device, struct failure *failure) {
    struct fx_driver *driver = &device->engine->cuda->driver;
    int same_addresses = 0;
    CUstreamCaptureMode before = fx_cuda_relax(driver);
    bool good = fx_cuda_tried(failure, "cuDeviceGet", driver->DeviceGet(&device->handle, (int)device->ordinal)) &&
                fx_cuda_tried(failure, "cuDevicePrimaryCtxRetain",
                              driver->DevicePrimaryCtxRetain(&device->context, device->handle));
    if (good && driver->DeviceGetAttribute(&same_addresses, FX_CU_HOST_POINTERS, device->handle)) same_addresses = 0;
    device->one_by_one = !same_addresses && FX_KEEPS(HOST_ADDRESSES);
    fx_cuda_unrelax(driver, before);
    return good;
}

static int open_device(struct device *device, struct fx_error *error) {
    struct cuda *cuda = device->engine->cuda;
    struct failure failure = {0};
    CUstreamCaptureMode before;
    int r = 0;
    if (retain(device, &failure) && fx_cuda_enter(device, &before, &failure)) {
        if (fx_cuda_tried(&failure, "cuStreamCreate", cuda->driver.StreamCreate(&device->stream, FX_CU_STREAM_NON_BLOCKING)) &&
            !cuda->memory)
            r = pin(device, error);
        fx_cuda_leave(device, before);
    }
    return failure.result ? fx_cuda_explain(device, failure, error) : r;
}

static int thread_refused(struct fx_error *error, int r) {
    return r ? fx_error_set(error, "start of a thread for copies", "", -1, r) : 0;
}

/* There is one for all devices. */
static int start_copier(struct fx_engine *engine, struct fx_error *error) {
    struct cuda *cuda = engine->cuda;
    if (cuda->copying) return 0;
    int r = fx_thread_start(&cuda->copier, fx_cuda_copier_main, engine, "fxckpt-copy");
    cuda->copying = !r;
    return thread_refused(error, r);
}

/* Returns when it has the device's context. */
static int start_reaper(struct device *device, struct fx_error *error) {
    char name[16];
    snprintf(name, sizeof name, "fxckpt-gpu%u", device->ordinal % 100);
    int r = fx_thread_start(&device->reaper, fx_cuda_reaper_main, device, name);
    if (r) return thread_refused(error, r);
    fx_lock(device->engine);
    while (!device->reaper_began) fx_wait(device->engine, INT64_MAX);
    fx_unlock(device->engine);
    if (!device->reaper_failure.result) return 0;
    pthread_join(device->reaper, NULL);
    return fx_cuda_explain(device, device->reaper_failure, error);
}

int fx_cuda_device(struct fx_engine *engine, uint32_t ordinal, struct fx_error *error) {
    struct cuda *cuda = engine->cuda;
    if (!cuda || cuda->stopped || ordinal >= FX_MAX_DEVICES)
        return fx_error_set(error, "a CUDA device of an engine that has no driver open, or is closed", "", -1, EINVAL);
    if (cuda->devices[ordinal]) return 0;
    struct device *device = calloc(1, sizeof *device);
    if (!device) return fx_error_set(error, "cuda", "", -1, ENOMEM);
    bool first = !cuda->memory;
    device->engine = engine;
    device->ordinal = ordinal;
    int r = start_copier(engine, error); /* before there is anything to take back */
    if (!r) r = open_device(device, error);
    if (!r) r = start_reaper(device, error);
    if (r) {
        close_device(device, false);
        return r;
    }
    if (first) use_pinned_memory(engine);
    fx_lock(engine);
    cuda->devices[ordinal] = device;
    fx_unlock(engine);
    return 0;
}

/* ---- the end of all ---- */

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
    while (cuda->inside) fx_wait(engine, INT64_MAX);
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
    bool lost = anyone_lost(cuda);
    if (cuda->memory && !cuda->shared) engine->staging.n_free = engine->staging.n_made = engine->staging.limit = 0;
    for (uint32_t i = 0; i < FX_MAX_DEVICES; i++)
        if (cuda->devices[i]) close_device(cuda->devices[i], lost);
    pthread_cond_destroy(&cuda->work);
    fx_lock(engine);
    engine->cuda = NULL;
    fx_unlock(engine);
    free(cuda);
}
