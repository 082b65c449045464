/* The CUDA driver as far as the engine uses it. Opened at run time: no toolkit to build, nothing linked.
 * Types and numbers are those of the driver's stable interface (cuda.h), which is not needed here; a test that reads
 * cuda.h first compares the two. */
#ifndef FX_DRIVER_H
#define FX_DRIVER_H

#include "engine.h"

#ifndef CUDA_VERSION /* of cuda.h */
typedef int CUresult; /* 0: success */
typedef int CUdevice;
typedef int CUdevice_attribute;
typedef int CUstreamCaptureMode;
typedef int CUstreamCaptureStatus; /* 0: it captures nothing */
typedef int CUdriverProcAddressQueryResult;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef unsigned long long CUdeviceptr;
typedef struct fx_copy_attributes CUmemcpyAttributes;
#endif

struct fx_location {
    int type, id;
};

struct fx_copy_attributes {
    int source_order;
    struct fx_location from, to; /* hints, for memory that has no fixed place */
    unsigned flags;
};

enum {
    FX_CU_LEGACY_STREAM = 1,       /* of cuGetProcAddress: stream 0 is the legacy default stream, as torch has it */
    FX_CU_STREAM_NON_BLOCKING = 1, /* does not wait for the legacy default stream, nor it for us */
    FX_CU_EVENT_BLOCKING_SYNC = 1, /* a host wait sleeps */
    FX_CU_EVENT_NO_TIMING = 2,     /* no time stamp, which makes events cheap */
    FX_CU_HOST_PORTABLE = 1,       /* pinned for every context */
    FX_CU_SOURCE_IN_STREAM_ORDER = 1,
    FX_CU_CAPTURE_RELAXED = 2,
    FX_CU_HOST_POINTERS = 91, /* attribute: registered memory has the same address on the device */
    FX_CU_ERROR_OUT_OF_MEMORY = 2,
    FX_CU_ERROR_CAPTURE_FIRST = 900, /* to CAPTURE_LAST: refused because a graph is captured, here or elsewhere */
    FX_CU_ERROR_CAPTURE_LAST = 908,
};

/* The entry points, and the CUDA version whose form of each is meant: a later form may take other arguments. The
 * second kind may be missing. */
#define FX_DRIVER_ENTRIES(NEEDED, OPTIONAL)                                                                            \
    NEEDED(Init, 2000)                                                                                                 \
    NEEDED(GetErrorName, 6000)                                                                                         \
    NEEDED(GetErrorString, 6000)                                                                                       \
    NEEDED(DeviceGet, 2000)                                                                                            \
    NEEDED(DeviceGetAttribute, 2000)                                                                                   \
    NEEDED(DeviceGetPCIBusId, 4010)                                                                                    \
    NEEDED(DevicePrimaryCtxRetain, 7000)                                                                               \
    NEEDED(DevicePrimaryCtxRelease, 11000)                                                                             \
    NEEDED(CtxPushCurrent, 4000)                                                                                       \
    NEEDED(CtxPopCurrent, 4000)                                                                                        \
    NEEDED(StreamCreate, 2000)                                                                                         \
    NEEDED(StreamDestroy, 4000)                                                                                        \
    NEEDED(StreamSynchronize, 2000)                                                                                    \
    NEEDED(StreamWaitEvent, 3020)                                                                                      \
    NEEDED(StreamIsCapturing, 10000)                                                                                   \
    NEEDED(EventCreate, 2000)                                                                                          \
    NEEDED(EventDestroy, 4000)                                                                                         \
    NEEDED(EventRecord, 2000)                                                                                          \
    NEEDED(EventSynchronize, 2000)                                                                                     \
    NEEDED(MemcpyDtoHAsync, 3020)                                                                                      \
    NEEDED(MemHostRegister, 6050)                                                                                      \
    NEEDED(MemHostUnregister, 4000)                                                                                    \
    NEEDED(ThreadExchangeStreamCaptureMode, 10010)                                                                     \
    OPTIONAL(MemcpyBatchAsync, 12080)

struct fx_driver {
    CUresult (*Init)(unsigned flags);
    CUresult (*GetErrorName)(CUresult error, const char **name);
    CUresult (*GetErrorString)(CUresult error, const char **text);
    CUresult (*DeviceGet)(CUdevice *device, int ordinal);
    CUresult (*DeviceGetAttribute)(int *value, CUdevice_attribute attribute, CUdevice device);
    CUresult (*DeviceGetPCIBusId)(char *text, int n, CUdevice device);
    CUresult (*DevicePrimaryCtxRetain)(CUcontext *context, CUdevice device);
    CUresult (*DevicePrimaryCtxRelease)(CUdevice device);
    CUresult (*CtxPushCurrent)(CUcontext context);
    CUresult (*CtxPopCurrent)(CUcontext *context);
    CUresult (*StreamCreate)(CUstream *stream, unsigned flags);
    CUresult (*StreamDestroy)(CUstream stream);
    CUresult (*StreamSynchronize)(CUstream stream);
    CUresult (*StreamWaitEvent)(CUstream stream, CUevent event, unsigned flags);
    CUresult (*StreamIsCapturing)(CUstream stream, CUstreamCaptureStatus *status);
    CUresult (*EventCreate)(CUevent *event, unsigned flags);
    CUresult (*EventDestroy)(CUevent event);
    CUresult (*EventRecord)(CUevent event, CUstream stream);
    CUresult (*EventSynchronize)(CUevent event);
    CUresult (*MemcpyDtoHAsync)(void *to, CUdeviceptr from, size_t n, CUstream stream);
    CUresult (*MemHostRegister)(void *memory, size_t n, unsigned flags);
    CUresult (*MemHostUnregister)(void *memory);
    CUresult (*ThreadExchangeStreamCaptureMode)(CUstreamCaptureMode *mode);
    /* NULL before CUDA 12.8, and with FXCKPT_CUDA_BATCH=0 in the environment */
    CUresult (*MemcpyBatchAsync)(CUdeviceptr *to, CUdeviceptr *from, size_t *n, size_t count, CUmemcpyAttributes *attributes,
                                 size_t *starts, size_t n_attributes, size_t *failed, CUstream stream);
};

/* How entry points are found: since CUDA 12, and before. */
typedef CUresult (*fx_get_proc_2)(const char *name, void **function, int version, uint64_t flags,
                                  CUdriverProcAddressQueryResult *status);
typedef CUresult (*fx_get_proc_1)(const char *name, void **function, int version, uint64_t flags);

/* Opens the driver (NULL or "": libcuda.so.1) and initialises it. The library stays open for good: the driver
 * does not survive being unloaded. */
int fx_driver_open(const char *path, struct fx_driver *out, struct fx_error *error);
/* Fills *error: the call that failed, the driver's name for the error and its text. Returns -EREMOTEIO, which
 * no file operation gives. */
int fx_driver_error(const struct fx_driver *driver, const char *call, CUresult result, struct fx_error *error);

#endif
