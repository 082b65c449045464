/* Finds the CUDA driver's entry points at run time. */
#include "cuda/driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

/* An entry point, and the CUDA version whose form of it is meant: a later form may take other arguments, and a
 * plain dlsym gives the oldest. */
struct entry {
    const char *name;
    int version;
    size_t at;
    int optional;
};

#define ENTRY(name, version) {"cu" #name, version, offsetof(struct fx_driver, name), 0}

static const struct entry entries[] = {
    ENTRY(Init, 2000),
    ENTRY(DriverGetVersion, 2020),
    ENTRY(GetErrorName, 6000),
    ENTRY(GetErrorString, 6000),
    ENTRY(DeviceGetCount, 2000),
    ENTRY(DeviceGet, 2000),
    ENTRY(DeviceGetPCIBusId, 4010),
    ENTRY(DevicePrimaryCtxRetain, 7000),
    ENTRY(DevicePrimaryCtxRelease, 11000),
    ENTRY(CtxPushCurrent, 4000),
    ENTRY(CtxPopCurrent, 4000),
    ENTRY(StreamCreate, 2000),
    ENTRY(StreamDestroy, 4000),
    ENTRY(StreamSynchronize, 2000),
    ENTRY(StreamWaitEvent, 3020),
    ENTRY(EventCreate, 2000),
    ENTRY(EventDestroy, 4000),
    ENTRY(EventRecord, 2000),
    ENTRY(EventSynchronize, 2000),
    ENTRY(MemcpyDtoHAsync, 3020),
    ENTRY(MemHostRegister, 6050),
    ENTRY(MemHostUnregister, 4000),
    ENTRY(ThreadExchangeStreamCaptureMode, 10010),
    {"cuMemcpyBatchAsync", 12080, offsetof(struct fx_driver, MemcpyBatchAsync), 1},
};

typedef CUresult get_proc_2(const char *name, void **function, int version, uint64_t flags, int *status);
typedef CUresult get_proc_1(const char *name, void **function, int version, uint64_t flags);

struct finder {
    get_proc_2 *newer; /* of CUDA 12 */
    get_proc_1 *older;
};

/* POSIX promises that a function pointer fits; ISO C has no cast for it. */
static void assign(void *to, void *symbol) { memcpy(to, &symbol, sizeof symbol); }

static void *find(const struct finder *finder, const struct entry *entry) {
    void *function = NULL;
    int status = 0;
    CUresult r = finder->newer
                     ? finder->newer(entry->name, &function, entry->version, CU_LEGACY_STREAM, &status)
                     : finder->older(entry->name, &function, entry->version, CU_LEGACY_STREAM);
    return r ? NULL : function;
}

int fx_driver_open(const char *path, struct fx_driver *out, struct fx_error *error) {
    const char *name = path && *path ? path : "libcuda.so.1";
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return fx_error_set(error, "dlopen of the CUDA driver (is an NVIDIA driver installed here?)", name, -1,
                            ENOENT);
    struct finder finder = {0};
    assign(&finder.newer, dlsym(library, "cuGetProcAddress_v2"));
    assign(&finder.older, dlsym(library, "cuGetProcAddress"));
    if (!finder.newer && !finder.older)
        return fx_error_set(error, "cuGetProcAddress (the NVIDIA driver is older than CUDA 11.3)", name, -1, ENOSYS);
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        void *function = find(&finder, &entries[i]);
        if (!function && !entries[i].optional)
            return fx_error_set(error, "cuGetProcAddress", entries[i].name, -1, ENOSYS);
        assign((char *)out + entries[i].at, function);
    }
    CUresult r = out->Init(0);
    return r ? fx_driver_error(out, "cuInit", r, error) : 0;
}

int fx_driver_error(const struct fx_driver *driver, const char *call, CUresult result, struct fx_error *error) {
    const char *name = NULL, *text = NULL;
    char what[512];
    if (driver->GetErrorName(result, &name) || !name) name = "an error that the driver has no name for";
    if (driver->GetErrorString(result, &text) || !text) text = "no text";
    snprintf(what, sizeof what, "%s (%d): %s", name, result, text);
    return fx_error_set(error, call, what, -1, EREMOTEIO);
}
