/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* The backend protocol's bytes (docs/backend-protocol.md), without input or output: what a hostile backend can send is
 * decided here. */
#ifndef REPLICATOR_PACKET_H
#define REPLICATOR_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HEADER_BYTES 8U
#define PAYLOAD_MAX 999999U
#define ADDRESS_BYTES 8U
/* A message for the job's log; Bacula formats into 2000 bytes. */
#define MESSAGE_MAX 1900U
/* A command or an answer. */
#define COMMAND_MAX 8192U

struct packet_header {
    char status;
    uint32_t length;
};

/* What STAT and TSTAMP say of a file. */
struct file_facts {
    char kind; /* F, E or D */
    int64_t size;
    uint32_t uid, gid, mode;
    int64_t atime, mtime, ctime;
};

/* False if these are no packet's first bytes, or a packet that no backend may send. */
bool packet_decode(const unsigned char bytes[HEADER_BYTES], struct packet_header *header);
/* `length` must not exceed PAYLOAD_MAX. */
void packet_encode(unsigned char bytes[HEADER_BYTES], char status, size_t length);

uint64_t address_decode(const unsigned char bytes[ADDRESS_BYTES]);
void address_encode(unsigned char bytes[ADDRESS_BYTES], uint64_t address);

/* Makes `text` of `length` bytes printable where it stands: control characters and what is no UTF-8 become "?", white
 * space at the end goes, at most MESSAGE_MAX bytes stay. There must be room for a zero at text[length]. */
void message_clean(char *text, size_t length);
/* Takes white space off the end; false if there is a control character (or a zero) in what is left. */
bool command_trim(char *text, size_t length);

/* False unless text begins with prefix; then *rest is what follows. */
bool after(const char *text, const char *prefix, const char **rest);
/* A decimal number without sign or blanks, up to `max`. */
bool number_parse(const char *text, uint64_t max, uint64_t *number);
/* What follows "STAT:" and "TSTAMP:". */
bool stat_parse(const char *text, struct file_facts *facts);
bool times_parse(const char *text, struct file_facts *facts);

#endif
