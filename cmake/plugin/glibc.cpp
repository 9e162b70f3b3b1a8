// What compiled code takes from a recent glibc and the oldest one that the plug-in runs on (2.28) has not: defined here,
// for this library alone (exports.map).
//
// Compiled against glibc's headers of today, libstdc++ asks __libc_single_threaded (2.32). Rust's standard library was
// compiled against an old glibc, where the stat functions were to be linked statically into each library; since 2.33
// they are functions of libc.

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" {

// False is always safe: reference counts are then updated atomically.
char __libc_single_threaded = 0;

// The kernel's structure is glibc's on 64-bit machines.
static_assert(sizeof(void*) == 8, "the stat functions are for 64-bit machines");

int fstatat64(int directory, const char* path, struct stat64* result, int flags) noexcept {
  return static_cast<int>(syscall(SYS_newfstatat, directory, path, result, flags));
}

int stat64(const char* path, struct stat64* result) noexcept {
  return fstatat64(AT_FDCWD, path, result, 0);
}

int lstat64(const char* path, struct stat64* result) noexcept {
  return fstatat64(AT_FDCWD, path, result, AT_SYMLINK_NOFOLLOW);
}

int fstat64(int file, struct stat64* result) noexcept {
  return fstatat64(file, "", result, AT_EMPTY_PATH);
}

} // extern "C"
