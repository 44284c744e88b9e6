/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* replicator-fd.so: what Bacula's file daemon calls. Frames packets, maps messages, passes on cancellation and verdict; decides
 * nothing. One binary for the interfaces of 9.6.7 and 15.0.x, every other one is refused. */
#include "job.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef REPLICATOR_VERSION
#define REPLICATOR_VERSION "0"
#endif
#ifndef REPLICATOR_BACKEND
#define REPLICATOR_BACKEND "/usr/bin/replicator-backend"
#endif
#define EXPORTED __attribute__((visibility("default")))
#define HERE __FILE__, __LINE__
#define ME "replicator: "
/* A type of message that is harmless in every version: a warning or an information. */
#define SAFE_MESSAGE 6

static const struct abi versions[] = {
    {INTERFACE_9_6, 3, 4, 5, 6, 14, 15, 17, (int32_t)sizeof(struct save_packet_14),
     (int32_t)sizeof(struct restore_packet_14)},
    {INTERFACE_15_0, 4, 5, 6, 7, 15, 16, 18, (int32_t)sizeof(struct save_packet_23),
     (int32_t)sizeof(struct restore_packet_23)},
};

/* Set in loadPlugin, then constant. */
const struct abi *abi;
static const struct fd_funcs *daemon_funcs;
static char beside_plugin[PATH_MAX];

const char *backend_program(void)
{
    if (beside_plugin[0] != '\0' && access(beside_plugin, X_OK) == 0)
        return beside_plugin;
    return REPLICATOR_BACKEND;
}

/* ---- Talking to the daemon ---- */

void job_say(struct job *job, enum severity severity, const char *text)
{
    int type = abi->info;
    if (severity == SAY_FATAL) {
        job->failed = true;
        /* A cancelled job stays a cancelled one, unless Bacula takes it for good. */
        bool cancelled = atomic_load(&job->cancelled) && job_number(job, VAR_JOB_STATUS) != 'T';
        type = cancelled ? abi->error : abi->fatal;
    } else if (severity == SAY_ERROR) {
        type = abi->error;
    } else if (severity == SAY_WARNING) {
        type = abi->warning;
    }
    char clean[MESSAGE_MAX + 8];
    size_t length = strnlen(text, sizeof clean - 1);
    memcpy(clean, text, length);
    message_clean(clean, length);
    daemon_funcs->job_message(job->context, HERE, type, 0, ME "%s\n", clean);
}

void job_sayf(struct job *job, enum severity severity, const char *format, ...)
{
    char text[MESSAGE_MAX + 1];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    job_say(job, severity, text);
}

void line_fail(struct line *line, const char *format, ...)
{
    char text[MESSAGE_MAX + 1];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    line->failed = true;
    job_say(line->job, SAY_FATAL, text);
}

int job_number(struct job *job, int variable)
{
    int value = 0;
    return daemon_funcs->get_value(job->context, variable, &value) == RC_OK ? value : 0;
}

const char *job_text(struct job *job, int variable)
{
    const char *value = NULL;
    return daemon_funcs->get_value(job->context, variable, &value) == RC_OK ? value : NULL;
}

static struct job *job_of(const struct fd_context *context)
{
    return context != NULL ? context->plugin : NULL;
}

/* The job, if the packet has the layout of this version. `end` is its last field. */
static struct job *job_checked(const struct fd_context *context, const void *packet, int32_t bytes, size_t end_at)
{
    struct job *job = job_of(context);
    int32_t size, end;
    if (job == NULL || packet == NULL)
        return NULL;
    memcpy(&size, packet, sizeof size);
    if (size == bytes) {
        memcpy(&end, (const char *)packet + end_at, sizeof end);
        if (end == bytes)
            return job;
    }
    job_sayf(job, SAY_FATAL, "the file daemon's packet has an unknown layout (%d bytes where %d were due)", size, bytes);
    return NULL;
}

static struct job *job_with_save_packet(const struct fd_context *context, const void *packet)
{
    return job_checked(context, packet, abi->save_bytes,
                       abi->interface == INTERFACE_9_6 ? offsetof(struct save_packet_14, end)
                                                       : offsetof(struct save_packet_23, end));
}

static struct job *job_with_restore_packet(const struct fd_context *context, const void *packet)
{
    return job_checked(context, packet, abi->restore_bytes, offsetof(struct restore_packet_23, end));
}

