/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* Restores: the daemon's files go to the backend of the plugin string that they were saved under. */
#include "job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- Objects from the catalogue ---- */

static char *copy_bytes(const char *bytes, size_t length)
{
    char *copy = malloc(length + 1);
    if (copy != NULL) {
        if (length > 0)
            memcpy(copy, bytes, length);
        copy[length] = '\0';
    }
    return copy;
}

static bool keep_object(struct job *job, const struct object_packet *packet)
{
    if (job->object_count == job->object_room) {
        size_t room = job->object_room == 0 ? 16 : job->object_room * 2;
        struct object *more = realloc(job->objects, room * sizeof *more);
        if (more == NULL)
            return false;
        job->objects = more;
        job->object_room = room;
    }
    struct object *object = &job->objects[job->object_count];
    object->type = packet->type;
    object->job_id = packet->job_id;
    object->length = (uint32_t)packet->length;
    object->name = strdup(packet->name);
    object->plugin_string = strdup(packet->plugin != NULL ? packet->plugin : "");
    object->data = copy_bytes(packet->object, object->length);
    job->object_count++; /* freed with the job, also if a part is missing */
    job->object_bytes += object->length;
    return object->name != NULL && object->plugin_string != NULL && object->data != NULL;
}

int restore_object(struct job *job, const struct object_packet *packet)
{
    if (packet->size != (int32_t)sizeof *packet || packet->end != (int32_t)sizeof *packet) {
        job_say(job, SAY_FATAL, "the file daemon's restore object has an unknown layout");
        return RC_ERROR;
    }
    /* The options that were offered; the operator's answers come as another type. */
    if (packet->type != FILE_RESTORE_OBJECT && packet->type != FILE_PLUGIN_CONFIG_FILLED)
        return RC_OK;
    if (packet->name == NULL || packet->length < 0 || (packet->object == NULL && packet->length > 0)) {
        job_say(job, SAY_FATAL, "the file daemon hands over a restore object without content");
        return RC_ERROR;
    }
    if (job->object_count >= OBJECTS_MAX || (uint32_t)packet->length > OBJECT_BYTES_MAX ||
        job->object_bytes + (uint32_t)packet->length > OBJECTS_BYTES_MAX) {
        job_say(job, SAY_FATAL, "too many or too large restore objects");
        return RC_ERROR;
    }
    if (!keep_object(job, packet)) {
        job_say(job, SAY_FATAL, "no memory for a restore object");
        return RC_ERROR;
    }
    return RC_OK;
}

static enum outcome answer_is_ok(struct line *line)
{
    char text[COMMAND_MAX];
    enum outcome outcome = backend_answer(&line->backend, text);
    if (outcome == DONE && strcmp(text, "OK") != 0)
        return backend_break(&line->backend, "replicator-backend answered where OK was due: %.200s", text);
    return outcome;
}

static enum outcome send_object(struct line *line, const struct object *object)
{
    struct backend *backend = &line->backend;
    enum outcome outcome = backend_command(backend, "RESTOREOBJ:%s", object->name);
    if (outcome == DONE)
        outcome = backend_command(backend, "RESTOREOBJ_JOBID:%u", object->job_id);
    if (outcome == DONE)
        outcome = backend_command(backend, "RESTOREOBJ_TYPE:%d", object->type);
    if (outcome == DONE)
        outcome = backend_command(backend, "RESTOREOBJ_LEN:%u", object->length);
    for (uint32_t at = 0; outcome == DONE && at < object->length;) {
        uint32_t length = object->length - at < BATCH_BYTES ? object->length - at : BATCH_BYTES;
        outcome = backend_send(backend, 'D', object->data + at, length);
        at += length;
    }
    if (outcome == DONE)
        outcome = backend_send(backend, 'F', NULL, 0);
    return outcome == DONE ? answer_is_ok(line) : outcome;
}

/* Those that have come and are this line's. */
static enum outcome send_objects(struct line *line)
{
    struct job *job = line->job;
    while (line->objects_sent < job->object_count) {
        const struct object *object = &job->objects[line->objects_sent];
        line->objects_sent++;
        if (object->type == FILE_RESTORE_OBJECT && strcmp(object->plugin_string, line->plugin_string) != 0)
            continue;
        enum outcome outcome = send_object(line, object);
        if (outcome != DONE)
            return outcome;
    }
    return DONE;
}

int restore_begin(struct job *job, const char *plugin_string)
{
    struct line *line = line_find(job, plugin_string);
    if (line == NULL)
        line = line_open(job, FOR_RESTORE, plugin_string, NULL);
    job->current = line;
    /* A line that has failed has said so; its files are refused one by one. */
    if (line != NULL && !line->failed)
        line_check(line, send_objects(line));
    return RC_OK;
}

