/* Compiled, never run: what csrc/cuda/driver.h says of the driver against the headers of a CUDA toolkit. */
#include <cudaTypedefs.h>

#include "cuda/driver.h"

#define SAME_TYPE(ours, theirs) _Static_assert(__builtin_types_compatible_p(ours, theirs), #theirs)
#define SAME_VALUE(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #theirs)

/* Each entry point takes and gives what it does in the version that is asked for. */
#define ENTRY(name, version) SAME_TYPE(__typeof__(((struct fx_driver *)0)->name), PFN_cu##name##_v##version);
FX_DRIVER_ENTRIES(ENTRY, ENTRY)
SAME_TYPE(fx_get_proc_2, PFN_cuGetProcAddress_v12000);
SAME_TYPE(fx_get_proc_1, PFN_cuGetProcAddress_v11030);

/* Types that driver.h names itself where this header is not read. */
SAME_TYPE(CUdevice, int);
SAME_TYPE(CUcontext, struct CUctx_st *);
SAME_TYPE(CUstream, struct CUstream_st *);
SAME_TYPE(CUevent, struct CUevent_st *);
SAME_TYPE(CUdeviceptr, unsigned long long);
#define AN_INT(type) _Static_assert(sizeof(type) == sizeof(int), #type)
AN_INT(CUresult);
AN_INT(CUdevice_attribute);
AN_INT(CUstreamCaptureMode);
AN_INT(CUstreamCaptureStatus);
AN_INT(CUdriverProcAddressQueryResult);

#define SAME_FIELD(ours, theirs)                                                                                       \
    _Static_assert(offsetof(struct fx_copy_attributes, ours) == offsetof(CUmemcpyAttributes, theirs) &&                \
                       sizeof(((struct fx_copy_attributes *)0)->ours) == sizeof(((CUmemcpyAttributes *)0)->theirs),    \
                   #theirs)
SAME_FIELD(source_order, srcAccessOrder);
SAME_FIELD(from, srcLocHint);
SAME_FIELD(from.type, srcLocHint.type);
SAME_FIELD(from.id, srcLocHint.id);
SAME_FIELD(to, dstLocHint);
SAME_FIELD(flags, flags);
_Static_assert(sizeof(struct fx_copy_attributes) == sizeof(CUmemcpyAttributes), "CUmemcpyAttributes");

SAME_VALUE(0, CUDA_SUCCESS);
SAME_VALUE(0, CU_STREAM_CAPTURE_STATUS_NONE);
SAME_VALUE(FX_CU_LEGACY_STREAM, CU_GET_PROC_ADDRESS_LEGACY_STREAM);
SAME_VALUE(FX_CU_STREAM_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
SAME_VALUE(FX_CU_EVENT_BLOCKING_SYNC, CU_EVENT_BLOCKING_SYNC);
SAME_VALUE(FX_CU_EVENT_NO_TIMING, CU_EVENT_DISABLE_TIMING);
SAME_VALUE(FX_CU_HOST_PORTABLE, CU_MEMHOSTREGISTER_PORTABLE);
SAME_VALUE(FX_CU_SOURCE_IN_STREAM_ORDER, CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
SAME_VALUE(FX_CU_CAPTURE_RELAXED, CU_STREAM_CAPTURE_MODE_RELAXED);
SAME_VALUE(FX_CU_HOST_POINTERS, CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM);
SAME_VALUE(FX_CU_ERROR_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME_VALUE(FX_CU_ERROR_CAPTURE_FIRST, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
SAME_VALUE(FX_CU_ERROR_CAPTURE_LAST, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
