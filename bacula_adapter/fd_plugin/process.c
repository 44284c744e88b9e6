/* SPDX-License-Identifier: AGPL-3.0-or-later */
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TERM_MS 5000
#define KILL_MS 10000

extern char **environ;

int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void close_one(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static pid_t child_of(const struct process *process)
{
    pid_t pid = atomic_load(&process->pid);
    return pid < 0 ? -pid : pid;
}

bool process_running(const struct process *process)
{
    return child_of(process) != 0;
}

void process_signal(struct process *process, int number)
{
    pid_t pid = atomic_load(&process->pid);
    /* Marked while it is signalled, so that its number cannot be given to another process in between. */
    if (pid > 0 && atomic_compare_exchange_strong(&process->pid, &pid, -pid)) {
        kill(pid, number);
        atomic_store(&process->pid, pid);
    }
}

/* No other thread signals the child from here on. */
static void retire(struct process *process, pid_t pid)
{
    for (pid_t expected = pid; !atomic_compare_exchange_weak(&process->pid, &expected, 0); expected = pid)
        sched_yield();
}

bool process_reap(struct process *process, int64_t limit_ms, int *status)
{
    pid_t pid = child_of(process);
    int64_t end = now_ms() + limit_ms;
    *status = -1;
    for (;;) {
        siginfo_t info = {0};
        int found = waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT);
        if ((found == 0 && info.si_pid == pid) || (found < 0 && errno == ECHILD)) {
            retire(process, pid);
            /* What it has started goes with it: it leads a process group, whose number is safe until it is waited for. */
            if (found == 0)
                kill(-pid, SIGKILL);
            while (waitpid(pid, status, 0) < 0 && errno == EINTR) {
            }
            return true;
        }
        if (now_ms() >= end)
            return false;
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
}

int process_end(struct process *process, int64_t natural_ms)
{
    int status = -1;
    pid_t pid = child_of(process);
    if (pid == 0 || process_reap(process, natural_ms, &status))
        return status;
    kill(pid, SIGTERM);
    if (process_reap(process, TERM_MS, &status))
        return status;
    kill(pid, SIGKILL);
    if (!process_reap(process, KILL_MS, &status))
        retire(process, pid);
    return status;
}

static bool make_pipe(int ends[2])
{
    if (pipe2(ends, O_CLOEXEC) != 0)
        return false;
    fcntl(ends[0], F_SETPIPE_SZ, PIPE_BYTES); /* where the system allows it */
    return true;
}

static int spawn(const char *program, int in, int out, int errors, pid_t *pid)
{
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t all, none;
    sigfillset(&all);
    sigemptyset(&none);
    int failed = posix_spawn_file_actions_init(&actions);
    if (failed)
        return failed;
    failed = posix_spawnattr_init(&attributes);
    if (failed) {
        posix_spawn_file_actions_destroy(&actions);
        return failed;
    }
    char *arguments[] = {(char *)(uintptr_t)program, NULL};
    /* The daemon's descriptors are its own: a copy of a connection would keep it open. */
    if (!(failed = posix_spawn_file_actions_adddup2(&actions, in, 0)) &&
        !(failed = posix_spawn_file_actions_adddup2(&actions, out, 1)) &&
        !(failed = posix_spawn_file_actions_adddup2(&actions, errors, 2)) &&
        !(failed = posix_spawn_file_actions_addclosefrom_np(&actions, 3)) &&
        !(failed = posix_spawnattr_setsigdefault(&attributes, &all)) &&
        !(failed = posix_spawnattr_setsigmask(&attributes, &none)) &&
        !(failed = posix_spawnattr_setpgroup(&attributes, 0)) &&
        !(failed = posix_spawnattr_setflags(
              &attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP)))
        failed = posix_spawn(pid, program, &actions, &attributes, arguments, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    return failed;
}

/* The daemon may have closed 0, 1 or 2, and dup2 of a descriptor onto itself would leave it to be closed on exec. */
static bool out_of_the_way(int *fd)
{
    if (*fd > 2)
        return true;
    int moved = fcntl(*fd, F_DUPFD_CLOEXEC, 3);
    if (moved < 0)
        return false;
    close(*fd);
    *fd = moved;
    return true;
}

bool process_start(struct process *process, const char *program, int *why)
{
    int pipes[3][2] = {{-1, -1}, {-1, -1}, {-1, -1}};
    pid_t pid = 0;
    bool ready = true;
    for (size_t i = 0; ready && i < 3; i++)
        ready = make_pipe(pipes[i]) && out_of_the_way(&pipes[i][0]) && out_of_the_way(&pipes[i][1]);
    /* Only our ends: each end of a pipe has flags of its own. */
    ready = ready && fcntl(pipes[0][1], F_SETFL, O_WRONLY | O_NONBLOCK) == 0 &&
            fcntl(pipes[1][0], F_SETFL, O_RDONLY | O_NONBLOCK) == 0 &&
            fcntl(pipes[2][0], F_SETFL, O_RDONLY | O_NONBLOCK) == 0;
    *why = ready ? spawn(program, pipes[0][0], pipes[1][1], pipes[2][1], &pid) : errno;
    close_one(&pipes[0][0]);
    close_one(&pipes[1][1]);
    close_one(&pipes[2][1]);
    if (*why != 0) {
        close_one(&pipes[0][1]);
        close_one(&pipes[1][0]);
        close_one(&pipes[2][0]);
        return false;
    }
    process->to = pipes[0][1];
    process->from = pipes[1][0];
    process->errors = pipes[2][0];
    atomic_store(&process->pid, pid);
    return true;
}
