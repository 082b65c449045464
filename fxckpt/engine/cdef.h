/* What Python uses of csrc/engine.h, where it is explained. */

#define FX_ABI ...
#define FX_BLOCK ...
#define FX_MISMATCH ...
#define FX_TRUNCATED ...

struct fx_error {
    const char *operation;
    int err;
    int64_t offset;
    uint32_t expected;
    uint32_t found;
    char path[...];
};

uint32_t fx_crc32c(uint32_t crc, const void *data, size_t n);
const char *fx_crc32c_name(void);
void fx_crc32c_blocks(uint32_t *crcs, uint64_t block, uint64_t offset, const void *data, size_t n);
size_t fx_sums_text(const uint32_t *crcs, size_t n, char *out);
int64_t fx_sums_parse(const char *text, size_t n, uint32_t *crcs);

struct fx_view {
    char *address;
    int32_t ndim;
    int64_t *sizes;
    int64_t *strides;
    uint32_t device;
};

struct fx_file {
    uint64_t nbytes;
    const void *header;
    uint64_t header_nbytes;
};

struct fx_tensor {
    uint32_t layer;
    uint32_t file;
    uint64_t offset;
    uint64_t nbytes;
    uint64_t itemsize;
};

struct fx_plan;
int fx_plan_new(const struct fx_file *files, uint32_t n_files, const struct fx_tensor *tensors, uint32_t n_tensors,
                uint32_t n_layers, uint64_t chunk_bytes, uint64_t sum_bytes, struct fx_plan **out,
                struct fx_error *error);
void fx_plan_free(struct fx_plan *plan);
void fx_plan_file_sums(const struct fx_plan *plan, uint32_t file, uint32_t *first, uint32_t *count);

struct fx_sources;
struct fx_sources *fx_sources_new(const struct fx_view *views, uint32_t n);
void fx_sources_free(struct fx_sources *sources);

struct fx_options {
    uint32_t threads;
    uint64_t chunk_bytes;
    uint64_t staging_bytes;
    int mock;
    int direct;
};

struct fx_statistics {
    uint64_t bytes_written;
    uint64_t copy_ns;
    uint64_t write_ns;
    uint64_t stall_ns;
    uint64_t staging_bytes;
    uint64_t staging_peak_bytes;
    uint64_t buffered_files;
    uint64_t unbatched_devices;
};

struct fx_engine;
int fx_engine_new(const struct fx_options *options, struct fx_engine **out, struct fx_error *error);
int fx_engine_close(struct fx_engine *engine, int64_t timeout_ns);
void fx_engine_free(struct fx_engine *engine);
void fx_engine_statistics(struct fx_engine *engine, struct fx_statistics *out);
const int64_t *fx_engine_pending(const struct fx_engine *engine);

struct fx_stream {
    uint32_t device;
    uint64_t handle;
};

struct fx_checkpoint;
struct fx_file_id {
    uint64_t device, inode, nbytes;
    int64_t modified_ns, changed_ns;
};
struct fx_held {
    const uint8_t *has;
    const uint32_t *crcs;
    const struct fx_file_id *files;
};
int fx_begin(struct fx_engine *engine, struct fx_plan *plan, int at, const char *const *paths, const struct fx_held *held,
             struct fx_checkpoint **out, struct fx_error *error);
uint64_t fx_file_inode(const struct fx_checkpoint *ck, uint32_t file);
int fx_emit(struct fx_checkpoint *ck, uint32_t layer, struct fx_sources *sources);
int fx_emit_from(struct fx_checkpoint *ck, uint32_t layer, struct fx_sources *sources,
                 const struct fx_stream *streams, uint32_t n_streams);
uint32_t fx_emitted(struct fx_checkpoint *ck);
int fx_copied(struct fx_checkpoint *ck, int64_t timeout_ns, struct fx_error *error);
int fx_durable(struct fx_checkpoint *ck, int64_t timeout_ns, struct fx_error *error);
void fx_cancel(struct fx_checkpoint *ck);
int fx_settled(struct fx_checkpoint *ck, int64_t timeout_ns);
const uint32_t *fx_crcs(const struct fx_checkpoint *ck);
void fx_checkpoint_release(struct fx_checkpoint *ck);

