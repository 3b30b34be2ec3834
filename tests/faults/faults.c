/* Counts the system calls of a process that change files below a folder, and at a chosen call kills the process, kills it
   with half of a write done, or refuses the call. Loaded with LD_PRELOAD, it is idle until `faults_arm`.

   What to do, and what happened, lies in a file that is mapped by the process under test and by the test, which reads it
   after a SIGKILL too. With a log, every call is recorded with the bytes that it wrote, in order: what a model of a
   power cut replays. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, KILL, TEAR, REFUSE_ONE, REFUSE_FROM, REFUSE_OPEN, REFUSE_READ, REFUSE_STAT, REFUSE_LIST };
enum { GO_ON = 0, TORN = -1 }; /* answers of `decide` that are no errno */

struct state {
  int mode, error;
  long at, count;
  int hit, pad;
  char root[PATH_MAX]; /* calls on paths below it count */
  char file[PATH_MAX]; /* what is not opened, read, looked at or listed, by the last four modes */
  char what[PATH_MAX]; /* the call that was hit, and its path */
};

static struct state *state;
static int log_file = -1;
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;

/* Take orders from the state in a file; record calls in another, if `log` is given. Returns 0, or -1. */
int faults_arm(const char *orders, const char *log) {
  int file = syscall(SYS_openat, AT_FDCWD, orders, O_RDWR | O_CLOEXEC, 0);
  if (file < 0) return -1;
  void *mapped = mmap(0, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  syscall(SYS_close, file);
  if (mapped == MAP_FAILED) return -1;
  if (log) log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
  state = mapped;
  return log && log_file < 0 ? -1 : 0;
}

static int is_armed(void) { return state && state->mode != OFF; }

static int is_below_root(const char *path) {
  size_t length = strlen(state->root);
  return length && !strncmp(path, state->root, length) && (path[length] == 0 || path[length] == '/');
}

static void path_of(int file, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
  path[length > 0 ? length : 0] = 0;
}

/* The path of a name in a folder given by its descriptor, without "/./", which is how Python joins to ".". */
static void path_in(int folder, const char *name, char *path) {
  char base[PATH_MAX] = "";
  if (name[0] != '/') {
    if (folder != AT_FDCWD) path_of(folder, base);
    else if (!getcwd(base, sizeof base)) base[0] = 0;
  }
  if (snprintf(path, PATH_MAX, "%s%s%s", base, name[0] == '/' ? "" : "/", name) >= PATH_MAX) path[0] = 0;
  for (char *dot; (dot = strstr(path, "/./"));) memmove(dot, dot + 2, strlen(dot + 2) + 1);
}

static long inode_of(int file) {
  struct stat found;
  return syscall(SYS_fstat, file, &found) ? 0 : (long)found.st_ino;
}

/* A line of the call, both paths, offset, number of bytes and inode, between tabs; then the bytes and a newline. */
static void record(const char *call, const char *path, const char *other, long offset, const void *data, long n, long inode) {
  if (log_file < 0) return;
  char head[3 * PATH_MAX];
  int length = snprintf(head, sizeof head, "%s\t%s\t%s\t%ld\t%ld\t%ld\n", call, path, other, offset, n, inode);
  struct iovec parts[] = {{head, length}, {(void *)data, data ? n : 0}, {"\n", 1}};
  pthread_mutex_lock(&log_lock);
  syscall(SYS_writev, log_file, parts, 3);
  pthread_mutex_unlock(&log_lock);
}

static void die(void) {
  for (;;) syscall(SYS_kill, getpid(), SIGKILL);
}

static void note_hit(const char *call, const char *path) {
  snprintf(state->what, sizeof state->what, "%s %s", call, path);
  state->hit = 1;
}

/* Count a call; return an errno to refuse it with, GO_ON, or TORN: do half of it, then die. */
static int decide(const char *call, const char *path) {
  long number = __sync_add_and_fetch(&state->count, 1);
  if (number == state->at && state->mode != COUNT) note_hit(call, path);
  if (state->mode == REFUSE_FROM) return number >= state->at ? state->error : GO_ON;
  if (number != state->at) return GO_ON;
  if (state->mode == KILL) die();
  return state->mode == TEAR ? TORN : state->mode == REFUSE_ONE ? state->error : GO_ON;
}

static int refuses_file(int mode, const char *call, const char *path) {
  if (state->mode != mode || strcmp(path, state->file)) return 0;
  note_hit(call, path);
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REFUSED(reason, value) do { errno = (reason); return (value); } while (0)

/* --- looking at names and listing folders */

static int refuses_path(int mode, const char *call, const char *path) {
  if (!is_below_root(path)) return 0;
  if (refuses_file(mode, call, path)) return 1;
  record(call, path, "", 0, 0, 0, 0);
  return 0;
}

/* Whether to refuse what is asked about a name; an empty one is that of an open file. */
static int refuses_name(int mode, const char *call, int folder, const char *name) {
  char path[PATH_MAX];
  if (!is_armed() || !name || !name[0]) return 0;
  path_in(folder, name, path);
  return refuses_path(mode, call, path);
}

#define LOOK(name, folder, path, call, ...) \
  int name(__VA_ARGS__) { \
    if (refuses_name(REFUSE_STAT, "stat", folder, path)) REFUSED(state->error, -1); \
    return call; \
  }
LOOK(stat, AT_FDCWD, path, syscall(SYS_newfstatat, AT_FDCWD, path, found, 0), const char *path, struct stat *found)
LOOK(stat64, AT_FDCWD, path, syscall(SYS_newfstatat, AT_FDCWD, path, found, 0), const char *path, struct stat64 *found)
LOOK(lstat, AT_FDCWD, path, syscall(SYS_newfstatat, AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW), const char *path, struct stat *found)
LOOK(lstat64, AT_FDCWD, path, syscall(SYS_newfstatat, AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW), const char *path, struct stat64 *found)
LOOK(fstatat, folder, path, syscall(SYS_newfstatat, folder, path, found, flags), int folder, const char *path, struct stat *found, int flags)
LOOK(fstatat64, folder, path, syscall(SYS_newfstatat, folder, path, found, flags), int folder, const char *path, struct stat64 *found, int flags)
LOOK(statx, folder, path, syscall(SYS_statx, folder, path, flags, mask, found), int folder, const char *path, int flags, unsigned mask, struct statx *found)
LOOK(access, AT_FDCWD, path, syscall(SYS_faccessat, AT_FDCWD, path, mode), const char *path, int mode)
LOOK(statvfs, AT_FDCWD, path, REAL(statvfs)(path, found), const char *path, struct statvfs *found)
LOOK(statvfs64, AT_FDCWD, path, REAL(statvfs64)(path, found), const char *path, struct statvfs64 *found)

DIR *opendir(const char *path) {
  if (refuses_name(REFUSE_LIST, "list", AT_FDCWD, path)) REFUSED(state->error, 0);
  return REAL(opendir)(path);
}
DIR *fdopendir(int file) {
  char path[PATH_MAX];
  if (is_armed()) path_of(file, path);
  if (is_armed() && refuses_path(REFUSE_LIST, "list", path)) REFUSED(state->error, 0);
  return REAL(fdopendir)(file);
}

/* --- opening */

static const char *kind_of_opening(const char *path, int flags) {
  struct stat found;
  if (syscall(SYS_newfstatat, AT_FDCWD, path, &found, 0)) return "create";
  return flags & O_TRUNC ? "truncate" : "reopen";
}

static int open_file(int folder, const char *name, int flags, mode_t mode) {
  if (!is_armed()) return syscall(SYS_openat, folder, name, flags, mode);
  char path[PATH_MAX];
  path_in(folder, name, path);
  if (!is_below_root(path)) return syscall(SYS_openat, folder, name, flags, mode);
  if (!(flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))) {
    if (refuses_file(REFUSE_OPEN, "open", path)) REFUSED(state->error, -1);
    int file = syscall(SYS_openat, folder, name, flags, mode), saved = errno;
    if (file >= 0) record("read", path, "", 0, 0, 0, 0);
    REFUSED(saved, file);
  }
  int answer = decide("open", path);
  if (answer > 0) REFUSED(answer, -1);
  const char *kind = kind_of_opening(path, flags);
  int file = syscall(SYS_openat, folder, name, flags, mode), saved = errno;
  record(file < 0 ? "failed" : kind, path, "", 0, 0, 0, file < 0 ? 0 : inode_of(file));
  if (answer == TORN) die();
  REFUSED(saved, file);
}

#define OPEN(name, ...) \
  int name(__VA_ARGS__, int flags, ...) { \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list more; \
      va_start(more, flags); \
      mode = va_arg(more, int); \
      va_end(more); \
    }
OPEN(open, const char *path) return open_file(AT_FDCWD, path, flags, mode); }
OPEN(open64, const char *path) return open_file(AT_FDCWD, path, flags, mode); }
OPEN(openat, int folder, const char *path) return open_file(folder, path, flags, mode); }
OPEN(openat64, int folder, const char *path) return open_file(folder, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_file(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* The C library's own streams call the kernel by themselves, so a file is opened for them here. */
static FILE *open_stream(const char *path, const char *mode, FILE *(*real)(const char *, const char *)) {
  if (!is_armed()) return real(path, mode);
  int plus = !!strchr(mode, '+'), flags = plus ? O_RDWR : O_WRONLY;
  if (mode[0] == 'r') flags = plus ? O_RDWR : O_RDONLY;
  else flags |= O_CREAT | (mode[0] == 'w' ? O_TRUNC : O_APPEND);
  if (strchr(mode, 'e')) flags |= O_CLOEXEC;
  if (strchr(mode, 'x')) flags |= O_EXCL;
  int file = open_file(AT_FDCWD, path, flags, 0666);
  return file < 0 ? 0 : fdopen(file, mode);
}
FILE *fopen(const char *path, const char *mode) { return open_stream(path, mode, REAL(fopen)); }
FILE *fopen64(const char *path, const char *mode) { return open_stream(path, mode, REAL(fopen64)); }

/* --- bytes */

static int refuses_reading(int file) {
  if (!state || state->mode != REFUSE_READ) return 0;
  char path[PATH_MAX];
  path_of(file, path);
  return refuses_file(REFUSE_READ, "read", path);
}

#define READ(type, name, arguments, call) \
  type name arguments { \
    if (refuses_reading(file)) REFUSED(state->error, (type)-1); \
    return (type)call; \
  }
READ(ssize_t, read, (int file, void *data, size_t n), syscall(SYS_read, file, data, n))
READ(ssize_t, pread, (int file, void *data, size_t n, off_t at), syscall(SYS_pread64, file, data, n, at))
READ(ssize_t, pread64, (int file, void *data, size_t n, off64_t at), syscall(SYS_pread64, file, data, n, at))
READ(ssize_t, readv, (int file, const struct iovec *parts, int n), syscall(SYS_readv, file, parts, n))
READ(ssize_t, preadv, (int file, const struct iovec *parts, int n, off_t at), syscall(SYS_preadv, file, parts, n, at, 0))
READ(ssize_t, preadv64, (int file, const struct iovec *parts, int n, off64_t at), syscall(SYS_preadv, file, parts, n, at, 0))
READ(void *, mmap, (void *to, size_t n, int protection, int flags, int file, off_t at), syscall(SYS_mmap, to, n, protection, flags, file, at))
READ(void *, mmap64, (void *to, size_t n, int protection, int flags, int file, off64_t at), syscall(SYS_mmap, to, n, protection, flags, file, at))

static ssize_t plain_write(int file, const void *data, size_t n, off_t at) {
  return at < 0 ? syscall(SYS_write, file, data, n) : syscall(SYS_pwrite64, file, data, n, at);
}

/* `at` is -1 for the position of the descriptor. */
static ssize_t write_bytes(int file, const void *data, size_t n, off_t at) {
  char path[PATH_MAX];
  if (is_armed()) path_of(file, path);
  if (!is_armed() || !is_below_root(path)) return plain_write(file, data, n, at);
  int answer = decide("write", path), flags = syscall(SYS_fcntl, file, F_GETFL);
  if (answer > 0) REFUSED(answer, -1);
  long offset = at;
  if (at < 0) offset = syscall(SYS_lseek, file, 0, flags & O_APPEND ? SEEK_END : SEEK_CUR);
  if (answer == TORN) {
    if (flags & O_DIRECT) syscall(SYS_fcntl, file, F_SETFL, flags & ~O_DIRECT); /* half a block may be written */
    n /= 2;
  }
  ssize_t written = plain_write(file, data, n, at);
  int saved = errno;
  record(written > 0 ? "write" : "failed", path, "", offset, data, written > 0 ? written : 0, inode_of(file));
  if (answer == TORN) die();
  REFUSED(saved, written);
}
ssize_t write(int file, const void *data, size_t n) { return write_bytes(file, data, n, -1); }
ssize_t pwrite(int file, const void *data, size_t n, off_t at) { return write_bytes(file, data, n, at); }
ssize_t pwrite64(int file, const void *data, size_t n, off64_t at) { return write_bytes(file, data, n, at); }

/* As many writes as there are parts: a kernel may do so too. */
static ssize_t write_parts(int file, const struct iovec *parts, int n_parts, off_t at) {
  ssize_t total = 0;
  for (int i = 0; i < n_parts; i++) {
    if (!parts[i].iov_len) continue;
    ssize_t written = write_bytes(file, parts[i].iov_base, parts[i].iov_len, at < 0 ? -1 : at + total);
    if (written < 0) return total ? total : -1;
    total += written;
    if ((size_t)written < parts[i].iov_len) break;
  }
  return total;
}
ssize_t writev(int file, const struct iovec *parts, int n) { return is_armed() ? write_parts(file, parts, n, -1) : syscall(SYS_writev, file, parts, n); }
ssize_t pwritev(int file, const struct iovec *parts, int n, off_t at) { return write_parts(file, parts, n, at); }
ssize_t pwritev64(int file, const struct iovec *parts, int n, off64_t at) { return write_parts(file, parts, n, at); }

/* Copies inside the kernel are refused, so that they come as reads and writes. */
ssize_t sendfile(int to, int from, off_t *at, size_t n) {
  if (is_armed()) REFUSED(EINVAL, -1);
  return syscall(SYS_sendfile, to, from, at, n);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t n) { return sendfile(to, from, at, n); }
ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t n, unsigned flags) {
  if (is_armed()) REFUSED(EXDEV, -1);
  return syscall(SYS_copy_file_range, from, from_at, to, to_at, n, flags);
}

/* --- calls on an open file */

#define ON_FILE(call, file, offset, n, system_call) \
  do { \
    char path[PATH_MAX]; \
    if (is_armed()) path_of(file, path); \
    if (!is_armed() || !is_below_root(path)) return system_call; \
    int answer = decide(call, path); \
    if (answer > 0) REFUSED(answer, -1); \
    int done = system_call, saved = errno; \
    record(done ? "failed" : call, path, "", offset, 0, n, inode_of(file)); \
    if (answer == TORN) die(); \
    REFUSED(saved, done); \
  } while (0)
int fsync(int file) { ON_FILE("fsync", file, 0, 0, syscall(SYS_fsync, file)); }
int fdatasync(int file) { ON_FILE("fsync", file, 0, 0, syscall(SYS_fdatasync, file)); }
int ftruncate(int file, off_t n) { ON_FILE("ftruncate", file, n, 0, syscall(SYS_ftruncate, file, n)); }
int ftruncate64(int file, off64_t n) { return ftruncate(file, n); }
static int reserve(int file, off_t at, off_t n) { ON_FILE("fallocate", file, at, n, syscall(SYS_fallocate, file, 0, at, n)); }
int posix_fallocate(int file, off_t at, off_t n) { return reserve(file, at, n) ? errno : 0; }
int posix_fallocate64(int file, off64_t at, off64_t n) { return reserve(file, at, n) ? errno : 0; }

/* --- names */

#define ON_NAME(call, folder, name, system_call) \
  do { \
    char path[PATH_MAX]; \
    if (is_armed()) path_in(folder, name, path); \
    if (!is_armed() || !is_below_root(path)) return system_call; \
    int answer = decide(call, path); \
    if (answer > 0) REFUSED(answer, -1); \
    int done = system_call, saved = errno; \
    record(done ? "failed" : call, path, "", 0, 0, 0, 0); \
    if (answer == TORN) die(); \
    REFUSED(saved, done); \
  } while (0)
int unlinkat(int folder, const char *name, int flags) {
  ON_NAME(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, name, syscall(SYS_unlinkat, folder, name, flags));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int remove(const char *name) { return unlink(name) && (errno == EISDIR || errno == EPERM) ? rmdir(name) : 0; }
int mkdirat(int folder, const char *name, mode_t mode) { ON_NAME("mkdir", folder, name, syscall(SYS_mkdirat, folder, name, mode)); }
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

#define ON_NAMES(call, folder, name, to_folder, to, system_call) \
  do { \
    char path[PATH_MAX], other[PATH_MAX]; \
    if (is_armed()) path_in(folder, name, path), path_in(to_folder, to, other); \
    if (!is_armed() || (!is_below_root(path) && !is_below_root(other))) return system_call; \
    int answer = decide(call, other); \
    if (answer > 0) REFUSED(answer, -1); \
    int done = system_call, saved = errno; \
    record(done ? "failed" : call, path, other, 0, 0, 0, 0); \
    if (answer == TORN) die(); \
    REFUSED(saved, done); \
  } while (0)
int renameat2(int folder, const char *name, int to_folder, const char *to, unsigned flags) {
  ON_NAMES("rename", folder, name, to_folder, to, syscall(SYS_renameat2, folder, name, to_folder, to, flags));
}
int renameat(int folder, const char *name, int to_folder, const char *to) { return renameat2(folder, name, to_folder, to, 0); }
int rename(const char *name, const char *to) { return renameat2(AT_FDCWD, name, AT_FDCWD, to, 0); }
int linkat(int folder, const char *name, int to_folder, const char *to, int flags) {
  ON_NAMES("link", folder, name, to_folder, to, syscall(SYS_linkat, folder, name, to_folder, to, flags));
}
int link(const char *name, const char *to) { return linkat(AT_FDCWD, name, AT_FDCWD, to, 0); }
int symlinkat(const char *target, int folder, const char *name) { ON_NAME("symlink", folder, name, syscall(SYS_symlinkat, target, folder, name)); }
int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }
