/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* A job of the file daemon as the plugin sees it, and its lines: one for each plugin string, with a backend each. */
#ifndef REPLICATOR_JOB_H
#define REPLICATOR_JOB_H

#include "backend.h"
#include "bacula_abi.h"

#include <stdatomic.h>
#include <stdbool.h>

#define LINES_MAX 32U
#define CLAIMS_MAX 64U
#define OBJECTS_MAX 65536U
#define OBJECT_BYTES_MAX (16U << 20)
#define OBJECTS_BYTES_MAX (256U << 20)
/* Of a packet to the backend; written in one call, as far as the pipe takes it. */
#define BATCH_BYTES (256U << 10)

/* What differs between the versions of Bacula. */
struct abi {
    uint32_t interface;
    int fatal, error, warning, info;      /* types of messages */
    int where, regex_where, version;      /* variables */
    int32_t save_bytes, restore_bytes;    /* packets */
};

enum purpose { FOR_BACKUP, FOR_ESTIMATE, FOR_LISTING, FOR_QUERY, FOR_RESTORE };

enum item_kind { NO_ITEM, FILE_ITEM, OBJECT_ITEM, OPTIONS_ITEM, END_ITEM };

/* What a backup emits next. */
struct item {
    enum item_kind kind;
    char name[COMMAND_MAX];
    struct file_facts facts;
    bool addressed;
    char *object;
    uint32_t object_length;
};

enum file_state { NO_FILE, FILE_BEGUN, FILE_OPEN, FILE_ENDED };

struct line {
    struct job *job;
    enum purpose purpose;
    char *plugin_string; /* all of it */
    struct backend backend;
    bool failed;    /* something of it is not good: the job cannot end well */
    bool concluded; /* the verdict was delivered */
    int64_t timeout_ms;
    size_t claim_count;
    char *claims[CLAIMS_MAX];
    /* The file at hand. */
    enum file_state file;
    uint64_t position;
    /* Backup. */
    struct item item;
    bool objects_begun;
    int32_t object_index;
    uint64_t data_at;
    bool data_waits; /* a data packet has begun: backend.left bytes of it are for data_at */
    /* Restore. */
    size_t objects_sent;
    bool core, attributes_set, any_open;
    unsigned char *batch; /* header, address, data */
    size_t batch_length;  /* of the data */
    uint64_t batch_at;
    /* Query. */
    char answer[COMMAND_MAX];
};

struct object {
    char *name, *plugin_string, *data;
    int32_t type;
    uint32_t length, job_id;
};

struct job {
    struct fd_context *context;
    atomic_bool cancelled;
    bool failed; /* Bacula was told so, or would have been, had it not been cancelled */
    _Atomic(struct line *) lines[LINES_MAX];
    struct line *current;
    char level;
    int64_t since;
    char *where, *regex_where;
    char replace;
    struct object *objects;
    size_t object_count, object_room;
    uint64_t object_bytes;
};

/* Set when the daemon loads the plugin, then constant. */
extern const struct abi *abi;

/* fd_plugin.c */
void job_say(struct job *job, enum severity severity, const char *text);
void job_sayf(struct job *job, enum severity severity, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Tells Bacula that the job is not good. Without effect on a cancelled job's status. */
void line_fail(struct line *line, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Whether the backend can be spoken to. */
bool line_lives(const struct line *line);
/* A variable of the job: 0 or NULL if there is none. The text is the daemon's. */
int job_number(struct job *job, int variable);
const char *job_text(struct job *job, int variable);
const char *backend_program(void);

/* dialogue.c */
/* Tells the daemon that an operation failed; RC_ERROR. */
int io_failed(struct io_packet *io, int error);
/* Starts a backend for the plugin string and tells it about the job. NULL if that failed, which has been said. */
struct line *line_open(struct job *job, enum purpose purpose, const char *plugin_string, const char *query);
struct line *line_find(struct job *job, const char *plugin_string);
/* `outcome` as success; notes that the line failed otherwise. */
bool line_check(struct line *line, enum outcome outcome);
/* END and T, or only T, and the process's end. */
void line_close(struct line *line);
/* Tells every backend of the job Bacula's verdict and ends it. */
void job_conclude(struct job *job, bool restore);
void line_free(struct line *line);

/* backup.c */
int backup_start_file(struct job *job, void *packet);
int backup_end_file(struct job *job);
int backup_io(struct job *job, struct io_packet *io);
int backup_check_file(struct job *job, const char *name);

/* restore.c */
int restore_object(struct job *job, const struct object_packet *object);
int restore_begin(struct job *job, const char *plugin_string);
int restore_create(struct job *job, void *packet);
int restore_io(struct job *job, struct io_packet *io);
int restore_attributes(struct job *job, void *packet);

#endif