int fx_fence_for(struct fx_engine *engine, int64_t layer, int64_t timeout_ns, const struct fx_stream *streams,
                 uint32_t n_streams);
int fx_cuda_open(struct fx_engine *engine, const char *path, struct fx_error *error);
int fx_cuda_device(struct fx_engine *engine, uint32_t ordinal, struct fx_error *error);

struct fx_fetch;
int fx_fetch_new(struct fx_engine *engine, const struct fx_stream *stream, const void *from, uint64_t nbytes,
                 struct fx_fetch **out, struct fx_error *error);
int fx_fetch_wait(struct fx_fetch *fetch, void *to, struct fx_error *error);
void fx_fetch_free(struct fx_fetch *fetch);

struct fx_ring;
struct fx_posted {
    uint64_t checkpoint;
    uint32_t chunk;
    uint32_t slot;
    uint32_t same;
};
int fx_ring_new(uint32_t slots, uint64_t slot_bytes, struct fx_ring **out, struct fx_error *error);
int fx_ring_fd(const struct fx_ring *ring);
int fx_relay_revive(struct fx_engine *engine, int peer, struct fx_error *error);
int fx_ring_open(int fd, struct fx_ring **out, struct fx_error *error);
void fx_ring_free(struct fx_ring *ring);
int fx_ring_next(struct fx_ring *ring, uint32_t *from, struct fx_posted *out);
void fx_ring_return(struct fx_ring *ring, uint32_t slot, int freed);
int fx_relay_trainer(struct fx_engine *engine, struct fx_ring *ring, int posted, int freed, int peer, struct fx_error *error);
int fx_relay_monitor(struct fx_engine *engine, struct fx_ring *ring, int freed, struct fx_error *error);
uint64_t fx_id(const struct fx_checkpoint *ck);
int fx_emit_posted(struct fx_checkpoint *ck, const struct fx_posted *posted);

struct fx_span {
    uint32_t kind, track;
    uint64_t checkpoint;
    int64_t layer, chunk;
    uint64_t nbytes;
    int64_t begin_ns, end_ns;
};
int fx_trace(struct fx_engine *engine, uint32_t capacity);
uint32_t fx_trace_take(struct fx_engine *engine, struct fx_span *out, uint32_t n, uint64_t *dropped);

struct fx_target {
    uint64_t offset;
    uint64_t nbytes;
    uint64_t itemsize;
    struct fx_view view;
};

struct fx_range {
    uint64_t first;
    uint64_t n;
};

int fx_read_verified(int fd, const char *path, uint64_t nbytes, uint64_t chunk_bytes, const uint32_t *crcs,
                     const struct fx_range *ranges, uint32_t n_ranges, const struct fx_target *targets, uint32_t n_targets,
                     uint32_t threads, struct fx_error *error);

int fx_open(int at, const char *path, int flags, int mode);
int fx_close(int fd);
int fx_pwrite(int fd, const void *data, size_t n, int64_t offset, size_t *done);
int fx_pread(int fd, void *data, size_t n, int64_t offset, size_t *done);
int fx_ftruncate(int fd, int64_t nbytes);
int fx_fallocate(int fd, int64_t nbytes);
int fx_fdatasync(int fd);
int fx_fsync(int fd);
int fx_rename(int at, const char *from, int into, const char *to);
int fx_exchange(int at, const char *one, int into, const char *other);
int fx_unlink(int at, const char *path);
int fx_mkdir(int at, const char *path, int mode);
int fx_rmdir(int at, const char *path);

int fx_fork_close(int fd);
void fx_fork_keep(int fd);

void fx_spread(const void *value, uint32_t nbytes, const uint64_t *addresses, uint64_t n);
#define FX_FLOAT_MODE ...
void fx_float_mode(char *mode);
void fx_float_mode_use(const char *mode);