/* ---- Instances ---- */

/* One a job, and one for every connection of a console: nothing is started here. */
static int new_plugin(struct fd_context *context)
{
    struct job *job = calloc(1, sizeof *job);
    if (job == NULL) {
        daemon_funcs->job_message(context, HERE, abi->fatal, 0, ME "no memory\n");
        return RC_ERROR;
    }
    job->context = context;
    context->plugin = job;
    return RC_OK;
}

static int free_plugin(struct fd_context *context)
{
    struct job *job = job_of(context);
    if (job == NULL)
        return RC_OK;
    context->plugin = NULL;
    for (size_t i = 0; i < LINES_MAX; i++) {
        struct line *line = atomic_exchange(&job->lines[i], NULL);
        if (line != NULL)
            line_free(line);
    }
    for (size_t i = 0; i < job->object_count; i++) {
        free(job->objects[i].name);
        free(job->objects[i].plugin_string);
        free(job->objects[i].data);
    }
    free(job->objects);
    free(job->where);
    free(job->regex_where);
    free(job);
    return RC_OK;
}

static int get_plugin_value(struct fd_context *context, int variable, void *value)
{
    (void)context;
    (void)variable;
    (void)value;
    return RC_OK;
}

static int set_plugin_value(struct fd_context *context, int variable, void *value)
{
    return get_plugin_value(context, variable, value);
}

/* ---- Events ---- */

/* The job cannot go on. Where that has been said, or it is cancelled, nothing is added. */
static int job_stuck(struct job *job, const char *text)
{
    if (!job->failed && !atomic_load(&job->cancelled))
        job_say(job, SAY_FATAL, text);
    return RC_ERROR;
}

static int begin_backup(struct job *job, const char *plugin_string, enum purpose purpose)
{
    job->current = NULL;
    if (plugin_string == NULL)
        return job_stuck(job, "the file daemon gives no plugin string");
    if (line_find(job, plugin_string) != NULL) {
        job_say(job, SAY_FATAL, "two Plugin lines of the FileSet are the same");
        return RC_ERROR;
    }
    job->current = line_open(job, purpose, plugin_string, NULL);
    return job->current != NULL ? RC_OK : RC_ERROR;
}

/* On any thread, at any time, also within another callback of the same job. */
static int cancel(struct job *job)
{
    atomic_store(&job->cancelled, true);
    for (size_t i = 0; i < LINES_MAX; i++) {
        struct line *line = atomic_load(&job->lines[i]);
        if (line != NULL)
            backend_cancel(&line->backend);
    }
    return RC_OK;
}

static char *copy_text(const char *text, bool *whole)
{
    char *copy = text != NULL ? strdup(text) : NULL;
    *whole = *whole && (text == NULL || copy != NULL);
    return copy;
}

static int start_restore(struct job *job)
{
    bool whole = true;
    free(job->where);
    free(job->regex_where);
    job->where = copy_text(job_text(job, abi->where), &whole);
    job->regex_where = copy_text(job_text(job, abi->regex_where), &whole);
    job->replace = (char)job_number(job, VAR_REPLACE);
    if (whole)
        return RC_OK;
    job_say(job, SAY_FATAL, "no memory");
    return RC_ERROR;
}

static void close_estimates(struct job *job)
{
    for (size_t i = 0; i < LINES_MAX; i++) {
        struct line *line = atomic_load(&job->lines[i]);
        if (line != NULL && line->purpose != FOR_BACKUP && line->purpose != FOR_RESTORE)
            line_close(line);
    }
}

static int handle_event(struct fd_context *context, struct fd_event *event, void *value)
{
    struct job *job = job_of(context);
    if (job == NULL || event == NULL)
        return RC_ERROR;
    switch (event->type) {
    case EVENT_LEVEL:
        job->level = (char)(intptr_t)value;
        return RC_OK;
    case EVENT_SINCE:
        job->since = (int64_t)(intptr_t)value;
        return RC_OK;
    case EVENT_BACKUP_COMMAND:
        return begin_backup(job, value, FOR_BACKUP);
    case EVENT_ESTIMATE_COMMAND: {
        bool listing = value != NULL && strstr(value, " listing=") != NULL;
        return begin_backup(job, value, listing ? FOR_LISTING : FOR_ESTIMATE);
    }
    case EVENT_RESTORE_OBJECT:
        return value != NULL ? restore_object(job, value) : RC_OK;
    case EVENT_START_RESTORE:
        return start_restore(job);
    case EVENT_RESTORE_COMMAND:
        return value != NULL ? restore_begin(job, value) : job_stuck(job, "the file daemon gives no plugin string");
    case EVENT_END_BACKUP:
    case EVENT_END_RESTORE:
        job_conclude(job, event->type == EVENT_END_RESTORE);
        return RC_OK;
    case EVENT_JOB_END:
        close_estimates(job);
        return RC_OK;
    case EVENT_CANCEL:
        return cancel(job);
    case EVENT_HANDLE_BACKUP_FILE:
        return RC_CORE;
    default:
        return RC_OK;
    }
}

/* ---- Files ---- */

static int start_backup_file(struct fd_context *context, void *packet)
{
    struct job *job = job_with_save_packet(context, packet);
    return job != NULL ? backup_start_file(job, packet) : RC_ERROR;
}

static int end_backup_file(struct fd_context *context)
{
    struct job *job = job_of(context);
    return job != NULL ? backup_end_file(job) : RC_ERROR;
}

static int start_restore_file(struct fd_context *context, const char *command)
{
    (void)command;
    return job_of(context) != NULL ? RC_OK : RC_ERROR;
}

/* Nothing is done here: 9.6.7 leaves the call out at times. */
static int end_restore_file(struct fd_context *context)
{
    (void)context;
    return RC_OK;
}

static int plugin_io(struct fd_context *context, struct io_packet *io)
{
    struct job *job = job_checked(context, io, (int32_t)sizeof *io, offsetof(struct io_packet, end));
    if (job == NULL) {
        /* Of a packet that is not known, nothing is written. */
        return RC_ERROR;
    }
    io->status = 0;
    io->error = 0;
    if (job->current == NULL) {
        io->status = -1;
        io->error = ENODEV;
        return job_stuck(job, "the file daemon reads or writes before it has said of which plugin string");
    }
    return job->current->purpose == FOR_RESTORE ? restore_io(job, io) : backup_io(job, io);
}

static int create_file(struct fd_context *context, void *packet)
{
    struct job *job = job_with_restore_packet(context, packet);
    return job != NULL ? restore_create(job, packet) : RC_ERROR;
}

static int set_file_attributes(struct fd_context *context, void *packet)
{
    struct job *job = job_with_restore_packet(context, packet);
    return job != NULL ? restore_attributes(job, packet) : RC_ERROR;
}

static int check_file(struct fd_context *context, char *name)
{
    struct job *job = job_of(context);
    return job != NULL && name != NULL ? backup_check_file(job, name) : RC_OK;
}

/* Called without being asked for: there are no ACLs and no extended attributes. */
static int handle_xacl(struct fd_context *context, struct xacl_packet *packet)
{
    if (job_checked(context, packet, (int32_t)sizeof *packet, offsetof(struct xacl_packet, end)) == NULL)
        return RC_ERROR;
    packet->count = 0;
    return RC_OK;
}

/* ---- Queries ---- */

static int answer_query(struct line *line, struct query_packet *packet)
{
    char status = '\0';
    enum outcome outcome = backend_next(&line->backend, &status);
    if (outcome == DONE && status == 'F') {
        line_close(line);
        return RC_OK;
    }
    if (outcome == DONE && status != 'C')
        outcome = backend_break(&line->backend, "replicator-backend answered a query with %c", status);
    if (outcome == DONE)
        outcome = backend_text(&line->backend, line->answer);
    if (!line_check(line, outcome))
        return RC_ERROR;
    packet->result = line->answer;
    return RC_MORE;
}

static int query_parameter(struct fd_context *context, struct query_packet *packet)
{
    struct job *job = job_checked(context, packet, (int32_t)sizeof *packet, offsetof(struct query_packet, end));
    if (job == NULL)
        return RC_ERROR;
    packet->result = NULL;
    if (packet->parameter == NULL || packet->command == NULL)
        return RC_ERROR;
    struct line *line = job->current;
    if (line == NULL || line->purpose != FOR_QUERY || !line_lives(line))
        line = job->current = line_open(job, FOR_QUERY, packet->command, packet->parameter);
    if (line == NULL || line->failed)
        return RC_ERROR;
    return answer_query(line, packet);
}

