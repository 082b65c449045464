/* Instruments for tests: a log, faults and delays. Only in builds with FX_TESTING; off until first used. */
#ifndef FX_INSTRUMENTS_H
#define FX_INSTRUMENTS_H

#include "engine.h"

enum fx_op {
    FX_OPEN,
    FX_CLOSE,
    FX_PWRITE,
    FX_PREAD,
    FX_FTRUNCATE,
    FX_FDATASYNC,
    FX_FSYNC,
    FX_RENAME,
    FX_UNLINK,
    FX_MKDIR,
    FX_RMDIR,
    FX_FALLOCATE,
    FX_EXCHANGE,
    FX_COPY /* not a file operation: only for fx_io_delay */,
    FX_OPS
};

/* Writes every mutating call, with its data and in its true order, to the file at `path`; with `append`, behind what is
 * there already: several processes may record to one file at a time. */
int fx_io_record(const char *path, int append);
int fx_io_stop_recording(void);
/* The nth call from now (1: the next), of this kind or of any (-1), fails with err and is not carried out;
 * err 0: a pwrite or pread transfers only half. nth 0: no more faults. */
void fx_io_fail(int op, int64_t nth, int err);
/* Each call of this kind takes this much longer; FX_COPY: each piece copied by a writer. */
void fx_io_delay(int op, int64_t ns);
int64_t fx_io_calls(int op); /* so far, of this kind or of all (-1), since the instruments were first used */
const char *fx_op_name(int op);

#endif