/* ---- Files ---- */

struct created {
    const char *name;
    const struct stat *stat;
    int32_t type, file_index;
    int32_t *status;
};

static struct created look_into(void *packet)
{
    if (abi->interface == INTERFACE_9_6) {
        struct restore_packet_14 *restore = packet;
        return (struct created){restore->name, &restore->stat, restore->type, restore->file_index,
                                &restore->create_status};
    }
    struct restore_packet_23 *restore = packet;
    return (struct created){restore->name, &restore->stat, restore->type, restore->file_index,
                            &restore->create_status};
}

static char kind_of(int32_t type)
{
    if (type == FILE_DIRECTORY)
        return 'D';
    return type == FILE_EMPTY ? 'E' : 'F';
}

static enum outcome describe_file(struct line *line, const struct created *file, char *answer)
{
    struct backend *backend = &line->backend;
    const struct stat *stat = file->stat;
    enum outcome outcome = backend_command(backend, "FNAME:%s", file->name);
    if (outcome == DONE)
        outcome = backend_command(backend, "STAT:%c %lld %u %u %o %lu %d", kind_of(file->type),
                                  (long long)stat->st_size, stat->st_uid, stat->st_gid, stat->st_mode,
                                  (unsigned long)stat->st_nlink, file->file_index);
    if (outcome == DONE)
        outcome = backend_command(backend, "TSTAMP:%lld %lld %lld", (long long)stat->st_atim.tv_sec,
                                  (long long)stat->st_mtim.tv_sec, (long long)stat->st_ctim.tv_sec);
    if (outcome == DONE)
        outcome = backend_send(backend, 'F', NULL, 0);
    return outcome == DONE ? backend_answer(backend, answer) : outcome;
}

static bool is_plain(const char *name)
{
    for (; *name != '\0'; name++) {
        if ((unsigned char)*name < 0x20 || *name == 0x7F)
            return false;
    }
    return true;
}

static int decide(struct line *line, const struct created *file, const char *answer)
{
    if (strcmp(answer, "OK") == 0) {
        line->file = FILE_BEGUN;
        *file->status = CREATE_EXTRACT;
    } else if (strcmp(answer, "SKIP") == 0) {
        *file->status = CREATE_SKIP;
    } else if (strcmp(answer, "CORE") == 0) {
        line->core = true;
        *file->status = CREATE_CORE;
    } else {
        line_check(line, backend_break(&line->backend, "replicator-backend answered for a file: %.200s", answer));
        return RC_ERROR;
    }
    return RC_OK;
}

static int create_file(struct job *job, void *packet)
{
    struct created file = look_into(packet);
    struct line *line = job->current;
    char answer[COMMAND_MAX];
    *file.status = CREATE_ERROR;
    if (line == NULL || line->failed || !line_lives(line)) {
        if (!job->failed && !atomic_load(&job->cancelled))
            job_say(job, SAY_FATAL, "the file daemon restores a file without having said of which plugin string");
        return RC_ERROR;
    }
    if (line->file == FILE_OPEN) {
        line_fail(line, "the file daemon begins a file before it has closed the one before");
        return RC_ERROR;
    }
    if (file.name == NULL || *file.name == '\0' || strlen(file.name) > PAYLOAD_MAX / 2 || !is_plain(file.name)) {
        line_fail(line, "a file of the backup has a name that cannot be restored");
        return RC_ERROR;
    }
    line->file = NO_FILE;
    line->core = line->attributes_set = false;
    if (!line_check(line, describe_file(line, &file, answer)))
        return RC_ERROR;
    return decide(line, &file, answer);
}

/* The job has failed with a message by then. To an error the file daemon of 9.6 hangs up on the Director, which waits for
   a minute; a file that is skipped lets it end the failed job at once. */
int restore_create(struct job *job, void *packet)
{
    int result = create_file(job, packet);
    if (result != RC_ERROR || !(job->failed || atomic_load(&job->cancelled)))
        return result;
    *look_into(packet).status = CREATE_SKIP;
    return RC_OK;
}

int restore_attributes(struct job *job, void *packet)
{
    struct created file = look_into(packet);
    struct line *line = job->current;
    if (line == NULL)
        return RC_ERROR;
    line->attributes_set = true;
    if (line->core)
        *file.status = CREATE_CORE;
    return RC_OK;
}

/* ---- Data ---- */