/* ---- Loading ---- */

#define ENTRIES                                                                                                        \
    {                                                                                                                  \
        .new_plugin = new_plugin, .free_plugin = free_plugin, .get_plugin_value = get_plugin_value,                    \
        .set_plugin_value = set_plugin_value, .handle_event = handle_event, .start_backup_file = start_backup_file,    \
        .end_backup_file = end_backup_file, .start_restore_file = start_restore_file,                                  \
        .end_restore_file = end_restore_file, .plugin_io = plugin_io, .create_file = create_file,                      \
        .set_file_attributes = set_file_attributes, .check_file = check_file, .handle_xacl = handle_xacl               \
    }

static const struct plugin_funcs_14 funcs_14 = {
    .size = sizeof funcs_14, .version = INTERFACE_9_6, .entries = ENTRIES};
static const struct plugin_funcs_23 funcs_23 = {
    .size = sizeof funcs_23, .version = INTERFACE_15_0, .entries = ENTRIES, .query_parameter = query_parameter};

#define INFO(number)                                                                                                   \
    {                                                                                                                  \
        .size = sizeof(struct plugin_info), .version = (number), .magic = PLUGIN_MAGIC, .license = PLUGIN_LICENSE,     \
        .author = "The replctl project", .date = "2026", .plugin_version = REPLICATOR_VERSION,                         \
        .description = "Disks of virtual machines: full and changed-block backups, restores to files and platforms"    \
    }

static const struct plugin_info info_14 = INFO(INTERFACE_9_6), info_23 = INFO(INTERFACE_15_0);

static const struct abi *find_version(const struct fd_info *info, const struct fd_funcs *funcs)
{
    if (info->size != sizeof *info || funcs->version != info->version)
        return NULL;
    for (size_t i = 0; i < sizeof versions / sizeof versions[0]; i++) {
        uint32_t size = versions[i].interface == INTERFACE_9_6 ? FD_FUNCS_SIZE_14 : FD_FUNCS_SIZE_23;
        if (versions[i].interface == info->version && funcs->size == size)
            return &versions[i];
    }
    return NULL;
}

static void find_program(void)
{
    Dl_info where;
    char path[PATH_MAX];
    beside_plugin[0] = '\0';
    if (dladdr(&abi, &where) == 0 || where.dli_fname == NULL || realpath(where.dli_fname, path) == NULL)
        return;
    char *slash = strrchr(path, '/');
    if (slash == NULL)
        return;
    slash[1] = '\0';
    if (snprintf(beside_plugin, sizeof beside_plugin, "%sreplicator-backend", path) >= (int)sizeof beside_plugin)
        beside_plugin[0] = '\0';
}

EXPORTED int loadPlugin(const struct fd_info *info, const struct fd_funcs *funcs, const struct plugin_info **out_info,
                        const void **out_funcs);
EXPORTED int unloadPlugin(void);

int loadPlugin(const struct fd_info *info, const struct fd_funcs *funcs, const struct plugin_info **out_info,
               const void **out_funcs)
{
    if (info == NULL || funcs == NULL || out_info == NULL || out_funcs == NULL)
        return RC_ERROR;
    const struct abi *found = find_version(info, funcs);
    if (found == NULL) {
        static const char refusal[] = ME "not loaded: this file daemon has plugin interface %u; known are %u (Bacula 9.6) "
                                         "and %u (Bacula 15.0)\n";
        /* The first slots have been the same in every version so far. */
        if (funcs->size >= sizeof *funcs && funcs->job_message != NULL && funcs->debug_message != NULL) {
            funcs->debug_message(NULL, HERE, 0, refusal, info->version, INTERFACE_9_6, INTERFACE_15_0);
            funcs->job_message(NULL, HERE, SAFE_MESSAGE, 0, refusal, info->version, INTERFACE_9_6, INTERFACE_15_0);
        }
        return RC_ERROR;
    }
    if (funcs->get_value == NULL || funcs->job_message == NULL)
        return RC_ERROR;
    abi = found;
    daemon_funcs = funcs;
    find_program();
    *out_info = found->interface == INTERFACE_9_6 ? &info_14 : &info_23;
    *out_funcs = found->interface == INTERFACE_9_6 ? (const void *)&funcs_14 : (const void *)&funcs_23;
    return RC_OK;
}

int unloadPlugin(void)
{
    return RC_OK;
}
