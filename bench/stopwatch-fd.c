/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* A plugin that does nothing but time jobs: a file daemon of interface 14 tells every plugin of the beginning and the end of
 * every job. Lines "JobId seconds" go to the file "times" beside the plugin. */
#define _GNU_SOURCE
#include "../bacula_adapter/fd_plugin/bacula_abi.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const struct fd_funcs *daemon_funcs;
static char path[4096];

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static int new_plugin(struct fd_context *context) {
    context->plugin = calloc(1, sizeof(double));
    return context->plugin ? RC_OK : RC_ERROR;
}

static int free_plugin(struct fd_context *context) {
    free(context->plugin);
    context->plugin = NULL;
    return RC_OK;
}

static int handle_event(struct fd_context *context, struct fd_event *event, void *value) {
    (void)value;
    double *started = context->plugin;
    if (event->type == 3)
        *started = now();
    if (event->type == EVENT_END_BACKUP) {
        int job = 0;
        daemon_funcs->get_value(context, VAR_JOB_ID, &job);
        FILE *file = fopen(path, "ae");
        if (file) {
            fprintf(file, "%d %.6f\n", job, now() - *started);
            fclose(file);
        }
    }
    return RC_OK;
}

static int no_value(struct fd_context *c, int v, void *o) { (void)c, (void)v, (void)o; return RC_OK; }
static int no_packet(struct fd_context *c, void *p) { (void)c, (void)p; return RC_ERROR; }
static int nothing(struct fd_context *c) { (void)c; return RC_OK; }
static int no_command(struct fd_context *c, const char *t) { (void)c, (void)t; return RC_OK; }
static int no_io(struct fd_context *c, struct io_packet *p) { (void)c, (void)p; return RC_ERROR; }

static const struct plugin_funcs_14 table = {
    sizeof table, INTERFACE_9_6,
    {new_plugin, free_plugin, no_value, no_value, handle_event, no_packet, nothing, no_command, nothing, no_io, no_packet, no_packet},
    NULL};
static const struct plugin_info about = {sizeof about, INTERFACE_9_6, PLUGIN_MAGIC, PLUGIN_LICENSE, "replctl", "2026", "1", "times jobs"};

__attribute__((visibility("default"))) int loadPlugin(const struct fd_info *info, const struct fd_funcs *funcs,
                                                      const struct plugin_info **out, const struct plugin_funcs_14 **entries) {
    Dl_info here;
    if (info->version != INTERFACE_9_6 || !dladdr(&about, &here))
        return RC_ERROR;
    const char *slash = strrchr(here.dli_fname, '/');
    snprintf(path, sizeof path, "%.*s/times", slash ? (int)(slash - here.dli_fname) : 1, slash ? here.dli_fname : ".");
    daemon_funcs = funcs;
    *out = &about;
    *entries = &table;
    return RC_OK;
}

__attribute__((visibility("default"))) int unloadPlugin(void) { return RC_OK; }
