/* The CUDA driver as far as the engine uses it. Opened at run time: no toolkit to build, nothing linked.
 * Types and numbers are those of the driver's stable interface (cuda.h), which is not needed here. */
#ifndef FX_DRIVER_H
#define FX_DRIVER_H

#include "engine.h"

typedef int CUresult; /* 0: success */
typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef unsigned long long CUdeviceptr;

struct cu_location {
    int type, id;
};

struct cu_copy_attributes {
    int source_order; /* 1: in stream order */
    struct cu_location from, to;
    unsigned flags;
};

enum {
    CU_LEGACY_STREAM = 1,      /* of cuGetProcAddress: stream 0 is the legacy default stream, as torch has it */
    CU_STREAM_NON_BLOCKING = 1, /* does not wait for the legacy default stream, nor it for us */
    CU_EVENT_QUIET = 1 | 2,    /* a host wait sleeps; no time stamp, which makes events cheap */
    CU_HOST_PORTABLE = 1,      /* pinned for every context */
    CU_SOURCE_IN_STREAM_ORDER = 1,
    CU_CAPTURE_RELAXED = 2,
    CU_ERROR_NOT_SUPPORTED = 801,
    CU_ERROR_NOT_FOUND = 500,
};

struct fx_driver {
    CUresult (*Init)(unsigned flags);
    CUresult (*DriverGetVersion)(int *version);
    CUresult (*GetErrorName)(CUresult error, const char **name);
    CUresult (*GetErrorString)(CUresult error, const char **text);
    CUresult (*DeviceGetCount)(int *count);
    CUresult (*DeviceGet)(CUdevice *device, int ordinal);
    CUresult (*DeviceGetPCIBusId)(char *text, int n, CUdevice device);
    CUresult (*DevicePrimaryCtxRetain)(CUcontext *context, CUdevice device);
    CUresult (*DevicePrimaryCtxRelease)(CUdevice device);
    CUresult (*CtxPushCurrent)(CUcontext context);
    CUresult (*CtxPopCurrent)(CUcontext *context);
    CUresult (*StreamCreate)(CUstream *stream, unsigned flags);
    CUresult (*StreamDestroy)(CUstream stream);
    CUresult (*StreamSynchronize)(CUstream stream);
    CUresult (*StreamWaitEvent)(CUstream stream, CUevent event, unsigned flags);
    CUresult (*EventCreate)(CUevent *event, unsigned flags);
    CUresult (*EventDestroy)(CUevent event);
    CUresult (*EventRecord)(CUevent event, CUstream stream);
    CUresult (*EventSynchronize)(CUevent event);
    CUresult (*MemcpyDtoHAsync)(void *to, CUdeviceptr from, size_t n, CUstream stream);
    CUresult (*MemHostRegister)(void *memory, size_t n, unsigned flags);
    CUresult (*MemHostUnregister)(void *memory);
    CUresult (*ThreadExchangeStreamCaptureMode)(int *mode);
    /* NULL before CUDA 12.8 */
    CUresult (*MemcpyBatchAsync)(CUdeviceptr *to, CUdeviceptr *from, size_t *n, size_t count,
                                 struct cu_copy_attributes *attributes, size_t *starts, size_t n_attributes,
                                 size_t *failed, CUstream stream);
};

/* Opens the driver (NULL or "": libcuda.so.1) and initialises it. The library stays open for good: the driver
 * does not survive being unloaded. */
int fx_driver_open(const char *path, struct fx_driver *out, struct fx_error *error);
/* Fills *error: the call that failed, the driver's name for the error and its text. Returns -EREMOTEIO, which
 * no file operation gives. */
int fx_driver_error(const struct fx_driver *driver, const char *call, CUresult result, struct fx_error *error);

#endif
