/* Finds the CUDA driver's entry points at run time. */
#include "cuda/driver.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* An entry point by its version: a plain dlsym gives the oldest form. */
struct entry {
    const char *name;
    int version;
    size_t at;
    int optional;
};

#define NEEDED(name, version) {"cu" #name, version, offsetof(struct fx_driver, name), 0},
#define OPTIONAL(name, version) {"cu" #name, version, offsetof(struct fx_driver, name), 1},

static const struct entry entries[] = {FX_DRIVER_ENTRIES(NEEDED, OPTIONAL)};

struct finder {
    fx_get_proc_2 newer;
    fx_get_proc_1 older;
};

/* POSIX promises that a function pointer fits; ISO C has no cast for it. */
static void assign(void *to, void *symbol) { memcpy(to, &symbol, sizeof symbol); }

/* NULL also where the driver calls the search a success: it has no form of it for this version. */
static void *find(const struct finder *finder, const struct entry *entry) {
    void *function = NULL;
    CUdriverProcAddressQueryResult status = 0;
    CUresult r = finder->newer
                     ? finder->newer(entry->name, &function, entry->version, FX_CU_LEGACY_STREAM, &status)
                     : finder->older(entry->name, &function, entry->version, FX_CU_LEGACY_STREAM);
    return r ? NULL : function;
}

static int find_all(const struct finder *finder, struct fx_driver *out, struct fx_error *error) {
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        void *function = find(finder, &entries[i]);
        if (!function && !entries[i].optional)
            return fx_error_set(error, "cuGetProcAddress", entries[i].name, -1, ENOSYS);
        assign((char *)out + entries[i].at, function);
    }
    const char *batch = getenv("FXCKPT_CUDA_BATCH");
    if (batch && !strcmp(batch, "0")) out->MemcpyBatchAsync = NULL;
    return 0;
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
    int found = find_all(&finder, out, error);
    if (found) return found;
    CUresult r = out->Init(0);
    return r ? fx_driver_error(out, "cuInit", r, error) : 0;
}

int fx_driver_error(const struct fx_driver *driver, const char *call, CUresult result, struct fx_error *error) {
    const char *name = NULL, *text = NULL;
    char what[512];
    if (driver->GetErrorName(result, &name) || !name) name = "an error that the driver has no name for";
    if (driver->GetErrorString(result, &text) || !text) text = "no text";
    snprintf(what, sizeof what, "%s (%d): %s", name, (int)result, text);
    return fx_error_set(error, call, what, -1, EREMOTEIO);
}
