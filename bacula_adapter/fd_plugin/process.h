/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* A child process with a pipe to each of its three descriptors. Knows nothing of what is said over them. */
#ifndef REPLICATOR_PROCESS_H
#define REPLICATOR_PROCESS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define PIPE_BYTES (1 << 20)

struct process {
    /* Of the child that has not been waited for; negative while another thread signals it, 0 if there is none. */
    _Atomic pid_t pid;
    int to, from, errors; /* our ends of the pipes, which never block; -1 when closed */
};

/* Starts `program` with nothing of ours but the pipes. False if that failed: *why is an errno. */
bool process_start(struct process *process, const char *program, int *why);
bool process_running(const struct process *process);
/* By any thread, at any time: never reaches a process that has taken the number over. */
void process_signal(struct process *process, int number);
/* Waits for the child's end. False if it still runs. `status` is waitpid's, -1 if somebody else has taken it. */
bool process_reap(struct process *process, int64_t limit_ms, int *status);
/* The child is given time to end by itself, then it is made to. Returns waitpid's status, -1 if there is none. */
int process_end(struct process *process, int64_t natural_ms);

void close_one(int *fd);
int64_t now_ms(void);

#endif