static enum outcome send_batch(struct line *line)
{
    if (line->batch_length == 0)
        return DONE;
    size_t length = ADDRESS_BYTES + line->batch_length;
    address_encode(line->batch + HEADER_BYTES, line->batch_at);
    line->batch_length = 0;
    return backend_send_in_place(&line->backend, 'B', line->batch, length);
}

/* Takes data to be sent, together as far as they lie one behind the other. */
static enum outcome put_data(struct line *line, const char *data, size_t length)
{
    if (line->batch_length > 0 && line->batch_at + line->batch_length != line->position) {
        enum outcome outcome = send_batch(line);
        if (outcome != DONE)
            return outcome;
    }
    while (length > 0) {
        if (line->batch_length == 0)
            line->batch_at = line->position;
        size_t room = BATCH_BYTES - line->batch_length;
        size_t now = length < room ? length : room;
        memcpy(line->batch + HEADER_BYTES + ADDRESS_BYTES + line->batch_length, data, now);
        line->batch_length += now;
        line->position += now;
        data += now;
        length -= now;
        if (line->batch_length == BATCH_BYTES) {
            enum outcome outcome = send_batch(line);
            if (outcome != DONE)
                return outcome;
        }
    }
    return DONE;
}

static int restore_open(struct line *line, struct io_packet *io)
{
    if (line->file != FILE_BEGUN) {
        line_fail(line, "the file daemon opens a file that it was not told to");
        return io_failed(io, EINVAL);
    }
    if (line->batch == NULL)
        line->batch = malloc(HEADER_BYTES + ADDRESS_BYTES + BATCH_BYTES);
    if (line->batch == NULL) {
        line_fail(line, "no memory for a file's data");
        return io_failed(io, ENOMEM);
    }
    line->position = 0;
    line->batch_length = 0;
    if (!line_check(line, backend_command(&line->backend, "DATA")))
        return io_failed(io, EIO);
    line->file = FILE_OPEN;
    return RC_OK;
}

static int restore_write(struct line *line, struct io_packet *io)
{
    if (io->count < 0 || (io->buffer == NULL && io->count > 0) ||
        line->position > (uint64_t)INT64_MAX - (uint64_t)io->count) {
        line_fail(line, "the file daemon writes in a way that is not known");
        return io_failed(io, EINVAL);
    }
    if (!line_check(line, put_data(line, io->buffer, (size_t)io->count)))
        return io_failed(io, EIO);
    io->status = io->count;
    return RC_OK;
}

static int restore_seek(struct line *line, struct io_packet *io)
{
    if (io->whence != 0 || io->offset < 0) {
        line_fail(line, "the file daemon seeks in a way that is not known");
        io->offset = -1;
        return io_failed(io, EINVAL);
    }
    line->position = (uint64_t)io->offset;
    return RC_OK;
}

static int restore_close(struct line *line, struct io_packet *io)
{
    struct backend *backend = &line->backend;
    static const char cut[] = "Bacula did not restore all of it\n";
    bool cancelled = atomic_load(&line->job->cancelled);
    /* A cancelled restore closes its files as if they were whole. */
    bool whole = line->attributes_set && !cancelled;
    line->file = FILE_ENDED;
    enum outcome outcome = send_batch(line);
    if (outcome == DONE && whole)
        outcome = backend_send(backend, 'F', NULL, 0);
    else if (outcome == DONE)
        outcome = backend_send(backend, 'E', cut, sizeof cut - 1);
    if (outcome == DONE)
        outcome = answer_is_ok(line);
    if (!line_check(line, outcome))
        return io_failed(io, EIO);
    if (!whole) {
        line_fail(line, "Bacula closed a file before it was complete");
        return io_failed(io, EIO);
    }
    return RC_OK;
}

int restore_io(struct job *job, struct io_packet *io)
{
    struct line *line = job->current;
    if (line == NULL || line->purpose != FOR_RESTORE)
        return io_failed(io, EIO);
    if (line->failed || !line_lives(line)) {
        if (io->func == IO_CLOSE)
            line->file = FILE_ENDED;
        if (io->func == IO_SEEK)
            io->offset = -1;
        return io_failed(io, EIO);
    }
    if (io->func == IO_OPEN)
        return restore_open(line, io);
    if (line->file == FILE_OPEN) {
        switch (io->func) {
        case IO_WRITE:
            return restore_write(line, io);
        case IO_SEEK:
            return restore_seek(line, io);
        case IO_CLOSE:
            return restore_close(line, io);
        default:
            break;
        }
    }
    line_fail(line, "the file daemon asks for operation %d in a restore", io->func);
    return io_failed(io, EINVAL);
}
