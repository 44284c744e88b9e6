/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* What a Bacula file daemon and its plugins hand each other, in our own words: layouts and numbers of interface 14
 * (9.6.7) and interface 23 (15.0.x) on Linux, LP64. Every offset is asserted; the packets' own sizes are checked in
 * every callback, because they are the only sign of another layout that there is. */
#ifndef REPLICATOR_BACULA_ABI_H
#define REPLICATOR_BACULA_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

#define INTERFACE_9_6 14U
#define INTERFACE_15_0 23U
#define PLUGIN_MAGIC "*FDPluginData*"
#define PLUGIN_LICENSE "AGPLv3"

enum { RC_OK = 0, RC_STOP = 1, RC_ERROR = 2, RC_MORE = 3, RC_SEEN = 5, RC_CORE = 6 };

enum {
    EVENT_JOB_END = 2,
    EVENT_END_BACKUP = 4,
    EVENT_START_RESTORE = 5,
    EVENT_END_RESTORE = 6,
    EVENT_BACKUP_COMMAND = 9,
    EVENT_RESTORE_COMMAND = 10,
    EVENT_ESTIMATE_COMMAND = 11,
    EVENT_LEVEL = 12,
    EVENT_SINCE = 13,
    EVENT_CANCEL = 14,
    EVENT_RESTORE_OBJECT = 18,
    EVENT_HANDLE_BACKUP_FILE = 24
};

/* Variables whose numbers are the same in both versions; the others are in struct abi. */
enum {
    VAR_JOB_ID = 1,
    VAR_LEVEL = 3,
    VAR_CLIENT = 5,
    VAR_JOB_NAME = 6,
    VAR_JOB_STATUS = 7,
    VAR_SINCE = 8,
    VAR_ACCURATE = 9,
    VAR_WORKING_DIR = 13,
    VAR_PREV_JOB_NAME = 20,
    VAR_REPLACE = 24
};

enum { FILE_EMPTY = 2, FILE_REGULAR = 3, FILE_DIRECTORY = 5, FILE_RESTORE_OBJECT = 25, FILE_PLUGIN_CONFIG = 27 };
enum { FILE_PLUGIN_CONFIG_FILLED = 28 };
enum { CREATE_SKIP = 1, CREATE_ERROR = 2, CREATE_EXTRACT = 3, CREATE_CORE = 5 };
enum { IO_OPEN = 1, IO_READ = 2, IO_WRITE = 3, IO_CLOSE = 4, IO_SEEK = 5 };

/* The file's data come with addresses. */
#define FLAG_OFFSETS (UINT64_C(1) << 30)

struct fd_info {
    uint32_t size, version;
};

struct fd_event {
    uint32_t type;
};

struct fd_context {
    void *daemon; /* not ours */
    void *plugin;
};

struct plugin_info {
    uint32_t size, version;
    const char *magic, *license, *author, *date, *plugin_version, *description;
};

/* Both packets of a version begin so: enough to find their end. */
struct io_packet {
    int32_t size, func, count, flags;
    uint32_t mode;
    char *buffer, *name;
    int32_t status, error, last_error, whence;
    int64_t offset;
    bool win32;
    int32_t end;
};

struct xacl_packet {
    int32_t size, func, count;
    char *content;
    int32_t end;
};

struct query_packet {
    int32_t size;
    char *parameter, *command, *options, *result;
    int32_t end;
};

struct object_packet {
    int32_t size;
    char *name, *object, *plugin;
    int32_t type, length, full_length, index, compression, stream;
    uint32_t job_id;
    int32_t end;
};

struct save_packet_14 {
    int32_t size;
    char *name, *link;
    struct stat stat;
    int32_t type;
    uint64_t flags;
    bool no_read, portable, accurate_found;
    char *command;
    uint32_t delta_seq;
    char *object_name, *object;
    int32_t object_length, index, link_index, end;
};

struct save_packet_23 {
    int32_t size;
    char *name, *snapshot_name;
    int32_t plugin_mode;
    char *link;
    struct stat stat;
    int32_t type;
    uint64_t flags;
    bool no_read, portable, accurate_found, dedup, stat_update;
    char *command;
    struct {
        char *name, *object;
        int32_t length, index, compression;
    } object;
    struct {
        char *texts[7];
        uint64_t size;
        int32_t status;
        uint32_t count;
    } plugin_object;
    void *metadata;
    uint32_t delta_seq;
    int32_t link_index, end;
};

/* Of equal size, and yet not the same. */
struct restore_packet_14 {
    int32_t size, stream, data_stream, type, file_index, link_index;
    uint32_t uid;
    struct stat stat;
    const char *attributes, *name, *link, *where, *regex_where;
    int32_t replace, create_status;
    uint32_t delta_seq;
    int32_t end;
};

struct restore_packet_23 {
    int32_t size, plugin_mode, stream, data_stream, type, file_index, link_index;
    uint32_t uid;
    struct stat stat;
    const char *attributes, *name, *link, *where, *regex_where;
    int32_t replace, create_status;
    uint32_t delta_seq;
    int32_t end;
};

