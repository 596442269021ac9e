/* Keeps what a power cut would leave of the files under SYNCED_ROOT, in SYNCED_MIRROR. For LD_PRELOAD.
 *
 * The strictest file system that POSIX allows: of a file there is what its last fsync or fdatasync wrote, in `inode-N`; of a
 * directory there are the names that its own last fsync found, in `dir-PATH`, with `%` for `/`. What is read before the real call
 * is put in place after it. Files are read through the caller's descriptor: closing another one would drop its POSIX locks.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int call(int);

static void list(const char *path, FILE *into) {
    DIR *directory = opendir(path);
    if (directory == NULL) abort();
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;)
        if (entry->d_type == DT_REG) fprintf(into, "%lu %s\n", (unsigned long)entry->d_ino, entry->d_name);
    closedir(directory);
}

static void copy(int fd, FILE *into) {
    static _Thread_local char block[1 << 16];
    off_t at = 0;
    for (ssize_t got; (got = pread(fd, block, sizeof block, at)) != 0; at += got) {
        if (got < 0) abort();
        fwrite(block, 1, (size_t)got, into);
    }
}

static int keep(int fd, const char *name) {
    call *real = (call *)dlsym(RTLD_NEXT, name);
    const char *root = getenv("SYNCED_ROOT"), *mirror = getenv("SYNCED_MIRROR");
    char link[64], path[PATH_MAX] = "", draft[PATH_MAX], kept[2 * PATH_MAX];
    struct stat is;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0 || root == NULL || mirror == NULL || fstat(fd, &is) < 0) return real(fd);
    size_t above = strlen(root);
    if (strncmp(path, root, above) != 0 || (path[above] != '/' && path[above] != '\0')) return real(fd);

    snprintf(draft, sizeof draft, "%s/draft-%d", mirror, (int)getpid());
    FILE *into = fopen(draft, "w");
    if (into == NULL) abort();
    if (S_ISDIR(is.st_mode)) {
        list(path, into);
        for (char *each = path; *each != '\0'; each++)
            if (*each == '/') *each = '%';
        snprintf(kept, sizeof kept, "%s/dir-%s", mirror, path[above] == '\0' ? "" : path + above + 1);
    } else {
        copy(fd, into);
        snprintf(kept, sizeof kept, "%s/inode-%lu", mirror, (unsigned long)is.st_ino);
    }
    if (fclose(into) != 0) abort();
    int answer = real(fd);
    if (answer == 0 && rename(draft, kept) != 0) abort();
    return answer;
}

int fsync(int fd) { return keep(fd, "fsync"); }
int fdatasync(int fd) { return keep(fd, "fdatasync"); }
