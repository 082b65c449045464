/* What tests use of the engine beside fxckpt/engine/cdef.h: the instruments, and what only they call. */

#define FX_OPS ...
uint32_t fx_crc32c_portable(uint32_t crc, const void *data, size_t n);
int fx_io_record(const char *path, int append);
int fx_io_stop_recording(void);
void fx_io_fail(int op, int64_t nth, int err);
void fx_io_delay(int op, int64_t ns);
int64_t fx_io_calls(int op);
const char *fx_op_name(int op);