/* What the daemon offers. Slots that are not used are only counted. */
typedef int (*get_value_t)(struct fd_context *, int variable, void *out);
typedef int (*job_message_t)(struct fd_context *, const char *file, int line, int type, int64_t mtime,
                             const char *format, ...) __attribute__((format(printf, 6, 7)));
typedef int (*debug_message_t)(struct fd_context *, const char *file, int line, int level, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

struct fd_funcs {
    uint32_t size, version;
    void (*register_events)(void);
    get_value_t get_value;
    void (*set_value)(void);
    job_message_t job_message;
    debug_message_t debug_message;
};
#define FD_FUNCS_SIZE_14 144U
#define FD_FUNCS_SIZE_23 168U

/* What the plugin offers: the first 14 slots are the same in all versions. */
struct plugin_entries {
    int (*new_plugin)(struct fd_context *);
    int (*free_plugin)(struct fd_context *);
    int (*get_plugin_value)(struct fd_context *, int, void *);
    int (*set_plugin_value)(struct fd_context *, int, void *);
    int (*handle_event)(struct fd_context *, struct fd_event *, void *);
    int (*start_backup_file)(struct fd_context *, void *);
    int (*end_backup_file)(struct fd_context *);
    int (*start_restore_file)(struct fd_context *, const char *);
    int (*end_restore_file)(struct fd_context *);
    int (*plugin_io)(struct fd_context *, struct io_packet *);
    int (*create_file)(struct fd_context *, void *);
    int (*set_file_attributes)(struct fd_context *, void *);
    int (*check_file)(struct fd_context *, char *);
    int (*handle_xacl)(struct fd_context *, struct xacl_packet *);
};

struct plugin_funcs_14 {
    uint32_t size, version;
    struct plugin_entries entries;
    void (*check_stream)(void);
};

struct plugin_funcs_23 {
    uint32_t size, version;
    struct plugin_entries entries;
    void (*restore_file_list)(void);
    void (*check_stream)(void);
    int (*query_parameter)(struct fd_context *, struct query_packet *);
    void (*metadata_restore)(void);
    void (*start_verify_file)(void);
    void (*end_verify_file)(void);
};

#define AT(type, member, offset) \
    _Static_assert(offsetof(struct type, member) == (offset), #type "." #member " is not where Bacula has it")
#define SIZE(type, bytes) _Static_assert(sizeof(struct type) == (bytes), #type " has not Bacula's size")

_Static_assert(sizeof(struct stat) == 144 && sizeof(bool) == 1 && sizeof(void *) == 8, "only 64-bit Linux is known");
SIZE(fd_info, 8);
SIZE(plugin_info, 56);
SIZE(io_packet, 72);
AT(io_packet, mode, 16);
AT(io_packet, buffer, 24);
AT(io_packet, status, 40);
AT(io_packet, whence, 52);
AT(io_packet, offset, 56);
AT(io_packet, win32, 64);
AT(io_packet, end, 68);
SIZE(xacl_packet, 32);
SIZE(query_packet, 48);
SIZE(object_packet, 64);
AT(object_packet, plugin, 24);
AT(object_packet, length, 36);
AT(object_packet, job_id, 56);
AT(object_packet, end, 60);
SIZE(save_packet_14, 240);
AT(save_packet_14, stat, 24);
AT(save_packet_14, type, 168);
AT(save_packet_14, flags, 176);
AT(save_packet_14, no_read, 184);
AT(save_packet_14, command, 192);
AT(save_packet_14, object_name, 208);
AT(save_packet_14, object_length, 224);
AT(save_packet_14, end, 236);
SIZE(save_packet_23, 344);
AT(save_packet_23, link, 32);
AT(save_packet_23, stat, 40);
AT(save_packet_23, type, 184);
AT(save_packet_23, flags, 192);
AT(save_packet_23, no_read, 200);
AT(save_packet_23, stat_update, 204);
AT(save_packet_23, command, 208);
AT(save_packet_23, object, 216);
AT(save_packet_23, plugin_object, 248);
AT(save_packet_23, metadata, 320);
AT(save_packet_23, end, 336);
SIZE(restore_packet_14, 232);
AT(restore_packet_14, type, 12);
AT(restore_packet_14, file_index, 16);
AT(restore_packet_14, stat, 32);
AT(restore_packet_14, name, 184);
AT(restore_packet_14, create_status, 220);
AT(restore_packet_14, end, 228);
SIZE(restore_packet_23, 232);
AT(restore_packet_23, type, 16);
AT(restore_packet_23, file_index, 20);
AT(restore_packet_23, stat, 32);
AT(restore_packet_23, name, 184);
AT(restore_packet_23, create_status, 220);
AT(restore_packet_23, end, 228);
AT(fd_funcs, get_value, 16);
AT(fd_funcs, job_message, 32);
AT(fd_funcs, debug_message, 40);
SIZE(plugin_funcs_14, 128);
SIZE(plugin_funcs_23, 168);
AT(plugin_funcs_23, query_parameter, 136);

#undef AT
#undef SIZE

#endif
